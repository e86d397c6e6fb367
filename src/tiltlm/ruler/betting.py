"""Betting: a certificate of a mean m = E[x] of bounded draws, from nothing but their bounds.

For x ≥ 0, each factor 1 − λ + λ·x/m with 0 ≤ λ ≤ 1 is nonnegative and has mean 1; so has, for x ≤ 1, the factor
1 − λ + λ·(1 − x)/(1 − m). A gambler who puts the share λ of his capital on "more than m" (on "less than m") each time
holds the product of the factors, a martingale if m is the mean, and Ville's inequality says that he rarely gets rich:
with probability 1 − α/2 his capital never reaches 2/α. Every m at which it did is out. His λ is a fixed mixture: half his
capital at λ = 1, the rest in equal parts at λ = 0.6, 0.36, …, so that some part is right for any spread. Capital falls
(rises) in m, so what is left is an interval, and it holds for all n at once.

λ = 1 alone, on x = Ẑ and 1/Ẑᶜ, is `certificate.py`. On weights of plain draws, x = exp((r − r_max)/beta), m =
Z·exp(−r_max/beta): a *sound* interval of Z for every beta, however rare the draws that matter. On rejection's verdicts,
x = 1 for a draw that was kept, m is the same. The lower side needs no bound on the reward at all.

Waudby-Smith & Ramdas 2024 (arXiv:2010.09686).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltlm.ruler.certificate import ALPHA

SHARES = torch.cat([torch.ones(1, dtype=torch.float64), 0.6 ** torch.arange(1, 33, dtype=torch.float64)])
PRIOR = torch.cat([torch.tensor([0.5]), torch.full((32,), 0.5 / 32)]).double().log()[:, None]
FINE = 1e9
"""Weights that differ by rounding alone are one weight: rewards often take few values, and betting is then quick."""

STEPS = 18
"""Bisections: the ends are found to 1e-5 of where they may lie."""


def interval_of_mean(
    log_x: Tensor, counts: Tensor | None = None, bounded: bool = True, alpha: float = ALPHA
) -> tuple[float, float]:
    """(low, high) of log E[x], nats, from log x [n] of independent draws, seen counts [n] times each (default: once).

    bounded: all x ≤ 1 (log_x ≤ 0), else the upper end is inf.
    """
    log_x = log_x.double().cpu()
    if counts is None:
        log_x, counts = ((log_x * FINE).round() / FINE).unique(return_counts=True)
    keep = counts > 0
    log_x, counts = log_x[keep], counts[keep].double().cpu()
    if bounded and bool((log_x > 1e-9).any()):
        raise ValueError(f"betting wants draws within [0, 1]; log x is up to {log_x.max().item():.6g}")
    goal, top = math.log(2 / alpha), float((log_x + counts.log()).logsumexp(0) - counts.sum().log())
    low = _lowest(log_x, counts, top, goal)
    return low, _highest(log_x.exp(), counts, top, goal) if bounded else math.inf


def _lowest(log_x: Tensor, counts: Tensor, top: float, goal: float) -> float:
    """The largest log m at which betting on "more" got rich."""

    def rich(log_m: float) -> bool:
        d = log_x - log_m
        logs = torch.log1p(SHARES[1:, None] * torch.expm1(d))
        total = (torch.cat([d[None], logs]) * counts).sum(1, keepdim=True)
        return float((total + PRIOR).logsumexp(0)) >= goal

    if top == -math.inf:
        return -math.inf
    step = 1e-3
    while not rich(top - step):
        step *= 2
        if step > 1e6:
            return -math.inf
    low, high = top - step, top
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rich(middle) else (low, middle)
    return low


def _highest(x: Tensor, counts: Tensor, top: float, goal: float) -> float:
    """The smallest log m at which betting on "less" got rich; 0, the bound itself, where it never does."""

    def rich(log_m: float) -> bool:
        m = math.exp(log_m)
        won = ((m - x) / -math.expm1(log_m)).clamp_min(-1)  # −1 for x = 1, which rounding must not go below
        logs = torch.log1p(SHARES[:, None] * won)
        return float(((logs * counts).sum(1, keepdim=True) + PRIOR).logsumexp(0)) >= goal

    low, high = max(top, -745.0), -1e-12
    if not rich(high):
        return 0.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if rich(middle) else (middle, high)
    return high

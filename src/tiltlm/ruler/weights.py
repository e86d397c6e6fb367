"""How far a weighted estimate can be trusted: effective sample size, and the Pareto shape of its weights.

The largest importance weights follow a generalised Pareto law; its shape k̂ says how heavy the tail is. Below 0.5
the weights have a finite variance; above 0.7 their mean is not to be trusted at any practical sample size (Vehtari
et al. 2024, arXiv:1507.02646). The shape is fitted as Zhang & Stephens (2009, Technometrics 51) propose, with
Vehtari's weak prior towards 0.5.

Both speak of the weights that were *seen*. A run that never met the rare completions that matter has light weights and a
large effective sample size, and is wrong: only a bound on the weights can tell (`importance.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltlm.samplers.resampling import effective_sample_size

__all__ = ["effective_sample_size", "pareto_k", "trust"]

TRUSTED = 0.7
"""The largest k̂ at which a weighted mean is still to be trusted."""


ENOUGH = 100
"""Effective draws below which a weighted mean's own error is no longer to be relied on."""


def pareto_k(log_w: Tensor) -> float:
    """k̂ of the weights exp(log_w) [n]; −inf where they are all alike, NaN for fewer than 25 of them."""
    n = len(log_w)
    tail = min(n // 5, math.ceil(3 * math.sqrt(n)))
    if tail < 5 or bool(log_w.isnan().any()):
        return math.nan
    w = (log_w.double() - log_w.double().max()).exp().sort().values
    over = w[-tail:] - w[-tail - 1]
    if float(over[-1]) <= 1e-12:
        return -math.inf
    return _shape(over[over > 0])


def _shape(x: Tensor) -> float:
    """The shape of a generalised Pareto law from exceedances x > 0, ascending."""
    n = len(x)
    if n < 5:
        return math.nan
    m = 30 + int(math.sqrt(n))
    grid = 1 - (m / (torch.arange(1, m + 1, dtype=torch.float64, device=x.device) - 0.5)).sqrt()
    theta = 1 / x[-1] + grid / (3 * x[int(n / 4 + 0.5) - 1])
    k = torch.log1p(-theta[:, None] * x).mean(1)
    log_likelihood = n * ((-theta / k).log() - k - 1)
    weight = torch.softmax(log_likelihood.nan_to_num(nan=-torch.inf), 0)
    best = (theta * weight).sum()
    shape = float(torch.log1p(-best * x).mean())
    return (n * shape + 10 * 0.5) / (n + 10)


def trust(log_w: Tensor) -> str:
    """One sentence about an estimate made with these weights."""
    k, ess = pareto_k(log_w), float(effective_sample_size(log_w[None])[0])
    if k == -math.inf and bool((log_w == log_w[0]).all()):
        return f"all {len(log_w)} weights are the same: either there is nothing to weigh, or nothing was hit"
    verdict = "it rests on few draws" if ess < ENOUGH else "nothing wrong seen in these draws"
    verdict = "do not trust it" if k > TRUSTED else verdict
    verdict = "too few draws to tell" if math.isnan(k) else verdict
    return f"ESS {ess:.1f} of {len(log_w)}, Pareto shape {k:.2f}: {verdict}"

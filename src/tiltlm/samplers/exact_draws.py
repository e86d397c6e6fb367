"""Exact draws of pi* say what they are exact for, and are believed nowhere else.

What makes a draw exact is reference, reward, beta and prompt. Rows carry their prompt, their reward, log pi_ref token by
token and, as `exact_at`, beta. No digest stands for reward and reference: a digest of a function tells one text from
another, not whether two functions agree. The numbers themselves are computed again, by the target at hand, and compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiltlm.samples import Samples, Tokens
from tiltlm.target import Target

AGAIN = "draw them again for this target"

OFF = 0.05
"""Nats by which log pi_ref of a row may differ (float32, another processor); another reference differs by whole nats."""


def marked(samples: Samples, beta: float) -> Samples:
    """`samples`, said to be exact draws of the target at `beta`."""
    return samples.with_(exact_at=torch.full((len(samples),), beta, dtype=torch.float64, device=samples.device))


@torch.no_grad()
def confirm(
    target: Target, exact: Samples, prompts: Tokens | None = None, rewards: int = 256, densities: int = 64
) -> None:
    """Raise ValueError, in one line, unless `exact` may be exact draws of `target`.

    Compared are beta (rows that carry none, of older files, pass), the reward of `rewards` rows and log pi_ref of
    `densities` rows, spread over all of them; and the prompts, where `prompts` are given.
    """
    if prompts is not None and exact.prompts.lists() != prompts.lists():
        raise ValueError(f"the exact draws answer another prompt; {AGAIN}")
    at = exact.exact_at
    if at is not None and len(at) and bool(((at - target.beta).abs() > 1e-9 * target.beta).any()):
        raise ValueError(
            f"the exact draws are of beta {at[0].item():g}, the target's beta is {target.beta:g}; {AGAIN}"
        )
    if exact.reward is not None:
        some = exact.select(_spread(len(exact), rewards))
        assert some.reward is not None
        now = target.reward(some.with_(reward=None)).double()
        _same("reward", some.reward.double(), now, 1e-3 * now.abs().clamp_min(1.0))
    if exact.log_ref is not None:
        some = exact.select(_spread(len(exact), densities))
        assert some.log_ref is not None
        now = target.reference.log_prob(some.with_(log_ref=None)).double().sum(1)
        _same("log pi_ref", some.log_ref.double().sum(1), now, OFF + 1e-3 * now.abs())


def _spread(n: int, most: int) -> Tensor:
    """At most `most` of n rows, evenly spread."""
    return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most).long()


def _same(what: str, stored: Tensor, now: Tensor, tolerance: Tensor) -> None:
    off = ((stored.to(now) - now).abs() > tolerance).nonzero()[:, 0]
    if len(off):
        k = int(off[0])
        raise ValueError(
            f"the exact draws are of another target: their {what} is {stored[k].item():.6g} where this target's is "
            f"{now[k].item():.6g} ({len(off)} of {len(now)} rows looked at differ); {AGAIN}"
        )

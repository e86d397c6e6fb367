"""What the clipped policy-gradient methods share: advantages within a group, clipped ratios, k3, and what is watched.

    A_i = R_i − mean_j R_j     over the rows j that answer the same prompt; a method may divide by their standard deviation
    ρ = p/p_old                p_old: what the rows were drawn with
    max(−A·ρ, −A·clip(ρ, 1 − low, 1 + high))          the clipped step, of a token or of a row
    k3 = pi_ref/p − 1 − log(pi_ref/p)                 under draws of p its mean is KL(p‖pi_ref), its mean gradient is not

The group's mean holds the row itself: it shrinks the expected gradient of E[r] by 1 − 1/G (G rows a group) and leaves
that of k3 alone. So with the pull in the loss, G decides where a method ends; with the pull in the reward it does not.

On draws of p, E_p[∇k3] = E_p[(1 − pi_ref/p)·∇log p] = −E_ref[∇log p] = ∇KL(pi_ref‖p): the other divergence (Tang & Munos
2025, arXiv:2506.09477). Token by token, it also leaves out what a token does to the prefixes of those behind it.

Rows that another engine or another precision drew have a log_q that is not the trained network's log p. `truncate`
weighs every token by min(p_first/q, C), where p_first is the policy at the first pass over the rows, and counts ratios from
p_first (truncated importance sampling, Ionides 2008). The metric `mismatch` is the mean |log p_first − log q| in any case.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tiltlm.method import Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import positive, stated
from tiltlm.problem import Fed
from tiltlm.samplers.serving import MISMATCH
from tiltlm.samples import Samples

Pull = Literal["loss", "reward", "none"]
"""Where the pull towards the reference is: k3 in the loss, −beta·(log q − log pi_ref) in the reward, or nowhere."""

EPSILON = 1e-6
"""Added to a standard deviation."""

# ---- formulas -------------------------------------------------------------------------------------------------


def clipped_loss(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """max(−A·ρ, −A·clip(ρ, 1 − low, 1 + high)), elementwise."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))


def beyond(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Where the clip holds the step and no gradient is left, bool, elementwise."""
    return ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))


def k3(log_p: Tensor, log_ref: Tensor) -> Tensor:
    """pi_ref/p − 1 − log(pi_ref/p), elementwise; never negative, 0 where the two agree."""
    gap = log_ref - log_p
    return gap.expm1() - gap


def group_advantage(returns: Tensor, prompt_index: Tensor, std: bool) -> tuple[Tensor, Tensor]:
    """Returns less their group's mean, [n], and whether a row's group is tied (all returns equal), bool [n].

    std: also over the group's standard deviation (of n − 1 degrees of freedom) + EPSILON. Exactly 0 in a tied group. Raises
    ValueError where a prompt has one row only.
    """
    _, group, count = prompt_index.unique(return_inverse=True, return_counts=True)
    if int(count.min()) < 2:
        raise ValueError("advantages within a group need at least two samples of every prompt; draw with n >= 2")
    size = count.to(returns)
    mean = returns.new_zeros(len(count)).index_add(0, group, returns) / size
    centred = returns - mean[group]
    tied = tied_rows(returns, group)
    if std:
        square = returns.new_zeros(len(count)).index_add(0, group, centred.square())
        centred = centred / ((square / (size - 1)).sqrt() + EPSILON)[group]
    return torch.where(tied, 0.0, centred), tied


def tied_rows(returns: Tensor, group: Tensor) -> Tensor:
    """Whether all rows of a row's group have the same return, bool [n]; group: int64 [n]."""
    ends = returns.new_zeros(int(group.max()) + 1)
    low = ends.scatter_reduce(0, group, returns, "amin", include_self=False)
    high = ends.scatter_reduce(0, group, returns, "amax", include_self=False)
    return (low == high)[group]


# ---- a batch, before and at every pass --------------------------------------------------------------------------


@dataclass(frozen=True)
class Graded:
    """Live draws, each graded within its group.

    advantage [N]; tied: bool [N], its group's returns are all equal; log_first [N, T]: log p of every token at the first
    pass over it, NaN before (written by that pass: a micro-batch is a view of the batch); more: metrics, [N] each.
    """

    samples: Samples
    advantage: Tensor
    tied: Tensor
    log_first: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, index: Tensor | slice) -> Graded:
        more = {name: x[index] for name, x in self.more.items()}
        rows = self.samples.select(index)
        return Graded(rows, self.advantage[index], self.tied[index], self.log_first[index], more)


def returns_of(samples: Samples, kl: Pull, beta: float | None) -> Tensor:
    """The reward, less beta·(log q − log pi_ref) where the pull is in the reward, [n]."""
    if samples.reward is None or samples.log_q is None:
        raise ValueError("clipped methods need reward and log_q of every row: feed them live draws (fed 'live')")
    if kl == "none":
        return samples.reward
    if samples.log_ref is None:
        raise ValueError("a pull towards the reference needs log_ref of every row; or set kl to none")
    if kl == "loss":
        return samples.reward
    return samples.reward - stated(beta) * (samples.log_q - samples.log_ref).sum(1)


def graded(samples: Samples, returns: Tensor, std: bool, more: Mapping[str, Tensor] | None = None) -> Graded:
    """`samples` with advantages from `returns` [n], and nothing known of a first pass."""
    advantage, tied = group_advantage(returns, samples.prompt_index, std)
    assert samples.log_q is not None
    return Graded(samples, advantage, tied, torch.full_like(samples.log_q, torch.nan), more or {})


@dataclass(frozen=True)
class Pass:
    """One pass over graded rows: log p with gradient, log p_old, and log p_first − log q; [n, T], 0 at padding."""

    log_p: Tensor
    log_old: Tensor
    log_drift: Tensor
    mask: Tensor

    @property
    def log_ratio(self) -> Tensor:
        return self.log_p - self.log_old

    def mean(self, values: Tensor) -> Tensor:
        """Mean over a row's tokens, [n]."""
        return self.sum(values) / self.mask.sum(1)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over a row's tokens, [n]."""
        return torch.where(self.mask, values, 0.0).sum(1)


def passed(model: LanguageModel, batch: Graded, truncate: float | None) -> Pass:
    """What `model` says of the rows now. Warns at the first pass where what drew said something else."""
    samples = batch.samples
    assert samples.log_q is not None
    log_p = model.log_prob(samples)
    first_pass = bool(batch.log_first.isnan().any())
    if first_pass:
        batch.log_first.copy_(log_p.detach())
    log_q, log_first = samples.log_q.to(log_p), batch.log_first.to(log_p)
    drift = torch.where(samples.mask, log_first - log_q, 0.0)
    if first_pass and truncate is None and float(drift.abs().sum() / samples.mask.sum()) > MISMATCH:
        warnings.warn(
            f"what draws and what is trained differ by more than {MISMATCH} nats a token (metric `mismatch`): draw with "
            "the same weights and precision, or set truncate (2, say)",
            stacklevel=2,
        )
    return Pass(log_p, log_q if truncate is None else log_first, drift, samples.mask)


def truncated(log_weight: Tensor, truncate: float | None) -> Tensor | float:
    """min(exp(log_weight), truncate) without gradient; 1 where nothing is to be truncated."""
    return 1.0 if truncate is None else log_weight.detach().exp().clamp_max(truncate)


def pulled(seen: Pass, samples: Samples, kl: Pull, beta: float | None) -> Tensor | float:
    """beta·k3 of every token where the pull is in the loss, [n, T]; else 0."""
    if kl != "loss":
        return 0.0
    assert samples.log_ref is not None
    return stated(beta) * k3(seen.log_p, samples.log_ref.to(seen.log_p))


def watched(batch: Graded, seen: Pass, ratio: Tensor, clipped: Tensor) -> dict[str, Tensor]:
    """What every clipped method reports, [n] each, detached. ratio, clipped: a row's means of p/p_old and of being clipped.

    reward; kl: log q − log pi_ref of the draws (where the reference was asked); clipped: share whose step the clip holds;
    tied: share of groups of equal returns, which carry no gradient; length: tokens; mismatch: mean |log p_first − log q|.
    """
    samples = batch.samples
    assert samples.reward is not None and samples.log_q is not None
    known = {} if samples.log_ref is None else {"kl": (samples.log_q - samples.log_ref).sum(1)}
    return {
        "reward": samples.reward,
        **known,
        "ratio": ratio.detach(),
        "clipped": clipped.to(ratio).detach(),
        "tied": batch.tied.to(ratio),
        "length": samples.mask.sum(1).to(ratio),
        "mismatch": seen.mean(seen.log_drift.abs()),
        **batch.more,
    }


def checked(kl: Pull, beta: float | None, passes: int, truncate: float | None, **clips: float) -> None:
    """Raise ValueError naming the first of the shared settings that cannot be."""
    if kl not in ("loss", "reward", "none"):
        raise ValueError(f"kl is where the pull goes: loss, reward or none; got {kl!r}")
    positive(beta=beta, passes=passes, truncate=truncate, **clips)


class Clipped(Policy):
    """The answers of every clipped method; its settings are its own (beta, kl, std and the rest)."""

    fed: ClassVar[Fed] = "live"
    beta: float | None
    kl: Pull
    std: bool

    @property
    def least(self) -> int:
        return 2

    @property
    def wants_reference(self) -> bool:
        return self.kl != "none"

    def prepare(self, batch: Samples) -> Graded:
        return graded(batch, returns_of(batch, self.kl, self.beta), self.std)

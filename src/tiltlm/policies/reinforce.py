"""REINFORCE on the policy's own samples (Williams 1992), with or without a pull towards the reference.

    L = − A · log p(y|x),   A = R − baseline,   R = r(x, y) − beta·[log q(y|x) − log pi_ref(y|x)]

q is the policy at the moment of drawing (a number, not a function), so on policy E[∇L] = −∇J. With beta > 0
the expected gradient is zero at pi* of that beta. With beta = 0, the papers' setting, it is not: the optimum
is any distribution on the best answers.

Rows that another engine, or older weights, drew come from a q that is not p. `truncate` = C then corrects for it,

    L = − w · (A − beta·[log p(y|x) − log q(y|x)]) · log p(y|x),   w = min(p/q, C), all but the last factor a number,

which for C = ∞ has the on-policy gradient exactly: the bracket turns A's log q into log p (Ionides 2008 on truncation).

Baselines: `none`; `batch_mean` (shrinks the expected gradient by 1 − 1/n, moves no fixed point);
`leave_one_out`, the mean of the *other* samples of the same prompt (Kool et al. 2019; Ahmadian et al. 2024,
arXiv:2402.14740), which leaves the expectation untouched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tiltlm.method import Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, one_per_row, positive, stated
from tiltlm.problem import Fed
from tiltlm.samples import Samples
from tiltlm.settings import ADDED

Baseline = Literal["none", "batch_mean", "leave_one_out"]


def reinforce_loss(log_p: Tensor, advantage: Tensor) -> Tensor:
    """−A·log p of each row: [n], [n] -> [n]."""
    return -advantage * log_p


def leave_one_out(returns: Tensor, prompt_index: Tensor) -> Tensor:
    """Mean return of the other rows that answer the same prompt, [n]. Raises if a prompt has one row only."""
    size = int(prompt_index.max()) + 1
    count = returns.new_zeros(size).index_add(0, prompt_index, torch.ones_like(returns))
    total = returns.new_zeros(size).index_add(0, prompt_index, returns)
    if bool((count[prompt_index] < 2).any()):
        raise ValueError("leave_one_out needs at least two samples of every prompt; draw with n >= 2")
    return (total[prompt_index] - returns) / (count[prompt_index] - 1)


@dataclass(frozen=True)
class Advantages:
    """Samples, each with its advantage [N]."""

    samples: Samples
    advantage: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, index: Tensor | slice) -> Advantages:
        return Advantages(self.samples.select(index), self.advantage[index])


@dataclass(frozen=True)
class Reinforce(Policy):
    """REINFORCE with a `baseline` and a pull of strength `beta` towards the reference (0: none, as published)."""

    baseline: Baseline = "batch_mean"
    beta: float | None = 0.0
    """Strength of the pull (0: none; None: the target's temperature, which makes pi* the fixed point)."""

    wrong: float | None = None
    """Paid for a reward of 0, where rewards are 0 and 1 (None: as they are)."""

    truncate: float | None = field(default=None, metadata=ADDED)
    """Weigh rows by min(p/q, this), for draws of a server or of older weights (None: p is what drew)."""

    fed: ClassVar[Fed] = "live"

    def __post_init__(self) -> None:
        positive(truncate=self.truncate)
        if self.beta is not None and self.beta < 0:
            raise ValueError(f"beta must not be negative; got {self.beta}")

    @property
    def least(self) -> int:
        return 2 if self.baseline == "leave_one_out" else 1

    @property
    def wants_reference(self) -> bool:
        return self.beta != 0

    optimum: ClassVar[str] = "pi* of the same beta if beta > 0; with beta = 0 biased: the best answers alone"

    def prepare(self, batch: Samples) -> Advantages:
        returns = self.returns(batch)
        if self.baseline == "batch_mean":
            return Advantages(batch, returns - returns.mean())
        if self.baseline == "leave_one_out":
            return Advantages(batch, returns - leave_one_out(returns, batch.prompt_index))
        return Advantages(batch, returns)

    def returns(self, batch: Samples) -> Tensor:
        """r − beta·(log q − log pi_ref), [n]."""
        if batch.reward is None:
            raise ValueError("these samples have no reward: score them first")
        beta, reward = stated(self.beta), batch.reward
        if self.wrong is not None:
            reward = torch.where(reward == 0, self.wrong, reward)
        if beta == 0:
            return reward
        if batch.log_q is None or batch.log_ref is None:
            raise ValueError("a pull towards the reference (beta > 0) needs log_q and log_ref of every sample")
        return reward - beta * (batch.log_q - batch.log_ref).sum(1)

    def weight(self, batch: Advantages) -> Tensor:
        return one_per_row(batch)

    def loss(self, model: LanguageModel, batch: Advantages) -> Outcome:
        log_p = model.log_prob(batch.samples).sum(1)
        metrics = {"advantage_size": batch.advantage.abs(), "reward": _known(batch.samples.reward, log_p)}
        if batch.samples.log_q is not None:
            metrics["ratio"] = (log_p.detach() - batch.samples.log_q.sum(1)).exp()
        return Outcome(reinforce_loss(log_p, self.corrected(batch, log_p.detach())), metrics)

    def corrected(self, batch: Advantages, log_p: Tensor) -> Tensor:
        """The advantage, weighed and counted for p where q drew, [n]; as it is without `truncate`."""
        if self.truncate is None:
            return batch.advantage
        if batch.samples.log_q is None:
            raise ValueError("truncate weighs by p/q: it needs log_q of every sample")
        drift = log_p - batch.samples.log_q.sum(1)
        return drift.exp().clamp_max(self.truncate) * (batch.advantage - stated(self.beta) * drift)


def _known(reward: Tensor | None, like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan).detach() if reward is None else reward


PAPER = Reinforce(baseline="batch_mean", beta=0.0)
"""The star-graph experiments' setting (`--baseline 1`): batch-mean baseline, no KL term."""


NAMES: dict[str, str] = {
    "reinforce": "policy gradient on own samples, no pull to the reference",
    "rloo": "REINFORCE, leave-one-out, with the pull of beta",
}
METHODS: dict[str, Method] = {
    "reinforce": Reinforce(),
    "rloo": Reinforce("leave_one_out", beta=None),
}

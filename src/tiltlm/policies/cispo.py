"""CISPO: the importance weight is clipped, not the step (MiniMax 2025, arXiv:2506.13585, eq. 4 and 5).

    L = Σ −sg[ clip(ρ, 1 − low, 1 + high) ]·A·log p(y_t)  over the batch's tokens, / their number,      ρ = p/q
    A_i = (r_i − mean(r)) / std(r)

sg: no gradient flows. So every token keeps its gradient, where GRPO's clip drops those that have moved. On policy the
weight is 1, and the gradient is REINFORCE's with this advantage; off policy and below the cap it is that of the unclipped
step −A·ρ.

The paper sets no lower bound (`clip_low` None) and tunes the upper one without saying where to; Khatri et al. 2025
(arXiv:2510.13786) take a cap of 5, `clip_high` 4. It takes no pull. Each batch of draws serves several updates, each on a
part of it; here `passes` go over the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiltlm.clipped import (
    Clipped,
    Graded,
    Pull,
    checked,
    passed,
    pulled,
    truncated,
    watched,
)
from tiltlm.method import Method
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome


def cispo_loss(log_p: Tensor, ratio: Tensor, advantage: Tensor, low: float | None, high: float) -> Tensor:
    """−sg[clip(ρ, 1 − low, 1 + high)]·A·log p, elementwise; low None: no lower bound."""
    weight = ratio.detach().clamp(None if low is None else 1 - low, 1 + high)
    return -weight * advantage * log_p


@dataclass(frozen=True)
class CISPO(Clipped):
    """The published settings, the cap as in arXiv:2510.13786."""

    beta: float | None = None
    """Strength of the pull towards the reference (None: the target's temperature)."""

    clip_low: float | None = None
    """Weights are at least 1 − clip_low (None: as they are)."""

    clip_high: float = 4.0
    std: bool = True
    """Divide advantages by their group's standard deviation."""

    kl: Pull = "none"
    """Where the pull goes: k3 in the loss, −beta·(log q − log pi_ref) in the reward, or nowhere."""

    passes: int = 4
    """Updates per batch of draws."""

    truncate: float | None = None
    """Rows of another engine or precision: weigh tokens by min(p/q, truncate) (None: q is taken at its word)."""

    optimum: ClassVar[str] = "biased: with no pull the best answers alone; with it in the reward pi*"

    def __post_init__(self) -> None:
        low = {} if self.clip_low is None else {"clip_low": self.clip_low}
        checked(self.kl, self.beta, self.passes, self.truncate, clip_high=self.clip_high, **low)

    def weight(self, batch: Graded) -> Tensor:
        return batch.samples.mask.sum(1)

    def loss(self, model: LanguageModel, batch: Graded) -> Outcome:
        seen, advantage = passed(model, batch, self.truncate), batch.advantage[:, None]
        ratio = seen.log_ratio.detach().exp()
        step = cispo_loss(seen.log_p, ratio, advantage, self.clip_low, self.clip_high)
        step = truncated(seen.log_drift, self.truncate) * step
        loss = seen.sum(step + pulled(seen, batch.samples, self.kl, self.beta))
        floor = 0.0 if self.clip_low is None else 1 - self.clip_low
        out = (ratio > 1 + self.clip_high) | (ratio < floor)
        return Outcome(loss, watched(batch, seen, seen.mean(ratio), seen.mean(out.to(ratio))))


NAMES: dict[str, str] = {"cispo": "CISPO: groups, importance weights clipped"}
METHODS: dict[str, Method] = {"cispo": CISPO()}

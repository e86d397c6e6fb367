"""GSPO: one ratio a row, of whole sequences, length-normalised (Zheng et al. 2025, arXiv:2507.18071).

    s = (p(y|x)/q(y|x))^{1/|y|} = exp( mean_t (log p − log q)(y_t) )
    L = mean over rows of max(−A·s, −A·clip(s, 1 − low, 1 + high)),      A_i = (r_i − mean(r)) / std(r)      (eq. 5 to 7)

On policy ∇s = mean_t ∇log p(y_t): exactly the gradient of GRPO's token form without its pull, that is REINFORCE's with each
row weighed by 1/|y|. The two part when the policy has moved: here all tokens of a row are clipped or none is.

The paper clips at 3e-4 and 4e-4 (s is a geometric mean and moves little), takes no pull, and makes four updates on each
batch of draws, each on a quarter of it; here `passes` go over the whole. A pull in the loss is the row's mean k3, as in
GRPO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiltlm.clipped import (
    Clipped,
    Graded,
    Pull,
    beyond,
    checked,
    clipped_loss,
    passed,
    pulled,
    truncated,
    watched,
)
from tiltlm.method import Method
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, one_per_row


@dataclass(frozen=True)
class GSPO(Clipped):
    """The published settings."""

    beta: float | None = None
    """Strength of the pull towards the reference (None: the target's temperature)."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    std: bool = True
    """Divide advantages by their group's standard deviation."""

    kl: Pull = "none"
    """Where the pull goes: k3 in the loss, −beta·(log q − log pi_ref) in the reward, or nowhere."""

    passes: int = 4
    """Updates per batch of draws."""

    truncate: float | None = None
    """Rows of another engine or precision: weigh rows by min((p/q)^{1/|y|}, truncate) (None: q is taken at its word)."""

    optimum: ClassVar[str] = "biased: with no pull the best answers alone; with it in the reward pi*"

    def __post_init__(self) -> None:
        clips = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        checked(self.kl, self.beta, self.passes, self.truncate, **clips)

    def weight(self, batch: Graded) -> Tensor:
        return one_per_row(batch)

    def loss(self, model: LanguageModel, batch: Graded) -> Outcome:
        seen = passed(model, batch, self.truncate)
        ratio = seen.mean(seen.log_ratio).exp()
        step = clipped_loss(ratio, batch.advantage, self.clip_low, self.clip_high)
        step = truncated(seen.mean(seen.log_drift), self.truncate) * step
        pull = pulled(seen, batch.samples, self.kl, self.beta)
        out = beyond(ratio, batch.advantage, self.clip_low, self.clip_high)
        loss = step + seen.mean(pull) if isinstance(pull, Tensor) else step
        return Outcome(loss, watched(batch, seen, ratio, out))


NAMES: dict[str, str] = {"gspo": "GSPO: GRPO with one clipped ratio a sequence"}
METHODS: dict[str, Method] = {"gspo": GSPO()}

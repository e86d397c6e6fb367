"""Dr. GRPO: GRPO without its two divisions (Liu et al. 2025, arXiv:2503.20783).

    A_i = R_i − mean(R)                                  over the G draws of a prompt
    L = mean over rows of Σ_t max(−A·ρ, −A·clip(ρ, 1 ± c)) / constant,      ρ = p/q

On policy the expected gradient is −(1 − 1/G)·∇E_p[R]/constant. With the pull in the reward, R = r − beta·(log q −
log pi_ref), that is −∇J up to a factor: zero at pi* of the same beta, for every G and for answers of any length. Without a
pull, as published (the paper takes beta = 0), any distribution on the best answers is an optimum. With k3 in the loss it is
as biased as GRPO with std off. Clipping biases later passes.

The paper's formula has no constant; its code divides by the generation's budget of tokens. That is a matter of the learning
rate, and of nothing with Adam but the norm at which gradients are clipped.
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
class DrGRPO(Clipped):
    """The published settings: no pull. With `kl` "reward" it ends at pi*."""

    beta: float | None = None
    """Strength of the pull towards the reference (None: the target's temperature)."""

    clip: float = 0.2
    kl: Pull = "none"
    """Where the pull goes: k3 in the loss, −beta·(log q − log pi_ref) in the reward, or nowhere."""

    constant: float = 1.0
    """Divides the sum over a row's tokens."""

    passes: int = 1
    """Updates per batch of draws."""

    truncate: float | None = None
    """Rows of another engine or precision: weigh tokens by min(p/q, truncate) (None: q is taken at its word)."""

    std: ClassVar[bool] = False  # type: ignore[misc]
    optimum: ClassVar[str] = (
        "pi* of the same beta with the pull in the reward, on policy; with no pull biased: the best answers alone; with k3 "
        "in the loss biased as GRPO"
    )

    def __post_init__(self) -> None:
        checked(self.kl, self.beta, self.passes, self.truncate, clip=self.clip, constant=self.constant)

    def weight(self, batch: Graded) -> Tensor:
        return self.constant * one_per_row(batch)

    def loss(self, model: LanguageModel, batch: Graded) -> Outcome:
        seen, advantage = passed(model, batch, self.truncate), batch.advantage[:, None]
        ratio = seen.log_ratio.exp()
        step = truncated(seen.log_drift, self.truncate) * clipped_loss(ratio, advantage, self.clip, self.clip)
        loss = seen.sum(step + pulled(seen, batch.samples, self.kl, self.beta))
        out = beyond(ratio, advantage, self.clip, self.clip)
        return Outcome(loss, watched(batch, seen, seen.mean(ratio), seen.mean(out.to(ratio))))


NAMES: dict[str, str] = {
    "dr-grpo": "GRPO without its divisions, no pull",
    "dr-grpo-kl": "the same with the pull in the reward",
}
METHODS: dict[str, Method] = {"dr-grpo": DrGRPO(), "dr-grpo-kl": DrGRPO(kl="reward")}

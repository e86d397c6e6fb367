"""GRPO: clipped steps with advantages within a group, no critic, k3 in the loss (Shao et al. 2024, arXiv:2402.03300).

    A_i = (r_i − mean(r)) / std(r)                       over the G draws of a prompt
    L = mean over rows, in each the mean over tokens, of max(−A·ρ, −A·clip(ρ, 1 ± c)) + beta·k3,      ρ = p/q  (eq. 3, 4)

As published it does not end at pi* (all of this is shown in tests/laws/test_clipped.py):

- k3 in the loss pulls by KL(pi_ref‖p). With one token an answer and std off, p(y) = b·pi_ref(y)/(λ − r(y)), where
  b = beta·G/(G − 1) (the row is part of its own baseline) and λ > max r makes it sum to 1. With longer answers not even
  that.
- 1/std weighs groups by what they happened to draw, against a pull that is not weighed. For G = 2, A = ±1/√2: the order of
  rewards counts, their size does not.
- 1/length makes a long bad answer cheap: the gradient points elsewhere than that of J where lengths differ.

With the pull in the reward (`kl` "reward"), pi* is the fixed point whatever A is divided by: there all returns of a prompt
are equal, and A is 0 in every group. Divisions bend the way, and the end only where a policy class cannot reach pi*.

The paper updates once on each batch (`passes` 1), and says neither the clip (0.2 is common), nor which std, nor what is
added to it: here n − 1 degrees of freedom and 1e-6. It does not weigh k3 by ρ at later passes; nor does this.
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
class GRPO(Clipped):
    """The published settings."""

    beta: float | None = None
    """Strength of the pull towards the reference (None: the target's temperature)."""

    clip: float = 0.2
    std: bool = True
    """Divide advantages by their group's standard deviation."""

    kl: Pull = "loss"
    """Where the pull goes: k3 in the loss, −beta·(log q − log pi_ref) in the reward, or nowhere."""

    passes: int = 1
    """Updates per batch of draws."""

    truncate: float | None = None
    """Rows of another engine or precision: weigh tokens by min(p/q, truncate) (None: q is taken at its word)."""

    optimum: ClassVar[str] = (
        "biased: with one token an answer and std off b·pi_ref/(λ − r), b = beta·G/(G − 1), not pi*; else another point; "
        "with the pull in the reward pi*"
    )

    def __post_init__(self) -> None:
        checked(self.kl, self.beta, self.passes, self.truncate, clip=self.clip)

    def weight(self, batch: Graded) -> Tensor:
        return one_per_row(batch)

    def loss(self, model: LanguageModel, batch: Graded) -> Outcome:
        seen, advantage = passed(model, batch, self.truncate), batch.advantage[:, None]
        ratio = seen.log_ratio.exp()
        step = truncated(seen.log_drift, self.truncate) * clipped_loss(ratio, advantage, self.clip, self.clip)
        loss = seen.mean(step + pulled(seen, batch.samples, self.kl, self.beta))
        out = beyond(ratio, advantage, self.clip, self.clip)
        return Outcome(loss, watched(batch, seen, seen.mean(ratio), seen.mean(out.to(ratio))))


NAMES: dict[str, str] = {"grpo": "GRPO: groups, clipped steps, k3 in the loss"}
METHODS: dict[str, Method] = {"grpo": GRPO()}

"""Anchored preference optimisation (D'Oosterlinck et al. 2024, arXiv:2408.06266).

    zero:  L = 1 − σ(beta·h_c) + σ(beta·h_r)                    chosen up, rejected down
    down:  L = σ(beta·h_c) + 1 − σ(beta·[h_c − h_r])            both down, the rejected further

Biased: each log-ratio is pushed by itself, against an anchor at 0 instead of the other side alone; no temperature makes
pi* a stationary point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tiltlm.method import Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, PerRow, positive, stated
from tiltlm.policies.dpo import log_ratios, preference_metrics
from tiltlm.problem import Fed
from tiltlm.samples import Pairs

Anchor = Literal["zero", "down"]


def apo_loss(h_chosen: Tensor, h_rejected: Tensor, beta: float, anchor: Anchor) -> Tensor:
    """See the module: [n], [n] -> [n]; 1 at h = 0."""
    chosen = (beta * h_chosen).sigmoid()
    if anchor == "zero":
        return 1 - chosen + (beta * h_rejected).sigmoid()
    return chosen + 1 - (beta * (h_chosen - h_rejected)).sigmoid()


@dataclass(frozen=True)
class APO(PerRow, Policy):
    """APO: `zero` where chosen answers are better than the model's own, `down` where they are worse."""

    beta: float | None = None
    """Temperature of the log-ratios (None: the target's)."""

    anchor: Anchor = "zero"
    fed: ClassVar[Fed] = "pairs"
    optimum: ClassVar[str] = "biased: log-ratios anchored at zero, chosen up (or less down) and rejected down"

    def __post_init__(self) -> None:
        positive(beta=self.beta)

    def loss(self, model: LanguageModel, batch: Pairs) -> Outcome:
        beta = stated(self.beta)
        h_chosen, h_rejected, _ = log_ratios(model, batch)
        loss = apo_loss(h_chosen, h_rejected, beta, self.anchor)
        return Outcome(loss, preference_metrics(h_chosen, h_rejected, beta))


NAMES: dict[str, str] = {"apo": "anchored preference optimisation, on pairs"}
METHODS: dict[str, Method] = {"apo": APO()}

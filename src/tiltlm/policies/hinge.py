"""The hinge loss on DPO's margins: SLiC, normalised by the reference (Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2023,
arXiv:2309.06657).

    L = max(0, 1 − z),     z = beta·[h(y_c) − h(y_r)]

Biased: within |z| < 1 an ordered pair pulls with the same force, 2·P(y ≻ y') − 1, wherever it stands; a lone pair ends
at z = ±1, in favour of the likelier winner, whatever its strength.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiltlm.method import Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, PerRow, positive, stated
from tiltlm.policies.dpo import log_ratios, preference_metrics
from tiltlm.problem import Fed
from tiltlm.samples import Pairs


def hinge_loss(h_chosen: Tensor, h_rejected: Tensor, beta: float) -> Tensor:
    """max(0, 1 − beta·(h_c − h_r)): [n], [n] -> [n]."""
    return (1 - beta * (h_chosen - h_rejected)).clamp_min(0)


@dataclass(frozen=True)
class Hinge(PerRow, Policy):
    """The hinge loss with temperature `beta`."""

    beta: float | None = None
    """Temperature of the log-ratios (None: the target's)."""

    fed: ClassVar[Fed] = "pairs"
    optimum: ClassVar[str] = "biased: a margin of one in favour of the likelier winner, whatever its strength"

    def __post_init__(self) -> None:
        positive(beta=self.beta)

    def loss(self, model: LanguageModel, batch: Pairs) -> Outcome:
        beta = stated(self.beta)
        h_chosen, h_rejected, _ = log_ratios(model, batch)
        loss = hinge_loss(h_chosen, h_rejected, beta)
        return Outcome(loss, preference_metrics(h_chosen, h_rejected, beta))


NAMES: dict[str, str] = {"hinge": "the hinge loss (SLiC, normalised), on pairs"}
METHODS: dict[str, Method] = {"hinge": Hinge()}

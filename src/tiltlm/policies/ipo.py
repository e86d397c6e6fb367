"""IPO: margins regressed on one number (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    L = [ h(y_c) − h(y_r) − 1/(2·beta) ]²

Expected gradient zero at pi* of the reward u(x, y) = P(y ≻ Y'), the chance to beat an answer Y' of the distribution that
the pairs were drawn from, which must be the same for both sides; not at pi* of the reward behind Bradley–Terry. u is
bounded, so hard labels give no infinite margins. `beta` is the paper's tau and divides u.
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


def ipo_loss(h_chosen: Tensor, h_rejected: Tensor, beta: float) -> Tensor:
    """(h_c − h_r − 1/(2·beta))²: [n], [n] -> [n]; log-ratios of whole answers, or per token, as meant."""
    return (h_chosen - h_rejected - 1 / (2 * beta)) ** 2


@dataclass(frozen=True)
class IPO(PerRow, Policy):
    """IPO with the log-ratio of the whole answer (`sum`, the paper's), or averaged over its tokens (`mean`, TRL's)."""

    beta: float | None = None
    """Temperature of the log-ratios (None: the target's)."""

    normalise: Literal["sum", "mean"] = "sum"
    fed: ClassVar[Fed] = "pairs"
    optimum: ClassVar[str] = (
        "pi* of the reward P(y beats a draw of the pairs' distribution), not of the one behind it"
    )

    def __post_init__(self) -> None:
        positive(beta=self.beta)

    def loss(self, model: LanguageModel, batch: Pairs) -> Outcome:
        beta = stated(self.beta)
        h_chosen, h_rejected, _ = log_ratios(model, batch)
        metrics = preference_metrics(h_chosen, h_rejected, beta)
        if self.normalise == "mean":
            h_chosen, h_rejected = h_chosen / batch.chosen.mask.sum(1), h_rejected / batch.rejected.mask.sum(1)
        return Outcome(ipo_loss(h_chosen, h_rejected, beta), metrics)


NAMES: dict[str, str] = {"ipo": "identity preference optimisation, on pairs"}
METHODS: dict[str, Method] = {"ipo": IPO()}

"""RPO: DPO plus the likelihood of the chosen answer (Pang et al. 2024, arXiv:2404.19733, eq. 1).

    L = L_DPO − alpha · log p(y_c|x)            `normalise="sum"`  (the star-graph experiments of Q#, alpha 1)
    L = L_DPO − alpha · log p(y_c|x) / |y_c|    `normalise="mean"` (Pang et al.)

Biased on purpose: at pi* the DPO part's expected gradient vanishes and the likelihood's does not, unless the
chosen answers follow pi* themselves. ("Reward-aware preference optimisation" is another method of the same
initials.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tiltlm.method import Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, PerRow, positive, stated
from tiltlm.policies.dpo import dpo_loss, log_ratios, preference_metrics
from tiltlm.problem import Fed
from tiltlm.samples import Pairs


def rpo_loss(h_chosen: Tensor, h_rejected: Tensor, log_p_chosen: Tensor, beta: float, alpha: float) -> Tensor:
    """dpo_loss − alpha·log_p_chosen, all [n]; pass log_p_chosen summed or averaged over tokens, as meant."""
    return dpo_loss(h_chosen, h_rejected, beta) - alpha * log_p_chosen


@dataclass(frozen=True)
class RPO(PerRow, Policy):
    """DPO + `alpha` times the chosen answer's negative log-likelihood, per sequence `sum` or per-token `mean`."""

    beta: float | None = None
    """Temperature of the log-ratios (None: the target's)."""

    alpha: float = 1.0
    normalise: Literal["sum", "mean"] = "sum"
    fed: ClassVar[Fed] = "pairs"
    optimum: ClassVar[str] = "biased: DPO's, pulled towards the distribution of the chosen answers"

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative; got {self.alpha}")

    def loss(self, model: LanguageModel, batch: Pairs) -> Outcome:
        beta = stated(self.beta)
        h_chosen, h_rejected, log_p_chosen = log_ratios(model, batch)
        if self.normalise == "mean":
            log_p_chosen = log_p_chosen / batch.chosen.mask.sum(1)
        loss = rpo_loss(h_chosen, h_rejected, log_p_chosen, beta, self.alpha)
        metrics = preference_metrics(h_chosen, h_rejected, beta) | {"log_p_chosen": log_p_chosen.detach()}
        return Outcome(loss, metrics)


NAMES: dict[str, str] = {"rpo": "DPO plus the likelihood of the winner, on pairs"}
METHODS: dict[str, Method] = {"rpo": RPO()}

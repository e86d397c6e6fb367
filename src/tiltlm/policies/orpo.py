"""ORPO: likelihood of the chosen answer plus a log-odds ratio, without a reference (Hong et al. 2024, arXiv:2403.07691,
eq. 6 and 7).

    m = log p(y|x)/|y|,   odds = e^m/(1 − e^m),     L = −m_c − alpha·log σ( log odds_c − log odds_r )

Biased: the reference does not occur in it, and the likelihood pulls towards the distribution of the chosen answers.
(The paper calls alpha lambda.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tiltlm.method import Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, PerRow
from tiltlm.policies.dpo import preference_metrics
from tiltlm.policies.simpo import mean_log_probs
from tiltlm.problem import Fed
from tiltlm.samples import Pairs


def log_odds(mean: Tensor) -> Tensor:
    """log(e^m / (1 − e^m)) of mean log-probabilities m < 0."""
    return mean - torch.log(-torch.expm1(mean.clamp_max(-1e-7)))


def orpo_loss(mean_chosen: Tensor, mean_rejected: Tensor, alpha: float) -> Tensor:
    """−m_c − alpha·log σ(log odds_c − log odds_r), mean log-probabilities per token [n], [n] -> [n]."""
    return -mean_chosen - alpha * logsigmoid(log_odds(mean_chosen) - log_odds(mean_rejected))


@dataclass(frozen=True)
class ORPO(PerRow, Policy):
    """ORPO with the paper's weight `alpha` of the odds ratio."""

    alpha: float = 0.1
    fed: ClassVar[Fed] = "pairs"
    optimum: ClassVar[str] = "biased: no reference in it; pulled towards the distribution of the chosen answers"

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative; got {self.alpha}")

    def loss(self, model: LanguageModel, batch: Pairs) -> Outcome:
        chosen, rejected = mean_log_probs(model, batch)
        loss = orpo_loss(chosen, rejected, self.alpha)
        return Outcome(loss, preference_metrics(chosen, rejected, 1.0) | {"nll_chosen": -chosen.detach()})


NAMES: dict[str, str] = {"orpo": "ORPO, which knows no reference, on pairs"}
METHODS: dict[str, Method] = {"orpo": ORPO()}

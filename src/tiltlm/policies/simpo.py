"""SimPO: margins of mean log-probabilities, without a reference (Meng et al. 2024, arXiv:2405.14734, eq. 6).

    L = −log σ( beta·[log p(y_c|x)/|y_c| − log p(y_r|x)/|y_r|] − gamma )

Biased: the reference does not occur in it. With gamma = 0, Bradley–Terry preferences and answers of one length T, its
optimum is p ∝ exp(T·r/beta): pi* of a *uniform* reference and temperature beta/T. gamma > 0 asks for more than the
preferences say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from tiltlm.method import Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, PerRow, positive
from tiltlm.policies.dpo import preference_metrics
from tiltlm.problem import Fed
from tiltlm.samples import Pairs


def simpo_loss(mean_chosen: Tensor, mean_rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """−log σ(beta·(mean_c − mean_r) − gamma), mean log-probabilities per token [n], [n] -> [n]."""
    return -logsigmoid(beta * (mean_chosen - mean_rejected) - gamma)


def mean_log_probs(model: LanguageModel, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """log p(y|x)/|y| of chosen and rejected answers, [n] each; one forward pass for all rows."""
    both = pairs.both()
    mean = model.log_prob(both).sum(1) / both.mask.sum(1).clamp_min(1)
    chosen, rejected = mean.split(len(pairs))
    return chosen, rejected


@dataclass(frozen=True)
class SimPO(PerRow, Policy):
    """SimPO with the paper's scale of margins: beta 2 to 10, gamma/beta about 0.5."""

    beta: float = 2.0
    gamma: float = 1.0
    fed: ClassVar[Fed] = "pairs"
    optimum: ClassVar[str] = (
        "biased: no reference in it; pi* of a uniform one for gamma = 0 and answers of one length"
    )

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        if self.gamma < 0:
            raise ValueError(f"gamma must not be negative; got {self.gamma}")

    def loss(self, model: LanguageModel, batch: Pairs) -> Outcome:
        chosen, rejected = mean_log_probs(model, batch)
        loss = simpo_loss(chosen, rejected, self.beta, self.gamma)
        return Outcome(loss, preference_metrics(chosen, rejected, self.beta))


NAMES: dict[str, str] = {"simpo": "SimPO, which knows no reference, on pairs"}
METHODS: dict[str, Method] = {"simpo": SimPO()}

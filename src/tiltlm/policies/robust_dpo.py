"""Robust DPO: unbiased under labels that were turned over with chance eps (Chowdhury et al. 2024, arXiv:2403.00409).

    L = [ −(1 − eps)·log σ(z) + eps·log σ(−z) ] / (1 − 2·eps),     z = beta·[h(y_c) − h(y_r)]

If the labels one has are Bradley–Terry's, each turned over with chance eps, the expected loss is DPO's on the clean
ones: expected gradient zero at pi*. A single pair's loss may be negative, and has no lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiltlm.method import Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, PerRow, positive, stated
from tiltlm.policies.dpo import dpo_loss, log_ratios, preference_metrics
from tiltlm.policies.exo_pref import smoothing
from tiltlm.problem import Fed
from tiltlm.samples import Pairs


def robust_dpo_loss(h_chosen: Tensor, h_rejected: Tensor, beta: float, epsilon: float) -> Tensor:
    """[(1 − eps)·DPO − eps·DPO of the pair turned over] / (1 − 2·eps): [n], [n] -> [n]."""
    right, wrong = dpo_loss(h_chosen, h_rejected, beta), dpo_loss(h_rejected, h_chosen, beta)
    return ((1 - epsilon) * right - epsilon * wrong) / (1 - 2 * epsilon)


@dataclass(frozen=True)
class RobustDPO(PerRow, Policy):
    """DPO for labels of which a share `epsilon` is wrong."""

    beta: float | None = None
    """Temperature of the log-ratios (None: the target's)."""

    epsilon: float = 0.1
    fed: ClassVar[Fed] = "pairs"
    optimum: ClassVar[str] = (
        "pi* of the same beta, under Bradley–Terry preferences turned over with chance epsilon"
    )

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        smoothing(self.epsilon)

    def loss(self, model: LanguageModel, batch: Pairs) -> Outcome:
        beta = stated(self.beta)
        h_chosen, h_rejected, _ = log_ratios(model, batch)
        loss = robust_dpo_loss(h_chosen, h_rejected, beta, self.epsilon)
        return Outcome(loss, preference_metrics(h_chosen, h_rejected, beta))


NAMES: dict[str, str] = {"robust-dpo": "DPO for labels of which a share is wrong, on pairs"}
METHODS: dict[str, Method] = {"robust-dpo": RobustDPO()}

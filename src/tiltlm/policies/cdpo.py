"""Conservative DPO: labels taken for wrong with chance eps (Mitchell 2023, "A note on DPO with noisy preferences").

    L = −(1 − eps)·log σ(z) − eps·log σ(−z),     z = beta·[h(y_c) − h(y_r)]

Its expected gradient is DPO's on labels that a coin turned over with chance eps. Biased: where the labels follow
Bradley–Terry it wants every margin shrunk; where the better answer always wins (hard labels) it gives every pair the finite
log-odds log((1 − eps)/eps) instead of DPO's infinite ones. `robust_dpo` takes label noise *out* instead.
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


def cdpo_loss(h_chosen: Tensor, h_rejected: Tensor, beta: float, epsilon: float) -> Tensor:
    """DPO's loss, and with weight epsilon that of the pair turned over: [n], [n] -> [n]."""
    right, wrong = dpo_loss(h_chosen, h_rejected, beta), dpo_loss(h_rejected, h_chosen, beta)
    return (1 - epsilon) * right + epsilon * wrong


@dataclass(frozen=True)
class CDPO(PerRow, Policy):
    """DPO with label smoothing `epsilon`."""

    beta: float | None = None
    """Temperature of the log-ratios (None: the target's)."""

    epsilon: float = 0.1
    fed: ClassVar[Fed] = "pairs"
    optimum: ClassVar[str] = "biased: DPO's on labels turned over with chance epsilon"

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        smoothing(self.epsilon)

    def loss(self, model: LanguageModel, batch: Pairs) -> Outcome:
        beta = stated(self.beta)
        h_chosen, h_rejected, _ = log_ratios(model, batch)
        loss = cdpo_loss(h_chosen, h_rejected, beta, self.epsilon)
        return Outcome(loss, preference_metrics(h_chosen, h_rejected, beta))


NAMES: dict[str, str] = {"cdpo": "DPO with smoothed labels, on pairs"}
METHODS: dict[str, Method] = {"cdpo": CDPO()}

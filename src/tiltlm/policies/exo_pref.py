"""EXO on preferences: the reverse KL to a label smoothed by eps (Ji et al. 2024, arXiv:2402.00856).

    z = beta·[h(y_c) − h(y_r)],  q = σ(z)
    L = q·(log q − log(1 − eps)) + (1 − q)·(log(1 − q) − log eps),        dL/dz = q(1 − q)·(z − c),  c = log((1 − eps)/eps)

Biased: every pair is asked for the same log-odds c, however strongly one answer is better; it is `exo_rw` with the rewards
beta_r·(log(1 − eps), log eps). The gradient dies for q → 0 as for q → 1: a pair that is badly misordered is hardly
corrected, which `peaked` counts. eps must be positive: at 0 the target log-odds are infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from tiltlm.method import Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, PerRow, positive, stated
from tiltlm.policies.dpo import log_ratios, preference_metrics
from tiltlm.problem import Fed
from tiltlm.samples import Pairs


def exo_pref_loss(h_chosen: Tensor, h_rejected: Tensor, beta: float, epsilon: float) -> Tensor:
    """KL((σ(z), σ(−z))‖(1 − eps, eps)), z = beta·(h_c − h_r): [n], [n] -> [n], nats."""
    z = beta * (h_chosen - h_rejected)
    ahead, behind = logsigmoid(z), logsigmoid(-z)
    return ahead.exp() * (ahead - math.log1p(-epsilon)) + behind.exp() * (behind - math.log(epsilon))


PEAKED = math.log(999)
"""The margin at which one answer of a pair has 0.999 of q."""


def smoothing(epsilon: float, lowest: float = 0.0) -> None:
    """Raise ValueError unless epsilon lies in (lowest, 1/2)."""
    if not lowest < epsilon < 0.5:
        raise ValueError(f"epsilon must lie between {lowest} and 0.5, both excluded; got {epsilon}")


@dataclass(frozen=True)
class ExoPref(PerRow, Policy):
    """EXO on pairs: `beta` scales the log-ratios (the paper's beta_pi), `epsilon` smooths the label."""

    beta: float | None = None
    """Temperature of the log-ratios (None: the target's)."""

    epsilon: float = 1e-3
    fed: ClassVar[Fed] = "pairs"
    optimum: ClassVar[str] = "biased: log-odds log((1 − eps)/eps) in every pair, whatever its strength"

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        smoothing(self.epsilon)

    def loss(self, model: LanguageModel, batch: Pairs) -> Outcome:
        beta = stated(self.beta)
        h_chosen, h_rejected, _ = log_ratios(model, batch)
        loss = exo_pref_loss(h_chosen, h_rejected, beta, self.epsilon)
        metrics = preference_metrics(h_chosen, h_rejected, beta)
        return Outcome(loss, metrics | {"peaked": (metrics["margin"].abs() > PEAKED).to(loss.dtype)})


NAMES: dict[str, str] = {"exo-pref": "EXO, on pairs"}
METHODS: dict[str, Method] = {"exo-pref": ExoPref()}

"""DPO on rewards: the forward KL between what policy and reward say of a group (Ji et al. 2024, arXiv:2402.00856).

    L = −Σ_i p_i·log q_i = KL(p‖q) + H(p),     q = softmax(beta_pi·h),  p = softmax(r/beta_r)      (see `exo_rw`)
    dL/dz_i = q_i − p_i

Expected gradient zero at pi* of beta = beta_r·beta_pi, from draws of any distribution of full support; the loss there
is H(p), not 0. Where the policy cannot reach pi*, this one (forward KL) covers all of its mass; see `exo_rw` for how
much that depends on the groups' size.
With K = 2 and p = (1, 0) it is DPO; with p = (1 − eps, eps) it is cDPO.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from tiltlm.groups import Groups
from tiltlm.method import Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, PerRow, positive, stated
from tiltlm.policies.exo_rw import group_log_ratios, group_metrics
from tiltlm.problem import Fed


def dpo_rw_loss(h: Tensor, reward: Tensor, beta_r: float, beta_pi: float) -> Tensor:
    """−Σ softmax(r/beta_r)·log softmax(beta_pi·h): log-ratios and rewards [G, K] -> [G], nats."""
    return -((reward / beta_r).softmax(1) * (beta_pi * h).log_softmax(1)).sum(1)


@dataclass(frozen=True)
class DpoRw(PerRow, Policy):
    """DPO on rewards; the target's beta is the product of its two temperatures."""

    beta_r: float | None = None
    """Temperature of the rewards within a group (None: what makes the product the target's beta)."""

    beta_pi: float = 0.5
    """Temperature of the log-ratios within a group (the paper's 0.5)."""

    fed: ClassVar[Fed] = "groups"
    optimum: ClassVar[str] = "pi* of beta = beta_r·beta_pi, whoever drew the groups"

    def __post_init__(self) -> None:
        positive(beta_r=self.beta_r, beta_pi=self.beta_pi)

    def bound(self, beta: float) -> Self:
        return replace(self, beta_r=beta / self.beta_pi) if self.beta_r is None else self

    def loss(self, model: LanguageModel, batch: Groups) -> Outcome:
        h, reward = group_log_ratios(model, batch), batch.reward
        beta_r = stated(self.beta_r)
        loss = dpo_rw_loss(h, reward, beta_r, self.beta_pi)
        return Outcome(loss, group_metrics(h, reward, beta_r, self.beta_pi))


NAMES: dict[str, str] = {"dpo-rw": "DPO on rewards: forward KL within groups"}
METHODS: dict[str, Method] = {"dpo-rw": DpoRw()}

"""EXO on rewards: the reverse KL between what policy and reward say of a group (Ji et al. 2024, arXiv:2402.00856).

    q = softmax(beta_pi·h_1 … beta_pi·h_K),     p = softmax(r_1/beta_r … r_K/beta_r),     h = log p(y|x) − log pi_ref(y|x)
    L = KL(q‖p) = Σ_i q_i·(log q_i − log p_i),        dL/dz_i = q_i·[(log q_i − log p_i) − L],   z = beta_pi·h

Expected gradient zero at pi* of beta = beta_r·beta_pi, from draws of *any* distribution of full support: q = p holds in
every group at once, and the loss is 0 there. It shares this minimum with `dpo_rw`; where the policy cannot reach pi* the
two part ways: this one (reverse KL) would rather miss a mode of pi* than put mass where pi* has none, if groups
are large; with 2 or 4 rows a group the difference is gone (`modes/solve`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from tiltlm.groups import Groups
from tiltlm.method import Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, PerRow, positive, stated
from tiltlm.problem import Fed


def exo_rw_loss(h: Tensor, reward: Tensor, beta_r: float, beta_pi: float) -> Tensor:
    """KL(softmax(beta_pi·h)‖softmax(r/beta_r)): log-ratios and rewards [G, K] -> [G], nats."""
    log_q, log_p = (beta_pi * h).log_softmax(1), (reward / beta_r).log_softmax(1)
    return (log_q.exp() * (log_q - log_p)).sum(1)


def group_log_ratios(model: LanguageModel, groups: Groups) -> Tensor:
    """h of every row, [G, K], in one forward pass. Raises ValueError where the rows carry no reference
    log-probabilities."""
    log_ref = groups.samples.log_ref
    if log_ref is None:
        raise ValueError(
            "these groups have no log_ref: score them with the reference first (experience.referenced)"
        )
    return (model.log_prob(groups.samples) - log_ref).sum(1).reshape(-1, groups.size)


def group_metrics(h: Tensor, reward: Tensor, beta_r: float, beta_pi: float) -> dict[str, Tensor]:
    """What every method on groups reports, [G] each, detached.

    gap: KL(q‖p), the distance to the target in this group, 0 exactly at pi*. h: mean log-ratio. entropy: of q, nats.
    peaked: whether one row has all but a thousandth of q, where gradients die. ranking: whether the policy's favourite
    is the reward's (a share, where rewards tie).
    """
    h = h.detach()
    log_q = (beta_pi * h).log_softmax(1)
    best = (reward == reward.max(1, keepdim=True).values).to(h.dtype)
    favourite = (h == h.max(1, keepdim=True).values).to(h.dtype)
    return {
        "gap": exo_rw_loss(h, reward, beta_r, beta_pi),
        "h": h.mean(1),
        "entropy": -(log_q.exp() * log_q).sum(1),
        "peaked": (log_q.exp().max(1).values > 0.999).to(h.dtype),
        "ranking": (favourite * best).sum(1) / favourite.sum(1),
    }


@dataclass(frozen=True)
class ExoRw(PerRow, Policy):
    """EXO on rewards; the target's beta is the product of its two temperatures."""

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
        loss = exo_rw_loss(h, reward, beta_r, self.beta_pi)
        return Outcome(loss, group_metrics(h, reward, beta_r, self.beta_pi))


NAMES: dict[str, str] = {"exo-rw": "EXO on rewards: reverse KL within groups"}
METHODS: dict[str, Method] = {"exo-rw": ExoRw()}

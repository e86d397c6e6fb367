"""Online IPO: IPO on pairs that the policy has just drawn (Calandriello et al. 2024, arXiv:2403.08635).

    p = σ((r_1 − r_2)/beta_r),      L = p·[Δh − 1/(2·beta)]² + (1 − p)·[Δh + 1/(2·beta)]²,      Δh = h(y_1) − h(y_2)

In one pair alone, zero gradient at Δh = (2p − 1)/(2·beta): bounded, however far apart the rewards are. On the policy's own
pairs the expected gradient is zero where p ∝ pi_ref·exp(P(y ≻ Y')/beta), Y' drawn by p itself: the Nash equilibrium of the
game of beating each other, with a pull of strength beta towards the reference (their theorem). It is not pi* of r. On other
draws, Y' is theirs: see `ipo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.experience import Experience
from tiltlm.groups import Groups, extremes
from tiltlm.method import Lesson, Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, positive, stated
from tiltlm.policies.exo_rw import group_log_ratios
from tiltlm.policies.ipo import ipo_loss
from tiltlm.policies.opo import Coins, Labels, labels_of, pair_metrics, told_apart
from tiltlm.problem import Fed, Source


def online_ipo_loss(h: Tensor, label: Tensor, beta: float) -> Tensor:
    """p·(Δh − 1/(2·beta))² + (1 − p)·(Δh + 1/(2·beta))²: log-ratios [G, 2], P(the first is better) [G] -> [G]."""
    return label * ipo_loss(h[:, 0], h[:, 1], beta) + (1 - label) * ipo_loss(h[:, 1], h[:, 0], beta)


@dataclass(frozen=True)
class OnlineIPO(Policy):
    """IPO on labelled pairs of the policy's own."""

    labels: Labels = "soft"
    """soft: P(better) by the rewards; sampled: a coin of that chance; hard: the larger reward wins."""

    beta: float | None = None
    """Temperature of the log-ratios, the papers' tau (None: the target's)."""

    beta_r: float = 1.0
    """Temperature of the labels (1: Bradley–Terry preferences of the reward, as of every method on pairs)."""

    passes: int = 1
    """Updates per batch of draws."""

    fed: ClassVar[Fed] = "groups"
    source: ClassVar[Source | None] = "live"
    optimum: ClassVar[str] = (
        "on policy the Nash equilibrium of P(y beats y'), pulled to the reference; not pi* of the reward"
    )

    def __post_init__(self) -> None:
        positive(beta=self.beta, beta_r=self.beta_r, passes=self.passes)

    def experience(self, experience: Experience, lesson: Lesson) -> Experience:
        """`experience`; where labels are sampled, with a coin for every pair."""
        return Coins(experience, self.beta_r, lesson.stream) if self.labels == "sampled" else experience

    def prepare(self, batch: Groups) -> Groups:
        return extremes(batch)

    def weight(self, batch: Groups) -> Tensor:
        return told_apart(labels_of(batch, self.labels, self.beta_r))

    def loss(self, model: LanguageModel, batch: Groups) -> Outcome:
        beta, h = stated(self.beta), group_log_ratios(model, batch)
        label = labels_of(batch, self.labels, self.beta_r)
        loss = torch.where(label.isnan(), 0.0, online_ipo_loss(h, label.nan_to_num(0.5).to(h), beta))
        return Outcome(loss, pair_metrics(h, batch, label, beta))


NAMES: dict[str, str] = {"online-ipo": "IPO on the policy's own pairs, labelled by the reward"}
METHODS: dict[str, Method] = {"online-ipo": OnlineIPO()}

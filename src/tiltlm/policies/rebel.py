"""REBEL: regress relative rewards on relative log-ratios to the last policy (Gao et al. 2024, arXiv:2404.16767).

    R = r − beta·h_t,       h_t = log p_t(y|x) − log pi_ref(y|x),       p_t: the policy before this batch
    L = [ (Δ log p − Δ log p_t)/eta − ΔR ]²      of a pair; of K rows, the mean over all pairs: 2·Var(log(p/p_t)/eta − R)

One batch's minimum is p ∝ p_t·exp(eta·R), or h = (1 − eta·beta)·h_t + eta·r + const: a damped step from h_t to r/beta.
So pi* is the fixed point of the iteration (eta < 2/beta), whoever drew. With eta = 1/beta, p_t drops out, and the loss is
4·beta² times that of `log_variance`. With the paper's R = r, the iteration ends on the best answers alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.experience import Around, Experience
from tiltlm.groups import Groups
from tiltlm.method import Lesson, Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, PerRow, positive, stated
from tiltlm.policies.exo_rw import group_log_ratios
from tiltlm.policies.log_variance import distance_metrics
from tiltlm.problem import Fed, Source


def rebel_loss(h: Tensor, h_old: Tensor, reward: Tensor, beta: float, eta: float) -> Tensor:
    """2·Var((h − h_t)/eta − (r − beta·h_t)) of each group, in a pair the squared difference: [G, K] each -> [G]."""
    return 2 * ((h - h_old) / eta - (reward - beta * h_old)).var(1)


@dataclass(frozen=True)
class LastPolicy(Around):
    """Another experience's groups with log_q of `policy` as it is now, whoever drew them."""

    policy: LanguageModel

    @torch.no_grad()
    def batch(self, step: int) -> Groups:
        groups: Groups = self.experience.batch(step)
        samples = groups.samples.with_(log_q=self.policy.log_prob(groups.samples))
        return Groups(samples, groups.size, groups.preferred)


@dataclass(frozen=True)
class REBEL(PerRow, Policy):
    """REBEL with the pull of `beta` in the reward."""

    beta: float | None = None
    """Strength of the pull towards the reference (None: the target's temperature)."""

    eta: float | None = None
    """Size of a step, in units of one over the reward (None: 1/(2·beta), half of the way to pi*)."""

    passes: int = 4
    """Updates per batch of draws: the regression of one step. The first alone does not depend on eta, but for its scale."""

    fed: ClassVar[Fed] = "groups"
    source: ClassVar[Source | None] = "live"
    optimum: ClassVar[str] = "pi* of the same beta, as the fixed point of the iteration, whoever drew"

    def __post_init__(self) -> None:
        positive(beta=self.beta, eta=self.eta, passes=self.passes)

    def experience(self, experience: Experience, lesson: Lesson) -> Experience:
        """`experience` with the log-probabilities of the policy before the step; its own draws have them already."""
        if lesson.live:
            return experience
        assert lesson.learner.policy is not None
        return LastPolicy(experience, lesson.learner.policy)

    def loss(self, model: LanguageModel, batch: Groups) -> Outcome:
        h, reward, beta = group_log_ratios(model, batch), batch.reward, stated(self.beta)
        samples = batch.samples
        if samples.log_q is None or samples.log_ref is None:
            raise ValueError("REBEL needs the last policy's log-probabilities of every row (rebel.LastPolicy)")
        h_old = (samples.log_q - samples.log_ref).sum(1).reshape_as(h).to(h)
        loss = rebel_loss(h, h_old, reward, beta, self.eta or 1 / (2 * beta))
        return Outcome(loss, distance_metrics(h, reward, beta) | {"moved": (h.detach() - h_old).mean(1)})


NAMES: dict[str, str] = {"rebel": "REBEL: regress relative rewards, step by step, with the pull of beta"}
METHODS: dict[str, Method] = {"rebel": REBEL()}

"""Trajectory balance (Malkin et al. 2022, arXiv:2201.13259; for language models Hu et al. 2023, arXiv:2310.04363).

    L = ½·mean_i [h(y_i) + log Ẑ(x) − r_i/beta]²,      h(y) = log p(y|x) − log pi_ref(y|x)

A language model's completion is a trajectory in a tree: every one is reached in one way, and the loss asks
Ẑ·p = pi_ref·exp(r/beta) of each. It is 0 at pi* and log Ẑ = log Z, whoever drew.

    trajectory-balance          log Ẑ: the group's mean of r/beta − h, a number (Bartoldson et al. 2025, arXiv:2503.18929).
                                That is the best log Ẑ for these rows, and makes the loss (K − 1)/K times `log_variance`
    trajectory-balance-learnt   log Ẑ: learnt beside the policy, as a critic's value in front of the first token. It keeps
                                what earlier steps taught it of a prompt. Until then, a wrong log Ẑ is noise on the
                                policy's own rows, and a bias on others'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiltlm.groups import Groups
from tiltlm.method import Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, PerRow, positive, stated
from tiltlm.policies.exo_rw import group_log_ratios
from tiltlm.policies.log_variance import distance_metrics
from tiltlm.policies.ppo import ActorCritic
from tiltlm.problem import Fed, Source


def trajectory_balance_loss(h: Tensor, log_z: Tensor, reward: Tensor, beta: float) -> Tensor:
    """½·mean (h + log Ẑ − r/beta)² of each group: [G, K], log Ẑ [G, K] or [G, 1], [G, K] -> [G], nats²."""
    return 0.5 * (h + log_z - reward / beta).square().mean(1)


@dataclass(frozen=True)
class TrajectoryBalance(PerRow, Policy):
    """Trajectory balance with the group's own estimate of log Z."""

    beta: float | None = None
    """Temperature that divides the reward (None: the target's)."""

    passes: int = 1
    """Updates per batch of draws."""

    fed: ClassVar[Fed] = "groups"
    source: ClassVar[Source | None] = "live"
    optimum: ClassVar[str] = "pi* of the same beta, whoever drew; the loss itself is 0 there"

    def __post_init__(self) -> None:
        positive(beta=self.beta, passes=self.passes)

    def loss(self, model: LanguageModel, batch: Groups) -> Outcome:
        h, reward, beta = group_log_ratios(model, batch), batch.reward, stated(self.beta)
        metrics = distance_metrics(h, reward, beta)
        return Outcome(trajectory_balance_loss(h, metrics["log_z"][:, None], reward, beta), metrics)


@dataclass(frozen=True)
class LearntTrajectoryBalance(PerRow, Policy):
    """Trajectory balance with a log Z that is learnt: of every prompt, by a critic of the policy's size."""

    beta: float | None = None
    """Temperature that divides the reward (None: the target's)."""

    passes: int = 1
    """Updates per batch of draws."""

    fed: ClassVar[Fed] = "groups"
    source: ClassVar[Source | None] = "live"
    critic: ClassVar[bool] = True
    optimum: ClassVar[str] = "pi* of the same beta and log Z, whoever drew; the loss itself is 0 there"

    def __post_init__(self) -> None:
        positive(beta=self.beta, passes=self.passes)

    def loss(self, model: ActorCritic, batch: Groups) -> Outcome:
        policy: LanguageModel = model.policy
        h, reward, beta = group_log_ratios(policy, batch), batch.reward, stated(self.beta)
        log_z = model.critic.values_before(batch.samples)[:, 0, 0].reshape(-1, batch.size)
        loss = trajectory_balance_loss(h, log_z, reward, beta)
        return Outcome(loss, distance_metrics(h, reward, beta) | {"log_z": log_z.detach().mean(1)})


NAMES: dict[str, str] = {
    "trajectory-balance": "trajectory balance, log Z by the group",
    "trajectory-balance-learnt": "trajectory balance, log Z learnt beside the policy",
}
METHODS: dict[str, Method] = {
    "trajectory-balance": TrajectoryBalance(),
    "trajectory-balance-learnt": LearntTrajectoryBalance(),
}

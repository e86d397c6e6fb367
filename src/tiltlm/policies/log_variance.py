"""The log-variance loss (Richter et al. 2020, arXiv:2010.10436, "VarGrad"): 0 at pi*, whoever drew, and nowhere else.

    d_i = h(y_i) − r_i/beta,      h(y) = log p(y|x) − log pi_ref(y|x)
    L = ½·Var(d_1 … d_K) = 1/(2K)·Σ_i d_i·(d_i − mean_{j≠i} d_j),        ∂L/∂h_i = (d_i − mean_{j≠i} d_j)/K

Var is the unbiased variance of the K rows of a group: what leaving each row out of its own mean makes of it. At pi*,
d = −log Z(x) in every row. On the policy's own draws the gradient is that of `rloo` over beta, batch by batch: nothing new.
Off policy (stored or stale draws, another sampler's) it still ends at pi*, where `rloo` does not, and without weights.
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
from tiltlm.problem import Fed, Source


def log_variance_loss(h: Tensor, reward: Tensor, beta: float) -> Tensor:
    """½·Var(h − r/beta) within each group: log-ratios and rewards [G, K] -> [G], nats²."""
    return 0.5 * (h - reward / beta).var(1)


def distance_metrics(h: Tensor, reward: Tensor, beta: float) -> dict[str, Tensor]:
    """What methods report that fit h to r/beta, [G] each, detached.

    variance: Var(h − r/beta) within the group, nats²: a distance to pi*, 0 exactly there on what was drawn. log_z: mean of
    r/beta − h, which at pi* is log Z(x); of the policy's own draws no more than that, on average. h, reward: means.
    """
    excess = reward / beta - h.detach()
    return {"variance": excess.var(1), "log_z": excess.mean(1), "h": h.detach().mean(1), "reward": reward.mean(1)}


@dataclass(frozen=True)
class LogVariance(PerRow, Policy):
    """The log-variance loss."""

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
        return Outcome(log_variance_loss(h, reward, beta), distance_metrics(h, reward, beta))


NAMES: dict[str, str] = {"log-variance": "variance of log p/pi_ref − r/beta within groups (VarGrad)"}
METHODS: dict[str, Method] = {"log-variance": LogVariance()}

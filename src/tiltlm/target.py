"""The target: one reference, one reward, one temperature. This module alone says what beta means.

    pi*(y|x) = pi_ref(y|x) · exp(r(x, y) / beta) / Z(x),     Z(x) = E_{y ~ pi_ref}[exp(r(x, y) / beta)]

beta is in units of reward and always *divides* r: small beta leans hard on the reward, beta → ∞ gives pi_ref
back. pi* is the unique maximiser of J(q) = E_q[r] − beta·KL(q‖pi_ref), and J(pi*) = beta·log Z.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.models.base import LanguageModel
from tiltlm.samples import Samples

Reward = Callable[[Samples], Tensor]
"""r(x, y): Samples with N rows -> float [N]."""


@dataclass(frozen=True)
class Target:
    """pi* ∝ reference · exp(reward / beta). Raises ValueError unless beta > 0."""

    reference: LanguageModel
    reward: Reward
    beta: float

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive: it divides the reward; got {self.beta}")

    def scored(self, samples: Samples, batch_size: int | None = None) -> Samples:
        """`samples` with `reward` and `log_ref` filled in where they are missing, `batch_size` rows at once."""
        if batch_size is not None and len(samples) > batch_size:
            starts = range(0, len(samples), batch_size)
            parts = [self.scored(samples.select(slice(k, k + batch_size))) for k in starts]
            found = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("reward", "log_ref")}
            return samples.with_(**found)
        filled: dict[str, Tensor] = {}
        if samples.reward is None:
            filled["reward"] = self.reward(samples)
        if samples.log_ref is None:
            with torch.no_grad():
                filled["log_ref"] = self.reference.log_prob(samples)
        return samples.with_(**filled) if filled else samples

    def log_potential(self, samples: Samples) -> Tensor:
        """log phi = r / beta, nats, [N]."""
        reward = self.reward(samples) if samples.reward is None else samples.reward
        return reward / self.beta

    def log_unnormalised(self, samples: Samples) -> Tensor:
        """log pi_ref(y|x) + r / beta, which is log pi* + log Z(x); nats, [N]."""
        log_ref = self.scored(samples).log_ref
        assert log_ref is not None
        return log_ref.sum(1) + self.log_potential(samples)

"""A line of outcomes with two hills of reward: the smallest world in which the two KLs ask for different policies.

    y on a line from −6 to 6,   r(y) = exp(−(y + 2)²/2) + second·exp(−(y − 2)²/2),   uniform reference

One prompt, number 0; an outcome is one token, its number on the line.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiltlm.models.table import TableLM
from tiltlm.samples import Samples
from tiltlm.target import Reward


def places(points: int) -> Tensor:
    """Where the outcomes are, float64 [points]."""
    return torch.linspace(-6, 6, points, dtype=torch.float64)


def hills(points: int, second: float) -> Tensor:
    """The reward of every outcome, float64 [points]; `second`: the height of the second hill, the first is 1."""
    y = places(points)
    return (-((y + 2) ** 2) / 2).exp() + second * (-((y - 2) ** 2) / 2).exp()


def line(points: int, second: float) -> tuple[TableLM, Reward]:
    """The reference (vocabulary `points`, horizon 1, every logit 0) and its reward."""
    reward = hills(points, second)

    def reward_of(samples: Samples) -> Tensor:
        return reward.to(samples.device)[samples.tokens[:, 0]]

    return TableLM(n_prompts=1, vocab_size=points, horizon=1), reward_of

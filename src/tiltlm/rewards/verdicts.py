"""A reward learnt from verdicts on single answers: logistic regression on the reward model's output.

    P(y is wanted | x) = σ(r(x, y)),        L = −log σ(r) for a wanted answer,  −log σ(−r) for an unwanted one

At the optimum r is the log-odds of "wanted". Unlike that of a reward learnt from pairs its zero means something: as likely
wanted as not. It compares no two answers to one prompt, so it ranks them less surely than a reward learnt from pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tiltlm.models.reward_model import RewardModel
from tiltlm.objective import Outcome, PerRow
from tiltlm.samples import Samples


def verdict_loss(reward: Tensor, good: Tensor) -> Tensor:
    """−log σ(±r): rewards [n] and verdicts bool [n] -> [n]; ln 2 at r = 0."""
    return -logsigmoid(torch.where(good, reward, -reward))


@dataclass(frozen=True)
class Verdicts:
    """Answers in the reward model's own tokens, and whether each is wanted, bool [n]."""

    samples: Samples
    good: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, index: Tensor | slice) -> Verdicts:
        return Verdicts(self.samples.select(index), self.good[index])


@dataclass(frozen=True)
class VerdictRegression(PerRow):
    """Maximum likelihood of the verdicts."""

    optimum: ClassVar[str] = "the log-odds that an answer is wanted"

    def loss(self, model: RewardModel, batch: Verdicts) -> Outcome:
        reward = model.score(batch.samples)
        right = (reward.detach() > 0) == batch.good
        return Outcome(verdict_loss(reward, batch.good), {"accuracy": right.float(), "reward": reward.detach()})


def verdicts(
    model: RewardModel, prompts: Sequence[str], completions: Sequence[str], good: Sequence[bool]
) -> Verdicts:
    """Verdicts on texts, in the tokens of `model`."""
    samples = model.encode(prompts, completions)
    return Verdicts(samples, torch.tensor(list(good), dtype=torch.bool, device=model.device))

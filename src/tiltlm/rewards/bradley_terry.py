"""A reward learnt from preferences (Bradley & Terry 1952; Ziegler et al. 2019, arXiv:1909.08593).

    P(y_c ≻ y_r | x) = σ(r_c − r_r),        L = −log σ( r(x, y_c) − r(x, y_r) − m ) + center·(r_c + r_r)²

m ≥ 0 is a margin of the pair (how much better, where annotators said so; Touvron et al. 2023, arXiv:2307.09288, eq. 2), 0
elsewhere. With d = r_c − r_r, a preference over preferences (Singhal et al. 2024, arXiv:2405.01511, prefoverpref) adds

    prefoverpref · mean over pairs of rows i, j of a batch with m_i > m_j of −log σ( (d_i − d_j) − (m_i − m_j) ):

the pair of the larger margin is to be further apart, by as much as the margins say. Rewards are determined up to a constant
per prompt, which pi* does not notice; `center` holds their mean near 0 (Eisenstein et al. 2023, arXiv:2312.09244).
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
from tiltlm.samples import Pairs


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """−log σ(r_c − r_r − m): rewards [n], [n] and margins [n] -> [n]; ln 2 at equal rewards without margin."""
    return -logsigmoid(chosen - rejected - margin)


def preference_over_preferences_loss(gap: Tensor, margin: Tensor) -> Tensor:
    """−log σ((d_i − d_j) − (m_i − m_j)), averaged over the pairs of rows with m_i > m_j: gaps d [n], margins m [n] -> [n],
    one number per row i whose mean is that average; zeros where all margins are equal."""
    further = gap[:, None] - gap - (margin[:, None] - margin)
    larger = margin[:, None] > margin
    return (-logsigmoid(further) * larger).sum(1) * len(gap) / larger.sum().clamp_min(1)


@dataclass(frozen=True)
class Comparisons:
    """Pairs in the reward model's own tokens, with the margin of each, float [n]."""

    pairs: Pairs
    margin: Tensor

    def __len__(self) -> int:
        return len(self.pairs)

    def select(self, index: Tensor | slice) -> Comparisons:
        return Comparisons(self.pairs.select(index), self.margin[index])


@dataclass(frozen=True)
class BradleyTerry(PerRow):
    """Maximum likelihood of the preferences; `center` weighs (r_c + r_r)², `prefoverpref` the preferences over preferences
    among the rows that are scored together (those of a micro-batch, where there are such)."""

    center: float = 0.0
    prefoverpref: float = 0.0
    optimum: ClassVar[str] = "the reward behind Bradley–Terry preferences, up to a constant per prompt"

    def __post_init__(self) -> None:
        if self.center < 0 or self.prefoverpref < 0:
            raise ValueError(
                f"center and prefoverpref must not be negative; got {self.center}, {self.prefoverpref}"
            )

    def loss(self, model: RewardModel, batch: Comparisons) -> Outcome:
        chosen, rejected = model.score(batch.pairs.both()).split(len(batch))
        loss = bradley_terry_loss(chosen, rejected, batch.margin) + self.center * (chosen + rejected) ** 2
        if self.prefoverpref:
            over = preference_over_preferences_loss(chosen - rejected, batch.margin)
            loss = loss + self.prefoverpref * over
        gap = (chosen - rejected).detach()
        metrics = {"accuracy": ahead(gap), "margin": gap, "reward": (chosen + rejected).detach() / 2}
        return Outcome(loss, metrics)


def ahead(gap: Tensor) -> Tensor:
    """1 where the chosen side is ahead, ½ where the two tie, [n]."""
    return (gap.sign() + 1) / 2


def comparisons(
    model: RewardModel,
    prompts: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str],
    margin: Sequence[float] | None = None,
) -> Comparisons:
    """Preferences as text, in the tokens of `model`."""
    n = len(prompts)
    both = model.encode([*prompts, *prompts], [*chosen, *rejected], together=2)
    pairs = Pairs(both.select(slice(0, n)), both.select(slice(n, 2 * n)))
    return Comparisons(pairs, torch.tensor(margin or [0.0] * n, device=both.device))

"""The exact-match reward: r(x, y) = correct if y is the answer to x, token by token and in length, else wrong.

With correct = 1 and wrong = 0, log Z(x) = log(1 + p(e^{1/beta} − 1)), p = pi_ref(answer | x). The star-graph
REINFORCE runs of Zhou et al. 2025 (arXiv:2502.20548) pay 1 and −0.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tiltlm.samples import Samples, Tokens


def agreement(rows: Tokens, others: Tokens) -> Tensor:
    """Where two batches hold the same real token, or both hold none: bool [N, max width]."""
    width = max(rows.ids.shape[1], others.ids.shape[1])
    ids, mask = _widened(rows, width)
    other_ids, other_mask = _widened(others, width)
    return torch.where(mask & other_mask, ids == other_ids, mask == other_mask)


def _widened(rows: Tokens, width: int) -> tuple[Tensor, Tensor]:
    more = (0, width - rows.ids.shape[1])
    return pad(rows.ids, more), pad(rows.mask, more, value=False)


def same_rows(rows: Tokens, others: Tokens) -> Tensor:
    """Whether row n of both batches is the same sequence, of the same length: bool [N]."""
    return agreement(rows, others).all(1)


def answers_of(samples: Samples, answers: Tokens) -> Tokens:
    """The answer to each row's prompt, Tokens [N, T]. Raises ValueError unless `answers` has a row per prompt."""
    if len(answers) != len(samples.prompts):
        raise ValueError(
            f"answers need one row per prompt of the samples: got {len(answers)} answers for "
            f"{len(samples.prompts)} prompts; build them from the same prompts, in the same order"
        )
    return answers.to(samples.device).select(samples.prompt_index)


@dataclass(frozen=True)
class ExactAnswer:
    """`correct` where the completion is its prompt's row of `answers` [P, T], `wrong` elsewhere.

    Called on Samples over the same P prompts, in the same order, it returns [N] in the default float type.
    Raises ValueError if the counts differ.
    """

    answers: Tokens
    correct: float = 1.0
    wrong: float = 0.0

    def __call__(self, samples: Samples) -> Tensor:
        right = same_rows(samples.completions, answers_of(samples, self.answers))
        paid = torch.full(right.shape, self.wrong, device=right.device)
        return paid.masked_fill(right, self.correct)

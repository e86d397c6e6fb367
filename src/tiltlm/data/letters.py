"""Which letter is best, A, B, C or D? A question whose answer is chance, and five rationales for it.

    y uniform on the four letters, whatever was said before
    "it is A" … "it is D":  p(named letter | z) = 1 − epsilon, every other letter epsilon/3
    z* = "it could be any": p(y | z*) = 1/4

Every rationale is right in one case of four: E_y p(y|z) = 1/4. They differ in E_y log p(y|z), where z* is the best.
One prompt, number 0; a completion is one token, the rationale's number (A to D, then z*); the reference draws uniformly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiltlm.models.table import TableLM
from tiltlm.samples import Samples
from tiltlm.target import Reward

LETTERS, RATIONALES, UNSURE = 4, 5, 4
"""How many answers, how many rationales, and which of these is z*."""


def answers(epsilon: float) -> Tensor:
    """p(y | z), float64 [5, 4]. Raises ValueError unless 0 ≤ epsilon < 1."""
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon is a probability below 1, that of another letter than the named; got {epsilon}")
    p = torch.full((RATIONALES, LETTERS), epsilon / 3, dtype=torch.float64)
    p[:UNSURE].fill_diagonal_(1 - epsilon)
    p[UNSURE] = 1 / LETTERS
    return p


def paid(reward: Tensor) -> tuple[TableLM, Reward]:
    """The uniform reference over rationales, and a reward [5] of each."""

    def reward_of(samples: Samples) -> Tensor:
        return reward.to(samples.device)[samples.tokens[:, 0]]

    return TableLM(n_prompts=1, vocab_size=RATIONALES, horizon=1), reward_of

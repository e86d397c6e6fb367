"""The two-branch tree: the smallest world in which guiding by E[r | prefix] and by the twist part ways.

    root ── 0 (left),  probability p_left ──▶ reward 0.1, whatever comes next
         └─ 1 (right) ──▶ 1 with probability 0.05: reward 1;  0: reward 0

Left has the higher mean (0.1 against 0.05), right the higher best; pi* goes right as beta falls, while a guide
by exp(E[r | prefix] / beta) goes left (Zhou et al. 2025, arXiv:2502.20548, fig. 4). Completions are two tokens;
the token after left is a fair coin without meaning. log Z = log(p_left e^{0.1/b} + p_right (0.95 + 0.05 e^{1/b})).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltlm.models.table import TableLM
from tiltlm.samples import Samples
from tiltlm.target import Reward

LEFT, RIGHT = 0, 1
SURE_REWARD = 0.1
JACKPOT_PROBABILITY = 0.05
ATOMS = (0.0, SURE_REWARD, 1.0)
"""The rewards there are in the tree."""


def tree(p_left: float = 0.5) -> tuple[TableLM, Reward]:
    """The reference (one prompt, number 0; vocabulary 2, horizon 2) and its reward, both float64.

    Raises ValueError unless 0 < p_left < 1.
    """
    if not 0 < p_left < 1:
        raise ValueError(f"p_left must lie strictly between 0 and 1; got {p_left}")
    reference = TableLM(n_prompts=1, vocab_size=2, horizon=2)
    with torch.no_grad():
        reference.tables[0][0, 0, RIGHT] = math.log((1 - p_left) / p_left)
        reference.tables[1][0, RIGHT, 1] = math.log(JACKPOT_PROBABILITY / (1 - JACKPOT_PROBABILITY))
    return reference, tree_reward


def tree_reward(samples: Samples) -> Tensor:
    """0.1 left; right, the second token itself: float64 [N]. Raises ValueError unless all rows have two tokens."""
    if samples.tokens.shape[1] != 2 or not bool(samples.mask.all()):
        raise ValueError(
            f"the tree's completions are two tokens each; got shape {list(samples.tokens.shape)}, "
            f"{int(samples.mask.sum())} tokens in all: draw with max_new_tokens=2"
        )
    first, second = samples.tokens.unbind(1)
    return torch.where(first == LEFT, SURE_REWARD, second.to(torch.float64))

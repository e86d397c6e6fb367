"""All completions of a prompt that are likely enough: a walk down the tree of tokens that leaves out what is rare.

No more than 1/floor prefixes of a length have a probability of `floor` or more, so the walk is never wide, and narrow where
a model is nearly sure of itself. What is left out has the rest of the probability, 1 − Σ p(y|x).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltlm.models.base import LanguageModel, is_end
from tiltlm.samples import Samples, Tokens


@torch.no_grad()
def listed(model: LanguageModel, prompts: Tokens, max_new_tokens: int, floor: float) -> tuple[Samples, Tensor]:
    """Every completion of probability `floor` or more, and their log-probabilities in nats, float64 [N].

    Raises ValueError unless 0 < floor ≤ 1.
    """
    if not 0 < floor <= 1:
        raise ValueError(f"floor is a probability above 0; got {floor}")
    state, device = model.start(prompts, max_new_tokens), prompts.device
    index = torch.arange(len(prompts), device=device)
    log_p = torch.zeros(len(prompts), dtype=torch.float64, device=device)
    tokens = torch.zeros(len(prompts), 0, dtype=torch.int64, device=device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in range(max_new_tokens):
        joint = log_p[:, None] + state.log_next().double()
        row, token = (joint >= math.log(floor)).nonzero(as_tuple=True)
        index, log_p, tokens = index[row], joint[row, token], torch.cat([tokens[row], token[:, None]], 1)
        last = step == max_new_tokens - 1
        over = is_end(token, model.eos_ids) | last
        found.append((tokens[over], index[over], log_p[over]))
        if bool(over.all()):
            break
        on = ~over
        index, log_p, tokens = index[on], log_p[on], tokens[on]
        state.select(row[on])
        state.append(token[on])
    rows = Tokens.of([ids for part, _, _ in found for ids in part.tolist()], device)
    ends = rows.ids.gather(1, (rows.lengths - 1).clamp_min(0)[:, None])[:, 0] if len(rows) else rows.lengths
    finished = is_end(ends, model.eos_ids) | (not model.eos_ids)
    samples = Samples(prompts, torch.cat([own for _, own, _ in found]), rows.ids, rows.mask, finished=finished)
    return samples, torch.cat([p for _, _, p in found])

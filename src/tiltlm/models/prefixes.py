"""Decoding states of a body: with a cache where the self-test trusts it, by full forward passes where not.

Recurrent and hybrid networks (Mamba, Qwen3-Next, MiniMax …) keep states that cannot be padded, repeated or dropped row by
row the way keys and values can. Their rows are run whole at every step: T tokens cost T passes, and what is drawn
is what is scored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiltlm.models.backbone import BackboneState, BodyState, check_room, hidden
from tiltlm.models.body import trust_of
from tiltlm.samples import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS_AT_ONCE = 256
"""Rows of one forward pass while peeking."""


def body_state(model: PreTrainedModel, prompts: Tokens, capacity: int) -> BodyState:
    """A state behind `prompts`, ready to grow by up to `capacity` tokens."""
    cached = trust_of(model).caches(prompts.ids.shape[1] + capacity)
    return BackboneState(model, prompts, capacity) if cached else WholePasses(model, prompts, capacity)


class WholePasses:
    """A `BodyState` that keeps the rows' tokens and runs all of them again at every step."""

    def __init__(self, model: PreTrainedModel, prompts: Tokens, capacity: int) -> None:
        check_room(model, prompts, capacity)
        self.model, self.rows = model, Tokens(prompts.ids, prompts.mask)
        self.last = self._last_of(self.rows)

    @property
    def lengths(self) -> Tensor:
        return self.rows.lengths

    def append(self, tokens: Tensor) -> None:
        self.rows = self.rows.followed_by(Tokens.full(tokens[:, None]))
        self.last = self._last_of(self.rows)

    def select(self, index: Tensor) -> None:
        self.rows, self.last = self.rows.select(index).cropped(), self.last[index]

    def peek(self, candidates: Tensor) -> Tensor:
        n, k = candidates.shape
        rows = torch.arange(n, device=candidates.device).repeat_interleave(k)
        longer = self.rows.select(rows).followed_by(Tokens.full(candidates.reshape(-1, 1)))
        parts = [
            self._last_of(longer.select(slice(begin, begin + ROWS_AT_ONCE)))
            for begin in range(0, n * k, ROWS_AT_ONCE)
        ]
        return torch.cat(parts).view(n, k, -1)

    def _last_of(self, rows: Tokens) -> Tensor:
        states = hidden(self.model, rows.cropped())
        return states[torch.arange(len(rows), device=rows.device), rows.lengths - 1]

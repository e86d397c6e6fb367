"""Packing: several short sequences in one row as long as the longest, so that little is computed for padding.

No mask is given: positions that start again at 0 are how transformers tells where a sequence begins, and the
causal mask it then builds keeps the sequences of a row apart. Not every network listens (some build their mask
without looking at the positions), so nobody is taken at their word: `why_not` compares packed with separate rows on
the very model, and only an exact one is packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiltlm.models.backbone import hidden
from tiltlm.models.body import attention_window, body_of, most_positions, run_body
from tiltlm.samples import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDEST_WINDOW = 512
"""The widest attention window (tokens) that the self-test goes beyond; networks with wider ones are not packed."""

TOLERANCE = 1e-4
"""Difference of hidden states, absolute and relative, that the order of sums may make."""


def first_fit(lengths: Sequence[int], width: int) -> tuple[list[int], list[int]]:
    """Rows of `width` filled with sequences, longest first, each in the first row with room: (row, start) of each.

    Never more than 11/9 of the fewest rows possible, plus one.
    """
    room: list[int] = []
    rows, starts = [0] * len(lengths), [0] * len(lengths)
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        row = next((k for k, free in enumerate(room) if free >= lengths[n]), len(room))
        if row == len(room):
            room.append(width)
        rows[n], starts[n] = row, width - room[row]
        room[row] -= lengths[n]
    return rows, starts


def hidden_packed(model: PreTrainedModel, sequences: Tokens) -> Tensor:
    """What `hidden` gives, [N, L, D] (0 at padding), computed in packed rows where that takes fewer rows."""
    n, width = sequences.ids.shape
    rows, starts = first_fit(sequences.lengths.tolist(), width)
    height = max(rows, default=-1) + 1
    if height == n:
        return hidden(model, sequences)
    column = torch.arange(width, device=sequences.device)
    begin = torch.tensor(rows, device=column.device) * width + torch.tensor(starts, device=column.device)
    mask = sequences.mask
    place = (begin[:, None] + column)[mask]  # of every real token, the packed rows laid end to end
    ids, positions = sequences.ids.new_zeros(2, height * width)  # padding: sequences of one token, seen by nobody
    ids[place], positions[place] = sequences.ids[mask], column.expand(n, width)[mask]
    packed = run_body(body_of(model), ids.view(height, width), positions.view(height, width)).flatten(0, 1)
    return packed.new_zeros(n, width, packed.shape[1]).masked_scatter(mask[:, :, None], packed[place])


def packs_exactly(model: PreTrainedModel) -> bool:
    """Whether hidden states of packed rows are those of separate rows, by a test of random tokens on this model."""
    return why_not(model) == ""


@torch.no_grad()
def why_not(model: PreTrainedModel) -> str:
    """Why `model` is not packed exactly; empty where it is. Runs a few rows in evaluation mode."""
    window = attention_window(model.config)
    if window is not None and window > WIDEST_WINDOW:
        return (
            f"its attention window of {window} tokens is wider than the {WIDEST_WINDOW} that packing is tested for"
        )
    sequences = _trial(model, 12 if window is None else 2 * (window + 4))
    was_training = model.training
    model.eval()
    packed, apart = (run(model, sequences)[sequences.mask].float() for run in (hidden_packed, hidden))
    model.train(was_training)
    if torch.allclose(packed, apart, atol=TOLERANCE, rtol=TOLERANCE):
        return ""
    error = (packed - apart).abs().max().item()
    return f"states of packed rows differ by {error:.1e}: it does not keep sequences of a row apart by their positions"


def _trial(model: PreTrainedModel, longest: int) -> Tokens:
    """Random tokens that are packed into three rows of one, two and three sequences."""
    longest = min(longest, most_positions(model) or longest)
    half, quarter = longest // 2, longest // 4
    lengths = torch.tensor([quarter, half, longest, half, quarter, half])
    mask = torch.arange(longest) < lengths[:, None]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(model.config.get_text_config().vocab_size), mask.shape, generator=generator)
    return Tokens(ids * mask, mask).to(model.device)

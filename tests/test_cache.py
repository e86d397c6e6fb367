"""The decoding cache against tensors that are concatenated and indexed, and what is copied when rows end."""

from __future__ import annotations

import pytest
import torch

from families import build
from tiltlm.models.cache import NARROW, BufferLayer
from tiltlm.samplers.ancestral import _closed_up, draw
from tiltlm.samples import Tokens
from tiltlm.seeds import stream

CAPACITY = 40


@pytest.mark.parametrize("width", [NARROW // 8, NARROW // 8 + 1], ids=["narrow", "wide"])
def test_whatever_is_done_to_the_cache_it_holds_what_plain_tensors_hold(width):
    """Appended, taken back, rows repeated, dropped in place; keys are narrow enough to grow, or not; values are narrow."""
    random = torch.Generator().manual_seed(0)
    layer, keys, values = (
        BufferLayer(CAPACITY),
        torch.empty(5, 2, 0, width).double(),
        torch.empty(5, 2, 0, 3).double(),
    )
    for step in range(30):
        new = [
            torch.randn(len(x), 2, 1 + 2 * (step % 7 == 0), x.shape[3], generator=random).double()
            for x in (keys, values)
        ]
        found = layer.update(*new)
        keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
        assert torch.equal(found[0], keys) and torch.equal(found[1], values)
        if step % 5 == 1:
            index = torch.randint(len(keys), (8,), generator=random)
            layer.take_rows(index)
            keys, values = keys[index], values[index]
        if step % 5 == 3:
            layer.keep_first_rows(6, torch.tensor([0, 4]), torch.tensor([7, 6]))
            keys, values = (x[[7, 1, 2, 3, 6, 5]] for x in (keys, values))
        if step % 6 == 5:
            layer.length -= 1
            keys, values = keys[:, :, :-1], values[:, :, :-1]
    with pytest.raises(ValueError, match=f"holds {CAPACITY} tokens a row; {layer.length + 20} were written"):
        layer.update(*(torch.zeros(len(x), 2, 20, x.shape[3]).double() for x in (keys, values)))


def test_storage_grows_where_heads_are_narrow_and_is_made_once_where_they_are_wide():
    layer = BufferLayer(CAPACITY)
    layer.update(torch.zeros(1, 1, 3, NARROW // 4), torch.zeros(1, 1, 3, NARROW // 4 + 1))
    assert [store.shape[2] for store in layer.stores()] == [7, CAPACITY]


def test_gaps_are_filled_from_the_end():
    """Of six rows the second, third and last end: the fourth and fifth take the places of the second and third."""
    ended = torch.tensor([False, True, True, False, False, True])
    assert _closed_up(ended).tolist() == [0, 3, 4]
    assert _closed_up(torch.tensor([True, False, True, False])).tolist() == [3, 1]


def test_rows_that_end_leave_the_cache_in_place(monkeypatch):
    """`draw` copies whole caches once, to hand each prompt to its rows; log q is still what a pass over the rows says."""
    model = build("gpt2", torch.float64)
    model.eos_ids = tuple(range(8))
    taken, right = [], BufferLayer.take_rows
    monkeypatch.setattr(
        BufferLayer, "take_rows", lambda self, index: (taken.append(len(index)), right(self, index))
    )
    drawn = draw(model, Tokens.of([[9, 10], [11, 12, 13]]), n=20, max_new_tokens=6, stream=stream(0, "test-cache"))
    assert len(drawn.mask.sum(1).unique()) >= 4
    assert set(taken) == {40} and len(taken) == model.model.config.num_hidden_layers
    torch.testing.assert_close(drawn.log_q, model.log_prob(drawn), atol=1e-6, rtol=0)

"""A Hugging Face network's body behind a batch of prefixes: hidden states, a growing cache, and `peek`.

Two paths, one padding rule each:

- *scoring* (`hidden`): rows right-padded, no mask at all. Under causal attention no real token sees the
  padding behind it, so the fast unmasked kernel is exact. Prompts that several rows answer (the two sides of a
  pair, a group of draws) are run once, and their keys and values handed to all those rows, gradients included
  (`hidden_of`).
- *decoding* (`BackboneState`): rows moved to the right edge of the cache, so that the next token of every row
  is written in the same column and a sliding window sees no holes. The mask is left out when rows are equally
  long.

`position_ids` are passed wherever the network takes them: GPT-2 and GPT-Neo number positions without looking at the
mask, OPT with it. Networks for which one of these ways was found wrong (`Trust`) are run in a slower one that is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from tiltlm.models.body import attention_window, body_of, most_positions, recomputes, run_body, trust_of
from tiltlm.samples import Samples, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from tiltlm.models.cache import BufferLayer


class BodyState(Protocol):
    """N prefixes behind which a body stands.

    last [N, D] is the hidden state of each row's last token.
    """

    last: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens so far, int64 [N]."""

    def append(self, tokens: Tensor) -> None:
        """Extend row n by `tokens[n]`."""

    def select(self, index: Tensor) -> None:
        """Keep the rows at `index`, in its order."""

    def peek(self, candidates: Tensor) -> Tensor:
        """Hidden states of prefix n + candidates[n, k], [N, K, D]; the prefixes stay put."""


def fuse_activations(model: nn.Module) -> None:
    """Put torch's one-pass GELU in the place of transformers' `gelu_new`.

    The formula is the same, 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))); written out in eager mode it takes eight
    passes over the widest activations of the network and keeps most of them for the backward pass.
    """
    from transformers.activations import NewGELUActivation

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, nn.GELU(approximate="tanh"))


def hidden(model: PreTrainedModel, sequences: Tokens) -> Tensor:
    """Last hidden states of right-padded rows, [N, L, D]; what stands at padding is meaningless."""
    if trust_of(model).padding or bool((sequences.lengths == sequences.ids.shape[1]).all()):
        return _right_padded(model, sequences.ids)
    return _by_length(model, sequences)


def _right_padded(model: PreTrainedModel, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return run_body(body_of(model), ids, positions if trust_of(model).positions else None)


def _by_length(model: PreTrainedModel, sequences: Tokens) -> Tensor:
    """`hidden` without any padding: rows of one length together, one forward pass per length."""
    states: Tensor | None = None
    for length in sequences.lengths.unique().tolist():
        rows = (sequences.lengths == length).nonzero()
        if length == 0:
            continue
        part = _right_padded(model, sequences.ids[rows[:, 0], :length])
        if states is None:
            states = part.new_zeros(*sequences.ids.shape, part.shape[2])
        states = states.index_put((rows, torch.arange(length, device=rows.device)), part)
    if states is None:
        raise ValueError("there is nothing to run: every row is empty")
    return states


def hidden_of(model: PreTrainedModel, samples: Samples, apart: Callable[..., Tensor] = hidden) -> Tensor:
    """`hidden` of `samples.sequences()`, [N, L, D], running a prompt that several rows answer only once.

    L is at least the longest row's length, and may be more; columns that every row pads cost nothing. Sharing costs
    the memory of a decoding cache of the same rows. Where prompts have fewer than two rows each on average, or long ragged
    completions would cost more than is saved, nothing is shared, and `apart` (as `hidden`) runs the rows. Prompts of the
    same tokens are one (in infilling they differ by their conditions alone).
    """
    used, row = samples.prompt_index.unique(return_inverse=True)
    prompts, which = _distinct(samples.prompts.select(used).cropped())
    row = which[row]
    completions = samples.completions.cropped()
    worth = 0 < 2 * len(prompts) <= len(samples) and _saves(prompts, row, completions)
    if worth and _can_share(model, prompts, completions.ids.shape[1]):
        return _behind_shared_prompts(model, prompts, row, completions)
    return apart(model, samples.sequences())


def _distinct(prompts: Tokens) -> tuple[Tokens, Tensor]:
    """The different rows of `prompts`, without conditions, and which of them each row is."""
    if len(prompts) < 2:
        return prompts, torch.arange(len(prompts), device=prompts.device)
    rows, which = torch.where(prompts.mask, prompts.ids, -1).unique(dim=0, return_inverse=True)
    if len(rows) == len(prompts):
        return prompts, torch.arange(len(prompts), device=prompts.device)
    return Tokens(rows.clamp_min(0), rows >= 0), which


def _saves(prompts: Tokens, row: Tensor, completions: Tokens) -> bool:
    """Whether sharing runs at most nine tenths of the positions, padding counted, that rows apart would."""
    longest = int((prompts.lengths[row] + completions.lengths).max())
    return 10 * (prompts.ids.numel() + completions.ids.numel()) <= 9 * len(row) * longest


def _can_share(model: PreTrainedModel, prompts: Tokens, new: int) -> bool:
    """Networks that recompute activations take no cache, and padding must not run past the last position."""
    trust, width = trust_of(model), prompts.ids.shape[1] + new
    fits = width <= (most_positions(model) or width)
    return (
        trust.sharing
        and trust.caches(width)
        and new > 0
        and fits
        and not recomputes(model)
        and int(prompts.lengths.min()) > 0
    )


def _behind_shared_prompts(model: PreTrainedModel, prompts: Tokens, row: Tensor, completions: Tokens) -> Tensor:
    """States of prompts[row] followed by completions, right-padded as `followed_by` would have them."""
    from transformers.cache_utils import Cache, DynamicLayer

    cache = Cache(layer_class_to_replicate=DynamicLayer)
    ids, positions, mask = _at_right_edge(prompts)
    first = _cached_forward(model, ids, positions, mask, cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[row], layer.values[row]  # type: ignore[index, union-attr]
    positions = prompts.lengths[row, None] + torch.arange(completions.ids.shape[1], device=ids.device)
    if mask is not None:
        mask = torch.cat([mask[row], torch.ones_like(completions.mask)], 1)
    then = _cached_forward(model, completions.ids, positions, mask, cache)
    states = torch.cat([first[row], then], 1)
    if mask is None:
        return states
    width = states.shape[1]
    source = torch.arange(width, device=ids.device) + (ids.shape[1] - prompts.lengths)[row, None]
    return states.gather(1, source.clamp_max(width - 1)[:, :, None].expand_as(states))


def _cached_forward(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache
) -> Tensor:
    return run_body(body_of(model), ids, positions if trust_of(model).positions else None, mask, cache)


def check_room(model: PreTrainedModel, prompts: Tokens, capacity: int) -> None:
    """Raises ValueError for an empty prompt, and where prompt and new tokens exceed the network's positions."""
    width, limit = prompts.ids.shape[1], most_positions(model)
    if width == 0 or int(prompts.lengths.min()) == 0:
        raise ValueError("a prompt is empty: a causal LM needs at least one token (a start token, say) to begin")
    if limit is not None and width + capacity > limit:
        raise ValueError(f"prompt ({width}) plus new tokens ({capacity}) exceed the model's {limit} positions")


class BackboneState:
    """N prefixes behind which the body stands, with `last` [N, D], the hidden state of each row's last token."""

    def __init__(self, model: PreTrainedModel, prompts: Tokens, capacity: int) -> None:
        from transformers.cache_utils import Cache

        from tiltlm.models.cache import BufferLayer

        check_room(model, prompts, capacity)
        self.model, width = model, prompts.ids.shape[1]
        prompts, which = _distinct(prompts)
        self.lengths = prompts.lengths
        self.window = attention_window(model.config)
        self._spare = 0  # columns of cache left over for peeking, grown on the first peek
        self.cache: Cache = Cache(layer_class_to_replicate=lambda: BufferLayer(width + capacity))  # type: ignore[arg-type]
        ids, positions, self.mask = _at_right_edge(prompts)
        self.last = self._forward(ids, positions, self.mask)[:, -1]
        self._peeked: tuple[Tensor, Tensor] | None = None  # candidates [N, K] and their hidden states [N, K, D]
        if len(which) > len(prompts):
            self.select(which)

    @property
    def layers(self) -> list[BufferLayer]:
        return self.cache.layers  # type: ignore[return-value]

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        return _cached_forward(self.model, ids, positions, mask, self.cache)

    def append(self, tokens: Tensor) -> None:
        """Extend row n by `tokens[n]`; free if it was among the candidates just peeked at."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        if not self._append_peeked(tokens):
            self.last = self._forward(tokens[:, None], self.lengths[:, None], self.mask)[:, -1]
        self.lengths = self.lengths + 1
        self._peeked = None

    def _append_peeked(self, tokens: Tensor) -> bool:
        if self._peeked is None:
            return False
        candidates, states = self._peeked
        found = candidates == tokens[:, None]
        if not bool(found.any(1).all()):
            return False
        column = found.to(torch.int64).argmax(1)
        for layer in self.layers:
            layer.keep_column(column)
        self.last = states[torch.arange(len(tokens), device=tokens.device), column]
        return True

    def peek(self, candidates: Tensor) -> Tensor:
        """Hidden states of prefix n + candidates[n, k], [N, K, D], in ONE forward; the prefixes stay put.

        All candidates of a row carry the same position id and see the prefix and themselves, not each other.
        """
        n, k = candidates.shape
        beyond = self.window is not None and self.layers[0].length + k > self.window
        if beyond or not trust_of(self.model).peek:
            return self._peek_in_rows(candidates)
        self._make_room(k)
        length = self.layers[0].length
        seen = torch.ones(n, 1, k, length + k, dtype=torch.bool, device=candidates.device)
        if self.mask is not None:
            seen[..., :length] = self.mask[:, None, None, :]
        seen[..., length:] = torch.eye(k, dtype=torch.bool, device=candidates.device)
        states = self._forward(candidates, self.lengths[:, None].expand(n, k), self._float_mask(seen))
        for layer in self.layers:
            layer.length = length
        self._peeked = (candidates, states)
        return states

    def _peek_in_rows(self, candidates: Tensor) -> Tensor:
        """`peek` where one pass would not do, a window of attention counted in columns, say: a row for each candidate."""
        n, k = candidates.shape
        rows = torch.arange(n, device=candidates.device).repeat_interleave(k)
        kept = [(layer.length, *layer.stores()) for layer in self.layers]
        for layer in self.layers:
            layer.take_rows(rows)
        mask = None if self.mask is None else torch.nn.functional.pad(self.mask[rows], (0, 1), value=True)
        states = self._forward(candidates.reshape(-1, 1), self.lengths[rows, None], mask)
        for layer, (length, keys, values) in zip(self.layers, kept, strict=True):
            layer.length, layer.key_store, layer.value_store = length, keys, values
        return states.reshape(n, k, -1)

    def _float_mask(self, seen: Tensor) -> Tensor:
        """Additive form of a boolean mask: what both eager and fused attention accept."""
        zeros = torch.zeros(seen.shape, dtype=self.last.dtype, device=seen.device)
        return zeros.masked_fill_(~seen, torch.finfo(self.last.dtype).min)

    def _make_room(self, k: int) -> None:
        if k <= self._spare:
            return
        for layer in self.layers:
            layer.capacity += k - self._spare
        self._spare = k

    def select(self, index: Tensor) -> None:
        """Keep the rows at `index`, in its order; nothing but rows that change their place is copied, where all of those
        come from behind the ones kept (as `draw` drops rows)."""
        n = len(index)
        to = (index != torch.arange(n, device=index.device)).nonzero()[:, 0]
        source = index[to]
        if n <= len(self.lengths) and bool((source >= n).all()):
            for layer in self.layers:
                layer.keep_first_rows(n, to, source)
        else:
            for layer in self.layers:
                layer.take_rows(index)
        self.lengths, self.last = self.lengths[index], self.last[index]
        self.mask = None if self.mask is None else self.mask[index]
        self._peeked = None


def _at_right_edge(prompts: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows moved to the right edge: ids, position ids and mask (None where rows are equally long)."""
    width, lengths = prompts.ids.shape[1], prompts.lengths
    positions = torch.arange(width, device=prompts.device) - (width - lengths)[:, None]
    if bool(prompts.mask.all()):
        return prompts.ids, positions, None
    return _left_padded(prompts.ids, lengths), positions.clamp_min(0), _left_padded(prompts.mask, lengths)


def _left_padded(x: Tensor, lengths: Tensor) -> Tensor:
    """Right-padded rows [N, L] shifted to the right edge; zeros (False) in front."""
    width = x.shape[1]
    source = torch.arange(width, device=x.device) - (width - lengths)[:, None]
    return torch.where(source >= 0, x.gather(1, source.clamp_min(0)), torch.zeros_like(x))

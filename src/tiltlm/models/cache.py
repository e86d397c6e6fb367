"""Keys and values of one layer, in storage that is written in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 4
"""Columns that growing storage has to spare, at least, when it is made."""

NARROW = 128
"""Bytes of one head's keys in one column, up to which storage on a CPU grows."""


class BufferLayer(DynamicLayer):
    """One layer's keys and values, at most `capacity` columns of them.

    transformers' own dynamic layer copies the whole cache at every token; this one writes in place and hands
    out views, which also makes taking tokens back (`length = …`) free. (States with a gradient are copied after all.)

    Storage is allocated once, for `capacity` columns. Where heads are narrow, on a CPU, it grows by an eighth, or `ROOM`
    columns, at a time: short runs of memory with wide gaps between them are read at half the speed of runs that lie
    close together. Wide heads gain less from that than the copies cost.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0
        self.key_store: Tensor | None = None
        self.value_store: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens a row; {end} were written: start with more")
        if self.key_store is None or self.value_store is None:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            states = (key_states, value_states)
            self.key_store, self.value_store = (_empty(x, len(x), self._columns(x, end)) for x in states)
        if key_states.requires_grad or value_states.requires_grad:
            return self._joined(key_states, value_states)
        self.key_store, self.value_store = (self._with_room(store, end) for store in self.stores())
        self.key_store[:, :, self.length : end] = key_states
        self.value_store[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self.key_store[:, :, :end], self.value_store[:, :, :end]
        return self.keys, self.values

    def _joined(self, *states: Tensor) -> tuple[Tensor, Tensor]:
        """`update` with what has a gradient, in new storage: the backward pass reads the old one as it was."""
        held = zip(self.stores(), states, strict=True)
        self.keys, self.values = (torch.cat([store[:, :, : self.length], new], 2) for store, new in held)
        self.key_store, self.value_store, self.length = self.keys, self.values, self.keys.shape[2]
        return self.keys, self.values

    def _columns(self, like: Tensor, needed: int) -> int:
        """Of storage that must hold `needed` columns."""
        grows = like.device.type == "cpu" and like.shape[-1] * like.element_size() <= NARROW
        return min(self.capacity, needed + max(ROOM, needed // 8)) if grows else self.capacity

    def _with_room(self, store: Tensor, needed: int) -> Tensor:
        """`store`, or a wider copy of it, where it holds fewer than `needed` columns."""
        if store.shape[2] >= needed:
            return store
        fresh = _empty(store, len(store), self._columns(store, needed))
        fresh[:, :, : self.length] = store[:, :, : self.length]
        return fresh

    def get_seq_length(self) -> int:
        return self.length

    def stores(self) -> tuple[Tensor, Tensor]:
        if self.key_store is None or self.value_store is None:
            raise RuntimeError("the cache is empty: prefill first")
        return self.key_store, self.value_store

    def take_rows(self, index: Tensor) -> None:
        """Rows at `index`, in its order; only the columns in use are copied."""
        stores = []
        for store in self.stores():
            fresh = _empty(store, len(index), store.shape[2])
            fresh[:, :, : self.length] = store[:, :, : self.length].index_select(0, index)
            stores.append(fresh)
        self.key_store, self.value_store = stores

    def keep_first_rows(self, n: int, to: Tensor, source: Tensor) -> None:
        """The first `n` rows, with rows at `source`, from behind them, in the places `to`; the others stay as they are."""
        for store in self.stores():
            store[to, :, : self.length] = store[source, :, : self.length]
        self.key_store, self.value_store = (store[:n] for store in self.stores())

    def keep_column(self, column: Tensor) -> None:
        """Of the columns written beyond `length`, keep row n's column `length + column[n]` as the next one."""
        kept = []
        for store in self.stores():
            place = (self.length + column)[:, None, None, None].expand(-1, store.shape[1], 1, store.shape[3])
            kept.append(store.gather(2, place))
        if any(states.requires_grad for states in kept):
            self._joined(*kept)
            return
        for store, states in zip(self.stores(), kept, strict=True):
            store[:, :, self.length] = states[:, :, 0]
        self.length += 1


def _empty(like: Tensor, rows: int, columns: int) -> Tensor:
    _, heads, _, width = like.shape
    return like.new_empty(rows, heads, columns, width)

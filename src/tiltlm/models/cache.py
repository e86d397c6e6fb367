"""Keys and values of one layer, in storage that is allocated once and written in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class BufferLayer(DynamicLayer):
    """One layer's keys and values in storage allocated once for `capacity` columns.

    transformers' own dynamic layer copies the whole cache at every token; this one writes in place and hands
    out views, which also makes taking tokens back (`length = …`) free.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0
        self.key_store: Tensor | None = None
        self.value_store: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.key_store is None or self.value_store is None:
            self.key_store, self.value_store = self._empty(key_states), self._empty(value_states)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        end = self.length + key_states.shape[-2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens a row; {end} were written: start with more")
        self.key_store[:, :, self.length : end] = key_states
        self.value_store[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self.key_store[:, :, :end], self.value_store[:, :, :end]
        return self.keys, self.values

    def _empty(self, states: Tensor) -> Tensor:
        n, heads, _, width = states.shape
        return states.new_empty(n, heads, self.capacity, width)

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
            fresh = store.new_empty(len(index), store.shape[1], self.capacity, store.shape[3])
            fresh[:, :, : self.length] = store[:, :, : self.length].index_select(0, index)
            stores.append(fresh)
        self.key_store, self.value_store = stores

    def keep_column(self, column: Tensor) -> None:
        """Of the columns written beyond `length`, keep row n's column `length + column[n]` as the next one."""
        for store in self.stores():
            place = (self.length + column)[:, None, None, None].expand(-1, store.shape[1], 1, store.shape[3])
            store[:, :, self.length] = store.gather(2, place)[:, :, 0]
        self.length += 1

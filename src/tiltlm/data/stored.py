"""`Tokens` and `Samples` whose rows lie in Arrow files and are read when they are selected.

    tokens.select(index)     a batch: real `Tokens`, padded as those in memory would be; many rows at once stay in the file
    samples.select(index)    likewise, with the prompts of these rows alone

So a training step reads its own rows, and memory does not grow with the data. Whoever asks for a whole tensor (`ids`,
`tokens`, `log_ref`, …) gets it, in memory: everything that takes `Tokens` or `Samples` works.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltlm.data.arrow import Part, Ragged, flat_columns, write_parts
from tiltlm.samples import Samples, Tokens

MANY = 5_000
"""Rows that are held in memory, at most: some 50 MB of prompts and pairs of 512 tokens."""


@lru_cache(maxsize=4)
def _every(n: int) -> Tensor:
    """0 … n−1, int64: one for all columns of as many rows, for it is the largest thing that is held of them."""
    return torch.arange(n)


@dataclass(frozen=True)
class Picked:
    """Rows int64 [n] of stored lists, padded to `width` where they are read."""

    source: Ragged
    rows: Tensor
    width: int

    @staticmethod
    def whole(source: Ragged, width: int | None = None) -> Picked:
        """All rows; width: that of the longest, unless it is named."""
        return Picked(source, _every(len(source)), int(source.lengths.max()) if width is None else width)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Tensor:
        return self.source.lengths[self.rows].long()

    def at(self, index: Tensor | slice) -> Picked:
        return replace(self, rows=self.rows[index])

    def read(self) -> tuple[Tensor, Tensor]:
        """(numbers, mask), [n, width] each."""
        return self.source.padded(self.rows, self.width)

    def above(self, other: Picked) -> Picked:
        """These rows, then the other ones."""
        rows, width = other.rows, max(self.width, other.width)
        if self.source == other.source:
            return Picked(self.source, torch.cat([self.rows, rows]), width)
        both = Ragged((*self.source.paths, *other.source.paths), self.source.column)
        return Picked(both, torch.cat([self.rows, rows + len(self.source)]), width)


def _set(self: Any, **values: Any) -> None:
    """Fill a frozen dataclass."""
    for name, value in values.items():
        object.__setattr__(self, name, value)


class StoredTokens(Tokens):
    """Tokens in files; `device` is where they come to when they are read."""

    picked: Picked

    def __init__(self, picked: Picked, device: torch.device | str = "cpu") -> None:
        _set(self, picked=picked, _device=torch.device(device))

    def _read(self) -> Tokens:
        return Tokens(*(x.to(self.device) for x in self.picked.read()))

    @property
    def ids(self) -> Tensor:
        return self._read().ids

    @property
    def mask(self) -> Tensor:
        return self._read().mask

    def __len__(self) -> int:
        return len(self.picked)

    @property
    def lengths(self) -> Tensor:
        return self.picked.lengths.to(self.device)

    @property
    def device(self) -> torch.device:
        return self._device  # type: ignore[attr-defined]

    def select(self, index: Tensor | slice) -> Tokens:
        found = StoredTokens(self.picked.at(_cpu(index)), self.device)
        return found if len(found) > MANY else found._read()

    def same_as(self, other: Tokens) -> bool:
        if not isinstance(other, StoredTokens):
            return super().same_as(other)
        a, b = self.picked, other.picked
        return a is b or ((a.source, a.width) == (b.source, b.width) and torch.equal(a.rows, b.rows))

    def to(self, device: torch.device | str) -> Tokens:
        return StoredTokens(self.picked, device)

    def cropped(self) -> Tokens:
        return StoredTokens(replace(self.picked, width=int(self.lengths.max()) if len(self) else 0), self.device)

    def parts(self, size: int) -> Iterator[Tokens]:
        """All rows, `size` at a time, in memory."""
        return (self.select(slice(k, k + size)) for k in range(0, len(self), size))

    def lists(self) -> list[list[int]]:
        return [row for part in self.parts(MANY) for row in part.lists()]

    def __reduce__(self) -> Any:
        return StoredTokens, (self.picked, self.device)


class StoredSamples(Samples):
    """Samples in files: `done` are the completions, `known` what is one number a row [N], `referred` the log_ref."""

    done: Picked
    known: Mapping[str, Tensor]
    referred: Picked | None

    def __init__(
        self, prompts: Tokens, prompt_index: Tensor, done: Picked, known: Mapping[str, Tensor],
        referred: Picked | None = None, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        empty = {f.name: None for f in fields(Samples) if f.default is None and f.name != "log_ref"}
        _set(self, prompts=prompts, prompt_index=prompt_index, done=done, known=known, referred=referred)
        _set(self, _device=torch.device(device), **(empty | dict(known)))

    @cached_property
    def completions(self) -> Tokens:
        return StoredTokens(self.done, self.device)

    @property
    def tokens(self) -> Tensor:
        return self.completions.ids

    @property
    def mask(self) -> Tensor:
        return self.completions.mask

    @property
    def log_ref(self) -> Tensor | None:
        return None if self.referred is None else self.referred.read()[0].to(self.device)

    def __len__(self) -> int:
        return len(self.done)

    @property
    def device(self) -> torch.device:
        return self._device  # type: ignore[attr-defined]

    def optional(self) -> dict[str, Tensor]:
        log_ref = self.log_ref
        return dict(self.known) if log_ref is None else {**self.known, "log_ref": log_ref}

    def select(self, index: Tensor | slice) -> Samples:
        """The rows at `index`, with their own prompts alone; many of them stay where they are, with all prompts."""
        rows = _every(len(self))[_cpu(index)]
        known = {name: value[rows.to(value.device)] for name, value in self.known.items()}
        referred = None if self.referred is None else self.referred.at(rows)
        asked, done = self.prompt_index[rows.to(self.prompt_index.device)], self.done.at(rows)
        if len(rows) > MANY:
            return StoredSamples(self.prompts, asked, done, known, referred, self.device)
        used, place = asked.unique(return_inverse=True)
        log_ref = {} if referred is None else {"log_ref": referred.read()[0].to(self.device)}
        tokens = StoredTokens(done, self.device)._read()
        return Samples(
            self.prompts.select(used), place.to(self.device), tokens.ids, tokens.mask, **known, **log_ref
        )

    def above(self, other: Samples) -> Samples:
        if not (isinstance(other, StoredSamples) and self.prompts.same_as(other.prompts)):
            return super().above(other)
        known = {name: torch.cat([x, other.known[name]]) for name, x in self.known.items() if name in other.known}
        both = self.referred is not None and other.referred is not None
        referred = self.referred.above(other.referred) if both else None  # type: ignore[union-attr,arg-type]
        index = torch.cat([self.prompt_index, other.prompt_index])
        return StoredSamples(self.prompts, index, self.done.above(other.done), known, referred, self.device)

    def to(self, device: torch.device | str) -> Samples:
        known = {name: value.to(device) for name, value in self.known.items()}
        prompts, index = self.prompts.to(device), self.prompt_index.to(device)
        return StoredSamples(prompts, index, self.done, known, self.referred, device)

    def with_(self, **values: Tensor | None) -> Samples:
        flat = {name: x for name, x in values.items() if x is None or x.shape == (len(self),)}
        if len(flat) < len(values):
            return self.loaded().with_(**values)
        known = {name: x for name, x in {**self.known, **flat}.items() if x is not None}
        return StoredSamples(self.prompts, self.prompt_index, self.done, known, self.referred, self.device)

    def with_log_ref(self, referred: Ragged) -> StoredSamples:
        """The same with the reference's log-probabilities, row by row as they are here."""
        found = Picked.whole(referred, self.done.width)
        return StoredSamples(self.prompts, self.prompt_index, self.done, self.known, found, self.device)

    def loaded(self) -> Samples:
        """Everything in memory."""
        prompts = Tokens(self.prompts.ids, self.prompts.mask)
        return Samples(prompts, self.prompt_index, self.tokens, self.mask, **self.optional())

    def __reduce__(self) -> Any:
        return StoredSamples, (self.prompts, self.prompt_index, self.done, self.known, self.referred, self.device)


def _cpu(index: Tensor | slice) -> Tensor | slice:
    return index if isinstance(index, slice) else index.cpu()


# ---- files ------------------------------------------------------------------------------------------------------


def store_tokens(path: Path, parts: Iterable[Tokens]) -> None:
    """Write tokens to a file, part by part."""
    write_parts(path, ({"ids": (part.ids, part.mask)} for part in parts))


def open_tokens(path: Path) -> StoredTokens:
    """What `store_tokens` wrote."""
    return StoredTokens(Picked.whole(Ragged((path,), "ids")))


def store_samples(path: Path, parts: Iterable[tuple[int, Samples]]) -> None:
    """Write completions to a file, part by part; each with the number that its first prompt has among all."""

    def columns(begin: int, samples: Samples) -> Part:
        done = samples.completions
        flat = {name: x for name, x in samples.optional().items() if x.ndim == 1}
        return {"ids": (done.ids, done.mask), "prompt": samples.prompt_index + begin, **flat}

    write_parts(path, (columns(*part) for part in parts))


def open_samples(path: Path, prompts: Tokens) -> StoredSamples:
    """What `store_samples` wrote, as answers to `prompts`."""
    known = flat_columns(path, leave=("ids",))
    return StoredSamples(prompts, known.pop("prompt"), Picked.whole(Ragged((path,), "ids")), known)

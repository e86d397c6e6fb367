"""Rows of numbers of unequal length in Arrow files: written a part at a time, memory-mapped, read by number.

A file is in Arrow's IPC format, a record batch a part, so whatever reads Arrow reads it (`pyarrow.ipc.open_file`). Of a
file of any size a process holds next to nothing: where rows stand is looked up in the file too, and the pages that were
touched are given back once the rows are copied. They stay with the system, where whoever reads next finds them.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Part = Mapping[str, Tensor | tuple[Tensor, Tensor]]
"""Some rows: column -> one number a row [n], or (numbers [n, T], mask [n, T]), of which those under the mask are kept."""


def write_parts(path: Path, parts: Iterable[Part]) -> None:
    """A file of all parts' rows, written aside first: a reader never sees half of it. Raises ValueError without a part."""
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # processes side by side do not share it
    writer: Any = None
    try:
        with pyarrow.OSFile(str(aside), "wb") as file:
            for part in parts:
                batch = pyarrow.record_batch({name: _column(values) for name, values in part.items()})
                writer = writer or pyarrow.ipc.new_file(file, batch.schema)
                writer.write_batch(batch)
            if writer is None:
                raise ValueError(f"{path}: there are no rows to write")
            writer.close()
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def _column(values: Tensor | tuple[Tensor, Tensor]) -> Any:
    import pyarrow

    if isinstance(values, Tensor):
        return pyarrow.array(values.cpu().numpy())
    numbers, mask = (x.cpu() for x in values)
    flat = numbers[mask]
    flat = flat.to(torch.int32) if flat.dtype == torch.int64 else flat
    ends = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(ends.numpy()), pyarrow.array(flat.numpy()))


def flat_columns(path: Path, leave: Sequence[str] = ()) -> dict[str, Tensor]:
    """The columns of a file that hold one number a row, in memory; those named in `leave` are left out."""
    reader, found = _opened(path)[1], {}
    for name in reader.schema.names:
        if name not in leave:
            parts = [reader.get_batch(k).column(name) for k in range(reader.num_record_batches)]
            found[name] = torch.cat([torch.from_numpy(x.to_numpy(zero_copy_only=False).copy()) for x in parts])
    return found


def _opened(path: Path) -> tuple[mmap.mmap, Any]:
    """A file as it is mapped, and its reader. Raises ValueError for what is no whole Arrow file."""
    import pyarrow

    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return mapped, pyarrow.ipc.open_file(pyarrow.py_buffer(mapped))
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise ValueError(
            f"{path}: not a whole Arrow file ({error}); remove it, and the same command makes it again"
        ) from None


def _give_back(mapped: mmap.mmap) -> None:
    """Let go of a map's pages: a row that is read maps those around it as well, and an epoch would hold the whole file."""
    if sys.platform != "win32":
        mapped.madvise(mmap.MADV_DONTNEED)


AT_ONCE = 256
"""Rows that are read before their pages are given back: some 16 MB of them, for the system maps 64 kB around a row."""


@dataclass(frozen=True)
class _Part:
    """A column of a record batch: row k is values[offsets[k]:offsets[k + 1]]."""

    mapped: mmap.mmap
    offsets: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Ragged:
    """The rows of a column of lists, of files one behind the other."""

    paths: tuple[Path, ...]
    column: str

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __reduce__(self) -> Any:
        return Ragged, (self.paths, self.column)  # another process maps the files anew

    @cached_property
    def _parts(self) -> list[_Part]:
        found = []
        for mapped, reader in map(_opened, self.paths):
            for k in range(reader.num_record_batches):
                lists = reader.get_batch(k).column(self.column)
                found.append(_Part(mapped, lists.offsets.to_numpy(), lists.values.to_numpy()))
        return found

    @cached_property
    def _ends(self) -> np.ndarray:
        """How many rows there are up to the end of each part."""
        return np.cumsum([len(part.offsets) - 1 for part in self._parts])

    @property
    def lengths(self) -> Tensor:
        """Numbers in every row, int32 [N]."""
        found = torch.from_numpy(np.concatenate([np.diff(part.offsets) for part in self._parts]))
        for part in self._parts:
            _give_back(part.mapped)
        return found

    def padded(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(numbers [n, width], mask bool [n, width]) of the rows int64 [n], right-padded with 0; ids are int64."""
        parts = [self._read(some.numpy()) for some in rows.split(AT_ONCE)]
        flat, lengths = (torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True))
        flat = flat.long() if flat.dtype == torch.int32 else flat
        mask = torch.arange(width)[None, :] < lengths[:, None]
        out = torch.zeros(len(rows), width, dtype=flat.dtype)
        out[mask] = flat
        return out, mask

    def _read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of some rows, one behind the other, and how many each has."""
        numbers = np.searchsorted(self._ends, rows, side="right")
        places = rows - np.concatenate([[0], self._ends])[numbers]
        holders = [self._parts[k] for k in numbers.tolist()]
        pieces = [
            part.values[part.offsets[k] : part.offsets[k + 1]]
            for part, k in zip(holders, places.tolist(), strict=True)
        ]
        found = np.concatenate([self._parts[0].values[:0], *pieces])
        for mapped in {part.mapped for part in holders}:
            _give_back(mapped)
        return found, np.array([len(piece) for piece in pieces], dtype=np.int64)

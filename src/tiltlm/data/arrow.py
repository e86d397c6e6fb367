"""Rows of numbers of unequal length in Arrow files: written a part at a time, memory-mapped, read by number.

A file is in Arrow's IPC format, a record batch a part, so whatever reads Arrow reads it (`pyarrow.ipc.open_file`). Pages of
a mapped file belong to the system, which several processes share and which takes them back when it needs them: of a file of
any size a process holds 16 bytes a row, where it stands and how long it is.
"""

from __future__ import annotations

import os
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
    reader, found = _opened(path), {}
    for name in reader.schema.names:
        if name not in leave:
            parts = [reader.get_batch(k).column(name) for k in range(reader.num_record_batches)]
            found[name] = torch.cat([torch.from_numpy(x.to_numpy(zero_copy_only=False).copy()) for x in parts])
    return found


def _opened(path: Path) -> Any:
    """A reader of a file. Raises ValueError for what is no whole Arrow file."""
    import pyarrow

    try:
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"{path}: not a whole Arrow file ({error}); remove it, and the same command makes it again"
        ) from None


@dataclass(frozen=True)
class Ragged:
    """The rows of a column of lists, of files one behind the other."""

    paths: tuple[Path, ...]
    column: str

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> Any:
        return Ragged, (self.paths, self.column)  # another process maps the files anew

    @cached_property
    def _lists(self) -> list[Any]:
        readers = [_opened(path) for path in self.paths]
        return [
            reader.get_batch(k).column(self.column) for reader in readers for k in range(reader.num_record_batches)
        ]

    @cached_property
    def _values(self) -> list[np.ndarray]:
        return [each.values.to_numpy() for each in self._lists]

    @cached_property
    def _begins(self) -> np.ndarray:
        return np.concatenate([each.offsets.to_numpy()[:-1] for each in self._lists])

    @cached_property
    def _holders(self) -> np.ndarray:
        return np.repeat(np.arange(len(self._lists), dtype=np.int32), [len(each) for each in self._lists])

    @cached_property
    def lengths(self) -> Tensor:
        """Numbers in every row, int32 [N]."""
        return torch.from_numpy(np.concatenate([np.diff(each.offsets.to_numpy()) for each in self._lists]))

    def padded(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(numbers [n, width], mask bool [n, width]) of the rows int64 [n], right-padded with 0; ids are int64."""
        lengths = self.lengths[rows]
        mask = torch.arange(width)[None, :] < lengths[:, None]
        begins, holders = self._begins[rows.numpy()], self._holders[rows.numpy()]
        pieces = [
            self._values[k][begin : begin + n]
            for k, begin, n in zip(holders.tolist(), begins.tolist(), lengths.tolist(), strict=True)
        ]
        flat = torch.from_numpy(np.concatenate(pieces)) if pieces else torch.zeros(0, dtype=torch.int32)
        flat = flat.long() if flat.dtype == torch.int32 else flat
        out = torch.zeros(len(rows), width, dtype=flat.dtype)
        out[mask] = flat
        return out, mask

"""Tensors in files: equal content is equal bytes, and what cannot be read or written is said in one line.

safetensors writes several metadata keys in an order that changes from process to process; here all notes are one key that
holds sorted JSON. Files with a key for every note, as they were written before, are read as well.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

NOTES = "tiltlm"
"""The metadata key that holds all notes."""


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, notes: Mapping[str, str] | None = None) -> None:
    """Write named tensors (any device) and `notes` to a safetensors file. Raises OSError where it cannot be written."""
    plain: dict[str, Tensor] = {}
    for name, x in tensors.items():  # the format refuses tensors that share memory
        own = x.detach().cpu().contiguous()
        shared = own.untyped_storage().data_ptr() in {y.untyped_storage().data_ptr() for y in plain.values()}
        plain[name] = own.clone() if shared else own
    with writing(path):
        save_file(plain, str(path), {NOTES: json.dumps(notes, sort_keys=True)} if notes else None)


def load_tensors(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises FileNotFoundError, or ValueError for a file that is none or is cut."""
    with _reading(path):
        return load_file(str(path), device=str(device))


def length_of(path: str | Path, name: str) -> int:
    """The first dimension of the tensor called `name`, read off the header."""
    with _reading(path), safe_open(str(path), "pt") as file:
        return int(file.get_slice(name).get_shape()[0])


def notes_of(path: str | Path) -> dict[str, str]:
    """The notes in a file's header."""
    with _reading(path), safe_open(str(path), "pt") as file:
        found: dict[str, Any] = file.metadata() or {}
    return json.loads(found[NOTES]) if NOTES in found else found


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Within, only `path` is written, by a library that hides the system's error in its own: raises the OSError."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        number = _number(error)
        raise OSError(number, os.strerror(number), str(path)) from error
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _number(error: BaseException) -> int:
    """The system's error number behind `error`: of an OSError it came from, or named in its text."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.errno:
            return behind.errno
        if found := re.search(r"os error (\d+)", str(behind)):
            return int(found[1])
        behind = behind.__context__
    return errno.EIO


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); remove it, and what wrote it makes it again"
        ) from None

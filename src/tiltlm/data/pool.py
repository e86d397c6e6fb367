"""Rows that are read once and written in another order: a line each in a file, and in memory where it stands."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np


class Pool:
    """Rows of {prompt, …, perhaps label}, kept as lines of a file in `folder` that goes when the pool does.

    prompts   a hash of every distinct prompt -> its number, in the order of their first rows
    """

    def __init__(self, folder: Path, rows: Iterable[dict[str, Any]]) -> None:
        self.file = TemporaryFile(dir=folder)  # noqa: SIM115
        self.prompts: dict[bytes, int] = {}
        self._begins, self._numbers, self._labels = array("q"), array("q"), array("b")
        at = 0
        for row in rows:
            line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
            prompt = hashlib.blake2b(row["prompt"].encode(), digest_size=16).digest()
            self._begins.append(at)
            self._numbers.append(self.prompts.setdefault(prompt, len(self.prompts)))
            self._labels.append(int(row["label"]) if "label" in row else -1)
            at += self.file.write(line)

    def __len__(self) -> int:
        return len(self._begins)

    @cached_property
    def _by_prompt(self) -> tuple[np.ndarray, np.ndarray]:
        """All rows' numbers, those of a prompt side by side, and where those of each prompt begin."""
        numbers = np.asarray(self._numbers)
        order = np.argsort(numbers, kind="stable")
        return order, np.searchsorted(numbers[order], np.arange(len(self.prompts) + 1))

    def of(self, prompt: int) -> list[int]:
        """The rows of a prompt, in their order."""
        order, begins = self._by_prompt
        found: list[int] = order[begins[prompt] : begins[prompt + 1]].tolist()
        return found

    def first(self, prompt: int) -> int:
        """The first row of a prompt."""
        order, begins = self._by_prompt
        return int(order[begins[prompt]])

    def prompt(self, row: int) -> int:
        """The number of a row's prompt."""
        return self._numbers[row]

    def label(self, row: int) -> bool | None:
        """A row's label; None where it has none."""
        return None if self._labels[row] < 0 else bool(self._labels[row])

    def lines(self, rows: Iterable[int]) -> Iterator[str]:
        """The lines of these rows."""
        for row in rows:
            self.file.seek(self._begins[row])
            yield self.file.readline().decode()

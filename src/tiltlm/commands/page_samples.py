"""The report page's samples: some of every run, read and written one by one, and where the rest is.

Of a run with more samples than the page shows, half of those shown are drawn at random, for a fair picture, and a quarter
each are those of the highest and of the lowest reward.
"""

from __future__ import annotations

import heapq
import json
import math
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

from tiltlm.commands.page_tables import Row, number
from tiltlm.jsonl import read_rows
from tiltlm.run import Run
from tiltlm.seeds import stream
from tiltlm.tensors import length_of

SHOWN_AS = "shown as"
"""The column that says why a row was chosen, where not all are shown."""


@dataclass
class SamplesTable:
    """The samples of `runs`, at most `most` of each, under the names in `labels`; `page` is the file they are written to.

    No row is kept: what is said of all of them (columns, the rest) is known once `rows` were gone through.
    """

    runs: Sequence[Run[Any]]
    labels: Mapping[Path, str]
    most: int
    page: Path
    count: int = field(default=0, init=False)
    _columns: dict[str, bool] = field(init=False)  # whether it holds numbers
    _rest: list[Row] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._columns = dict.fromkeys(("run", "prompt", "completion"), False)

    def table(self) -> Row:
        """The table for `report.pieces`, which takes its parts in this order."""
        return {"title": "Samples", "rows": self.rows(), "columns": self.columns(), "rest": self.rest()}

    def rows(self) -> Iterator[Row]:
        """Numbers stay numbers, everything else becomes text."""
        for run in self.runs:
            path = run.folder / "samples.jsonl"
            if path.is_file() and self.most:
                yield from self._rows_of(run, path)

    def _rows_of(self, run: Run[Any], path: Path) -> Iterator[Row]:
        label, total, before = self.labels[run.folder], lines_in(path), self.count
        chosen = choice(path, total, self.most) if total > self.most else None
        for k, line in enumerate(read_rows(path)):
            if chosen is None or k in chosen:
                self.count += 1
                yield self._row(line, {"run": label} if chosen is None else {"run": label, SHOWN_AS: chosen[k]})
        drawn = run.folder / "samples.safetensors"
        drawn_rows = length_of(drawn, "tokens") if drawn.is_file() else 0
        if total > self.most or drawn_rows > total:
            found = {"run": label, "shown": self.count - before, "texts": total, "drawn": drawn_rows}
            self._rest.append(found | {"folder": str(run.folder), "href": self._href(run.folder)})

    def _row(self, line: Mapping[str, Any], row: Row) -> Row:
        for name, value in line.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            self._columns[name] = self._columns.get(name, False) or is_number
            row[name] = number(value) if is_number else text_of(value)
        for name in row:
            self._columns.setdefault(name, False)
        return row

    def _href(self, folder: Path) -> str:
        """The way from the page to a run's folder."""
        return quote(Path(os.path.relpath(folder.resolve(), self.page.resolve().parent)).as_posix()) + "/"

    def columns(self) -> Iterator[Row]:
        for name, numeric in self._columns.items():
            yield {"key": name, "label": name, "numeric": numeric}

    def rest(self) -> Iterator[Row]:
        """A line for every run that has more samples than are shown: how many, and where."""
        yield from self._rest


def lines_in(path: Path) -> int:
    """How many rows a file of JSON lines has."""
    with path.open("rb") as file:
        return sum(not line.isspace() for line in file)


def choice(path: Path, total: int, most: int) -> dict[int, str]:
    """Which of a file's `total` rows are shown, at most `most`, each with the reason; where rewards are all alike or not
    said, random ones alone."""
    rewards = array("d", (reward_of(line) for line in read_rows(path)))
    known = array("q", (k for k, value in enumerate(rewards) if not math.isnan(value)))
    extreme = most // 4 if any(rewards[k] != rewards[known[0]] for k in known) else 0
    own = Random(stream(0, "report", "samples").key)
    chosen = dict.fromkeys(own.sample(range(total), most - 2 * extreme), "at random")
    for reason, best in (("highest reward", heapq.nlargest), ("lowest reward", heapq.nsmallest)):
        for k in best(extreme, known, key=rewards.__getitem__):
            chosen.setdefault(k, reason)
    return chosen


def reward_of(line: Mapping[str, Any]) -> float:
    """A row's reward; NaN where it says none."""
    value = line.get("reward")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

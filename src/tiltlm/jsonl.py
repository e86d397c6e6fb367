"""JSON lines: one object a line, errors that name file and line, output that can be taken up where it stopped.

A file whose name ends in .gz is read through gzip.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast


def read_rows(path: str | Path, needs: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; each must have the columns in `needs`. Raises ValueError naming file:line."""
    return (row for _, row in placed_rows(path, needs))


def placed_rows(path: str | Path, needs: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """`read_rows` with the place of each row: ("file:line", row)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", _row(line, f"{path}:{number}", needs)


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """The file as UTF-8 text (a byte order mark at its start aside), through gzip where its name ends in .gz."""
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", newline=newline))
    return path.open(encoding="utf-8-sig", newline=newline)


def _row(line: str, where: str, needs: tuple[str, ...]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); every line must be one object"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(
            f'{where}: expected an object like {{"{needs[0] if needs else "prompt"}": …}}; got {line.strip()[:60]}'
        )
    missing = [name for name in needs if name not in row]
    if missing:
        has = ", ".join(row) or "nothing"
        raise ValueError(f"{where}: column {missing[0]!r} is missing; this line has {has}")
    return row


def whole_lines(path: Path) -> int:
    """How many whole lines a file holds; half a line at its end (an interrupted write) is cut off."""
    if not path.is_file():
        return 0
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
    return data[:end].count(b"\n")

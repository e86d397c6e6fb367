"""Labelled text from csv and jsonl files: (text, class) pairs, classes by name."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiltlm.jsonl import parsing, reading


def read_labelled(
    paths: Sequence[str | Path], text: str, label: str, classes: Mapping[str, str] | None = None
) -> tuple[list[tuple[str, int]], list[str]]:
    """Every row's text and class number, and the classes' names, sorted.

    classes: label -> class; labels it does not name are left out (None: every label is a class of its name).
    Raises ValueError naming file and line of a row without the columns, and where fewer than two classes are left.
    """
    found: list[tuple[str, str]] = []
    for path in paths:
        for line, row in _rows(Path(path)):
            if text not in row or label not in row:
                have = ", ".join(map(str, row))
                raise ValueError(f"{path}, line {line}: no column {text!r} or {label!r}; there are {have}")
            value = str(row[label]).strip()
            if classes is None or value in classes:
                found.append((str(row[text]), value if classes is None else classes[value]))
    names = sorted({name for _, name in found})
    if len(names) < 2:
        files = ", ".join(map(str, paths))
        raise ValueError(
            f"{files}: {len(found)} rows with {len(names)} classes ({', '.join(names)}); at least 2 needed"
        )
    return [(content, names.index(name)) for content, name in found], names


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with reading(path), path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            reader = csv.DictReader(file)
            try:
                for row in reader:
                    yield reader.line_num, {name: value for name, value in row.items() if value is not None}
            except csv.Error as error:
                raise ValueError(f"{path}, line {reader.line_num}: not csv ({error})") from None
            return
        for number, content in enumerate(file, 1):
            if content.strip():
                yield number, _object(content, path, number)


def _object(content: str, path: Path, number: int) -> Mapping[str, Any]:
    with parsing(f"{path}, line {number}", "a row is an object"):
        row = json.loads(content.rstrip())
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: a row is an object; got {type(row).__name__}")
    return row


def classes_of(settings: Sequence[str]) -> dict[str, str] | None:
    """{"label": "class"} from settings like ("5=good", "1=bad"); None where there are none."""
    pairs = [setting.partition("=") for setting in settings]
    bad = [setting for setting, (_, equals, _) in zip(settings, pairs, strict=True) if not equals]
    if bad:
        raise ValueError(f"classes are given as label=class; got {bad[0]!r}")
    return {label: name for label, _, name in pairs} or None

"""Rows of a table, wherever it is kept, each with its place, so that whoever refuses a row can say which.

| source | place of a row |
|---|---|
| .jsonl, .json (an array of objects, or lines like .jsonl), .csv, .tsv; each also as .gz | file:line where the row begins |
| .parquet | file:row, from 1 |
| a folder that holds one of these for the split asked for (train.jsonl, test.json, …) | as above |
| a data set of the hub: owner/name, owner/name#config, owner/name:data_dir, maybe with `[split]` | owner/name[split]:row |

A csv separates its fields by commas, semicolons, tabs or bars: whichever makes the most of its first line. Parquet needs
pyarrow and the hub needs datasets; they are imported only when asked for. A source may carry a weight: `file:2`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from tiltlm.jsonl import no_half_characters, open_text, parsing, placed_rows, reading
from tiltlm.models.reachable import hub_for

Placed = tuple[str, dict[str, Any]]
"""(where a row stands, the row)."""

HUB_NAME = re.compile(
    r"(?P<name>\w[\w.-]*(/[\w.-]+)?)(#(?P<config>[\w.-]+))?(:(?P<data_dir>[\w./-]+))?(\[(?P<split>\w+)\])?"
)
INSTALL = "install it with: pip install datasets"


def rows_of(source: str | Path, split: str = "train", encoding: str = "") -> Iterator[Placed]:
    """(where, row) of every row of a file, of a folder's file for `split`, or of a hub data set's `split`.

    encoding: of text without a byte order mark; empty: UTF-8, or UTF-16 or -32 where the first bytes say so.

    Raises FileNotFoundError for what is not there and ValueError, naming file:line, for what cannot be read.
    """
    path = file_of(source, split)
    if path is None:
        yield from _hub(str(source), split)
        return
    with reading(path):
        yield from READERS[_ending(path)](path, encoding)


WEIGHT = re.compile(r"\d+(\.\d*)?|\.\d+")


def weighed(source: str | Path) -> tuple[str, float]:
    """A source and its weight: `a.jsonl:2` is ("a.jsonl", 2), 1 where none is named. A number behind the last colon is a
    weight unless there is a file of the whole name; a hub's data_dir that is a number wants one behind it.

    Raises ValueError for a weight of 0, and for what is no weight behind the name of a file.
    """
    whole = str(source)
    name, colon, weight = whole.rpartition(":")
    if not colon or Path(whole).exists():
        return whole, 1.0
    if WEIGHT.fullmatch(weight) and float(weight) > 0:
        return name, float(weight)
    if WEIGHT.fullmatch(weight) or Path(name).is_file():
        raise ValueError(f"{whole}: a weight is a number above 0, like {name}:2; got {weight!r}")
    return whole, 1.0


def file_of(source: str | Path, split: str = "train") -> Path | None:
    """The file that `source` stands for; None where it can only be the name of a hub data set."""
    path = Path(source)
    if path.is_dir():
        return _in_folder(path, split)
    ending = _ending(path)
    if path.is_file() and ending not in READERS:
        raise ValueError(
            f"{path}: what is {path.suffix or 'a file without an ending'}? Known: {', '.join(READERS)}"
        )
    if path.is_file():
        return path
    if ending in READERS or not HUB_NAME.fullmatch(str(source)):
        raise FileNotFoundError(f"{source}: no such file or folder")
    return None


def _in_folder(folder: Path, split: str) -> Path:
    found = [folder / f"{split}{ending}" for ending in READERS if (folder / f"{split}{ending}").is_file()]
    if not found:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(f"{folder}: no file {split}.jsonl (or {', '.join(READERS)}) in it; it has {names}")
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ValueError(f"{folder} has {names}: name the file that is meant")
    return found[0]


def _ending(path: Path) -> str:
    """ ".jsonl" or ".jsonl.gz", in small letters."""
    return "".join(path.suffixes[-2:] if path.suffix.lower() == ".gz" else path.suffixes[-1:]).lower()


def _json(path: Path, encoding: str) -> Iterator[Placed]:
    """The objects of an array; a file that is no array is read line by line."""
    with open_text(path, encoding) as file:
        text = file.read(PART)
        while text.strip() in ("", "[") and (part := file.read(PART)):
            text += part
        opening = ARRAY.match(text)
        if opening is not None:
            yield from _objects(file, text, opening.end(), path)
            return
    yield from placed_rows(path, encoding=encoding)


PART = 1 << 20
"""Characters of an array that are held, and more only where an object is longer."""


def _objects(file: TextIO, text: str, at: int, path: Path) -> Iterator[Placed]:
    """The objects of an array that goes on at `text[at]`, and behind that in the file."""
    line, column, more = 1, 0, True  # how many lines, and characters of a line, lie before `text`
    while text[at : at + 1] != "]":
        place = line + text.count("\n", 0, at)
        try:
            row, end = _object_at(text, at, f"{path}:{place}", line - 1, column)
            whole = end < len(text)
        except ValueError:
            if not more:
                raise
            whole = False
        if whole or not more:
            yield f"{path}:{place}", row
            at = end
            continue
        column = at - text.rfind("\n", 0, at) - 1 + (column if place == line else 0)
        part = file.read(max(PART, len(text) - at))
        line, text, at, more = place, text[at:] + part, 0, bool(part)


ARRAY, BETWEEN = re.compile(r"\s*\[\s*"), re.compile(r"\s*(,\s*|(?=\]))")
"""How an array begins, and what follows one of its objects."""


def _object_at(text: str, at: int, where: str, lines: int, column: int) -> tuple[dict[str, Any], int]:
    """The object that begins at `at`, and where the next one, or the closing bracket, stands. lines, column: how many of
    them lie before the text."""
    with parsing(where, "an object was expected here"):
        try:
            row, end = json.JSONDecoder().raw_decode(text, at)
        except json.JSONDecodeError as error:
            error.colno += column if error.lineno == 1 else 0
            error.lineno += lines
            raise
        no_half_characters(text[at:end], row)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: an array of objects was expected; here is a {type(row).__name__}")
    after = BETWEEN.match(text, end)
    if after is None:
        raise ValueError(f"{where}: neither a comma nor a closing bracket follows the object that begins here")
    return row, after.end()


def _lines(path: Path, encoding: str) -> Iterator[Placed]:
    return placed_rows(path, encoding=encoding)


def _csv(path: Path, encoding: str) -> Iterator[Placed]:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the module's limit of 131072 characters
    with open_text(path, encoding, newline="") as file:
        mark = _separator(next((text for text in iter(file.readline, "") if text.strip()), ""))
        file.seek(0)
        reader = csv.reader(file, delimiter=mark, strict=True)
        line, names = 1, None
        try:
            for values in reader:
                if values and names is None:
                    names = values
                elif values:
                    yield f"{path}:{line}", _named(names or [], values, f"{path}:{line}")
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}:{line}: the row that begins here is not csv ({error})") from None


def _separator(head: str) -> str:
    """What separates the names in a table's first line: whatever makes the most of them, a comma in doubt."""
    return max(",;\t|", key=lambda mark: len(next(csv.reader([head], delimiter=mark), [])))


def _named(names: list[str], values: list[str], where: str) -> dict[str, Any]:
    if len(values) != len(names):
        raise ValueError(
            f"{where}: {len(values)} fields, but the first line names {len(names)}: {', '.join(names)}"
        )
    return dict(zip(names, values, strict=True))


ROWS_AT_ONCE = 1024
"""Rows of parquet that are held as objects."""


def _parquet(path: Path, encoding: str) -> Iterator[Placed]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs the package pyarrow; {INSTALL}") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(ROWS_AT_ONCE) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{path}: not parquet after row {number} ({why})") from None


def _hub(source: str, split: str) -> Iterator[Placed]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{source} is no file here, and hub data needs the package datasets; {INSTALL}") from None
    found = HUB_NAME.fullmatch(source)
    assert found is not None  # or it would not have been taken for a hub name
    split = found["split"] or split
    try:
        config = [found["config"]] if found["config"] else []
        with hub_for(found["name"]) as silence:
            data = load_dataset(found["name"], *config, data_dir=found["data_dir"], split=split)
    except (OSError, ValueError) as error:
        why = f"it cannot be reached: {silence}" if silence else str(error).strip().split("\n")[0]
        raise ValueError(
            f"{source!r} is no file or folder here, and the hub gives no split {split!r}: {why}"
        ) from None
    for number, row in enumerate(data, 1):
        yield f"{found['name']}[{split}]:{number}", dict(row)


PLAIN: dict[str, Callable[[Path, str], Iterator[Placed]]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
}
READERS = PLAIN | {f"{ending}.gz": reader for ending, reader in PLAIN.items()} | {".parquet": _parquet}
"""Who reads what, by the end of a file's name."""

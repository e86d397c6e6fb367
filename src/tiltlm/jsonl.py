"""JSON lines: one object a line, errors that name file and line, output that can be taken up where it stopped.

A file whose name ends in .gz is read through gzip. Text is what its byte order mark or, without one, its first bytes say
(UTF-8, UTF-16, UTF-32), or the encoding that is named.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

T = TypeVar("T")


def read_rows(path: str | Path, needs: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; each must have the columns in `needs`. Raises ValueError naming file:line."""
    return (row for _, row in placed_rows(path, needs))


def placed_rows(
    path: str | Path, needs: tuple[str, ...] = (), encoding: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """`read_rows` with the place of each row: ("file:line", row)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with reading(path), open_text(path, encoding) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", _row(line, f"{path}:{number}", needs)


@contextmanager
def open_text(path: Path, encoding: str = "", newline: str | None = None) -> Iterator[TextIO]:
    """The file as text, through gzip where its name ends in .gz; a byte order mark counts before `encoding`.

    Raises ValueError for an encoding that there is not, and with the place of the first byte that is not of it.
    """
    with _opened(path) as raw:
        found = json.detect_encoding(
            raw.read(4)
        )  # JSON's own rule: byte order marks, and where the zero bytes stand
        raw.seek(0)
        name = found if found in MARKED or not encoding else encoding
        try:
            text = io.TextIOWrapper(raw, encoding=name, newline=newline)
        except LookupError:
            raise ValueError(
                f"there is no encoding {encoding!r}; such are utf-8, utf-16, latin-1, cp1252, gb18030"
            ) from None
        try:
            yield text
        except UnicodeDecodeError as error:
            raise ValueError(_misread(path, name, error)) from None


MARKED = ("utf-8-sig", "utf-16", "utf-32")
"""What a byte order mark says."""


def _opened(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """The bytes of a file, unpacked."""
    return gzip.GzipFile(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _misread(path: Path, name: str, error: UnicodeDecodeError) -> str:
    """Which byte of a file is not in the encoding `name`, and what to try instead."""
    at, line = _first_misfit(path, name)
    likely = ("utf-16", "utf-8") if b"\0" in error.object else ("utf-8", "cp1252", "latin-1")
    others = [each for each in likely if each != name and _reads(error.object, each)] or ["latin-1"]
    return (
        f"{path}: cannot be read as {name.removesuffix('-sig').upper()}: byte {at} (line {line}) is not of it "
        f"({error.reason}); name the encoding it was written in, like --encoding {others[0]} (of a task: "
        f"--task.encoding {others[0]})"
    )


def _reads(data: bytes, name: str) -> bool:
    try:
        data.decode(name)
    except UnicodeDecodeError:
        return False
    return True


def _first_misfit(path: Path, name: str) -> tuple[int, int]:
    """(offset, line) of the first byte that cannot be read as `name`: what an error says counts within its part only."""
    decoder, seen, line = codecs.getincrementaldecoder(name)(), 0, 1
    with _opened(path) as file:
        while True:
            part = file.read(1 << 16)
            seen += len(part)
            try:
                line += decoder.decode(part, not part).count("\n")
            except UnicodeDecodeError as error:
                before = error.object[: error.start].decode(name, "ignore")
                return seen - len(error.object) + error.start, line + before.count("\n")
            if not part:
                return seen, line


def _row(line: str, where: str, needs: tuple[str, ...]) -> dict[str, Any]:
    with parsing(where, "every line must be one object"):
        row = json.loads(line.rstrip())
        no_half_characters(line, row)
    if not isinstance(row, dict):
        raise ValueError(
            f'{where}: expected an object like {{"{needs[0] if needs else "prompt"}": …}}; got {line.strip()[:60]}'
        )
    missing = [name for name in needs if name not in row]
    if missing:
        has = ", ".join(row) or "nothing"
        raise ValueError(f"{where}: column {missing[0]!r} is missing; this line has {has}")
    return row


@contextmanager
def parsing(where: str, wanted: str) -> Iterator[None]:
    """Within, JSON is parsed: whatever it can be wrong with is a ValueError that begins with `where`."""
    try:
        yield
    except json.JSONDecodeError as error:
        if error.lineno > 1:
            raise ValueError(f"{where}: {wanted}; not JSON in line {error.lineno} ({error.msg})") from None
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}); {wanted}") from None
    except RecursionError:
        raise ValueError(f"{where}: brackets within brackets, more than can be read; {wanted}") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where}: \\u{ord(half):04x} is half of a character, and no text; {wanted}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{where}: {error}; {wanted}") from None


HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""How half of a character beyond the first 65536 is written (two make one)."""


def no_half_characters(text: str, value: Any) -> None:
    """Raise UnicodeEncodeError where `value`, read from `text`, holds text that no file can."""
    if HALF.search(text):
        json.dumps(value, ensure_ascii=False).encode()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within, a file is read: where it is not UTF-8, no gzip or cut, a ValueError says so."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 ({error})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix} ({error}): pack it again") from None


def read_json(path: Path) -> Any:
    """A .json file. Raises FileNotFoundError, and ValueError that names the file."""
    with (
        reading(path),
        parsing(
            str(path), "if a run wrote it, remove it or the run's folder, and the same command makes it again"
        ),
    ):
        return json.loads(path.read_text(encoding="utf-8"))


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Write a text file (a text, or its pieces) as UTF-8, aside first: a reader never sees half of it."""
    with aside_of(path) as file:
        file.writelines([text] if isinstance(text, str) else text)


@contextmanager
def aside_of(path: Path, errors: str = "strict") -> Iterator[TextIO]:
    """A file beside `path` to write text to, which takes its place at the end, or is removed after an error. Two processes
    do not share it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8", errors=errors) as file:
            yield file
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def in_parts(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """All rows, `size` at a time."""
    rest = iter(rows)
    while part := list(islice(rest, size)):
        yield part


def whole_lines(path: Path) -> int:
    """How many whole lines a file holds; half a line at its end (an interrupted write) is cut off."""
    if not path.is_file():
        return 0
    lines, seen, end = 0, 0, 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            lines += part.count(b"\n")
            end = seen + part.rfind(b"\n") + 1 if b"\n" in part else end
            seen += len(part)
    if end < seen:
        os.truncate(path, end)
    return lines


@dataclass(frozen=True)
class Lines:
    """The objects of a .jsonl file, each with the columns in `needs`; read anew whenever they are gone through: none is
    kept."""

    path: Path
    needs: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return read_rows(self.path, self.needs)

    @cached_property
    def count(self) -> int:
        """How many there are."""
        with reading(self.path), open_text(self.path) as file:
            return sum(not line.isspace() for line in file)

    def __len__(self) -> int:
        return self.count

    def forward(self) -> Forward:
        """Objects by their numbers, one slice behind the other."""
        return Forward(self)

    def parts(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """All objects, `size` at a time."""
        return in_parts(self, size)


class Forward:
    """`lines[begin:end]`: objects of a file, each slice behind the one before; what stands between is passed over."""

    def __init__(self, lines: Lines) -> None:
        self._rows, self._at = iter(lines), 0

    def __getitem__(self, part: slice) -> list[dict[str, Any]]:
        if part.start < self._at:
            raise ValueError(f"objects {part.start} to {part.stop} were asked for, and {self._at} have been read")
        found = list(islice(self._rows, part.start - self._at, part.stop - self._at))
        self._at = part.stop
        return found

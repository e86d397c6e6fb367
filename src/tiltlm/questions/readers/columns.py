"""What the readers of questions share: a row's columns by their names in small letters, its text, its number."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tiltlm.data.tables import rows_of
from tiltlm.questions.base import Question

NUMBERS = ("index", "", "unnamed: 0")
"""Columns that number a data set's questions; the last two are what a table without a name for them is read as."""

SUBJECTS = ("subject", "category")
FILE_OF = re.compile(r"_(test|dev|val)\.csv.*\Z")
"""What MMMLU's Yoruba has behind its subjects: the name of the file they were in."""


def rows(source: str, split: str, what: str) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) of every row of a source, names of columns in small letters. Raises ValueError that says how to name a
    file where there is no such source."""
    try:
        found = [(where, {str(k).lower(): x for k, x in row.items()}) for where, row in rows_of(source, split)]
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"questions of {what}: {error} (--task.file names a csv or jsonl file of them)") from None
    if not found:
        raise ValueError(f"questions of {what}: {source} has no rows")
    return found


@contextmanager
def at(where: str) -> Iterator[None]:
    """Within, what a row is refused for is a ValueError that begins with its place."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def first_of(row: Mapping[str, Any], names: Sequence[str], what: str) -> Any:
    """The value of the first of these columns that a row has. Raises ValueError where it has none of them."""
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"no column for {what} ({', '.join(names)}); this row has {', '.join(row) or 'nothing'}")


def text(value: Any, what: str) -> str:
    """A value as text; numbers are written out. Raises ValueError for what is empty, or no text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if value is None or value == "":
        raise ValueError(
            f"{what} is empty (a hub's csv reader takes the text NA for nothing: then name the file itself)"
        )
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text; it is {type(value).__name__}")
    return value


def subject(row: Mapping[str, Any]) -> str:
    """The subject of a row, without the name of a file behind it; empty where it names none."""
    found = next((row[name] for name in SUBJECTS if row.get(name)), "")
    return FILE_OF.sub("", str(found))


def number(row: Mapping[str, Any], place: int) -> int:
    """A question's number: the one that its row has, or its place in the table. Raises ValueError for one that is none."""
    value = next((row[name] for name in NUMBERS if name in row), place)
    if isinstance(value, bool) or not re.fullmatch(r"\d+", str(value)):
        raise ValueError(f"the number of a question is 0 or more; got {value!r}")
    return int(value)


def numbered(found: Sequence[tuple[str, Question]]) -> list[Question]:
    """The questions. Raises ValueError where two of them have one number."""
    places: dict[int, str] = {}
    for where, question in found:
        before = places.setdefault(question.index, where)
        if before != where:
            raise ValueError(
                f"{where}: number {question.index} stands in {before} already: each question has its own"
            )
    return [question for _, question in found]

"""Questions with options that have letters, of any table with the usual columns.

| what | columns (in capital or small letters) |
|---|---|
| question | question, stem, query, prompt |
| options | A, B, C, …; or choices, options: a list of texts or of {label, text}, {label: […], text: […]}, or one in print |
| answer | answer, answerKey, correct, …: a letter (or label), the text of one option, or its place from 0 |
| number | index, or a column without a name; else the row's place |
| subject | subject, category |

CommonsenseQA has its options within the question: {stem, choices}. Other columns are kept beside the question. A list in
print is read as a Python literal and never run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase as LETTERS
from typing import Any

from tiltlm.data.tables import Placed
from tiltlm.questions.base import Question
from tiltlm.questions.readers.columns import NUMBERS, SUBJECTS, at, first_of, number, numbered, subject, text

ASKED = ("question", "stem", "query", "prompt")
OPTIONS = ("choices", "options")
ANSWER = ("answer", "answerkey", "answer_key", "correct", "correct_answer", "label", "target")


def lettered(rows: Iterable[Placed], first: int = 0) -> list[Question]:
    """The questions of rows, their columns' names in small letters. first: what is added to every number.

    Raises ValueError, naming the row's place, for what is no question with two options or more and one right answer.
    """
    found = []
    for place, (where, row) in enumerate(rows):
        with at(where):
            found.append((where, _question(row, place, first)))
    return numbered(found)


def _question(row: Mapping[str, Any], place: int, first: int) -> Question:
    asked = first_of(row, ASKED, "the question")
    own = {str(name).lower(): x for name, x in asked.items()} if isinstance(asked, dict) else {}
    labels, choices = _options(own or row)
    known = {*ASKED, *OPTIONS, *ANSWER, *NUMBERS, *SUBJECTS, *(letter.lower() for letter in LETTERS)}
    about = {name: x for name, x in row.items() if name not in known}
    return Question(
        first + number(row, place), text(first_of(own, ASKED[1:], "the question") if own else asked, "the question"),
        _letter(first_of(row, ANSWER, "the answer"), labels, choices), tuple(choices), subject(row), about=about,
    )  # fmt: skip


def _options(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(labels, texts) of the options: of columns a, b, …, or of a list."""
    names = [letter.lower() for letter in LETTERS]
    columns = names[: next(k for k, name in enumerate(names) if name not in row)]
    if columns:
        values = [row[name] for name in columns]
        while values and values[-1] in ("", None):  # a table whose questions have some three, some four options
            values.pop()
        labels: list[Any] = list(LETTERS[: len(values)])
    else:
        labels, values = _listed(first_of(row, ("a", *OPTIONS), "the options"))
    if len(values) < 2 or len(values) > len(LETTERS) or len(labels) != len(values):
        raise ValueError(f"a question has from 2 to 26 options; here {len(values)}, with {len(labels)} labels")
    texts = [text(value, f"option {label}") for label, value in zip(labels, values, strict=True)]
    return [str(label) for label in labels], texts


def _listed(value: Any) -> tuple[list[Any], list[Any]]:
    """(labels, texts) of a column that holds all options."""
    if isinstance(value, str):
        value = _printed(value)
    if isinstance(value, dict) and {"label", "text"} <= value.keys():
        return list(value["label"]), list(value["text"])
    if not isinstance(value, list | tuple):
        raise ValueError(f"the options must be a list; they are {type(value).__name__}")
    if all(isinstance(each, dict) and {"label", "text"} <= each.keys() for each in value):
        return [each["label"] for each in value], [each["text"] for each in value]
    return list(LETTERS[: len(value)]), list(value)


def _printed(value: str) -> Any:
    """The list that a text prints."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"the options are text that prints no list: {value[:60]!r}") from None


def _letter(value: Any, labels: Sequence[str], choices: Sequence[str]) -> str:
    """The letter of the right option, whatever the row tells it by."""
    if isinstance(value, int) and not isinstance(value, bool):
        found = {value} if 0 <= value < len(choices) else set()
    else:
        found = _places(text(value, "the answer").strip(), labels, choices)
    if len(found) != 1:
        how = "none of them" if not found else "more than one of them, as a place from 0 and as a text"
        raise ValueError(
            f"the answer {value!r} is {how}: it is one of the letters {''.join(LETTERS[: len(choices)])}, the text of one "
            "option, or its place from 0"
        )
    return LETTERS[found.pop()]


def _places(answer: str, labels: Sequence[str], choices: Sequence[str]) -> set[int]:
    """The places of the options that a text may mean: a label counts before all else."""
    bare = answer.strip("().: ").upper()
    if bare in labels:
        return {labels.index(bare)}
    places = {k for k, choice in enumerate(choices) if choice.strip() == answer}
    if answer.isascii() and answer.isdigit() and int(answer) < len(choices):
        places.add(int(answer))
    return places

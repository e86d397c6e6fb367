"""Questions whose answer is a number: GSM8K and MGSM, of their files or of the hub.

| what | columns |
|---|---|
| question | question |
| answer | answer_number, where it is not empty; else answer: the number, or a solution that ends in "#### number" |
| number | index; else the row's place |

The solution in front of #### is kept beside the question, as `solution`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tiltlm.data.tables import Placed
from tiltlm.questions.base import Question
from tiltlm.questions.numerals import value
from tiltlm.questions.readers.columns import at, first_of, number, numbered, text

MARK = "####"


def solved(rows: Iterable[Placed], first: int = 0) -> list[Question]:
    """The questions of rows. first: what is added to every number. Raises ValueError, naming the row's place."""
    found = []
    for place, (where, row) in enumerate(rows):
        with at(where):
            found.append((where, _question(row, place, first)))
    return numbered(found)


def _question(row: Mapping[str, Any], place: int, first: int) -> Question:
    given = row.get("answer_number")
    given = first_of(row, ("answer",), "the answer") if given in (None, "") else given
    solution, mark, answer = text(given, "the answer").rpartition(MARK)
    exact = value(answer)
    if exact is None:
        raise ValueError(f"the answer is no number: {answer.strip()[:40]!r}")
    about = {"solution": solution.strip()} if mark else {}
    asked = text(first_of(row, ("question",), "the question"), "the question")
    return Question(first + number(row, place), asked, str(exact), about=about)

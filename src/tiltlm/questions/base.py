"""A question with its right answer, and the verdict on one given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Question:
    """What is asked, and what is right.

    index    its number in the data set, the same in every split, language and run: what runs are joined by
    text     the question alone, without options, instructions or template
    answer   what is right: a letter, a number, a text, as the grader reads it
    choices  the options, in order; none where the answer is free
    subject  what accuracies are also told apart by; may be empty
    hint     what tells the answer, where that is something else than the answer
    about    other columns of its row
    """

    index: int
    text: str
    answer: str
    choices: tuple[str, ...] = ()
    subject: str = ""
    hint: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grade:
    """right; answer: what was read off the completion (empty: nothing); rule: which rule read it (empty: none did)."""

    right: bool
    answer: str = ""
    rule: str = ""


class Grader(Protocol):
    """Reads an answer off a completion, and says whether it is right."""

    def grade(self, question: Question, completion: str, finished: bool) -> Grade:
        """finished: whether the completion ended by itself; a grader may refuse those that were cut off."""

"""A world of questions that a network learns in a second: an answer is right if its first letter is c."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tiltlm.fit import Fit
from tiltlm.questions.base import Grade, Question
from tiltlm.tasks.sums import Sums


@dataclass(frozen=True)
class Carried:
    """Right is who means to carry."""

    def grade(self, question: Question, completion: str, finished: bool) -> Grade:
        return Grade(completion.startswith("c"), completion[:1], "letter" if completion[:1] in ("c", "n") else "")


@dataclass(frozen=True)
class Letters(Sums):
    """Sums of one digit by a network that has learnt little but the first letter."""

    @property
    def grader(self) -> Any:
        return Carried()


def letters() -> Letters:
    fit = Fit(lr=1e-2, steps=60, batch_size=32)
    language = replace(Sums().language, stories=300, layers=1, fit=fit, new_tokens=3)
    return Letters(language, digits=1, width=16, train=12, valid=6, test=6)

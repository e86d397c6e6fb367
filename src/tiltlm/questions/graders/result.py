"""The grader of sums: the result is what stands between the last semicolon and the closing sign."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tiltlm.questions.base import Grade, Question

RESULT = re.compile(r";([0-9]+)#$")


@dataclass(frozen=True)
class Exact:
    """Right is a completion that ended by itself with the exact result, zeros in front included."""

    def grade(self, question: Question, completion: str, finished: bool) -> Grade:
        found = RESULT.search(completion)
        if found is None:
            return Grade(False)
        return Grade(finished and found[1] == question.answer, found[1], "result")


GRADERS: dict[str, str] = {"result": "the result of a sum worked out, between the last semicolon and #"}


def grader(name: str) -> Exact:
    return Exact()

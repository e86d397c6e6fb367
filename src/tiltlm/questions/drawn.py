"""Protocols of completions: the greedy one, or K draws whose verdicts are averaged, or that vote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tiltlm.models.base import without_end
from tiltlm.questions.exam import Exam
from tiltlm.questions.generated import Generated
from tiltlm.questions.outcomes import Outcome
from tiltlm.samplers.ancestral import Warp, Warped, draw

MOST = 1 << 20
"""Draws of a question at most: draw k of question i has the uniforms number i · MOST + k."""


@dataclass(frozen=True)
class Drawn:
    """n completions of a question; greedy: likeliest tokens in the place of draws; vote: the commonest answer counts."""

    n: int = 1
    greedy: bool = False
    vote: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.n < MOST:
            raise ValueError(f"a question is answered 1 to {MOST - 1} times; got {self.n}")

    @property
    def rows(self) -> int:
        return self.n

    def lines(self, exam: Exam, begin: int, end: int) -> Iterator[dict[str, Any]]:
        asked = exam.questions[begin:end]
        numbers = torch.tensor([question.index for question in asked])
        prompts = exam.prompts.select(slice(begin, end)).cropped()
        drawn = draw(
            Warped(exam.model, Warp(top_k=1)) if self.greedy else exam.model, prompts, n=self.n,
            max_new_tokens=exam.width, stream=exam.stream,
            rows=(numbers[:, None] * MOST + torch.arange(self.n)).flatten(),
        )  # fmt: skip
        assert drawn.finished is not None
        said = {"temperature": 0.0 if self.greedy else 1.0, "max_new_tokens": exam.width, **exam.settings}
        decode, ids = exam.grading.tokenizer.decode, drawn.completions.lists()
        texts = [decode(row) for row in prompts.lists()]
        verdicts = zip(
            drawn.prompt_index.tolist(), ids, drawn.finished.tolist(), exam.grading.grades(drawn), strict=True
        )
        for number, (k, row, finished, grade) in enumerate(verdicts):
            yield Generated(
                asked[k].index, number % self.n, texts[k], decode(without_end(row, exam.model.eos_ids)), grade.answer,
                asked[k].answer, asked[k].subject, float(grade.right), "stop" if finished else "length", grade.rule,
                tuple(row), said,
            ).line()  # fmt: skip

    def outcomes(self, lines: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        return [self._outcome(lines[k : k + self.n]) for k in range(0, len(lines), self.n)]

    def _outcome(self, rows: Sequence[Mapping[str, Any]]) -> Outcome:
        """A question's, from its lines."""
        answers = tuple(str(row["answer"]) if row["parse_rule"] else "" for row in rows)
        accuracy = sum(row["score"] for row in rows) / self.n
        if self.vote:
            settled = majority(answers)
            right = settled and any(row["score"] for row, a in zip(rows, answers, strict=True) if a == settled)
            answers, accuracy = (settled,), float(bool(right))
        return Outcome(
            rows[0]["index"], rows[0]["subject"], rows[0]["correct_answer"], answers, accuracy,
            sum(bool(row["parse_rule"]) for row in rows) / self.n,
            sum(row["finish_reason"] == "stop" for row in rows) / self.n,
        )  # fmt: skip


def majority(answers: Sequence[str]) -> str:
    """The commonest answer, the first of those that are as common; empty ones do not count, and are all there is if nothing
    else was given."""
    counts = Counter(answer for answer in answers if answer)
    return max(counts, key=lambda answer: counts[answer], default="")

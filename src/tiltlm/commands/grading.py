"""`tiltlm score grader:NAME FILE --out FILE`: stored answers to questions graded anew.

In and out are lines of ours (.jsonl; those of `tiltlm sample` as well, if they have an `index` and a `correct_answer` or
`answer`) or STaR's generated.csv, in any combination.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tiltlm.progress import note
from tiltlm.questions.base import Grader, Question
from tiltlm.questions.generated import Generated, read_generated, write_generated
from tiltlm.questions.graders import grader
from tiltlm.questions.outcomes import Outcome, constant, observations
from tiltlm.ruler.intervals import of_mean

GRADER = "grader:"
"""What the name of a grader begins with, where names of rewards stand as well."""


def grade(name: str, path: Path, out: Path) -> int:
    """Grade the answers in `path`, and say what came of it. Raises ValueError for a file without any."""
    by, stored = grader(name), read_generated(path)
    if not stored.rows:
        raise ValueError(f"{path} has no answers: there is nothing to grade")
    for text in stored.said:
        note(f"{path}: {text}")
    rows = [graded(row, by) for row in stored.rows]
    write_generated(out, rows)
    other = sum(a.score is not None and a.score != b.score for a, b in zip(stored.rows, rows, strict=True))
    note(f"{out}: {told(rows)}; {other} graded otherwise than before")
    return 0


def graded(row: Generated, by: Grader) -> Generated:
    """An answer with its verdict. Raises ValueError where nothing says what is right."""
    if not row.correct:
        raise ValueError(f"the right answer to question {row.index} is missing: a `correct_answer` in every row")
    question = Question(row.index, "", row.correct, subject=row.subject)
    verdict = by.grade(question, row.response, row.finish_reason != "length")
    return replace(row, answer=verdict.answer, score=float(verdict.right), parse_rule=verdict.rule)


def told(rows: Sequence[Generated]) -> str:
    """Accuracy over questions with its interval, what a constant answer would get, shares of answers read and ended."""
    outcomes = by_question(rows)
    right = observations("", outcomes)["accuracy[]"]
    interval, (best, always) = of_mean(right, True), constant(outcomes)
    read = sum(bool(row.parse_rule) for row in rows) / len(rows)
    cut = sum(row.finish_reason == "length" for row in rows)
    return (
        f"{len(rows)} answers to {len(outcomes)} questions, accuracy {float(right.mean()):.4f} "
        f"[{interval.low:.4f}, {interval.high:.4f}], always {best} {float(always.mean()):.4f}; "
        f"{read:.4f} could be read, {cut} were cut off"
    )


def by_question(rows: Sequence[Generated]) -> list[Outcome]:
    """One outcome a question, its samples averaged."""
    found: dict[int, list[Generated]] = {}
    for row in rows:
        found.setdefault(row.index, []).append(row)
    return [
        Outcome(
            index, own[0].subject, own[0].correct, tuple(row.answer for row in own),
            sum(row.score or 0.0 for row in own) / len(own),
        )
        for index, own in found.items()
    ]  # fmt: skip

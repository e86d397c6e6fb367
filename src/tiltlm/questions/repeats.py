"""Questions that a data set has twice: with answers that contradict each other, or to train on and to test."""

from __future__ import annotations

from collections.abc import Iterable

from tiltlm.progress import note
from tiltlm.questions.base import Question
from tiltlm.questions.splits import Parts


def consistent(questions: Iterable[Question], what: str) -> list[Question]:
    """The questions without those that another one before them asks in the same words, with the same options, and answers
    otherwise: a prompt has one right answer. Says how many went. Repeats that agree stay."""
    known: dict[tuple[str, tuple[str, ...]], Question] = {}
    kept: list[Question] = []
    dropped: list[Question] = []
    for question in questions:
        before = known.setdefault((question.text, question.choices), question)
        (kept if before.answer == question.answer else dropped).append(question)
    if dropped:
        numbers = ", ".join(str(question.index) for question in dropped[:5]) + (", …" if len(dropped) > 5 else "")
        note(
            f"{what}: {len(dropped)} left out that ask what one before them asks, and answer otherwise ({numbers})"
        )
    return kept


def say_leaks(parts: Parts, what: str) -> None:
    """Say how many questions to test stand word for word among those to train on, where some do. They stay: the splits are
    as published."""
    trained = {(question.text, question.choices) for question in parts["train"]}
    leaks = sum((question.text, question.choices) in trained for question in parts["test"])
    if leaks:
        note(
            f"{what}: {leaks} of {len(parts['test'])} questions to test stand word for word among those to train on as well"
        )

"""Which questions of a data set a model is trained, validated and tested on.

A data set in one piece of n questions is split as the original STaR on MMLU did: the numbers 0 … n−1 in a random order, of
which the first ⌈n/5⌉ are held out and the rest trained on; those held out in another random order, the first half (the
larger) to test, the other to validate. The orders are numpy's `default_rng(0).permutation`, the same in every language and
run. A question that a file lacks is lacking in its split too, and moves no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tiltlm.progress import note
from tiltlm.questions.base import Question

Split = Literal["train", "valid", "test"]

Parts = Mapping[Split, list[Question]]
"""The questions by split, each in the order in which they are taken."""

FURTHER = 1_000_000
"""What is added to the numbers of a data set's next file, where each file counts from 0."""

CALLED: dict[str, Split] = {
    "train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test",
}  # fmt: skip
"""What a column `split` may say."""


def order(n: int) -> list[int]:
    """0 … n−1 in the order of numpy's generator of seed 0."""
    return [int(k) for k in np.random.default_rng(0).permutation(n)]


def numbers(n: int) -> dict[Split, list[int]]:
    """The numbers of n questions by split (the rule of the module)."""
    mixed, held = order(n), -(-n // 5)
    again = [mixed[k] for k in order(held)]
    middle = -(-held // 2)
    return {"train": mixed[held:], "valid": again[middle:], "test": again[:middle]}


def by_number(questions: Sequence[Question], n: int, what: str) -> Parts:
    """The split of a data set whose questions are numbered 0 … n−1. Raises as `_present`."""
    return _present(questions, numbers(n), n, what)


def _present(
    questions: Sequence[Question], wanted: Mapping[Split, list[int]], n: int, what: str
) -> dict[Split, list[Question]]:
    """The questions of these numbers, of n that there are; says how many are there, where some are not.

    Raises ValueError for a question of no such number.
    """
    known = {question.index: question for question in questions}
    odd = max(known, default=0)
    if odd >= n:
        raise ValueError(f"{what} has {n} questions, numbered from 0; here is one of number {odd}")
    found: dict[Split, list[Question]] = {s: [known[k] for k in own if k in known] for s, own in wanted.items()}
    if len(known) < n:
        has = ", ".join(f"{len(found[s])} of {len(own)} to {VERBS[s]}" for s, own in wanted.items())
        note(f"{what}: {len(known)} of {n} questions are there ({has}): the others are left out of their splits")
    return found


VERBS: dict[Split, str] = {"train": "train", "valid": "validate", "test": "test"}


def by_place(questions: Sequence[Question]) -> Parts:
    """The split of a user's questions: by their column `split`, where they have one, else by their places, by the rule.
    Raises ValueError where that column leaves a split without questions."""
    if any("split" in question.about for question in questions):
        found = by_name(questions, CALLED)
        for split, own in found.items():
            if not own:
                raise ValueError(
                    f"no row's column split says {split}: mark some, or leave the column out, and a fifth is held out"
                )
        return found
    return {split: [questions[k] for k in own] for split, own in numbers(len(questions)).items()}


def by_name(questions: Sequence[Question], called: Mapping[str, Split]) -> Parts:
    """The split that the column `split` names. Raises ValueError for a name that is none of `called`."""
    found: dict[Split, list[Question]] = {"train": [], "valid": [], "test": []}
    for question in questions:
        name = str(question.about.get("split", "")).lower()
        if name not in called:
            raise ValueError(f"question {question.index}: a split is one of {', '.join(called)}; got {name!r}")
        found[called[name]].append(question)
    return found


def held_out(questions: Sequence[Question], n: int, test: Sequence[Question], what: str) -> Parts:
    """A data set with questions to test of its own and none to validate: a tenth of those to train, numbered 0 … n−1, is
    held out. Raises as `_present`."""
    mixed, middle = order(n), -(-n // 10)
    found = _present(questions, {"train": mixed[middle:], "valid": mixed[:middle]}, n, what)
    return {**found, "test": list(test)}


@dataclass(frozen=True)
class Portion:
    """How much of a data set is taken."""

    train: int = 0
    """Questions to train on, the first so many (0: all)."""

    valid: int = 0
    """Questions to validate on, likewise."""

    test: int = 0
    """Questions to test on, likewise."""

    longest: int = 0
    """Questions that have more characters than this, with their options, are left out (0: none is)."""

    def __post_init__(self) -> None:
        if min(self.train, self.valid, self.test, self.longest) < 0:
            raise ValueError(f"counts of questions and characters are 0 (all) or more; got {self}")

    def of(self, questions: Sequence[Question], split: Split) -> list[Question]:
        """Those of a split that are taken."""
        short = [
            q for q in questions if not self.longest or len(q.text) + sum(map(len, q.choices)) <= self.longest
        ]
        most: int = getattr(self, split)
        return short[: most or None]

"""What came out of putting questions to a model: one outcome a question, and what is read off all of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """A question's.

    answers   those that count: every draw's, or the one that was settled on (empty: none could be read)
    accuracy  share of right ones
    parsed    share of completions that an answer could be read off; None where nothing was drawn
    finished  share of completions that ended by themselves; None likewise
    """

    index: int
    subject: str
    correct: str
    answers: tuple[str, ...]
    accuracy: float
    parsed: float | None = None
    finished: float | None = None


def observations(protocol: str, outcomes: Sequence[Outcome]) -> dict[str, Tensor]:
    """{"accuracy[greedy]": …, "parsed[greedy]": …, "finished[greedy]": …}, float64 [questions] each, for `Measurement`.

    The protocol is part of the name: greedy accuracy and that of draws are never taken for one metric.
    """
    found: dict[str, Tensor] = {}
    for name in ("accuracy", "parsed", "finished"):
        values = [getattr(each, name) for each in outcomes]
        if None not in values:
            found[f"{name}[{protocol}]"] = torch.tensor(values, dtype=torch.float64)
    return found


def constant(outcomes: Sequence[Outcome]) -> tuple[str, Tensor]:
    """The answer that is right most often, and whether it is, float64 [questions]: what saying it always would get.

    It is chosen on these very questions, so its mean is the best that any constant answer gets here.
    """
    counts = Counter(each.correct for each in outcomes)
    best = min(counts, key=lambda answer: (-counts[answer], answer))
    return best, torch.tensor([each.correct == best for each in outcomes], dtype=torch.float64)


def histogram(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """answer -> the share of questions (draws of each count alike) that it was given to, the commonest first; "" stands for
    those without one."""
    shares: dict[str, float] = {}
    for each in outcomes:
        for answer in each.answers:
            shares[answer] = shares.get(answer, 0.0) + 1 / (len(each.answers) * len(outcomes))
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


def by_subject(outcomes: Sequence[Outcome]) -> dict[str, Tensor]:
    """subject -> accuracies of its questions, float64 [n], subjects in alphabetical order."""
    found: dict[str, list[float]] = {}
    for each in outcomes:
        found.setdefault(each.subject, []).append(each.accuracy)
    return {name: torch.tensor(found[name], dtype=torch.float64) for name in sorted(found)}


def fingerprint(indices: Sequence[int]) -> str:
    """A short hash of which questions these are, in their order: equal ones were asked the same."""
    return hashlib.sha256(",".join(map(str, indices)).encode()).hexdigest()[:16]

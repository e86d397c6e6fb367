"""How questions are put to a model and its answers become one number a question.

    greedy                  the likeliest token at every step, one completion
    avg@K                   the mean over K draws at temperature 1; avg@1 is a single draw
    maj@K                   the answer that most of K draws give; of those that as many give, the one drawn first. Draws
                            that no answer can be read off have no vote; where none has, the answer is wrong
    letters                 the likeliest letter (`scored.py` says of what exactly)
    options                 the likeliest option, by its text
    options-per-character   the same, log-likelihoods divided by the texts' lengths

avg@K and maj@K look at the same draws: draw k of question i follows from the stream, i and k alone, whatever K is, which
other questions there are and how many are answered at once.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tiltlm.mistakes import nearest
from tiltlm.models.base import LanguageModel
from tiltlm.questions.base import Question
from tiltlm.questions.grading import Grading
from tiltlm.questions.outcomes import Outcome
from tiltlm.samples import Tokens
from tiltlm.seeds import Stream


@dataclass(frozen=True)
class Exam:
    """Questions as they are put to a model.

    prompts   Tokens [P, L], those of the questions [P]
    width     tokens of a completion at most
    stream    every draw descends from it
    settings  what is written beside every answer
    """

    model: LanguageModel
    prompts: Tokens
    questions: Sequence[Question]
    grading: Grading
    width: int
    stream: Stream
    settings: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        model: LanguageModel,
        prompts: Tokens,
        asked: Sequence[Question],
        grading: Grading,
        width: int,
        stream: Stream,
        **settings: Any,
    ) -> Exam:
        """The questions asked by these prompts, each once."""
        first = {question.index: k for k, question in reversed(list(enumerate(asked)))}
        kept = sorted(first.values())
        return Exam(
            model,
            prompts.select(torch.tensor(kept, device=prompts.device)),
            [asked[k] for k in kept],
            grading,
            width,
            stream,
            settings,
        )

    def __len__(self) -> int:
        return len(self.questions)


class Protocol(typing.Protocol):
    """Answers questions line by line, so that an interrupted exam goes on where it stopped, and reads its lines again."""

    @property
    def rows(self) -> int:
        """Lines of a question."""

    def lines(self, exam: Exam, begin: int, end: int) -> Iterator[dict[str, Any]]:
        """The lines of questions begin … end − 1, those of a question side by side."""

    def outcomes(self, lines: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """One outcome a question, from all its lines."""


SCORED = {"letters": "letters", "options": "options", "options-per-character": "options"}
KNOWN = ("greedy", "avg@4", "maj@4", *SCORED)
"""Protocols as examples of names."""


def protocol(name: str) -> Protocol:
    """The protocol called `name`. Raises ValueError for what is none, naming the nearest."""
    from tiltlm.questions.drawn import Drawn
    from tiltlm.questions.scored import Scored

    if name == "greedy":
        return Drawn(1, greedy=True)
    if name in SCORED:
        return Scored(by_letter=name == "letters", per_character=name == "options-per-character")
    found = re.fullmatch(r"(avg|maj)@([1-9]\d*)", name)
    if found is None:
        raise ValueError(
            f"there is no protocol {name!r}.{nearest(name, KNOWN)} There are {', '.join(KNOWN)} (any number)"
        )
    return Drawn(int(found[2]), vote=found[1] == "maj")

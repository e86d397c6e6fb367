"""An exam: questions as they are put to a model; and what a protocol does with them."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

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

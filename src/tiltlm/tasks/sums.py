"""Sums worked out column by column: a world of questions that needs nothing from the hub (`data/sums.py`: what is taught).

The reference carries in 35 % of its answers. So a question without carries has the success rate 1, every other one .35, and
the likeliest answer to it is wrong: enough for a policy to learn from, and much to gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import tyro
from torch import Tensor

from tiltlm.data import sums
from tiltlm.objective import positive
from tiltlm.problem import Check, Problem, Split
from tiltlm.questions.base import Question
from tiltlm.questions.graders.result import Exact
from tiltlm.run import Recipe, Run
from tiltlm.samples import Samples
from tiltlm.seeds import stream
from tiltlm.settings import at_least_one
from tiltlm.stages.sums import FIT, POSITIONS, SumsBase
from tiltlm.tasks.language import Flat, Language
from tiltlm.tasks.questions import OfQuestions

MOST_DIGITS = 3
"""A million questions, all of which are put in order."""


@dataclass(frozen=True)
class Sums(OfQuestions):
    """Sums of two numbers."""

    language: Flat = Language(new_tokens=40, stop=(sums.END,), stories=16_000, fit=FIT, layers=3)
    digits: int = 3
    """Of each summand; the result has one more."""

    hints: bool = False
    """Prompts have a slot for the right result; the reference carries where it is told, and nowhere else."""

    train: int = 2000
    """Questions to train on."""

    valid: int = 1000
    """Questions to validate on."""

    test: int = 1000
    """Questions to measure on."""

    width: int = 96
    """Of the own model."""

    beta: float = 0.2
    """pi* ∝ pi_ref · exp(r / beta): smaller leans harder on right answers."""

    name: tyro.conf.Suppress[str] = "sums"
    shows: ClassVar[tuple[str, ...]] = ("digits", "hints", "train", "test", "beta", "language.new_tokens")

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        at_least_one(self, "digits", "train", "valid", "test", "width")
        if self.digits > MOST_DIGITS:
            raise ValueError(f"digits of Sums are {MOST_DIGITS} at most; got {self.digits}")
        wanted, there = self.train + self.valid + self.test, sums.count(self.digits)
        if wanted > there:
            raise ValueError(f"{self.digits} digits make {there} questions; train, valid and test want {wanted}")

    def check(self) -> None:
        super().check()
        room = POSITIONS - len(self.wording_of(0))
        if not self.language.model and self.language.new_tokens > room:
            raise ValueError(
                f"the own model has room for {room} tokens behind a prompt: lower --task.new-tokens, now "
                f"{self.language.new_tokens}"
            )

    @property
    def hinted(self) -> bool:
        return self.hints

    # ---- the reference ----------------------------------------------------------------------------------------------

    def base(self, seed: int) -> SumsBase:
        """The stage that trains the own model."""
        lm = self.language
        return SumsBase(
            self.digits, self.hints, lm.stories, lm.fit, lm.layers, self.width, lm.device, self.name, seed
        )

    def needs(self, seed: int) -> dict[str, Recipe]:
        return {} if self.language.model else {"base": self.base(seed)}

    def stages(self, seed: int) -> dict[str, Recipe]:
        return {"base": self.base(seed)}

    # ---- the questions ----------------------------------------------------------------------------------------------

    def asked(self, split: Split, seed: int) -> Sequence[Question]:
        """No question is in two splits; those of the test split do not depend on how many there are to train on."""
        begin = {"test": 0, "valid": self.test, "train": self.test + self.valid}[split]
        order = stream(seed, "sums", "questions").permutation(sums.count(self.digits))
        return [self.question(number) for number in order[begin : begin + getattr(self, split)].tolist()]

    def question(self, number: int) -> Question:
        """The question of a number; its subject tells those with carries from the others."""
        right = sums.answer(number, self.digits)
        subject = "carry" if sums.needs_carry(number, self.digits) else "no carry"
        return Question(number, sums.question(number, self.digits), right, subject=subject, hint=right)

    @property
    def grader(self) -> Exact:
        return Exact()

    def wording_of(self, number: int, hint: str = "") -> str:
        """The prompt of a question as text, with its slot where there are hints."""
        return sums.question(number, self.digits) + (sums.slot(self.digits, hint) if self.hints else "")

    def put(self, question: Question, tokenizer: Any, hint: bool = False) -> list[int]:
        return self.put_all([question], tokenizer, hint)[0]

    def put_all(self, questions: Sequence[Question], tokenizer: Any, hint: bool = False) -> list[list[int]]:
        """The prompts that ask them; the tokenizer is called once, for it takes far longer over thousands of calls."""
        if hint and not self.hints:
            raise ValueError("these prompts have no slot for a hint: set --task.hints")
        texts = [self.wording_of(q.index, q.hint if hint else "") for q in questions]
        return list(tokenizer(texts)["input_ids"]) if texts else []

    # ---- the problem ------------------------------------------------------------------------------------------------

    def problem(self, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
        made = super().problem(runs, seed)
        easy = [question.subject == "no carry" for question in made.questions["test"]]
        letter = made.tokenizer.convert_tokens_to_ids("c")

        def carries(samples: Samples) -> Tensor:
            """Whether the answer's strategy is to carry."""
            return samples.mask[:, 0] & (samples.tokens[:, 0] == letter)

        further: dict[str, Check] = {"carries": carries, "accuracy_without_carries": made.checks["accuracy"]}
        counts = {"accuracy_without_carries": torch.tensor(easy)}
        return replace(made, checks={**made.checks, **further}, counts=counts)

"""What the tasks of questions share: right answers are worth 1, all others 0, and pi* is the reference given (softly) that
it is right.

A task of questions is a frozen dataclass with `language` among its fields that says which questions there are (`asked`),
how one is put to the model (`put`), and who grades (`grader`). Of a reward of this kind log Z is
log(1 + p (exp(1/beta) − 1)), p being the reference's success rate on a question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tiltlm.models.causal import steady
from tiltlm.problem import SPLITS, Check, Facts, Problem, Split
from tiltlm.questions.base import Grader, Question
from tiltlm.questions.grading import Grading
from tiltlm.run import Run
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.target import Target
from tiltlm.tasks.language import OfLanguage


class OfQuestions(OfLanguage):
    """A task of questions."""

    questions: ClassVar[bool] = True

    @property
    def hinted(self) -> bool:
        """Whether a question can be put with a hint."""
        return True

    def asked(self, split: Split, seed: int) -> Sequence[Question]:
        """The questions of a split."""
        raise NotImplementedError

    @property
    def grader(self) -> Grader:
        raise NotImplementedError

    def put(self, question: Question, tokenizer: Any, hint: bool = False) -> list[int]:
        """The prompt that asks it, as token ids; hint: one that tells the answer, where the task is `hinted`."""
        raise NotImplementedError

    def put_all(self, questions: Sequence[Question], tokenizer: Any, hint: bool = False) -> list[list[int]]:
        """The prompts that ask them, as `put` makes each."""
        return [self.put(question, tokenizer, hint) for question in questions]

    def facts(self) -> Facts:
        return Facts(self.beta, "several", r_max=1.0, atoms=(0.0, 1.0), held_out=True, hints=self.hinted)

    def problem(self, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
        reference = self.language.reference(runs)
        asked = {split: self.asked(split, seed) for split in SPLITS}
        ids = {split: self.put_all(own, reference.tokenizer) for split, own in asked.items()}
        for split, own in asked.items():
            self._fit(ids[split], own)
            if self.hinted:
                self._fit(self.put_all(own, reference.tokenizer, hint=True), own, " with its hint")
        both = [pair for split in SPLITS for pair in zip(ids[split], asked[split], strict=True)]
        grading = Grading.of(both, self.grader, reference.tokenizer)

        def hinted(prompts: Tokens) -> Tokens:
            """The same questions, put with a hint."""
            told = self.put_all(grading.questions(prompts), reference.tokenizer, hint=True)
            return Tokens.of(told, prompts.device)

        return Problem(
            Target(reference, grading, self.beta), {s: Tokens.of(rows, reference.device) for s, rows in ids.items()},
            self.language.new_tokens, stream(seed, "questions"), self.facts(), reference.tokenizer,
            checks=checks(grading), begin=lambda: steady(reference), grading=grading, questions=asked,
            hinted=hinted if self.hinted else None,
        )  # fmt: skip

    def _fit(self, ids: Sequence[Sequence[int]], asked: Sequence[Question], how: str = "") -> None:
        """Raise ValueError, naming the question, for a prompt that does not fit into the model beside its completion."""
        most = self.language.positions() - self.language.new_tokens
        for row, question in zip(ids, asked, strict=True):
            if len(row) > most:
                raise ValueError(
                    f"question {question.index} is put{how} in {len(row)} tokens, and the model holds {most:g} beside the "
                    "completion: leave longer questions out, or lower --task.new-tokens"
                )


def checks(grading: Grading) -> dict[str, Check]:
    """What is told of every answer: whether it is right, whether one could be read, whether it ended by itself."""

    def parsed(samples: Samples) -> Tensor:
        return torch.tensor([bool(g.rule) for g in grading.grades(samples)], device=samples.device)

    def finished(samples: Samples) -> Tensor:
        done = samples.finished
        return torch.ones(len(samples), dtype=torch.bool, device=samples.device) if done is None else done

    return {"accuracy": grading, "parsed": parsed, "finished": finished}

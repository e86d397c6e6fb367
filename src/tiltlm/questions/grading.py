"""Grades of a policy's samples: the reward is 1 where the answer is right, 0 where it is not.

A grade needs the prompt alone: questions that are put in the same words have the same right answer. Which of them a prompt
of a split is (its number, its subject) only its place in the split tells: `Problem.questions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltlm.questions.base import Grade, Grader, Question
from tiltlm.samples import Samples, Tokens


@dataclass(frozen=True)
class Grading:
    """r(x, y) ∈ {0, 1} of samples whose prompts are these questions.

    of_prompt  a prompt's ids -> its question, the first of those that are put in these words
    """

    of_prompt: Mapping[tuple[int, ...], Question]
    grader: Grader
    tokenizer: Any

    @staticmethod
    def of(asked: Sequence[tuple[Sequence[int], Question]], grader: Grader, tokenizer: Any) -> Grading:
        """asked: (ids of the prompt, question). Raises ValueError where one prompt has two right answers."""
        found: dict[tuple[int, ...], Question] = {}
        for ids, question in asked:
            known = found.setdefault(tuple(ids), question)
            if known.answer != question.answer:
                raise ValueError(
                    f"questions {known.index} and {question.index} are put in the same words, and have the answers "
                    f"{known.answer!r} and {question.answer!r}: leave one of them out"
                )
        return Grading(found, grader, tokenizer)

    def questions(self, prompts: Tokens) -> list[Question]:
        """A question that is put as each prompt is. Raises KeyError for a prompt that is none of them."""
        return [self.of_prompt[tuple(ids)] for ids in prompts.lists()]

    def grades(self, samples: Samples) -> list[Grade]:
        """The verdict on every row."""
        asked = self.questions(samples.prompts)
        texts = self.tokenizer.batch_decode(samples.completions.lists(), skip_special_tokens=True)
        finished = [True] * len(samples) if samples.finished is None else samples.finished.tolist()
        rows = zip(samples.prompt_index.tolist(), texts, finished, strict=True)
        return [self.grader.grade(asked[k], text, done) for k, text, done in rows]

    def __call__(self, samples: Samples) -> Tensor:
        return reward_of(self.grades(samples), samples.device)


def reward_of(grades: Sequence[Grade], device: torch.device | str = "cpu") -> Tensor:
    """1 for each right answer, 0 for each other one; float32 [N]."""
    return torch.tensor([float(grade.right) for grade in grades], device=device)

"""Answers of a file in the place of drawn ones: graded anew, those that do not belong here left out and counted.

Questions are found by their number (`questions.preload`). Where prompts are no questions, a file's lines say them by their
ids, as `answers.jsonl` of this library does: `prompt_ids`, and of every answer `completion_ids` and `finished`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tiltlm.jsonl import placed_rows
from tiltlm.problem import Problem
from tiltlm.questions.base import Question
from tiltlm.questions.generated import read_generated
from tiltlm.questions.preload import preloaded
from tiltlm.samples import Samples, Tokens


def stored(
    problem: Problem, asked: Tokens, questions: Sequence[Question], file: str
) -> tuple[Samples, Sequence[str]]:
    """The file's answers to these prompts, those of a prompt side by side, with rewards and `finished`, on the CPU; and
    what there is to say of what was left out. Raises ValueError where not one of them answers one of the prompts."""
    if problem.grading is None:
        return _by_ids(problem, asked, file)
    found = read_generated(file)
    ours = preloaded(found.rows, asked, questions, problem.grading, problem.reference.eos_ids, problem.width)
    return ours.samples, [*found.said, *ours.said()]


def _by_ids(problem: Problem, asked: Tokens, file: str) -> tuple[Samples, Sequence[str]]:
    place = {tuple(ids): k for k, ids in reversed(list(enumerate(asked.lists())))}
    answers: list[list[tuple[list[int], bool]]] = [[] for _ in range(len(asked))]
    strangers = too_long = 0
    for where, row in placed_rows(file, ("prompt_ids", "completion_ids", "finished")):
        k, own = place.get(tuple(row["prompt_ids"])), _answers(row, where, problem.reference.vocab_size)
        if k is None:
            strangers += len(own)
            continue
        short = [each for each in own if len(each[0]) <= problem.width]
        too_long += len(own) - len(short)
        answers[k] += short
    every = [(k, ids, done) for k, own in enumerate(answers) for ids, done in own]
    if not every:
        raise ValueError(
            f"{file} holds no answer to one of these {len(asked)} prompts: is it another split's, or task's?"
        )
    tokens = Tokens.of([ids for _, ids, _ in every])
    samples = Samples(
        asked.to("cpu"), torch.tensor([k for k, _, _ in every]), tokens.ids, tokens.mask,
        finished=torch.tensor([done for _, _, done in every]),
    )  # fmt: skip
    reward = problem.target.reward(samples.to(problem.device)).cpu()
    unanswered = sum(not own for own in answers)
    said = {
        f"{unanswered} of {len(asked)} prompts have no stored answer": unanswered,
        f"{strangers} stored answers belong to none of these prompts": strangers,
        f"{too_long} stored answers have more tokens than a completion here and are left out": too_long,
    }
    return samples.with_(reward=reward), [text for text, number in said.items() if number]


def _answers(row: dict[str, Any], where: str, vocab_size: int) -> list[tuple[list[int], bool]]:
    """(ids, whether it ended by itself) of every answer in a line."""
    ids, finished = row["completion_ids"], row["finished"]
    if not (isinstance(ids, list) and isinstance(finished, list) and len(ids) == len(finished)):
        raise ValueError(f"{where}: completion_ids and finished are lists with an entry for each answer")
    if not all(isinstance(own, list) and all(0 <= i < vocab_size for i in own) for own in ids):
        raise ValueError(f"{where}: completion_ids are token ids, 0 to {vocab_size - 1}")
    return [(own, bool(done)) for own, done in zip(ids, finished, strict=True)]

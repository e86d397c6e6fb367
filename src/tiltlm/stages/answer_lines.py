"""Lines of answers, one a prompt: drawn and graded, written, and read back as samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltlm.jsonl import read_rows
from tiltlm.problem import Problem
from tiltlm.questions.base import Grade, Question
from tiltlm.questions.grading import reward_of
from tiltlm.samplers.serving import Drawer
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.stages.draws import Make, short_numbers

SPACING = 1 << 20
"""Between the random numbers of one prompt's answers and the next one's: as many could be drawn of each."""


def answered(
    problem: Problem, drawer: Drawer, plain: Tokens, put: Tokens, questions: Sequence[Question], n: int,
    own: Stream, numbers: Tensor | None = None,
) -> Make:  # fmt: skip
    """(begin, end) -> the lines of those prompts: drawn for `put`, graded as answers to `plain`, which ask `questions`
    (none where answers are not graded). Answer j to the prompt called i follows from i and j alone, however many are drawn
    of each. numbers: what prompts are called, int64 [P] (default: their places)."""
    called = torch.arange(len(plain)) if numbers is None else numbers.cpu()

    def make(begin: int, end: int) -> Iterator[dict[str, Any]]:
        asked, read_as = put.select(slice(begin, end)).cropped(), plain.select(slice(begin, end)).cropped()
        number = called[begin:end, None] * SPACING + torch.arange(n)
        drawn = drawer(asked, n=n, max_new_tokens=problem.width, stream=own, rows=number.flatten())
        samples, grades = replace(drawn, prompts=read_as), None
        if problem.grading is not None and problem.target.reward is problem.grading:
            grades = problem.grading.grades(samples)
        reward = problem.target.reward(samples) if grades is None else reward_of(grades, samples.device)
        again = {"retokenised": True} if drawn.log_q is None else {}
        for line in lines_of(problem, samples.with_(reward=reward), questions[begin:end], grades):
            yield line | again

    return make


def lines_of(
    problem: Problem, samples: Samples, questions: Sequence[Question] = (), grades: Sequence[Grade] | None = None
) -> Iterator[dict[str, Any]]:
    """A line a prompt, with all its answers; samples: those of a prompt side by side, with rewards and `finished`;
    questions: what each prompt asks, where answers are graded; grades: of every answer, where they are known already."""
    assert samples.reward is not None and samples.finished is not None
    texts, done = problem.rows(samples), samples.completions.lists()
    columns: dict[str, list[Any]] = {
        "completions": [line["completion"] for line in texts], "rewards": short_numbers(samples.reward),
        "completion_ids": done, "finished": samples.finished.tolist(),
    }  # fmt: skip
    if samples.log_q is not None:
        columns["log_q"] = samples.log_q.sum(1).tolist()
    if problem.grading is not None:
        grades = problem.grading.grades(samples) if grades is None else grades
        columns |= {"answers": [grade.answer for grade in grades], "rules": [grade.rule for grade in grades]}
    counts = torch.bincount(samples.prompt_index, minlength=len(samples.prompts)).tolist()
    begin = 0
    for k, (ids, n) in enumerate(zip(samples.prompts.lists(), counts, strict=True)):
        part = slice(begin, begin + n)
        about = {"prompt": texts[begin]["prompt"] if n else ids, "prompt_ids": ids}
        if problem.grading is not None:
            question = questions[k]
            about |= {"index": question.index, "subject": question.subject, "answer": question.answer}
        yield about | {name: values[part] for name, values in columns.items()}
        begin += n


def per_prompt(lines: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    """The mean of each line's entries called `name` (of texts: how many are not empty), [P]."""
    rows = [[bool(x) if isinstance(x, str) else float(x) for x in line[name]] for line in lines]
    return torch.tensor([sum(row) / len(row) for row in rows], dtype=torch.float64)


def read(path: Path) -> Samples:
    """Lines of answers as samples with rewards and `finished`."""
    rows = list(read_rows(path, ("rewards",)))
    if not rows:
        none = torch.zeros(0, dtype=torch.int64)
        return Samples(
            Tokens.of([]), none, none.reshape(0, 0), none.bool().reshape(0, 0), none.bool(), reward=none.float()
        )
    return of_lines(rows)


def of_lines(rows: list[dict[str, Any]]) -> Samples:
    """Each line's prompt, with all its answers."""
    index = [k for k, row in enumerate(rows) for _ in row["completion_ids"]]
    done = Tokens.of([ids for row in rows for ids in row["completion_ids"]])
    finished = torch.tensor([flag for row in rows for flag in row["finished"]], dtype=torch.bool)
    reward = torch.tensor([value for row in rows for value in row["rewards"]], dtype=torch.float32)
    prompts = Tokens.of([row["prompt_ids"] for row in rows])
    return Samples(prompts, torch.tensor(index), done.ids, done.mask, finished, reward=reward)

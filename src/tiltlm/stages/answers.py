"""Answers of a round: completions of every prompt by the policy that stands, with their rewards; a line a prompt.

Where answers are graded, a line also says what was read off each, and by which rule. Lines are written as they come, and an
interrupted stage goes on behind the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltlm.jsonl import read_rows, whole_lines
from tiltlm.models.base import LanguageModel
from tiltlm.problem import Problem, Split
from tiltlm.progress import steps
from tiltlm.questions.base import Question
from tiltlm.run import Recipe, Run
from tiltlm.samplers.ancestral import Warp, Warped, draw, draw_in_batches
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.settings import SPEED
from tiltlm.stages.draws import Make, append, short_numbers
from tiltlm.stages.reporting import estimate
from tiltlm.stages.task import OfTask, Task

OVER = "over.json"
"""What a round that ends the chain writes: why."""

GREEDY = "greedy.json"
"""Of each validation prompt, whether the likeliest tokens answer it right (0 or 1)."""

ROWS_AT_ONCE = 256

SPACING = 1 << 20
"""Between the random numbers of one prompt's answers and the next one's: as many could be drawn of each."""


@dataclass(frozen=True)
class Answers(OfTask):
    """Draw completions of a split's prompts, and grade them."""

    task: Task
    n: int = 4
    """Of every prompt."""

    prompts: int = 0
    """The first so many prompts (0: all)."""

    split: Split = "train"
    before: Any = None
    """The round whose policy answers; None: the reference."""

    hinted: bool = False
    """Then ask those prompts that have no right answer again, with a hint."""

    right: float | None = None
    """Reward from which an answer is right: for hints, and for greedy answers to validation prompts."""

    rows: int = field(default=256, metadata=SPEED)
    """Drawn at once."""

    seed: int = 0

    @property
    def stage(self) -> str:  # type: ignore[override]
        who = "" if self.before is None else f"{self.before.called}-"
        number = "" if self.before is None else f"-{self.before.index + 2}"
        return f"{who}answers{number}" + ("-valid" if self.split == "valid" else "")

    def counted(self) -> Answers:
        return replace(
            self, task=self.task.at(1.0), right=self.right if self.hinted or self.split == "valid" else None
        )

    def inputs(self) -> dict[str, Recipe]:
        return self.needs() | ({} if self.before is None else {"before": self.before})

    def build(self, run: Run[Any]) -> None:
        if self.before is not None and (run.inputs["before"].folder / OVER).is_file():
            return  # nobody learns from answers of a chain that is over
        problem = self.problem(run)
        policy = problem.reference
        if self.before is not None:
            before = run.inputs["before"]
            policy = before.recipe.learnt(before, problem).policy
        own = problem.stream.child("answers", self.split, 0 if self.before is None else self.before.index + 1)
        asked = problem.prompts[self.split].select(slice(0, self.prompts or None))
        questions = problem.questions.get(self.split, ())
        with steps(self.name) as on_step:
            lines = answered(problem, policy, asked, asked, questions, self.n, own)
            append(run.folder / "answers.jsonl", lines, len(asked), max(1, self.rows // self.n), on_step)
        if self.hinted:
            self.ask_again(run, problem, policy, asked, own.child("hinted"))
        report = self.report(run)
        if self.split == "valid":
            hit = greedy(problem, policy, right_from(problem, self.right))
            run.write_json(GREEDY, [int(x) for x in hit])
            report.append(estimate(self, self.stage, "accuracy[greedy]", hit))
        run.write_json("report.json", report)

    def ask_again(
        self, run: Run[Any], problem: Problem, policy: LanguageModel, asked: Tokens, own: Stream
    ) -> None:
        """Prompts without a right answer, with a hint."""
        if problem.hinted is None:
            raise ValueError(f"{self.task.name} has no hints: leave --feed.rounds.rationalize out")
        bar = right_from(problem, self.right)
        lines = read_rows(run.folder / "answers.jsonl", ("rewards",))
        never = [k for k, line in enumerate(lines) if max(line["rewards"]) < bar]
        plain = asked.select(torch.tensor(never, dtype=torch.int64, device=asked.device))
        own_questions = problem.questions.get(self.split, ())
        questions = [own_questions[k] for k in never] if own_questions else ()
        with steps(f"{self.name} with a hint") as on_step:
            found = answered(problem, policy, plain, problem.hinted(plain), questions, self.n, own)
            append(run.folder / "hinted.jsonl", found, len(plain), max(1, self.rows // self.n), on_step)

    def report(self, run: Run[Any]) -> list[dict[str, Any]]:
        """What the answers are like, each prompt one observation."""
        lines = list(read_rows(run.folder / "answers.jsonl", ("rewards",)))
        rows = [estimate(self, self.stage, "reward", per_prompt(lines, "rewards"), "reward")]
        rows.append(estimate(self, self.stage, "finished", per_prompt(lines, "finished")))
        if "rules" in lines[0]:
            rows.append(estimate(self, self.stage, "parsed", per_prompt(lines, "rules")))
        return rows

    def graded(self, run: Run[Any]) -> Samples:
        """The answers with their rewards, on the CPU; those of a prompt side by side."""
        return read(run.folder / "answers.jsonl")

    def drawn(self, run: Run[Any]) -> int:
        """How many completions were drawn, with a hint or without."""
        again = run.folder / "hinted.jsonl"
        lines = whole_lines(run.folder / "answers.jsonl") + (whole_lines(again) if again.is_file() else 0)
        return self.n * lines

    def rationalized(self, run: Run[Any], problem: Problem, show: float) -> Samples:
        """Right answers to prompts with a hint, as if there had been none; `show`: the part whose hint stays."""
        found = read(run.folder / "hinted.jsonl")
        assert found.reward is not None
        if not len(found):
            return found
        good = found.select(found.reward >= right_from(problem, self.right))
        if not show or not len(good):
            return good
        assert problem.hinted is not None
        told = problem.hinted(good.prompts.to(problem.device)).to("cpu")
        shown = problem.stream.child("show hint").uniform(good.prompt_index, 1)[:, 0] < show
        both = Tokens.of([*good.prompts.lists(), *told.lists()])
        return replace(good, prompts=both, prompt_index=good.prompt_index + len(told) * shown.long())


def right_from(problem: Problem, right: float | None) -> float:
    """The reward from which an answer counts as right: as said, or the largest that there is."""
    if right is not None:
        return right
    if problem.facts.r_max is None:
        raise ValueError("no bound of the reward is known: say from which one an answer counts as right")
    return problem.facts.r_max


def greedy(problem: Problem, policy: LanguageModel, right: float) -> Tensor:
    """Whether the likeliest tokens answer each validation prompt right, float64 [P]."""
    drawn = draw_in_batches(
        Warped(policy, Warp(top_k=1)), problem.prompts["valid"], max_new_tokens=problem.width,
        stream=problem.stream.child("greedy"), batch_size=ROWS_AT_ONCE,
    )  # fmt: skip
    return (problem.target.reward(drawn) >= right).double().cpu()


def answered(
    problem: Problem,
    policy: LanguageModel,
    plain: Tokens,
    put: Tokens,
    questions: Sequence[Question],
    n: int,
    own: Stream,
) -> Make:
    """(begin, end) -> the lines of those prompts: drawn for `put`, graded as answers to `plain`, which ask `questions`
    (none where answers are not graded). Answer j to prompt i follows from i and j alone, however many are drawn of each."""

    def make(begin: int, end: int) -> Iterator[dict[str, Any]]:
        asked, read_as = put.select(slice(begin, end)).cropped(), plain.select(slice(begin, end)).cropped()
        number = torch.arange(begin, end)[:, None] * SPACING + torch.arange(n)
        drawn = draw(policy, asked, n=n, max_new_tokens=problem.width, stream=own, rows=number.flatten())
        samples = replace(drawn, prompts=read_as)
        rewards, texts = short_numbers(problem.target.reward(samples)), problem.rows(samples)
        assert drawn.log_q is not None and drawn.finished is not None
        log_q, finished = drawn.log_q.sum(1).tolist(), drawn.finished.tolist()
        grades = None if problem.grading is None else problem.grading.grades(samples)
        done = drawn.completions.lists()
        for k, ids in enumerate(read_as.lists()):
            part = slice(k * n, (k + 1) * n)
            line = {
                "prompt": texts[k * n]["prompt"], "completions": [row["completion"] for row in texts[part]],
                "rewards": rewards[part], "prompt_ids": ids, "completion_ids": done[part], "log_q": log_q[part],
                "finished": finished[part],
            }  # fmt: skip
            if grades is not None:
                question = questions[begin + k]
                line |= {
                    "index": question.index, "subject": question.subject, "answer": question.answer,
                    "answers": [grade.answer for grade in grades[part]], "rules": [grade.rule for grade in grades[part]],
                }  # fmt: skip
            yield line

    return make


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

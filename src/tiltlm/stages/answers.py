"""Answers to every prompt of a split, with their rewards; a line a prompt. A round learns from those of the policy that
stands; by itself it is the stage `answers`, of the reference, of another policy, or of a file.

Where answers are graded, a line also says what was read off each, and by which rule. Lines are written as they come, and an
interrupted stage goes on behind the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import tyro
from rich.console import Console
from torch import Tensor

from tiltlm import ranks
from tiltlm.feeds.rounds import Shares, disagreement, rates
from tiltlm.feeds.served import Following
from tiltlm.jsonl import read_rows, whole_lines
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM
from tiltlm.nets import begun
from tiltlm.problem import Facts, Problem, Split
from tiltlm.progress import note, steps
from tiltlm.questions.base import Question
from tiltlm.ruler.accuracies import answers_table
from tiltlm.ruler.power import before_a_run
from tiltlm.ruler.table import read_report
from tiltlm.run import Recipe, Run
from tiltlm.samplers.ancestral import Warp, Warped, draw
from tiltlm.samplers.reloading import reload
from tiltlm.samplers.server import Server
from tiltlm.samplers.serving import HERE, Drawer, Serving
from tiltlm.samplers.shared import draw_batches_shared
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.settings import ADDED, SPEED, at_least_one
from tiltlm.stages.answer_lines import answered, lines_of, per_prompt, read
from tiltlm.stages.draws import append, served
from tiltlm.stages.reporting import Row, estimate, row
from tiltlm.stages.stored_answers import stored
from tiltlm.stages.task import OfTask, Task

OVER = "over.json"
"""What a round that ends the chain writes: why."""

GREEDY = "greedy.json"
"""Of each validation prompt, whether the likeliest tokens answer it right (0 or 1)."""


@dataclass(frozen=True)
class Answers(OfTask):
    """Draw completions of a split's prompts, or read them from a file, and grade them."""

    task: Task
    n: int = 4
    """Of every prompt."""

    prompts: int = 0
    """The first so many prompts (0: all)."""

    split: Split = "train"
    """Whose prompts: train, valid or test."""

    before: tyro.conf.Suppress[Any] = None
    """The round whose policy answers; None: the reference, or `policy`."""

    hinted: bool = False
    """Then ask those prompts that have no right answer again, with a hint."""

    right: float | None = None
    """Reward from which an answer is right (not named: the largest there is)."""

    rows: int = field(default=256, metadata=SPEED)
    """Drawn at once."""

    policy: str = field(default="", metadata=ADDED)
    """Who answers: a run that trained a policy, a folder or a hub name (empty: the reference)."""

    samples: str = field(default="", metadata=ADDED)
    """A file of answers to take instead of drawing any: lines of ours (.jsonl), or STaR's generated.csv."""

    draw: Serving = field(default=HERE, metadata=ADDED)
    """Who draws: a server, or this process; where `weights` names a folder, it is given the policy's first."""

    seed: int = 0
    shared: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least_one(self, "n", "rows")
        if self.prompts < 0:
            raise ValueError(f"prompts are the first ones, 0 for all; got {self.prompts}")
        if self.samples and self.draw.url:
            raise ValueError("answers of a file are not drawn: leave draw.url out, or the file")
        if self.samples and self.hinted:
            raise ValueError("answers of a file are not asked for again: leave hints out, or the file")

    @property
    def together(self) -> bool:
        return super().together and not self.draw.url  # a server is asked by one

    @property
    def stage(self) -> str:  # type: ignore[override]
        who = "" if self.before is None else f"{self.before.called}-"
        number = "" if self.before is None else f"-{self.before.index + 2}"
        return f"{who}answers{number}" + ("" if self.split == "train" else f"-{self.split}")

    def counted(self) -> Answers:
        right = self.right if self.hinted or self.split == "valid" else None
        made = replace(self, task=self.task.at(1.0), right=right, draw=self.draw.still)
        if self.samples:
            made = replace(made, n=Answers.n, policy=self.policy if self.split == "valid" else "")
        return made

    def inputs(self) -> dict[str, Recipe]:
        return self.needs() | ({} if self.before is None else {"before": self.before})

    def files(self) -> list[str]:
        return [*super().files(), self.policy, self.samples]

    def check(self) -> None:
        super().check()
        if self.task.facts().prompts != "several":
            raise ValueError(
                f"{self.name}: answers are given to many prompts, and {self.task.name} has not several"
            )
        if self.draw.url and not self.task.facts().network:
            raise ValueError(f"{self.name}: a server draws from a transformer: leave draw.url out")
        if self.samples and not Path(self.samples).is_file():
            raise ValueError(f"{self.samples}: no such file of answers")

    def build(self, run: Run[Any]) -> None:
        if self.split == "train" and self.before is not None and (run.inputs["before"].folder / OVER).is_file():
            return  # nobody learns from answers of a chain that is over
        problem = self.problem(run)
        if self.samples:
            ranks.from_first(lambda: self.take(run, problem))
        if not self.samples or self.split == "valid":
            policy = self.answering(run, problem)
        if not self.samples:
            self.ask(run, problem, self.drawer(problem, policy))
        report = ranks.from_first(lambda: self.report(run))
        if self.split == "valid":
            hit = greedy(problem, policy, right_from(problem.facts, self.right), self.rows)
            run.write_json(GREEDY, [int(x) for x in hit])
            report.append(estimate(self, self.stage, "accuracy[greedy]", hit))
            self.say_power(self.graded(run), right_from(problem.facts, self.right))
        run.write_json("report.json", report)

    def say_power(self, graded: Samples, right: float) -> None:
        """Say, before anything learns, which difference so many questions can show: two models are taken to differ on as
        many as two draws of this one do."""
        assert graded.reward is not None
        found = disagreement(graded.reward >= right, graded.prompt_index, len(graded.prompts))
        if found > 0:
            note(f"{self.name}: {before_a_run(len(graded.prompts), found)}")

    def answering(self, run: Run[Any], problem: Problem) -> LanguageModel:
        """Who answers; a server is given whole models, for the reference, which answers first, is one."""
        if self.before is not None:
            before = run.inputs["before"]
            policy: LanguageModel = before.recipe.learnt(before, problem).policy
            return policy.merged() if self.draw.url and isinstance(policy, CausalLM) else policy
        return begun(problem, self.policy) if self.policy else problem.reference

    def asked(self, problem: Problem) -> Tokens:
        """The prompts. Raises ValueError where there is no such split."""
        if self.split not in problem.prompts:
            raise ValueError(
                f"{self.task.name} has no prompts of the split {self.split!r}: {', '.join(problem.prompts)}"
            )
        return problem.prompts[self.split].select(slice(0, self.prompts or None))

    def questions(self, problem: Problem) -> Sequence[Question]:
        """What the prompts ask; none where answers are not graded."""
        return problem.questions.get(self.split, ())[: self.prompts or None]

    def drawer(self, problem: Problem, policy: LanguageModel) -> Drawer:
        """What draws: the policy, here or on a server."""
        if not self.draw.url:
            return partial(draw, self.draw.of(policy))
        if self.draw.weights:
            server = Server.of(self.draw, policy, problem.tokenizer)
            Following(server, policy, Path(self.draw.weights), partial(reload, server)).follow(0)
        return served(self.draw, policy, problem.tokenizer, self.name)

    def ask(self, run: Run[Any], problem: Problem, drawer: Drawer) -> None:
        asked, own = self.asked(problem), self.stream(problem)
        questions = self.questions(problem)
        with steps(self.name) as on_step:
            lines = answered(problem, drawer, asked, asked, questions, self.n, own)
            append(run.folder / "answers.jsonl", lines, len(asked), max(1, self.rows // self.n), on_step)
        if self.hinted:
            self.ask_again(run, problem, drawer, asked, own.child("hinted"))

    def take(self, run: Run[Any], problem: Problem) -> None:
        """The answers of the file; prompts that it has none to get an empty line."""
        found, said = stored(problem, self.asked(problem), self.questions(problem), self.samples)
        for text in said:
            note(f"{self.name}: {text}")
        run.write_jsonl("answers.jsonl", list(lines_of(problem, found, self.questions(problem))))

    def stream(self, problem: Problem) -> Stream:
        return problem.stream.child("answers", self.split, 0 if self.before is None else self.before.index + 1)

    def ask_again(self, run: Run[Any], problem: Problem, drawer: Drawer, asked: Tokens, own: Stream) -> None:
        """Prompts without a right answer, with a hint."""
        if problem.hinted is None:
            raise ValueError(f"{self.task.name} has no hints: leave --feed.rounds.rationalize out")
        bar = right_from(problem.facts, self.right)
        never = ranks.from_first(lambda: unanswered(run.folder / "answers.jsonl", bar))
        plain = asked.select(torch.tensor(never, dtype=torch.int64, device=asked.device))
        own_questions = problem.questions.get(self.split, ())
        questions = [own_questions[k] for k in never] if own_questions else ()
        with steps(f"{self.name} with a hint") as on_step:
            found = answered(
                problem, drawer, plain, problem.hinted(plain), questions, self.n, own, torch.tensor(never)
            )
            append(run.folder / "hinted.jsonl", found, len(plain), max(1, self.rows // self.n), on_step)

    def report(self, run: Run[Any]) -> list[Row]:
        """What the answers are like, each prompt that has some one observation."""
        lines = [line for line in read_rows(run.folder / "answers.jsonl", ("rewards",)) if line["rewards"]]
        rows = [estimate(self, self.stage, "reward", per_prompt(lines, "rewards"), "reward")]
        rows.append(estimate(self, self.stage, "finished", per_prompt(lines, "finished")))
        if "rules" in lines[0]:
            rows.append(estimate(self, self.stage, "parsed", per_prompt(lines, "rules")))
        return rows

    def graded(self, run: Run[Any]) -> Samples:
        """The answers with their rewards, on the CPU; those of a prompt side by side, prompt i being line i's."""
        return read(run.folder / "answers.jsonl")

    def drawn(self, run: Run[Any]) -> int:
        """How many completions there are, with a hint or without."""
        if self.samples:
            return len(self.graded(run))
        again = run.folder / "hinted.jsonl"
        lines = whole_lines(run.folder / "answers.jsonl") + (whole_lines(again) if again.is_file() else 0)
        return self.n * lines

    def decoder(self, run: Run[Any]) -> LanguageModel:
        raise ValueError(
            f"{run.folder} holds answers and draws nothing itself: name the run that they are drawn from"
        )

    def show(self, run: Run[Any]) -> None:
        """The report, how many answers are right, and of how many prompts all, some, none."""
        if not (run.folder / "report.json").is_file():
            print(f"{run.folder}: the chain of rounds was over, and nobody answered")
            return
        rows, right = read_report(run.folder / "report.json"), self.told_right()
        if right is not None:
            graded = self.graded(run)
            assert graded.reward is not None
            rate = rates(graded.reward >= right, graded.prompt_index, len(graded.prompts))
            rows = [estimate(self, self.stage, "accuracy", rate[~rate.isnan()]), *rows]
            rows += self.shares(Shares.of(graded.reward >= right, graded.prompt_index), rate)
        Console(width=130, highlight=False).print(answers_table(rows, self.name))

    def told_right(self) -> float | None:
        """The reward from which an answer is right, where that is known."""
        return self.task.facts().r_max if self.right is None else self.right

    def shares(self, found: Shares, rate: Tensor) -> list[Row]:
        """Of how many prompts all answers are right, some, none; of how many there are none; (right, wrong) pairs."""
        counts = {
            "always_right": found.right, "sometimes_right": found.mixed, "never_right": found.wrong,
            "unanswered": int(rate.isnan().sum()), "pairs": found.pairs,
        }  # fmt: skip
        return [row(self, self.stage, name, count) for name, count in counts.items()]

    def rationalized(self, run: Run[Any], problem: Problem, show: float) -> Samples:
        """Right answers to prompts with a hint, as if there had been none; `show`: the part whose hint stays."""
        found = read(run.folder / "hinted.jsonl")
        assert found.reward is not None
        if not len(found):
            return found
        good = found.select(found.reward >= right_from(problem.facts, self.right))
        if not show or not len(good):
            return good
        assert problem.hinted is not None
        told = problem.hinted(good.prompts.to(problem.device)).to("cpu")
        shown = problem.stream.child("show hint").uniform(good.prompt_index, 1)[:, 0] < show
        both = Tokens.of([*good.prompts.lists(), *told.lists()])
        return replace(good, prompts=both, prompt_index=good.prompt_index + len(told) * shown.long())


def right_from(facts: Facts, right: float | None) -> float:
    """The reward from which an answer counts as right: as said, or the largest that there is."""
    if right is not None:
        return right
    if facts.r_max is None:
        raise ValueError("no bound of the reward is known: say from which one an answer counts as right")
    return facts.r_max


def unanswered(path: Path, right: float) -> list[int]:
    """The numbers of the lines that have no right answer."""
    return [k for k, line in enumerate(read_rows(path, ("rewards",))) if max(line["rewards"]) < right]


def greedy(problem: Problem, policy: LanguageModel, right: float, rows_at_once: int) -> Tensor:
    """Whether the likeliest tokens answer each validation prompt right, float64 [P]."""

    def graded(drawn: Samples) -> Samples:
        return drawn.with_(reward=problem.target.reward(drawn))

    found = draw_batches_shared(
        Warped(policy, Warp(top_k=1)), problem.prompts["valid"], graded, max_new_tokens=problem.width,
        stream=problem.stream.child("greedy"), batch_size=rows_at_once,
    )  # fmt: skip
    assert found.reward is not None
    return (found.reward >= right).double().cpu()

"""V-STaR (Hosseini et al. 2024, arXiv:2402.06457): rounds of SFT make a generator, the right and wrong answers of all its
rounds a verifier, and of n answers the one that the verifier likes best is given.

    generator   rounds of SFT from the base, on all right answers so far
    verifier    DPO from the base on (right, wrong) pairs of all answers that the generator learnt from
    score       h(y) = log p_verifier(y|x) − log pi_ref(y|x)

Generator and verifier are chains of rounds like any other, and are found where they have been trained before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor

from tiltlm import ranks
from tiltlm.jsonl import read_json, read_rows
from tiltlm.models.base import LanguageModel
from tiltlm.problem import Problem
from tiltlm.ruler.accuracies import chosen_table
from tiltlm.ruler.measure import Measurement
from tiltlm.ruler.of_draws import best_at, majority_at, pass_at, ranking
from tiltlm.ruler.plots import of_draws_plot
from tiltlm.run import Recipe, Run
from tiltlm.samples import Samples
from tiltlm.settings import SPEED, at_least_one
from tiltlm.stages.answers import Answers, right_from
from tiltlm.stages.cells import Cell
from tiltlm.stages.log_ref import score
from tiltlm.stages.reporting import Row, estimate
from tiltlm.stages.rounds import Round
from tiltlm.stages.task import OfTask, Task

PICTURE = "best-of-n.png"


@dataclass(frozen=True)
class Candidates:
    """Answers to test questions that the verifier chooses among."""

    n: int = 64
    """Of every question; the best of 1, 2, 4, … of them are measured."""

    prompts: int = 0
    """Test questions, the first ones (0: all)."""

    rows: int = field(default=256, metadata=SPEED)
    """Drawn at once."""

    def __post_init__(self) -> None:
        at_least_one(self, "n", "rows")
        if self.prompts < 0:
            raise ValueError(f"prompts are the first ones, 0 for all; got {self.prompts}")


@dataclass(frozen=True)
class VStar(OfTask):
    """Best of n answers of a generator by a verifier, both learnt from the same rounds."""

    task: Task
    generator: Cell
    verifier: Cell
    candidates: Candidates = Candidates()
    seed: int = 0
    stage: ClassVar[str] = "v-star"
    shared: ClassVar[bool] = True

    @property
    def last(self) -> Round:
        """What the generator ends with."""
        return Round.last_of(self.task, self.generator, "v-star", self.seed)

    @property
    def judge(self) -> Round:
        """The verifier: one round, on the answers that the generator's rounds learnt from."""
        how = replace(self.verifier.feed.rounds, count=1, accumulate=True)
        cell = replace(self.verifier, feed=replace(self.verifier.feed, rounds=how))
        return Round.last_of(self.task, cell, "v-star-verifier", self.seed, self.last)

    def counted(self) -> VStar:
        facts, beta = self.task.facts(), self.task.beta
        first, second = (
            replace(cell.counted(facts), method=cell.method.bound(beta))
            for cell in (self.generator, self.verifier)
        )
        return replace(self, task=self.task.at(1.0), generator=first, verifier=second)

    def files(self) -> list[str]:
        return [*super().files(), *self.generator.files(), *self.verifier.files()]

    def inputs(self) -> dict[str, Recipe]:
        how = self.candidates
        drawn = Answers(
            self.task,
            how.n,
            how.prompts,
            "test",
            self.last,
            rows=how.rows,
            draw=self.last.feed.draw,
            seed=self.seed,
        )
        return self.needs() | {"generator": self.last, "verifier": self.judge, "answers": drawn}

    def check(self) -> None:
        super().check()
        for name, cell in {"generator": self.generator, "verifier": self.verifier}.items():
            if getattr(cell.feed, "source", "") != "rounds":
                raise ValueError(f"{self.name}: its {name} learns in rounds: --{name}.feed.source rounds")
        if self.verifier.method.fed != "pairs":
            raise ValueError(
                f"{self.name}: a verifier learns from pairs, and this one from {self.verifier.method.fed}"
            )

    # ---- measuring ------------------------------------------------------------------------------------------------

    def build(self, run: Run[Any]) -> None:
        problem, drawn = self.problem(run), run.inputs["answers"]
        samples, n = drawn.recipe.graded(drawn), self.candidates.n
        assert samples.reward is not None
        h = self.log_ratios(run, problem, samples).reshape(-1, n)
        right = (samples.reward >= right_from(problem.facts, self.generator.feed.rounds.right)).reshape(-1, n)
        said = [row.get("answers") for row in read_rows(drawn.folder / "answers.jsonl", ("rewards",))]
        values, rows = {}, []
        for chosen, draws, x in chosen_of(right, h, None if None in said else said):
            values[f"accuracy[{chosen}@{draws}]"] = x
            rows.append(self.row(f"accuracy[{chosen}@{draws}]", x) | {"chosen": CHOSEN[chosen], "draws": draws})
        run.save("measurement.safetensors", Measurement(values))
        if ranks.is_first():
            of_draws_plot(rows, run.folder / PICTURE, f"{self.task.title()}: one of n answers")
        pairs = ranking(right, h)
        rows += [self.row("verifier_accuracy", pairs)] if len(pairs) else []
        run.write_json("report.json", rows)
        if problem.questions:
            asked = problem.questions["test"][: len(samples.prompts)]
            run.write_json("questions.json", [(question.index, question.answer) for question in asked])

    @torch.no_grad()
    def log_ratios(self, run: Run[Any], problem: Problem, samples: Samples) -> Tensor:
        """h of every answer, [N]; 0 where the verifier found nothing to learn from."""
        verifier = run.inputs["verifier"]
        policy = verifier.recipe.learnt(verifier, problem).policy
        return (score(samples, policy) - score(samples, problem.reference)).double().sum(1)

    def row(self, metric: str, x: Tensor) -> Row:
        return estimate(self, self.stage, metric, x)

    def decoder(self, run: Run[Any]) -> LanguageModel:
        raise ValueError(f"{run.folder} chooses among answers: name the run of its generator, or of its verifier")

    def show(self, run: Run[Any]) -> None:
        rows = read_json(run.folder / "report.json")
        Console(width=130, highlight=False).print(chosen_table(rows, self.name))
        for row in rows:
            if row["metric"] == "verifier_accuracy":
                print(f"right over wrong by the verifier: {row['value']:.4f}, {row['n']} questions that have both")
        print(f"generator: {run.inputs['generator'].folder}\nverifier: {run.inputs['verifier'].folder}")
        print(f"picture: {run.folder / PICTURE}")


CHOSEN = {"best": "by the verifier", "maj": "by majority", "pass": "any (pass@n)"}
"""Ways to choose one of n answers, for people."""


def chosen_of(right: Tensor, h: Tensor, said: Any) -> Iterator[tuple[str, int, Tensor]]:
    """(way to choose, n, whether right by question) for n = 1, 2, 4, … up to the draws there are. said: the answers as they
    were read, [P][N]; None: they are not known, and there is no majority."""
    draws = 1
    while draws <= right.shape[1]:
        yield "best", draws, best_at(right, h, draws)
        if said is not None:
            yield "maj", draws, majority_at(right, said, draws)
        yield "pass", draws, pass_at(right, draws)
        draws *= 2

"""Bounds of log Z against the number of particles, with CTL's twist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rich.console import Console

from tiltlm.jsonl import read_json
from tiltlm.problem import Facts
from tiltlm.progress import steps
from tiltlm.ruler.bounds import ESTIMATORS, bound_repeats, log_z_of
from tiltlm.ruler.bounds import Bounds as Found
from tiltlm.ruler.plots import bounds_plot
from tiltlm.ruler.table import table
from tiltlm.run import Recipe, Run
from tiltlm.settings import at_least_one
from tiltlm.stages.cells import Cell
from tiltlm.stages.exact import Exact, ExactSettings, exact_of
from tiltlm.stages.learn import Learn
from tiltlm.stages.log_z import first_prompts
from tiltlm.stages.reporting import Row
from tiltlm.stages.task import OfTask, Task
from tiltlm.tensors import load_tensors, save_tensors


@dataclass(frozen=True)
class BoundsSettings:
    """Which bounds."""

    particles: tuple[int, ...] = (4, 16, 64, 256)
    repeats: int = 20
    """Runs of each; the upper bounds take an exact draw of every prompt each."""

    prompts: int = 20
    """Several prompts: test prompts at most."""

    estimators: tuple[str, ...] = ("iwae", "smc", "smc-ess")
    proposals: tuple[Literal["twist", "reference"], ...] = ("twist", "reference")

    def __post_init__(self) -> None:
        at_least_one(self, "particles", "repeats", "prompts")
        unknown = [name for name in self.estimators if name not in ESTIMATORS]
        if unknown or not set(self.estimators) - {"iwae"} or not self.proposals:
            raise ValueError(
                f"bounds want estimators of {', '.join(ESTIMATORS)}, one of them by SMC (importance sampling's midpoint may"
                f" be nats off), and a proposal; got estimators {self.estimators}, proposals {self.proposals}"
            )


@dataclass(frozen=True)
class Bounds(OfTask):
    """Bounds of log Z against the number of particles, with CTL's twist."""

    task: Task
    twist: Cell
    """CTL's settings."""

    bounds: BoundsSettings = BoundsSettings()
    exact: ExactSettings = ExactSettings()
    seed: int = 0
    stage: ClassVar[str] = "bounds"

    def files(self) -> list[str]:
        return [*super().files(), *self.exact.files()]

    def check(self) -> None:
        super().check()
        refuse_conditions(self.stage, self.task.facts())
        Exact(self.task, self.exact, seed=self.seed).refuse_few(self.bounds.repeats, "bounds.repeats")

    def inputs(self) -> dict[str, Recipe]:
        twist = Learn.of(self.task, self.twist, "ctl", self.exact, self.seed)
        return self.needs() | {"exact": Exact(self.task, self.exact, seed=self.seed), "twist": twist}

    def build(self, run: Run[Any]) -> None:
        problem, s, kept = self.problem(run), self.bounds, run.inputs["twist"]
        prompts = problem.prompts["test"].select(slice(0, s.prompts))
        exact = first_prompts(exact_of(run).to(problem.device), len(prompts))
        twist: Any = kept.recipe.decoder(kept).twist
        with steps(self.name) as on_step:
            found = bound_repeats(
                problem.target, twist, prompts, exact, ks=s.particles, repeats=s.repeats, max_new_tokens=problem.width,
                stream=problem.stream.child("bounds"), estimators=s.estimators, proposals=s.proposals, on_step=on_step,
            )  # fmt: skip
        save_tensors(found.tensors(), run.folder / "bounds.safetensors")
        log_z_of(found)  # raises where lower and upper bounds contradict each other
        run.write_json("bounds.json", found.rows())
        run.write_json("report.json", bound_report(found.rows(), self))
        title = f"{self.task.title()}: log Z between its bounds"
        bounds_plot(found.rows(), run.folder / "bounds.png", title)

    def show(self, run: Run[Any]) -> None:
        flat = [
            row | {"method": method_of(row), "metric": row["side"]}
            for row in read_json(run.folder / "bounds.json")
        ]
        headings = {"lower": "log Z, lower bound", "upper": "upper bound"}
        Console(width=130, highlight=False).print(table(flat, "bounds of log Z (nats)", headings))
        print(log_z_of(Found.of_tensors(load_tensors(run.folder / "bounds.safetensors"))))
        print(f"picture: {run.folder / 'bounds.png'}")


def refuse_conditions(stage: str, facts: Facts) -> None:
    """Raise ValueError for conditions, which have one exact draw each."""
    if facts.conditioned:
        raise ValueError(
            f"{stage}: in infilling each condition has one exact draw, and bounds of one log Z want several"
        )


def method_of(row: Row) -> str:
    """What a table calls a kind of bound."""
    return f"{row['estimator']}, {row['proposal']} proposal, {row['k']} particles"


def bound_report(rows: list[Row], recipe: Recipe, method: Any = method_of) -> list[Row]:
    """Report rows: each bound as a metric of its method, e.g. smc-ess, 64 particles."""
    return [
        {"recipe": recipe.name, "method": method(row), "metric": f"log_z_{row['side']}", "seed": recipe.seed,
         "value": row["value"], "stderr": row["stderr"], "n": row["repeats"], "unit": "nats", "low": row["low"],
         "high": row["high"], "interval": "Student's t", "certified": row["certified"]}
        for row in rows
    ]  # fmt: skip

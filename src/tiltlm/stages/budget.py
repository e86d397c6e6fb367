"""Gold reward, J and the judge's accuracy against the labels bought: what online methods with a judge are compared by.

A label is one verdict of the gold reward on one pair: `stages.labels` counts them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any, ClassVar

from rich.console import Console

from tiltlm.jsonl import read_json, read_rows
from tiltlm.ruler.plots import budget_plot
from tiltlm.ruler.table import read_report, table
from tiltlm.run import Recipe, Run
from tiltlm.settings import at_least_one
from tiltlm.stages.cells import Cell
from tiltlm.stages.labels import labels_at, uncounted
from tiltlm.stages.measure import Measure, RulerSettings
from tiltlm.stages.reporting import Row, row
from tiltlm.stages.task import OfTask, Task

METRICS = ("reward", "objective", "kl_to_reference")
"""What is followed along the training."""

ACCURACY = "judge_accuracy"


@dataclass(frozen=True)
class Budget(OfTask):
    """Several methods against the labels they have bought, over several seeds."""

    task: Task
    cells: dict[str, Cell]
    """By the name that the picture has for each."""

    ruler: RulerSettings
    seeds: int = 1
    """Seeds, from `seed` on; the spread between them is the error bar."""

    seed: int = 0
    stage: ClassVar[str] = "budget"

    def __post_init__(self) -> None:
        at_least_one(self, "seeds")
        if self.ruler.checkpoints < 2:
            raise ValueError("a curve wants two checkpoints or more: --ruler.checkpoints")

    def measures(self) -> dict[tuple[str, int], Measure]:
        """What is measured: by name and seed."""
        return {
            (name, seed): Measure(
                self.task, cell.method, cell.feed, kept(cell, self.ruler.checkpoints), cell.net, self.ruler, called=name,
                seed=seed,
            )
            for name, cell in self.cells.items()
            for seed in range(self.seed, self.seed + self.seeds)
        }  # fmt: skip

    def inputs(self) -> dict[str, Recipe]:
        return {f"{name}/{seed}": each for (name, seed), each in self.measures().items()}

    def check(self) -> None:
        super().check()
        for (name, _), each in self.measures().items():
            each.check()
            why = uncounted(each.cell, self.task.facts())
            if why:
                raise ValueError(f"{name} cannot stand in a figure of labels: {why}")

    def build(self, run: Run[Any]) -> None:
        rows: list[Row] = []
        for name in self.cells:
            lines = [curve_of(run.inputs[f"{name}/{self.seed + k}"]) for k in range(self.seeds)]
            rows += list(over_seeds(self, name, lines))
        run.write_json("curve.json", rows)
        last = {(each["method"], each["metric"]): each for each in rows}
        run.write_json(
            "report.json", [{k: v for k, v in each.items() if k != "updates"} for each in last.values()]
        )
        budget_plot(rows, run.folder / "budget.png", f"{self.task.title()}: against labels bought")

    def show(self, run: Run[Any]) -> None:
        headings = {
            "labels": "labels",
            "reward": "E[r]",
            "kl_to_reference": "KL(q‖ref)",
            "objective": "J",
            ACCURACY: "judge right",
        }
        rows = read_report(run.folder / "report.json")
        title = f"{self.task.title()}: the last checkpoint" + (f", {self.seeds} seeds" if self.seeds > 1 else "")
        Console(width=110, highlight=False).print(table(rows, title, headings))
        print(f"picture: {run.folder / 'budget.png'}")


def kept(cell: Cell, checkpoints: int) -> Any:
    """The cell's fit, with so many checkpoints kept."""
    return replace(cell.fit, checkpoints=max(cell.fit.checkpoints, checkpoints))


Line = dict[int, dict[str, float]]
"""updates -> numbers by name."""


def curve_of(run: Run[Measure]) -> Line:
    """A measurement's checkpoints, with the labels bought until then and the judge's accuracy on the steps before."""
    learnt = run.inputs["learnt"]
    log = list(read_rows(learnt.folder / "metrics.jsonl"))
    found: Line = {}
    for each in read_json(run.folder / "curve.json"):
        if each["metric"] in METRICS:
            found.setdefault(int(each["updates"]), {})[each["metric"]] = float(each["value"])
    before = 0
    for updates in sorted(found):
        found[updates]["labels"] = float(labels_at(learnt, log, updates))
        seen = [line[ACCURACY] for line in log[before:updates] if ACCURACY in line]
        found[updates] |= {ACCURACY: mean(seen)} if seen else {}
        before = updates
    return dict(sorted(found.items()))


def over_seeds(recipe: Recipe, name: str, lines: Sequence[Line]) -> Iterator[Row]:
    """Rows of the checkpoints that all seeds have: the mean over seeds, and its standard error."""
    for updates in sorted(set.intersection(*(set(line) for line in lines))):
        points = [line[updates] for line in lines]
        for metric in [m for m in (*METRICS, "labels", ACCURACY) if all(m in point for point in points)]:
            x = [point[metric] for point in points]
            stderr = stdev(x) / math.sqrt(len(x)) if len(x) > 1 else None
            unit = {"labels": "rows", ACCURACY: "rate", "kl_to_reference": "nats"}.get(metric, "reward")
            yield row(recipe, name, metric, mean(x), stderr, len(x), unit, updates=updates)

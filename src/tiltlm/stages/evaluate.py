"""Comparing: several methods against one target, side by side: table, picture, lower bounds of the distances."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from rich.console import Console

from tiltlm.jsonl import read_json
from tiltlm.models.base import LanguageModel
from tiltlm.problem import Problem
from tiltlm.ruler.frontier import binary_curve, frontier_plot
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.measure import Measurement
from tiltlm.ruler.plots import curve_plot, kl_bars
from tiltlm.ruler.table import read_report, table
from tiltlm.run import Recipe, Run
from tiltlm.samples import Samples
from tiltlm.stages.cells import Cell
from tiltlm.stages.exact import ExactSettings
from tiltlm.stages.gap import gap_in_groups
from tiltlm.stages.log_z import LogZSettings
from tiltlm.stages.measure import Measure, RulerSettings, say_doubts
from tiltlm.stages.reporting import Row, estimate
from tiltlm.stages.task import OfTask, Task


@dataclass(frozen=True)
class Evaluate(OfTask):
    """Every method against the same target by the same ruler."""

    task: Task
    methods: tuple[str, ...]
    cells: Mapping[str, Cell]
    """The settings of each method."""

    ruler: RulerSettings = RulerSettings()
    exact: ExactSettings = ExactSettings()
    log_z: LogZSettings = LogZSettings()
    twist: Cell | None = None
    at: tuple[float, ...] = ()
    """Temperatures of the target that all methods are trained and measured at (none: the task's alone)."""

    seed: int = 0
    stage: ClassVar[str] = "evaluate"
    gathers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("name at least one method to compare; `tiltlm list` shows them")
        if not all(beta > 0 for beta in self.at):
            raise ValueError(f"temperatures must be positive: they divide the reward; got {self.at}")

    def inputs(self) -> dict[str, Recipe]:
        found: dict[str, Recipe] = {}
        for beta in self.at or (self.task.beta,):
            for name in self.methods:
                found[self.label(name, beta)] = self.measured(name, beta)
        return found

    def measured(self, name: str, beta: float) -> Measure:
        """The recipe that measures a method."""
        c, task = self.cells[name], self.task if beta == self.task.beta else self.task.at(beta)
        return Measure(
            task, c.method, c.feed, c.fit, c.net, self.ruler, self.exact, self.log_z, self.twist, name, self.seed
        )

    def label(self, name: str, beta: float) -> str:
        """A method's name in the tables of this comparison."""
        return f"{name} (beta {beta:g})" if len(self.at) > 1 else name

    def files(self) -> list[str]:
        own = [name for c in self.counted().cells.values() for name in c.files()]
        return [*super().files(), *own, *self.exact.files()]

    def check(self) -> None:
        for each in self.inputs().values():
            each.check()

    def counted(self) -> Evaluate:
        cells = {name: self.cells[name].counted(self.task.facts()) for name in self.methods}
        return replace(self, cells=cells, twist=self.twist if self.log_z.by == "bounds" else None)

    # ---- what comes out -------------------------------------------------------------------------------------------

    def build(self, run: Run[Any]) -> None:
        rows, curve = self.gathered(run, "report.json"), self.gathered(run, "curve.json")
        rows += self.pooled_bounds(run) + self.gap_of_reference(run)
        first = next(iter(run.inputs.values()))
        problem = first.recipe.problem(first)
        rows += self.optimum(first, problem)
        run.write_json("report.json", rows)
        if curve:
            run.write_json("curve.json", curve)
        self.draw(run, problem, rows, curve)
        for name, text in self.task.files_of(self, rows).items():
            run.write_json(name, text)

    def gathered(self, run: Run[Any], name: str) -> list[Row]:
        """The rows of all inputs' files called `name`, each method under its label here."""
        found = []
        for label, each in run.inputs.items():
            path, called = each.folder / name, each.recipe.called
            at = {"beta": each.recipe.task.beta} if len(self.at) > 1 else {}
            for row in read_json(path) if path.is_file() else []:
                found.append(row | at | {"method": row["method"].replace(called, label, 1)})
        return found

    def optimum(self, first: Run[Any], problem: Problem) -> list[Row]:
        """pi* itself, where it is in closed form."""
        if problem.optimum is None or len(self.at) > 1:
            return []
        ruler = first.recipe.ruler_of(first, problem)
        found: Measurement = problem.optimum(ruler)
        return found.rows(self.name, "optimum (exact)", self.seed)

    def pooled_bounds(self, run: Run[Any]) -> list[Row]:
        """KL(q‖pi*) at least, where no log Z is known: a lower bound of it from all methods' draws together, less the
        method's own F.

        The mean of all their weights is an unbiased Z of every prompt, whoever drew; its log is low in expectation. (The
        best method's bound alone would be picked for its luck.)
        """
        kept = {label: each for label, each in run.inputs.items() if not each.recipe.absolute}
        known = [row for row in self.gathered(run, "report.json") if row["metric"] == "kl_to_target"]
        if not kept or known or not self.ruler.absolute:
            return []
        rows = []
        for beta in dict.fromkeys(each.recipe.task.beta for each in kept.values()):
            some = {label: each.folder for label, each in kept.items() if each.recipe.task.beta == beta}
            drawn = {label: Samples.load(folder / "samples.safetensors") for label, folder in some.items()}
            weights = [s.log_w.reshape(len(s.prompts), -1) for s in drawn.values() if s.log_w is not None]
            if not weights:
                continue
            together = torch.cat(weights, 1)
            lower = together.logsumexp(1).double() - math.log(together.shape[1])
            for label, folder in some.items():
                own = Measurement.load(folder / "measurement.safetensors").values.get("log_w")
                if own is None or len(own) != len(lower):
                    continue
                row = estimate(self, label, "kl_to_target_at_least", lower - own, "nats")
                rows.append(row | {"high": None})  # how far the truth lies above a lower bound is not known
        return rows

    def gap_of_reference(self, run: Run[Any]) -> list[Row]:
        """The reference's distance within the groups that the policies beside it are held against."""
        rows: list[Row] = []
        for label, each in run.inputs.items():
            if each.recipe.called != "reference":
                continue
            problem = each.recipe.problem(each)
            beside = (other for other in run.inputs.values() if other.recipe.task == each.recipe.task)
            for learnt in (other.inputs["learnt"] for other in beside if "learnt" in other.inputs):
                gap = gap_in_groups(learnt, problem, problem.reference, problem.beta_pi)
                if len(gap):
                    rows.append(estimate(self, label, "gap", gap, "nats"))
                    break
        return rows

    def draw(self, run: Run[Any], problem: Problem, rows: list[Row], curve: list[Row]) -> None:
        """Pictures: reward against KL to the reference; both KLs to pi*, where they are known; curves over updates."""
        title = f"{self.task.title()}, seed {self.seed}"
        known = {row["metric"] for row in rows}
        main = [row for row in rows if not row["method"].endswith("responses")]
        frontier_plot(main, self.best_curve(problem), run.folder / "frontier.png", title, ways=curve)
        if {"kl_to_target", "kl_from_target"} <= known:
            kl_bars(rows, run.folder / "kl.png", f"{title}: how far from pi*")
        for metric, words in (("kl_to_target", "KL(q‖pi*)"), ("kl_from_target", "KL(pi*‖q)")):
            points = [row | {"step": row["updates"]} for row in curve if row["metric"] == metric]
            if points:
                curve_plot(points, metric, run.folder / f"curve_{metric}.png", f"{words} against updates")

    def best_curve(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(KL(pi*‖ref), E_pi*[r]) over beta, where the reward is 0 or 1 and its probability can be computed."""
        if problem.facts.atoms != (0.0, 1.0) or problem.expected_reward is None:
            return None
        log_p = problem.expected_reward(problem.reference, problem.prompts["test"]).double().log()
        return binary_curve(log_p, torch.logspace(-1.7, 2, 120))

    def decoder(self, run: Run[Any]) -> LanguageModel:
        raise ValueError(f"{run.folder} compares methods and draws nothing itself: name the run of one of them")

    def show(self, run: Run[Any]) -> None:
        rows = read_report(run.folder / "report.json")
        out, betas = Console(width=150, highlight=False), ", ".join(f"{b:g}" for b in self.at or (self.task.beta,))
        other = [row for row in rows if "(beta" in row["method"]] if not self.at else []
        title = f"{self.task.title()}, seed {self.seed}: pi* ∝ pi_ref · exp(r/{betas})"
        out.print(table([row for row in rows if row not in other], title))
        if other:
            out.print(table(other, "the same value model at other temperatures, each against its own pi*"))
        first = next(iter(run.inputs.values()))
        if "log_z" in first.inputs:
            print(LogZ.from_json(read_json(first.inputs["log_z"].folder / "log_z.json")))
        print("± is one standard error, log Z's own included; KL and log Z in nats.")
        print(f"picture: {run.folder / 'frontier.png'}")
        say_doubts(run.inputs.values())

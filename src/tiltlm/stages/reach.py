"""How far a certified interval for log Z reaches: longer and longer completions, a CTL twist for each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from rich.console import Console

from tiltlm.progress import steps
from tiltlm.ruler.bounds import Bounds, bound_repeats, log_z_of
from tiltlm.ruler.certificate import runs_for
from tiltlm.ruler.table import read_report, table
from tiltlm.run import Recipe, Run
from tiltlm.settings import at_least_one
from tiltlm.stages.bounds import bound_report, refuse_conditions
from tiltlm.stages.cells import Cell
from tiltlm.stages.exact import Exact, ExactSettings, exact_of
from tiltlm.stages.learn import Learn
from tiltlm.stages.log_z import first_prompts
from tiltlm.stages.reporting import Row
from tiltlm.stages.task import OfTask, Task
from tiltlm.tensors import save_tensors


@dataclass(frozen=True)
class ReachSettings:
    """Certified intervals for log Z at growing lengths, each with a CTL twist of its own."""

    width: float = 0.1
    """The table says how many runs a certificate of so many nats takes."""

    lengths: tuple[int, ...] = (20, 50, 100, 200)
    particles: tuple[int, ...] = (64, 256)
    repeats: int = 20
    prompts: int = 20
    """Several prompts: test prompts at most."""

    def __post_init__(self) -> None:
        at_least_one(self, "lengths", "particles", "repeats", "prompts")


@dataclass(frozen=True)
class Reach(OfTask):
    """Certified intervals of log Z at growing lengths."""

    task: Task
    twist: Cell
    """CTL's settings."""

    reach: ReachSettings = ReachSettings()
    exact: ExactSettings = ExactSettings()
    seed: int = 0
    stage: ClassVar[str] = "reach"

    def files(self) -> list[str]:
        return [*super().files(), *self.exact.files()]

    def check(self) -> None:
        super().check()
        refuse_conditions(self.stage, self.task.facts())
        self.exact_at(self.reach.lengths[0]).refuse_few(self.reach.repeats, "reach.repeats")

    def exact_at(self, length: int) -> Exact:
        return Exact(self.task.at_length(length), self.exact, seed=self.seed)

    def inputs(self) -> dict[str, Recipe]:
        needed = self.needs()
        for length in self.reach.lengths:
            twist = Learn.of(self.task.at_length(length), self.twist, "ctl", self.exact, self.seed)
            needed |= {f"twist {length}": twist, f"exact {length}": self.exact_at(length)}
        return needed

    def build(self, run: Run[Any]) -> None:
        rows: list[Row] = []
        for length in self.reach.lengths:
            found = self.bounds(run, length)
            rows += [{**row, "length": length} for row in found.rows()]
            save_tensors(found.tensors(), run.folder / f"bounds_{length}.safetensors")
            log_z_of(found)  # raises where lower and upper bounds contradict each other
        run.write_json("bounds_by_length.json", rows)
        run.write_json("report.json", bound_report(rows, self, called) + self.certificates(rows))

    def bounds(self, run: Run[Any], length: int) -> Bounds:
        """The bounds at one length."""
        s, kept = self.reach, run.inputs[f"twist {length}"]
        problem = replace(self, task=self.task.at_length(length)).problem(run)
        prompts = problem.prompts["test"].select(slice(0, s.prompts))
        exact = first_prompts(exact_of(run, f"exact {length}").to(problem.device), len(prompts))
        twist: Any = kept.recipe.decoder(kept).twist
        with steps(f"{self.name} {length}") as on_step:
            return bound_repeats(
                problem.target, twist, prompts, exact, ks=s.particles, repeats=s.repeats, max_new_tokens=length,
                stream=problem.stream.child("reach"), estimators=("iwae", "smc-ess"), on_step=on_step,
            )  # fmt: skip

    def certificates(self, rows: list[Row]) -> list[Row]:
        """Report rows: of every method the certificate's ends and width, and the runs that `reach.width` takes."""
        sides: dict[str, dict[str, Row]] = {}
        for row in rows:
            sides.setdefault(called(row), {})[row["side"]] = row
        out = []
        for method, both in sides.items():
            low, high = both["lower"], both["upper"]
            runs = runs_for(self.reach.width, max(0.0, high["value"] - low["value"]))
            found = {"certified_low": low["certified"], "certified_high": high["certified"]}
            found["certified_width"] = high["certified"] - low["certified"]
            found |= {} if math.isinf(runs) else {"runs": runs}
            head = {"recipe": self.name, "method": method, "seed": self.seed, "stderr": None, "n": low["repeats"]}
            units = {"runs": "rows"}
            out += [{**head, "metric": m, "value": v, "unit": units.get(m, "nats")} for m, v in found.items()]
        return out

    def show(self, run: Run[Any]) -> None:
        headings = {
            "log_z_lower": "log Z, lower bound", "log_z_upper": "upper bound", "certified_low": "certified from",
            "certified_high": "to", "certified_width": "width", "runs": f"runs for {self.reach.width:g}",
        }  # fmt: skip
        title = f"{self.task.title()}: how far log Z is certified"
        rows = read_report(run.folder / "report.json")
        Console(width=130, highlight=False).print(table(rows, title, headings))


def called(row: Row) -> str:
    """What a table calls a kind of bound at a length."""
    return f"{row['length']} tokens, {row['estimator']}, {row['k']} particles"

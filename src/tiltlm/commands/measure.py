"""`tiltlm measure RUN…`: finished runs side by side, and their differences prompt by prompt."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tiltlm.commands.models import load_run
from tiltlm.commands.run import prepare
from tiltlm.progress import note
from tiltlm.ruler.compare import paired
from tiltlm.ruler.measure import Measurement
from tiltlm.ruler.table import HEADINGS, table
from tiltlm.run import Run


@dataclass(frozen=True)
class Measure:
    """Compare finished runs. A difference of KLs needs no log Z, and is paired by prompt."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, as printed by `tiltlm run`."""

    out: Path | None = None
    """Write all rows to this .json file as well."""


def measure(args: list[str]) -> int:
    """Run the command."""
    settings = tyro.cli(Measure, prog="tiltlm measure", args=args)
    prepare()
    if not settings.runs:
        raise ValueError("name at least one run folder (`tiltlm run` prints it at its end)")
    runs = [load_run(folder) for folder in settings.runs]
    rows = [row for run in runs for row in report_of(run)]
    out = Console(width=130, highlight=False)
    out.print(table(rows, "finished runs"))
    if settings.out is not None:
        settings.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(settings.out)
    measured = [(run, kept) for run in runs if (kept := _measurement(run)) is not None]
    for (first, a), (second, b) in itertools.combinations(measured, 2):
        if _same_prompts(first, second):
            out.print(differences(first, a, second, b))
        else:
            note(f"{first.folder} and {second.folder}: measured on different prompts, so not compared in pairs")
    return 0


def report_of(run: Run[Any]) -> list[dict[str, Any]]:
    """The run's report rows. Raises ValueError for runs that measure nothing (a base model, rollouts)."""
    path = run.folder / "report.json"
    if not path.is_file():
        raise ValueError(
            f"{run.folder} ({run.recipe.name}) has no report: it is an ingredient; measure what uses it"
        )
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return [{**row, "method": f"{row['method']}  [{run.recipe.key}]"} for row in rows]


def _measurement(run: Run[Any]) -> Measurement | None:
    path = run.folder / "measurement.safetensors"
    return Measurement.load(path) if path.is_file() else None


def differences(first: Run[Any], a: Measurement, second: Run[Any], b: Measurement) -> Table:
    """first − second for the standard metrics, with a verdict at 95%."""
    name = f"{first.recipe.stage} [{first.recipe.key}] − {second.recipe.stage} [{second.recipe.key}]"
    out = Table(title=escape(name), title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("metric", "difference", "verdict"):
        out.add_column(heading)
    for row in paired(a, b):
        if row.metric in HEADINGS and row.metric not in _incomparable(first, second):
            out.add_row(
                escape(HEADINGS[row.metric]), f"{row.estimate.value:+.4f} ± {row.estimate.stderr:.4f}", row.verdict
            )
    return out


def _incomparable(first: Run[Any], second: Run[Any]) -> set[str]:
    """Metrics that mean different things in the two runs: their targets or references differ."""
    one, other = vars(first.recipe), vars(second.recipe)
    same_reference = all(one.get(name) == other.get(name) for name in ("network", "base", "pretrained"))
    if not same_reference:
        return {"kl_to_reference", "kl_to_target", "objective_gap"}
    return set() if one.get("target") == other.get("target") else {"kl_to_target", "objective_gap"}


def _same_prompts(first: Run[Any], second: Run[Any]) -> bool:
    """Whether two runs drew their test prompts alike: the same world, seed and test settings."""

    def prompts(run: Run[Any]) -> tuple[Any, ...]:
        settings = vars(run.recipe)
        return tuple(settings.get(name) for name in ("world", "seed", "test"))

    return prompts(first) == prompts(second)

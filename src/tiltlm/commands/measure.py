"""`tiltlm measure RUN…`: finished runs side by side, and their differences prompt by prompt."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tiltlm.commands.models import load_run
from tiltlm.commands.process import prepare
from tiltlm.progress import note
from tiltlm.ruler.compare import Difference, paired
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
    out.print(table(rows, "finished runs", SHOWN))
    if settings.out is not None:
        settings.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(settings.out)
    measured = [run for run in runs if (run.folder / "measurement.safetensors").is_file()]
    for first, second in itertools.combinations(measured, 2):
        found = comparable(first, second)
        if found is None:
            note(f"{first.folder} and {second.folder}: measured on different prompts, so not compared in pairs")
        else:
            out.print(differences(first, second, found))
            other = _incomparable(first, second) & set(SHOWN)
            if other:
                names = ", ".join(SHOWN[name] for name in SHOWN if name in other)
                note(f"their targets or references differ, so not compared: {names}")
    return 0


def report_of(run: Run[Any]) -> list[dict[str, Any]]:
    """The run's report rows. Raises ValueError for runs that measure nothing (a base model, rollouts)."""
    path = run.folder / "report.json"
    if not path.is_file():
        raise ValueError(
            f"{run.folder} ({run.recipe.name}) has no report: it is an ingredient; measure what uses it"
        )
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return [{**row, "method": f"{row['method']}  [{run.key}]"} for row in rows]


def comparable(first: Run[Any], second: Run[Any]) -> list[Difference] | None:
    """first − second for the standard metrics that mean the same in both; None if their prompts differ."""
    if not _same_prompts(first, second):
        return None
    a, b = (Measurement.load(run.folder / "measurement.safetensors") for run in (first, second))
    other = _incomparable(first, second)
    return [row for row in paired(a, b) if row.metric in SHOWN and row.metric not in other]


def differences(first: Run[Any], second: Run[Any], found: Sequence[Difference]) -> Table:
    """The differences as a table, with a verdict at 95%."""
    name = f"{first.recipe.stage} [{first.key}] − {second.recipe.stage} [{second.key}]"
    out = Table(title=escape(name), title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("metric", "difference", "verdict"):
        out.add_column(heading)
    for row in found:
        value = f"{row.estimate.value:+.4f} ± {row.estimate.stderr:.4f}"
        out.add_row(escape(SHOWN[row.metric]), value, row.verdict)
    return out


SHOWN = HEADINGS | {"objective": "J", "win_rate": "wins"}
"""Metrics that are compared, and what stands over them."""

ABSOLUTE = {"kl_to_target", "kl_to_target_at_least", "kl_from_target", "objective_gap"}


def _incomparable(first: Run[Any], second: Run[Any]) -> set[str]:
    """Metrics that mean different things in the two runs: their targets or references differ."""

    def same(*names: str) -> bool:
        one, other = vars(first.recipe), vars(second.recipe)
        return all(one.get(name) == other.get(name) for name in names)

    rewards = [_without_beta(vars(run.recipe).get("goal")) for run in (first, second)]
    found = set() if same("target", "goal", "classify", "judge") else set(ABSOLUTE)
    if rewards[0] != rewards[1] or not same("classify", "judge") or _judge(first) != _judge(second):
        found |= {
            "reward",
            "objective",
            "win_rate",
            *ABSOLUTE,
        }  # another reward model, another zero and another scale
    if not same("network", "base", "sft", "pretrained", "language"):
        found |= {"kl_to_reference", *ABSOLUTE}
    return found


def _judge(run: Run[Any]) -> str:
    """The key of the reward model that was trained for a run; empty where it was not."""
    return run.inputs["reward-model"].key if "reward-model" in run.inputs else ""


def _without_beta(goal: Any) -> dict[str, Any]:
    """What a goal says of the reward alone."""
    return {name: value for name, value in vars(goal).items() if not name.startswith("beta")} if goal else {}


def _same_prompts(first: Run[Any], second: Run[Any]) -> bool:
    """Whether two runs drew their test prompts alike: the same world, language or data, seed, exact and test
    settings."""

    def prompts(run: Run[Any]) -> tuple[Any, ...]:
        settings = vars(run.recipe)
        return tuple(settings.get(name) for name in ("world", "language", "data", "seed", "exact", "test"))

    return prompts(first) == prompts(second)

"""`tiltlm measure RUN… NAME=FOLDER…`: finished runs and models trained elsewhere side by side, their differences prompt by
prompt, and their hardest prompts."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tiltlm.commands.arguments import settings_from
from tiltlm.commands.compared import (
    SHOWN,
    Comparison,
    Contestant,
    comparisons,
    contestants,
    footnote,
    incomparable,
    measured,
    same_prompts,
)
from tiltlm.commands.exams import exams_of, show_exams
from tiltlm.commands.launch.building import build_all
from tiltlm.commands.launch.settings import launching
from tiltlm.commands.models import load_run
from tiltlm.commands.process import prepare
from tiltlm.commands.prompts import hardest, spread
from tiltlm.decoders.ready import Ready
from tiltlm.problem import Split
from tiltlm.progress import note
from tiltlm.ruler.table import read_report, table
from tiltlm.run import Run, ensure, find
from tiltlm.stages.cells import default_cell
from tiltlm.stages.examine import ExamSettings
from tiltlm.stages.measure import Measure as MeasureRecipe


@dataclass(frozen=True)
class Measure:
    """Compare finished runs. A difference of KLs needs no log Z, and is paired by prompt; runs of one recipe from several
    seeds are compared over them."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, as printed by `tiltlm run`. A run that compares methods brings theirs along. NAME=FOLDER is a model that
    was trained elsewhere (a transformers folder, a hub name), measured as the first run was and called NAME."""

    metrics: tuple[str, ...] = ()
    """Compare these metrics alone (e.g. objective kl_to_target): fewer comparisons, sharper verdicts."""

    control: str | None = None
    """Compare everything with this method alone (its name in the table)."""

    worst: int = 0
    """Show quantiles over prompts, and this many prompts on which each method did worst."""

    protocol: tuple[str, ...] = ()
    """Put the questions to the runs' models instead, by each of these protocols: greedy, avg@K, maj@K, letters, options,
    options-per-character. Then RUN@STEP is a checkpoint of the run's training and RUN@round2 what a round ended with,
    and runs that train may be named as well."""

    split: Split = "test"
    """Whose questions (with --protocol): train, valid or test."""

    questions: int = 0
    """The first ones of the split (with --protocol; 0: all)."""

    subjects: bool = False
    """Show accuracies by subject as well (with --protocol)."""

    out: Path | None = None
    """Write all rows to this .json file as well."""


def measure(args: list[str]) -> int:
    """Run the command."""
    rest, launch = launching(args)
    if launch.dry_run or launch.shard:
        raise ValueError(
            "--dry-run and --shard are options of `tiltlm run` and `tiltlm sweep`: leave them off here"
        )
    settings = settings_from(rest, Measure, "measure")
    prepare()
    metrics, command = _metrics(settings.metrics), shlex.join(["tiltlm", "measure", *args])
    if settings.protocol:
        asked = ExamSettings(settings.split, settings.questions)
        exams = exams_of(settings.runs, settings.protocol, asked)
        if not build_all([run for run, _ in exams], launch, command):
            return 0
        done = [(ensure(run.recipe, run.folder.parents[2], command), label) for run, label in exams]
        return show_exams(done, settings.subjects, settings.out)
    runs, called = gathered(settings.runs)
    models = [run for run in runs if run.folder in called]
    if not build_all(models, launch, command):
        return 0
    for run in models:
        ensure(run.recipe, run.folder.parents[2], command)
    rows = [row for run in runs for row in report_of(run, called.get(run.folder))]
    own = contestants(measured(runs), called)
    found = comparisons(own, metrics, settings.control)
    out = Console(width=150, highlight=False)
    out.print(table(rows, "finished runs", SHOWN))
    if settings.out is not None:
        settings.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(settings.out)
    if found:
        out.print(differences(found))
        print(footnote(found))
    _say_what_is_left_out(own)
    for made in (spread(own, metrics), *hardest(own, metrics, settings.worst)) if settings.worst else ():
        out.print(made)
    return 0


def gathered(names: Sequence[str]) -> tuple[list[Run[Any]], dict[Path, str]]:
    """The runs that are named, and those that measure ready models, whether or not they are built; the latter's names."""
    for name in names:
        folder, at, _ = name.rpartition("@")
        if at and not Path(name).is_dir() and Path(folder).is_dir():
            raise ValueError(
                f"{name}: what stands behind @ is put questions to, by a protocol: add --protocol greedy, say, or leave it "
                "out"
            )
    ready = [re.fullmatch(r"([^/=]+)=(.+)", name) for name in names if not Path(name).is_dir()]
    models = {found[1]: found[2] for found in ready if found is not None}
    runs = [load_run(Path(name)) for name in names if Path(name).is_dir() or "=" not in name]
    if not runs:
        raise ValueError("name at least one run folder (`tiltlm run` prints it at its end)")
    made = {name: as_measured(runs[0], folder) for name, folder in models.items()}
    return [*runs, *made.values()], {run.folder: name for name, run in made.items()}


def as_measured(run: Run[Any], model: str) -> Run[Any]:
    """The run of a ready model, measured on another run's prompts against its target by its ruler. Raises ValueError where
    that has none."""
    like = run if not run.recipe.gathers else next(iter(run.inputs.values()))
    if not isinstance(like.recipe, MeasureRecipe):
        raise ValueError(
            f"{run.folder} measures no method: name a run that does first, and {model} is measured like it"
        )
    cell = default_cell(Ready(model), like.recipe.task.facts())
    value = replace(like.recipe, method=cell.method, feed=cell.feed, fit=cell.fit, net=cell.net, called="model")
    return find(value, like.folder.parents[2])


def _metrics(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in SHOWN:
            near = get_close_matches(name, SHOWN, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"there is no metric {name!r} to compare.{hint} There are {', '.join(SHOWN)}")
    return names or tuple(SHOWN)


def report_of(run: Run[Any], called: str | None = None) -> list[dict[str, Any]]:
    """The run's report rows. Raises ValueError for runs that measure nothing (a base model, rollouts)."""
    path = run.folder / "report.json"
    if not path.is_file():
        raise ValueError(
            f"{run.folder} ({run.recipe.name}) has no report: it is an ingredient; measure what uses it"
        )
    rows: list[dict[str, Any]] = read_report(path)
    return [{**row, "method": f"{called or row['method']}  [{run.key}]"} for row in rows]


def differences(found: Sequence[Comparison]) -> Table:
    """The differences as a table, with intervals, adjusted p and verdicts."""
    out = Table(title="differences", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("first − second", "metric", "difference", "95% interval", "p (Holm)", "verdict", "would show"):
        out.add_column(heading, justify="left" if heading in ("first − second", "metric", "verdict") else "right")
    for each in found:
        d = each.difference
        low, high = d.estimate.interval()
        value = f"{d.estimate.value:+.4f} ± {d.estimate.stderr:.4f}" + ("*" if d.doubt else "")
        pair, p = f"{each.first} − {each.second}", f"{d.p:.3f}" if d.p >= 0.001 else "< 0.001"
        out.add_row(
            escape(pair),
            escape(SHOWN[d.metric]),
            value,
            f"{low:+.4f} to {high:+.4f}",
            p,
            d.verdict,
            f"{d.least:.4f}",
        )
    return out


def _say_what_is_left_out(found: Sequence[Contestant]) -> None:
    """Which pairs, and which metrics, are not compared, and why."""
    for a, b in itertools.combinations(found, 2):
        seeds = [seed for seed in a.runs if seed in b.runs]
        first, second = (each.runs[(seeds or [*each.runs])[0]] for each in (a, b))
        names = incomparable(first, second) & set(SHOWN)
        if not seeds or not same_prompts(first, second):
            note(
                f"{first.folder} and {second.folder}: measured on different prompts, or with files that changed in "
                "between, so not compared in pairs"
            )
        elif names:
            shown = ", ".join(SHOWN[name] for name in SHOWN if name in names)
            note(
                f"{first.folder} and {second.folder}: their targets or references differ, so not compared: {shown}"
            )

"""`tiltlm measure RUN… --protocol NAME…`: the questions of a split put to the models of finished runs, by each protocol.

The settings are the runs' own. Every exam is a run of the stage METHOD@PROTOCOL: found where it is there already, gone on
with where it was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tiltlm.commands.models import load_run
from tiltlm.decoders.ready import Ready
from tiltlm.jsonl import read_json
from tiltlm.progress import note
from tiltlm.ruler.accuracies import accuracies, subjects
from tiltlm.ruler.table import read_report
from tiltlm.run import Run, find
from tiltlm.stages.cells import default_cell
from tiltlm.stages.examine import Examine, ExamSettings
from tiltlm.stages.learn import Learn
from tiltlm.stages.measure import Measure, RulerSettings
from tiltlm.stages.rounds import Round


def exams_of(names: Sequence[str], protocols: Sequence[str], exam: ExamSettings) -> list[tuple[Run[Examine], str]]:
    """The exams of the models that are named, finished or not; and what to call each (empty: as its report does).

    names: RUN, RUN@STEP, RUN@round2, or NAME=FOLDER for a model trained elsewhere, which is asked what the first run's is.
    Raises ValueError for runs that hold no method's model, and for tasks without questions.
    """
    found: list[tuple[Run[Examine], str]] = []
    first: tuple[Measure, Path] | None = None
    for name in names:
        label, at = "", ""
        if "=" in name and not Path(name).is_dir():
            if first is None:
                raise ValueError(f"{name}: name a run first, and the model is asked the same questions")
            label, _, model = name.partition("=")
            asked = [_ready(first[0], model)]
        else:
            run, at = located(name)
            asked = _measured(run)
            for each in asked:
                _refuse_other_round(run, each, at)
            first = first or (asked[0], run.folder.parents[2])
        recipes = [Examine.of(each, how, replace(exam, at=at)) for each in asked for how in protocols]
        found += [(find(recipe, first[1]), label) for recipe in recipes]
    return found


def located(name: str) -> tuple[Run[Any], str]:
    """The run in a folder, and what stands behind an @: a checkpoint's step, or the name that its training gave one."""
    folder, _, at = name.rpartition("@")
    if Path(name).is_dir() or not folder:
        return load_run(Path(name)), ""
    return load_run(Path(folder)), at


def _measured(run: Run[Any]) -> list[Measure]:
    """The methods whose models a run holds. Raises ValueError where it holds none."""
    recipe = run.recipe
    if recipe.gathers:
        return [each for own in run.inputs.values() for each in _measured(own)]
    if isinstance(recipe, Measure):
        return [recipe]
    if isinstance(recipe, Examine):
        return [recipe.measured]
    if isinstance(recipe, Learn) and recipe.method.trains == "policy":
        parts = recipe.task, recipe.method, recipe.feed, recipe.fit, recipe.net
        return [
            Measure(*parts, RulerSettings(absolute=False), recipe.exact, called=recipe.called, seed=recipe.seed)
        ]
    if isinstance(recipe, Round):
        feed = replace(recipe.feed, rounds=replace(recipe.how, count=recipe.index + 1))
        parts = recipe.task, recipe.method, feed, recipe.fit, recipe.net
        return [Measure(*parts, RulerSettings(absolute=False), called=recipe.called, seed=recipe.seed)]
    raise ValueError(
        f"{run.folder} ({recipe.name}) holds no model to examine: name a run that measures a method, or trains a policy"
    )


def _refuse_other_round(run: Run[Any], measured: Measure, at: str) -> None:
    """Raise ValueError for a round that a finished training does not have, before anything of it is loaded."""
    last = measured.learn()
    if not at or not isinstance(last, Round):
        return
    kept = find(last, run.folder.parents[2])
    if not kept.done:
        return
    known = [f"round{stop.about['round']}" for stop in last.stops(kept, 0)]
    if at not in known:
        count = f"{len(known) - 1} round{'s' * (len(known) != 2)}"
        raise ValueError(f"{run.folder} has no {at!r}: it has {count}; there are {', '.join(known)}")


def _ready(like: Measure, model: str) -> Measure:
    """A model of a folder or the hub, to be measured as `like` was."""
    cell = default_cell(Ready(model), like.task.facts())
    return replace(like, method=cell.method, feed=cell.feed, fit=cell.fit, net=cell.net, called="model")


def show_exams(exams: Sequence[tuple[Run[Examine], str]], by_subject: bool, out: Path | None) -> int:
    """Print the table, those by subject if asked for, and where everything is kept."""
    console = Console(width=150, highlight=False)
    rows = [
        row | {"method": label or row["method"]}
        for run, label in exams
        for row in read_report(run.folder / "report.json")
    ]
    console.print(accuracies(rows, "questions"))
    for run, _ in exams:
        if by_subject:
            console.print(subjects(read_json(run.folder / "subjects.json"), run.recipe.name))
        note(f"{run.recipe.name}  {run.folder}")
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(out)
    return 0

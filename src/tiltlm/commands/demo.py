"""`tiltlm demo`: pre-train, seven roads, one ruler, on a laptop CPU; or a figure that needs no task, in a second."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tiltlm.commands.arguments import settings_from
from tiltlm.commands.options import parsed
from tiltlm.commands.process import prepare
from tiltlm.mistakes import nearest
from tiltlm.recipes import figures, recipe
from tiltlm.ruler.table import read_report
from tiltlm.run import ensure


@dataclass(frozen=True)
class Demo:
    """Star graph and the two-branch tree, from nothing to a table and a picture, in minutes; or one figure alone."""

    figure: Annotated[str, tyro.conf.Positional] = "all"
    """A figure that needs no task: `aleatoric`, `baselines`, `drift`, `margins`. all: star graph and tree."""

    out: Path = Path("demo")
    """Folder for report.json, frontier.png and the runs; an interrupted demo goes on there."""

    seed: int = 0
    """Every random choice follows from this number."""


def demo(args: list[str]) -> int:
    """Run `star-graph/evaluate` and `tree/solve` under `--out`, and put report and picture there."""
    settings = settings_from(args, Demo, "demo")
    prepare()
    if settings.figure != "all":
        return alone(settings, args)
    command, runs = shlex.join(["tiltlm", "demo", *args]), settings.out / "runs"
    tree = ensure(recipe("tree/solve"), runs, command)
    star = ensure(parsed(recipe("star-graph/evaluate"), [f"--seed={settings.seed}"]), runs, command)
    star.recipe.show(star)
    print()
    tree.recipe.show(tree)
    rows = [read_report(run.folder / "report.json") for run in (star, tree)]
    (settings.out / "report.json").write_text(json.dumps(rows[0] + rows[1], indent=1) + "\n", encoding="utf-8")
    shutil.copy(star.folder / "frontier.png", settings.out / "frontier.png")
    print(f"\nthe same numbers: {settings.out / 'report.json'}\nthe picture:      {settings.out / 'frontier.png'}")
    return 0


def alone(settings: Demo, args: list[str]) -> int:
    """Build and show a figure that needs no task, `tiltlm run FIGURE/solve` under `--out`."""
    name, known = f"{settings.figure}/solve", [each.partition("/")[0] for each in figures()]
    if name not in figures():
        near = nearest(settings.figure, known)
        raise ValueError(
            f"there is no demo {settings.figure!r}.{near} There are {', '.join(known)}, and all: star graph and tree"
        )
    value = parsed(recipe(name), [f"--seed={settings.seed}"])
    run = ensure(value, settings.out / "runs", shlex.join(["tiltlm", "demo", *args]))
    value.show(run)
    return 0

"""`tiltlm run` and `tiltlm sweep`: build recipes."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro
from rich.console import Console

from tiltlm.progress import note
from tiltlm.recipes import recipe
from tiltlm.ruler.table import table
from tiltlm.run import ROOT, Recipe, ensure


def runs_root() -> Path:
    """Where runs live: $TILTLM_RUNS, or ./runs."""
    return Path(os.environ.get("TILTLM_RUNS", ROOT))


def prepare() -> None:
    """Process-wide settings of the command line: one thread unless told otherwise, no foreign progress bars."""
    from transformers.utils import logging

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def parse(args: list[str], command: str) -> Recipe:
    """The recipe that `args` (a name, then options) describe."""
    if not args or args[0].startswith("-"):
        wanted = args and args[0] in ("-h", "--help")
        text = f"usage: tiltlm {command} RECIPE [--setting value …]\n\n`tiltlm list` shows the recipes; "
        text += f"`tiltlm {command} RECIPE --help` the settings of one."
        if wanted:
            print(text)
            raise SystemExit(0)
        raise ValueError(text)
    default = recipe(args[0])
    return tyro.cli(type(default), prog=f"tiltlm {command} {args[0]}", default=default, args=args[1:])


def run(args: list[str]) -> int:
    """Build one recipe, or find it built; then print its report and its folder."""
    prepare()
    finished = ensure(parse(args, "run"), runs_root())
    finished.recipe.show(finished)
    print(finished.folder)
    return 0


def sweep(args: list[str]) -> int:
    """Run a grid; every comma-separated value is an axis. Points that are done are found, not run again."""
    prepare()
    if not args or args[0] in ("-h", "--help"):
        print(
            "usage: tiltlm sweep RECIPE --setting value[,value…] …\n\nRuns every combination, one after the other."
        )
        return 0
    name, points = args[0], grid(args[1:])
    recipes = [parse([name, *point], "sweep") for point in points]  # all mistakes come before any work
    rows = []
    for k, (value, point) in enumerate(zip(recipes, points, strict=True)):
        note(f"[bold]{k + 1} of {len(points)}[/]  {name} {' '.join(point)}")
        finished = ensure(value, runs_root())
        report = finished.folder / "report.json"
        found = json.loads(report.read_text()) if report.is_file() else []
        rows += [{**row, "method": f"{row['method']}  {' '.join(point)}"} for row in found]
        print(finished.folder, file=sys.stdout)
    if rows:
        Console(width=150, highlight=False).print(table(rows, f"sweep of {name}"))
    return 0


def grid(args: Sequence[str]) -> list[list[str]]:
    """Every combination of the comma-separated values in `--name value` or `--name=value` arguments."""
    axes = []
    for arg in args:
        flag, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
        if arg.startswith("--") and not equals:
            axes.append([arg])
        else:
            axes.append([f"{flag}{equals}{part}" for part in value.split(",")])
    return [list(point) for point in itertools.product(*axes)]

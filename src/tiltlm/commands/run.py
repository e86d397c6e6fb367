"""`tiltlm run` and `tiltlm sweep`: build recipes."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from tiltlm.commands.jobs import build_all
from tiltlm.commands.options import methods_in, parsed
from tiltlm.commands.process import prepare, runs_root
from tiltlm.progress import note
from tiltlm.recipes import recipe
from tiltlm.rewards.masking import mask
from tiltlm.ruler.table import over_seeds, read_report, table
from tiltlm.run import Recipe, check_all, ensure, find


def parse(args: list[str], command: str) -> Recipe:
    """The recipe that `args` (a name, then options) describe."""
    if not args or args[0].startswith("-"):
        wanted = args and args[0] in ("-h", "--help")
        text = (
            f"usage: tiltlm {command} RECIPE [--setting value …] [--jobs N]\n\n`tiltlm list` shows the recipes; "
        )
        text += f"`tiltlm {command} RECIPE --help` the settings of one.\n"
        text += "--jobs N builds what a recipe needs N at a time, each in a process of its own."
        if wanted:
            print(text)
            raise SystemExit(0)
        raise ValueError(text)
    compared, rest = (
        methods_in(args[1:]) if args[0].endswith(("/evaluate", "/frontier")) else (None, list(args[1:]))
    )
    found: Recipe = parsed(recipe(args[0], compared), rest, f"tiltlm {command} {args[0]}")
    return found


def run(args: list[str]) -> int:
    """Build one recipe, or find it built; then print its report and its folder."""
    prepare()
    rest, jobs = side_by_side(args)
    command, value = command_line("run", args), parse(rest, "run")
    if jobs > 1:
        build_all([find(value, runs_root())], jobs, command)
    finished = ensure(value, runs_root(), command)
    finished.recipe.show(finished)
    print(finished.folder)
    return 0


def command_line(command: str, args: Sequence[str]) -> str:
    """What was typed, as it may be written down: without credentials."""
    return shlex.join(["tiltlm", command, *map(mask, args)])


def side_by_side(args: Sequence[str]) -> tuple[list[str], int]:
    """The arguments without `--jobs N`, and N (1 where it is not given)."""
    rest, jobs = list(args), "1"
    for k, arg in enumerate(args):
        if arg == "--jobs" or arg.startswith("--jobs="):
            after = 1 if "=" in arg else 2
            jobs = (args[k : k + after] if after == 2 else ["", arg.partition("=")[2]])[-1]
            rest = [*args[:k], *args[k + after :]]
    if not jobs.isdigit() or int(jobs) < 1:
        raise ValueError(f"--jobs wants a number of runs to build side by side, 1 or more; got {jobs!r}")
    return rest, int(jobs)


SWEEP_USAGE = """\
usage: tiltlm sweep RECIPE --setting value[,value…] … [--jobs N]

Runs every combination of the comma-separated values, one after the other or, with --jobs, N side by side; points that
are done are found, not run again. Ends in a table of all points, and one over seeds if --seed has several values.
`tiltlm run RECIPE --help` lists the settings."""


def sweep(args: list[str]) -> int:
    """Run a grid; every comma-separated value is an axis."""
    prepare()
    if not args or args[0] in ("-h", "--help"):
        print(SWEEP_USAGE)
        return 0
    rest, jobs = side_by_side(args)
    name, points = rest[0], grid(rest[1:])
    recipes = [parse([name, *point], "sweep") for point in points]  # all mistakes come before any work
    for value in recipes:
        check_all(find(value, runs_root()))
    if jobs > 1:
        build_all([find(value, runs_root()) for value in recipes], jobs, command_line("sweep", args))
    rows = []
    for k, (value, point) in enumerate(zip(recipes, points, strict=True)):
        note(f"[bold]{k + 1} of {len(points)}[/]  {name} {mask(' '.join(point))}")
        finished = ensure(value, runs_root(), command_line("sweep", args))
        report = finished.folder / "report.json"
        found = read_report(report) if report.is_file() else []
        rows += [{**row, "point": what_varies(point, points)} for row in found]
        print(finished.folder)
    _show_sweep(rows, f"sweep of {name}", len({value.seed for value in recipes}))
    return 0


def _show_sweep(rows: list[dict[str, Any]], title: str, seeds: int) -> None:
    out = Console(width=150, highlight=False)
    labelled = [{**row, "method": f"{row['method']}  {' '.join(row['point'].values())}"} for row in rows]
    if rows:
        out.print(table(labelled, title))
    if rows and seeds > 1:
        unseeded = [" ".join(v for flag, v in row["point"].items() if flag != "--seed") for row in rows]
        merged = [
            {**row, "method": f"{row['method']}  {rest}".strip()} for row, rest in zip(rows, unseeded, strict=True)
        ]
        out.print(table(over_seeds(merged), f"{title}: mean over {seeds} seeds ± standard error over seeds"))


def what_varies(point: Sequence[str], points: Sequence[Sequence[str]]) -> dict[str, str]:
    """Of a point of a grid, the options that differ between points: flag -> flag and value."""
    varying: dict[str, str] = {}
    for i, token in enumerate(point):
        if len({other[i] for other in points}) > 1:
            flag = token.partition("=")[0] if token.startswith("--") else point[i - 1]
            varying[flag] = mask(token if token.startswith("--") else f"{flag} {token}")
    return varying


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

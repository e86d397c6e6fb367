"""`tiltlm run` and `tiltlm sweep`: build recipes."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tiltlm import ranks
from tiltlm.commands.compared import measured, name_of
from tiltlm.commands.config import applied, read, save, say_masked
from tiltlm.commands.help import USAGE, full_help, short_help
from tiltlm.commands.launch.building import build_all
from tiltlm.commands.launch.settings import Launch, launch_options, launching
from tiltlm.commands.options import methods_in, parsed
from tiltlm.commands.process import prepare, runs_root
from tiltlm.commands.ranking import ranked
from tiltlm.jsonl import open_text, reading
from tiltlm.models.scattered import in_parts
from tiltlm.progress import note
from tiltlm.recipes import recipe
from tiltlm.rewards.masking import mask
from tiltlm.ruler.table import over_seeds, read_report, table
from tiltlm.run import Recipe, Run, ensure, find


@dataclass(frozen=True)
class Asked:
    """What was typed: the recipe, and what is to be done with it instead of building it."""

    recipe: Recipe
    help: str = ""
    save_to: Path | None = None


def parse(args: Sequence[str], command: str) -> Asked:
    """What `args` (a recipe's name, then options) ask for. Raises ValueError, in one line, for what they cannot mean."""
    file, rest = value_of("--config", args)
    save_to, rest = value_of("--save-config", rest)
    wanted = [arg for arg in rest if arg in ("-h", "--help", "--help-all")]
    rest = [arg for arg in rest if arg not in wanted]
    config = None if file is None else read(Path(file))
    named = bool(rest) and not rest[0].startswith("-")
    name = rest[0] if named else config.recipe if config else ""
    if not name:
        if wanted:
            raise Usage(USAGE.format(command=command))
        raise ValueError(f"name a recipe, `tiltlm {command} TASK/STAGE`; `tiltlm list` shows them")
    compared, options = (
        methods_in(rest[named:]) if name.endswith(("/evaluate", "/frontier")) else (None, rest[named:])
    )
    value: Recipe = recipe(name, compared or (config.methods if config else None))
    if config is not None:
        value = applied(config, value)
    if wanted:
        return Asked(value, (full_help if "--help-all" in wanted else short_help)(value, command))
    value = parsed(value, options, launch_options())
    if config is not None:
        say_masked(value)
    return Asked(value, save_to=None if save_to is None else Path(save_to))


class Usage(Exception):
    """What to print instead of doing anything."""


def run(args: list[str]) -> int:
    """Build one recipe, or find it built; then print its report and its folder."""
    prepare()
    rest, launch = launching(args)
    command = command_line("run", args)
    try:
        asked = parse(rest, "run")
    except Usage as usage:
        print(usage)
        return 0
    if asked.help:
        print(asked.help)
        return 0
    value = asked.recipe
    if asked.save_to is not None:
        save(value, asked.save_to)
        print(asked.save_to)
        return 0
    if launch.dry_run:
        return foreseen([value], launch)
    with in_parts(launch.shard):
        if not build_all([find(value, runs_root())], launch, command):
            return 0
        finished = ensure(value, runs_root(), command)
    if ranks.is_first():
        finished.recipe.show(finished)
        print(finished.folder)
    return 0


def foreseen(recipes: Sequence[Recipe], launch: Launch) -> int:
    """Say what building these would do and take, and build nothing; exit status 1 where something is missing for it."""
    from tiltlm.commands.dry_run import dry_run

    if not ranks.is_first():
        return 0
    asked = launch.slurm.nodes * launch.slurm.processes if launch.on == "slurm" else ranks.size()
    whole = dry_run([find(value, runs_root()) for value in recipes], launch.processes or asked, launch.shard)
    return 0 if whole else 1


def value_of(flag: str, args: Sequence[str]) -> tuple[str | None, list[str]]:
    """What follows `flag` (None: it is not there), and the other arguments."""
    for k, arg in enumerate(args):
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2], [*args[:k], *args[k + 1 :]]
        if arg == flag:
            if k + 1 == len(args) or args[k + 1].startswith("--"):
                raise ValueError(f"{flag} wants a file")
            return args[k + 1], [*args[:k], *args[k + 2 :]]
    return None, list(args)


def command_line(command: str, args: Sequence[str]) -> str:
    """What was typed, as it may be written down: without credentials."""
    return shlex.join(["tiltlm", command, *map(mask, args)])


SWEEP_USAGE = """\
usage: tiltlm sweep RECIPE --setting value[,value…] --setting @FILE … [--jobs N | --on slurm | --on ray]

Runs every combination of the comma-separated values: one after the other, N side by side with --jobs, or as jobs of SLURM
or tasks of Ray; points that are done are found, not run again. @FILE: the values are the lines of a file that are not
empty, commas and all (prompts, say). Ends in a table of all points, one over seeds if --seed has several values, and,
where right and wrong answers to the same questions were measured, one of accuracies from the best down: with Wilson's
interval, p of the difference from the best, adjusted for all pairs by Holm, and * for the top group, which is not told
apart from it.
`tiltlm run RECIPE --help` lists the settings."""


def sweep(args: list[str]) -> int:
    """Run a grid; every comma-separated value is an axis."""
    prepare()
    if not args or args[0] in ("-h", "--help"):
        print(SWEEP_USAGE)
        return 0
    rest, launch = launching(args)
    name, points = rest[0], grid(rest[1:])
    recipes = [parse([name, *point], "sweep").recipe for point in points]  # all mistakes come before any work
    if launch.dry_run:
        return foreseen(recipes, launch)
    with in_parts(launch.shard):
        return _swept(name, points, recipes, launch, command_line("sweep", args))


def _swept(
    name: str, points: Sequence[Sequence[str]], recipes: Sequence[Recipe], launch: Launch, command: str
) -> int:
    """Build every point, and show them beside each other."""
    if not build_all([find(value, runs_root()) for value in recipes], launch, command):
        return 0
    rows: list[dict[str, Any]] = []
    measurements: dict[Path, tuple[Run[Any], str]] = {}
    for k, (value, point) in enumerate(zip(recipes, points, strict=True)):
        note(f"[bold]{k + 1} of {len(points)}[/]  {name} {mask(' '.join(point))}")
        finished = ensure(value, runs_root(), command)
        report = finished.folder / "report.json"
        found = read_report(report) if report.is_file() else []
        varies = what_varies(point, points)
        rows += [{**row, "point": varies} for row in found]
        for run in measured([finished]):
            measurements[run.folder] = run, f"{name_of(run)}  {' '.join(varies.values())}"
        if ranks.is_first():
            print(finished.folder)
    if not ranks.is_first():
        return 0
    _show_sweep(rows, f"sweep of {name}", len({value.seed for value in recipes}))
    ranking = ranked([*measurements.values()])
    if ranking is not None:
        Console(width=150, highlight=False).print(ranking)
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
    """Every combination of the values in `--name value` or `--name=value` arguments: those between commas, of @FILE the
    file's lines."""
    axes: list[list[str]] = []
    for arg in args:
        flag, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
        if arg.startswith("--") and not equals:
            axes.append([arg])
        elif value.startswith("@"):  # a line may begin with --, so it stands in one word with its option
            option = flag or _option_before(axes, arg)
            axes.append([f"{option}={line}" for line in lines_of(Path(value[1:]))])
        else:
            axes.append([f"{flag}{equals}{part}" for part in value.split(",")])
    return [list(point) for point in itertools.product(*axes)]


def _option_before(axes: list[list[str]], arg: str) -> str:
    """The option that `arg` follows, taken from the axes. Raises ValueError where it follows none."""
    if not axes or len(axes[-1]) > 1 or not axes[-1][0].startswith("--") or "=" in axes[-1][0]:
        raise ValueError(f"{arg} follows no option: --setting @FILE has one value in each of the file's lines")
    return axes.pop()[0]


def lines_of(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises FileNotFoundError, and ValueError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (@FILE: the values of a setting, one a line)")
    with reading(path), open_text(path) as file:
        found = [line.rstrip("\r\n") for line in file if line.strip()]
    if not found:
        raise ValueError(f"{path} has no lines: one value of the setting is expected on each")
    return found

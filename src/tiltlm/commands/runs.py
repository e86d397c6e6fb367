"""`tiltlm runs ls | diff | rm | du`: what is in the runs folder, what differs between two, what may go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tiltlm.commands.arguments import settings_from
from tiltlm.commands.compared import SHOWN, leaves
from tiltlm.commands.folders import began, folders, in_bytes, named, object_in, recipe_of, size, state_of
from tiltlm.commands.process import runs_root
from tiltlm.commands.removing import Rm, rm
from tiltlm.progress import note
from tiltlm.ruler.table import cell, read_report

USAGE = """\
usage: tiltlm runs ls [WORD]          runs in ./runs (or $TILTLM_RUNS): state, age, size, a headline number
       tiltlm runs diff A B           settings, commit, versions that differ between two
       tiltlm runs rm RUN… [--yes]    remove runs that no finished one needs
       tiltlm runs du                 disk use by recipe

A run is named by its folder, or by its key where that is the only one of it."""


@dataclass(frozen=True)
class Ls:
    """List the runs, the oldest first: recipe, key, state, age, size, and one number of the report."""

    word: Annotated[str, tyro.conf.Positional] = ""
    """Only recipes whose name contains it."""


@dataclass(frozen=True)
class Diff:
    """Show what differs between two runs: settings by dotted name, files, commit, versions."""

    first: Annotated[str, tyro.conf.Positional]
    """A run's folder or key."""

    second: Annotated[str, tyro.conf.Positional]
    """Another one's."""


@dataclass(frozen=True)
class Du:
    """Disk use by recipe, the largest first, and how much of it is checkpoints."""


def runs(args: list[str]) -> int:
    """Run one of the commands."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if args[0] not in COMMANDS:
        raise ValueError(f"tiltlm runs has no {args[0]!r}; there are {', '.join(COMMANDS)}")
    settings, command = COMMANDS[args[0]]
    found = command(settings_from(args[1:], settings, f"runs {args[0]}"), runs_root())
    if found is not None:
        Console(width=150, highlight=False).print(found)
    return 0


def ls(settings: Ls, root: Path) -> Table | None:
    """The table of all runs."""
    found = [folder for folder in folders(root) if settings.word in recipe_of(folder)]
    if not found:
        note(f"no runs in {root}" + (f" whose recipe has {settings.word!r} in its name" if settings.word else ""))
        return None
    out = _headed("recipe", "key", "state", ">age", ">size", "headline")
    for folder in found:
        about = state_of(folder), _ago(began(folder)), in_bytes(size(folder)), headline(folder)
        out.add_row(*map(escape, (recipe_of(folder), folder.name, *about)))
    return out


def _headed(*headings: str) -> Table:
    out = Table(header_style="bold", box=box.SIMPLE_HEAD)
    for heading in headings:
        out.add_column(
            heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left", overflow="fold"
        )
    return out


def headline(folder: Path) -> str:
    """One number of a run's report: of its first method the first of these metrics that it has, else its first row."""
    path = folder / "report.json"
    try:
        rows = read_report(path) if path.is_file() else []
    except ValueError:
        return "its report cannot be read"
    if not rows:
        return ""
    own = {row["metric"]: row for row in rows if row["method"] == rows[0]["method"]}
    metric = next((name for name in ("accuracy", "objective", *SHOWN) if name in own), rows[0]["metric"])
    methods = len({row["method"] for row in rows})
    others = f" ({rows[0]['method']}; {methods} in all)" if methods > 1 else ""
    return f"{SHOWN.get(metric, metric)} {cell(own[metric])}{others}"


def _ago(when: float) -> str:
    minutes = max(0.0, time.time() - when) / 60
    hours = minutes / 60
    return f"{hours / 24:.0f} d" if hours >= 48 else f"{hours:.0f} h" if minutes >= 120 else f"{minutes:.0f} min"


def du(settings: Du, root: Path) -> Table | None:
    """The table of disk use."""
    groups: dict[str, list[Path]] = {}
    for folder in folders(root):
        groups.setdefault(recipe_of(folder), []).append(folder)
    used = {name: (len(own), sum(map(size, own)), sum(map(_checkpoints, own))) for name, own in groups.items()}
    out = _headed("recipe", ">runs", ">size", ">of it checkpoints")
    for name, (count, total, kept) in sorted(used.items(), key=lambda item: -item[1][1]):
        out.add_row(escape(name), str(count), in_bytes(total), in_bytes(kept))
    count, total, kept = (sum(column) for column in zip((0, 0, 0), *used.values(), strict=True))
    out.add_row("all", str(count), in_bytes(total), in_bytes(kept))
    return out


def _checkpoints(folder: Path) -> int:
    return sum(size(path) for path in folder.glob("checkpoint-*"))


ABSENT = "–"


def diff(settings: Diff, root: Path) -> Table | None:
    """The table of what differs."""
    first, second = (named(name, root) for name in (settings.first, settings.second))
    one, other = (_facts(folder) for folder in (first, second))
    rows = [(name, one.get(name, ABSENT), other.get(name, ABSENT)) for name in {**one, **other}]
    apart = [(name, a, b) for name, a, b in rows if a != b]
    if not apart:
        note(f"{first} and {second} differ in nothing that is written down")
        return None
    out = _headed("", f"{recipe_of(first)} {first.name}", f"{recipe_of(second)} {second.name}")
    for row in apart:
        out.add_row(*map(escape, row))
    return out


def _facts(folder: Path) -> dict[str, str]:
    """What a run is: recipe, settings by dotted name, files' digests, commit, Python, versions."""
    config = object_in(folder / "config.json")
    found: dict[str, Any] = {"recipe": config.get("recipe")}
    found |= dict(leaves(config.get("settings") or {}))
    found |= {f"file {name}": digest for name, digest in (config.get("files") or {}).items()}
    path = folder / "provenance.json"
    made = object_in(path) if path.is_file() else {}
    found |= {name: made.get(name) for name in ("commit", "python")}
    found |= {f"version of {name}": number for name, number in (made.get("versions") or {}).items()}
    return {
        name: repr(value) if isinstance(value, str) and not value.strip() else str(value)
        for name, value in found.items()
    }


COMMANDS: Mapping[str, tuple[type, Callable[[Any, Path], Table | None]]] = {
    "ls": (Ls, ls),
    "diff": (Diff, diff),
    "rm": (Rm, rm),
    "du": (Du, du),
}
"""Each command: its settings, and what does it, given them and the runs folder."""

"""What the pages of the documentation show: code, and `tiltlm` commands with the place where they stand."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tyro

from tiltlm.cli import COMMANDS
from tiltlm.commands.calibrate import Calibrate
from tiltlm.commands.compare import Compare
from tiltlm.commands.demo import Demo
from tiltlm.commands.doctor import Doctor
from tiltlm.commands.export import Export
from tiltlm.commands.launch.settings import launch_options, launching
from tiltlm.commands.list import gold_rewards, narrowed
from tiltlm.commands.measure import Measure
from tiltlm.commands.merge import Merge
from tiltlm.commands.options import by_flag
from tiltlm.commands.power import Power
from tiltlm.commands.prepare import Prepare
from tiltlm.commands.removing import Rm
from tiltlm.commands.report import Report
from tiltlm.commands.run import Usage, grid, parse, value_of
from tiltlm.commands.runs import Diff, Du, Ls
from tiltlm.commands.sample import Sample
from tiltlm.commands.score import Score
from tiltlm.commands.serve import Serve
from tiltlm.methods import names
from tiltlm.recipes import STAGES, figures, preset_of, recipe, tasks

ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, type] = {
    "measure": Measure, "report": Report, "sample": Sample, "score": Score, "prepare": Prepare, "doctor": Doctor,
    "calibrate": Calibrate, "demo": Demo, "merge": Merge, "export": Export, "serve": Serve, "compare": Compare,
    "power": Power,
    "runs ls": Ls, "runs diff": Diff, "runs rm": Rm, "runs du": Du,
}  # fmt: skip
"""Commands whose options are one class of settings."""

BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.S)
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
ENTRY = re.compile(r"^## (?=\d{4}-\d\d-\d\d)", re.M)
AND_SO_ON = ("…", "...")
OWN = (
    "--help",
    "--help-all",
    "--config",
    "--save-config",
    "--methods",
    *(f"--{each}" for each in launch_options()),
)
"""Options of `run` that are no settings."""


@dataclass(frozen=True)
class Code:
    """Code on a page: where, what, and whether it is a line of a block (else it stands in a sentence or a table)."""

    line: int
    text: str
    whole: bool


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [code for name, code in BLOCK.findall(page.read_text()) if name == language]


def codes(text: str) -> Iterator[Code]:
    """Every line of every block of code (continued lines are one), and every piece of code within text."""
    prose, whole, fenced = [""], "", False
    for number, line in enumerate(text.splitlines(), 1):
        inside = fenced or (line.startswith("    ") and not prose[-1].strip()) or bool(whole)
        if line.lstrip().startswith("```"):
            fenced, inside, line = not fenced, False, ""
        if not inside:
            prose.append(line)
            continue
        prose.append("")
        whole = f"{whole} {line.strip()}".strip()
        if whole.endswith("\\"):
            whole = whole[:-1]
        else:
            yield Code(number, whole, True)
            whole = ""
    joined = "\n".join(prose[1:])
    for found in CODE.finditer(joined):
        words = " ".join(found.group(1).replace("\\|", "|").split())
        yield Code(joined.count("\n", 0, found.start()) + 1, words, False)


def commands(code: Code) -> Iterator[list[str]]:
    """The words of each `tiltlm` command in a piece of code, without its own name."""
    text = re.sub(r"^\$ ", "", code.text)
    if not re.match(r"(\w+=\S+ )*tiltlm( |$)", text):
        return
    words = shlex.split(text, comments=code.whole)
    words = [word for word in words if word not in AND_SO_ON]
    ends = [k for k, word in enumerate(words) if word in ("|", ">", "&&", ";")]
    for begin, end in zip([0, *(k + 1 for k in ends)], [*ends, len(words)], strict=True):
        own = (
            [word for word in words[begin:end] if not re.match(r"\w+=", word)] if begin == 0 else words[begin:end]
        )
        if own[:1] == ["tiltlm"] and len(own) > 1:
            yield own[1:]


def wrong(words: list[str], whole: bool) -> str:
    """What is wrong with a command (empty: nothing). Nothing is built, and no file that it names is looked at. whole:
    whether it is all there, with every argument that it wants."""
    command, *rest = words
    if command.startswith("-") or command.isupper():
        return ""
    if command not in COMMANDS:
        return f"there is no command {command!r}"
    if command == "list":
        return wrong_list(rest)
    if command == "runs" and rest:
        command, rest = f"runs {rest[0]}", rest[1:]
        if command not in SETTINGS:
            return f"there is no command {command!r}"
    elif command == "runs":
        return ""
    if command not in SETTINGS:
        return wrong_recipe(rest, command)
    if whole:
        return wrong_arguments(SETTINGS[command], rest)
    unknown = [
        flag for flag in rest if flag.startswith("-") and flag.partition("=")[0] not in options(SETTINGS[command])
    ]
    return f"tiltlm {command} has no option {unknown[0]}" if unknown else ""


def wrong_list(rest: list[str]) -> str:
    """`tiltlm list WORD --matrix`, where the word finds something."""
    words, known = (
        [word for word in rest if not word.startswith("-")],
        {name: line for name, (_, line) in (*tasks().items(), *figures().items())},
    )
    if {word for word in rest if word.startswith("-")} - {"--matrix", "--help"}:
        return f"tiltlm list has no option in {' '.join(rest)}"
    missing = [
        word
        for word in words
        if not word.isupper() and not (narrowed(known | names() | STAGES, word) or gold_rewards(word))
    ]
    return f"tiltlm list finds nothing called {missing[0]}" if missing else ""


def wrong_recipe(rest: list[str], command: str) -> str:
    """`tiltlm run TASK/STAGE --…` and `tiltlm sweep`, read as the commands read it."""
    try:
        args, _ = launching(rest)
        for flag in ("--config", "--save-config"):  # files that need not be there
            _, args = value_of(flag, args)
        if not args or placeholder(args[0]):
            return ""
        for point in grid(without_files(args[1:])) if command == "sweep" else [args[1:]]:
            parse([args[0], *point], command)
    except Usage:
        return ""
    except ValueError as error:
        return str(error)
    return ""


def without_files(args: list[str]) -> list[str]:
    """A sweep's arguments without the axes that are files, `--setting @FILE`."""
    ends = [k for k, arg in enumerate(args) if arg.startswith("@")]
    return [arg for k, arg in enumerate(args) if k not in ends and k + 1 not in ends and "=@" not in arg]


def placeholder(name: str) -> bool:
    """Whether a recipe's name says only what stands there: TASK/STAGE, RECIPE, animals/METHOD."""
    return bool(re.search(r"[A-Z]{2}", name))


def wrong_arguments(kind: type, rest: list[str]) -> str:
    """What tyro says of a command's arguments."""
    import contextlib
    import io

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            tyro.cli(kind, args=rest)
    except SystemExit as stop:
        return " ".join(re.sub(r"[^\w\s.,:'=/-]", " ", said.getvalue()).split()) if stop.code else ""
    except ValueError as error:
        return str(error)
    return ""


def options(kind: type) -> set[str]:
    """The options of a class of settings."""
    found = {f"--{name.rstrip('_').replace('_', '-')}" for name in vars(kind)["__dataclass_fields__"]}
    return found | {f"--no-{each[2:]}" for each in found} | {"--help"}


# ---- flags that stand alone ---------------------------------------------------------------------------------------------


@cache
def flags_of(name: str, *methods: str) -> frozenset[str]:
    """The options of a recipe (of a comparison: with these methods)."""
    return frozenset(f"--{flag}" for flag in by_flag(recipe(name, methods or None))) | set(OWN)


@cache
def every_flag() -> frozenset[str]:
    """The options of every recipe and every command that there is."""
    found = set().union(*(options(kind) for kind in SETTINGS.values()), {"--matrix"}, OWN)
    for task in tasks():
        found |= flags_of(f"{task}/evaluate", *names())
        found |= set().union(*(flags_of(f"{task}/{stage}") for stage in stages_of(task)))
    return frozenset(found.union(*(flags_of(name) for name in figures())))


def stages_of(task: str) -> list[str]:
    """The stages of a task, in so many groups of options as there are."""
    preset = preset_of(task)
    own: Any = preset.task.stages(preset.seed)
    return [
        *names(),
        *own,
        "value",
        "exact",
        "log-z",
        "generate",
        "label",
        "answers",
        "v-star",
        "bounds",
        "frontier",
        "qualitative",
        "reach",
    ]


def flags_in(text: str) -> list[str]:
    """The options that a piece of code names, as they are called where they are said positively; of a group, --fit.…,
    what they begin with."""
    found = re.findall(r"(?:^|\s)(--[\w.-]+)", text)
    return [re.sub(r"^--(?:([\w.-]+)\.)?no-", lambda m: f"--{m[1]}." if m[1] else "--", each) for each in found]


def is_among(flag: str, known: Iterable[str]) -> bool:
    """Whether there is such an option, or such a group of them; --METHOD.fit.lr is that of some method."""
    if re.match(r"--[A-Z]{2}", flag):
        return any(each.endswith(flag[flag.index(".") :]) for each in known)
    return any(each.startswith(flag) for each in known) if flag.endswith(".") else flag in known

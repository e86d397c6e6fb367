"""`tiltlm list`: tasks, methods by road, stages, figures, gold rewards and papers, without importing torch; `--matrix`
asks every cell whether it makes sense. Two screens in all: the longest parts are names alone, until a word asks for their
lines."""

from __future__ import annotations

import builtins
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from tiltlm import recipes
from tiltlm.methods import ROADS, catalogue
from tiltlm.mistakes import nearest
from tiltlm.rewards import gold

USAGE = """\
usage: tiltlm list [WORD] [--matrix]   tasks, methods and stages (whose name or line contains WORD), one line each

Some parts are names alone until WORD is theirs: policies, gpu, presets, figures, gold,
papers.

A recipe is TASK/STAGE; a method's name is a stage: `tiltlm run animals/ctl` trains and measures it.
--matrix prints every task against every method: ✓ where the cell makes sense, – with a reason where it does not."""

WIDTH = 118

SHORT = ("gpu", "policies", "presets", "figures", "gold", "papers")
"""Parts that are names alone where no word is given; the word says a line on each."""


def list(args: Sequence[str]) -> int:
    """Print what there is; a word among the arguments narrows it down."""
    if any(arg in ("-h", "--help") for arg in args):
        print(USAGE)
        return 0
    words = [arg for arg in args if not arg.startswith("-")]
    unknown = [arg for arg in args if arg.startswith("-") and arg != "--matrix"]
    if unknown or len(words) > 1:
        raise ValueError(f"tiltlm list takes one WORD and --matrix; got {' '.join(unknown or words)}")
    word = words[0] if words else ""
    if "--matrix" in args:
        from tiltlm.commands.matrix import matrix  # imports torch

        return matrix(word)
    return _listed(word)


def _listed(word: str) -> int:
    shown = {part: (title, found) for part, (title, found) in _parts(word).items() if found}
    if not shown:
        known = [*recipes.tasks(), *(name for found in catalogue().values() for name in found), *recipes.STAGES]
        known += [*recipes.figures(), *recipes.presets(), *gold.catalogue()]
        print(f"nothing here is called {word!r}.{nearest(word, known)} `tiltlm list` shows everything")
        return 0
    for part, (title, found) in shown.items():
        short = part in SHORT and not word
        print(f"{title[0].upper()}{title[1:]}" + (f" (`tiltlm list {part}`: a line on each)" if short else ""))
        print("\n".join(_names(found) if short else _lines(part, found)))
    print("\ntiltlm run TASK/STAGE, TASK/evaluate --methods A B …; `--help` behind it shows the settings")
    return 0


def _parts(word: str) -> dict[str, tuple[str, Mapping[str, str]]]:
    """Part of the list -> its title, and what the word leaves of it."""
    tasks = narrowed({name: line for name, (_, line) in recipes.tasks().items()}, word)
    published = {name: line for name, line in tasks.items() if line.endswith("(wants a GPU)")}
    figures = {name: line for name, (_, line) in recipes.figures().items()}
    roads = {
        folder: (what, {name: line for name, (_, line) in found.items()})
        for (folder, what), found in zip(ROADS.items(), catalogue().values(), strict=True)
    }
    return {
        "tasks": ("tasks", {name: line for name, line in tasks.items() if name not in published}),
        "gpu": ("tasks that want a GPU, with published settings", published),
        **{
            road: (what, found if word == road else narrowed(found, word)) for road, (what, found) in roads.items()
        },
        "presets": (
            "presets, methods with settings of their own, stages of some tasks",
            recipes.presets() if word == "presets" else narrowed(recipes.presets(), word),
        ),
        "stages": ("stages that every task has", narrowed(recipes.STAGES, word)),
        "figures": (
            "figures that stand alone, without a task",
            figures if word == "figures" else narrowed(figures, word),
        ),
        "gold": ("gold rewards, for --task.reward and tiltlm score", gold_rewards(word)),
        "papers": ("papers", papers_of() if word == "papers" else narrowed(papers_of(), word)),
    }


def gold_rewards(word: str) -> dict[str, str]:
    """Gold rewards whose name or line contains `word`; all of them where the word is "gold"."""
    found = {name: each.line for name, each in gold.catalogue().items()}
    return found if word.lower() == "gold" else narrowed(found, word)


def _names(found: Mapping[str, str]) -> builtins.list[str]:
    return textwrap.wrap(
        ", ".join(found), WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def _lines(part: str, found: Mapping[str, str]) -> builtins.list[str]:
    """What stands under a title: a line on each, of gold rewards what they need as well."""
    if part == "gold":
        indent = " " * (4 + max(map(len, found)))
        pairs = zip(_column(found), (gold.catalogue()[name].needs for name in found), strict=True)
        return [each for line, needs in pairs for each in (line, f"{indent}[{needs}]")[: 1 + bool(needs)]]
    return _column(found) if len(found) < 9 or part in ("tasks", "gpu", "policies", "presets") else _columns(found)


def narrowed(found: Mapping[str, str], word: str) -> dict[str, str]:
    """Those whose name or line contains `word`."""
    return {name: line for name, line in found.items() if word.lower() in f"{name} {line}".lower()}


def papers_of() -> dict[str, str]:
    """File of the catalogue -> its first line."""
    here = Path(recipes.__file__).parent
    found: dict[str, str] = {}
    every = [*recipes.tasks().values(), *recipes.figures().values()]
    for path in sorted({here / f"{module.rpartition('.')[2]}.py" for module, _ in every}):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.startswith('"""'):
            found[path.stem] = text[3:].partition("\n")[0].removesuffix('"""')
    return found


def _column(found: Mapping[str, str]) -> builtins.list[str]:
    width = 2 + max(len(name) for name in found)
    lines = [f"  {name:<{width}}{line}" for name, line in found.items()]
    return [line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…" for line in lines]


def _columns(found: Mapping[str, str]) -> builtins.list[str]:
    """Names and lines, two in a row where they are short enough."""
    width, half = 2 + max(len(name) for name in found), WIDTH // 2
    lines: builtins.list[str] = []
    left = ""
    for name, line in found.items():
        item = f"  {name:<{width}}{line}"
        if left and len(item) <= half:
            lines[-1] = f"{left:<{half}}{item}"
            left = ""
        else:
            lines.append(item)
            left = item if len(item) < half else ""
    return lines

"""`tiltlm list`: tasks, methods by road, stages and papers, without importing torch; `--matrix` asks every cell whether it
makes sense."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from pathlib import Path

from tiltlm import recipes
from tiltlm.methods import ROADS, catalogue, names
from tiltlm.mistakes import nearest

USAGE = """\
usage: tiltlm list [WORD] [--matrix]   tasks, methods and stages (whose name or line contains WORD), one line each

A recipe is TASK/STAGE; a method's name is a stage: `tiltlm run animals/ctl` trains and measures it.
--matrix prints every task against every method: ✓ where the cell makes sense, – with a reason where it does not."""

WIDTH = 118


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
    chosen = narrowed({name: line for name, (_, line) in recipes.tasks().items()}, word)
    roads = {
        f"{what} ({folder})": narrowed({name: line for name, (_, line) in found.items()}, word)
        for (folder, what), found in zip(ROADS.items(), catalogue().values(), strict=True)
    }
    stages, papers = narrowed(recipes.STAGES, word), narrowed(papers_of(), word)
    alone = {
        "figures that stand alone": narrowed({name: line for name, (_, line) in recipes.figures().items()}, word)
    }
    if not (chosen or any(roads.values()) or stages or papers or any(alone.values())):
        known = [*recipes.tasks(), *recipes.figures(), *names(), *recipes.STAGES]
        print(f"nothing here is called {word!r}.{nearest(word, known)} `tiltlm list` shows everything")
        return 0
    common = {"stages that every task has": stages}
    for title, found in {"tasks": chosen, **roads, **common, **alone, "papers": papers}.items():
        if found:
            print(f"{title[0].upper()}{title[1:]}")
            print("\n".join(_column(found) if len(found) < 9 or title == "tasks" else _columns(found)))
    print("\ntiltlm run TASK/STAGE, TASK/evaluate --methods A B …; `--help` behind it shows the settings")
    return 0


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

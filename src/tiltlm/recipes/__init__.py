"""The catalogue: tasks by name, with the papers' settings as values. One file a system.

A file holds a literal TASKS {name: one line}, which `tiltlm list` reads without importing anything heavy, and
`preset(name)`, which makes the value. `recipe("task/stage")` is what `tiltlm run` builds: a stage is a method's name
(measure it), a method's training, `evaluate` (several methods side by side), a figure, or a stage of the task's own.
What needs no task (mathematics worked out) is a literal FIGURES {"name/stage": one line} and `figure(name)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tiltlm.literals import literal
from tiltlm.mistakes import nearest

if TYPE_CHECKING:
    from tiltlm.recipes.preset import Preset
    from tiltlm.run import Recipe

STAGES: dict[str, str] = {
    "evaluate": "several methods against one target, side by side: table, picture, differences",
    "METHOD": "train a method (where it trains), and measure it",
    "METHOD-policy, METHOD-twist, value": "its training alone",
    "METHOD@PROTOCOL": "the questions of a split put to its model: greedy, avg@4, maj@4, letters, options",
    "exact": "exact draws of pi*",
    "log-z": "the one log Z of a comparison",
    "generate, label": "stored draws of the reference, and their rewards",
    "budget": "gold reward and J against the labels bought, with a judge and without",
    "bounds": "bounds of log Z against the number of particles",
    "frontier": "reward against KL to the reference over temperatures",
    "qualitative": "samples of one SMC run by weight, ESS trace, genealogy",
    "reach": "certified intervals of log Z at growing lengths",
}
"""What every task has, where it makes sense."""


@cache
def tasks() -> dict[str, tuple[str, str]]:
    """name -> (module, one line) of every task in the catalogue. The files are parsed, not imported."""
    return _listed("TASKS")


@cache
def figures() -> dict[str, tuple[str, str]]:
    """The same of every figure that stands alone, by its recipe's whole name."""
    return _listed("FIGURES")


def _listed(named: str) -> dict[str, tuple[str, str]]:
    return {
        name: (f"tiltlm.recipes.{path.stem}", line)
        for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))
        for name, line in literal(path, named).items()
    }


def preset_of(name: str) -> Preset:
    """The task called `name` with its settings. Unknown names raise, naming the nearest."""
    known = tasks()
    if name not in known:
        near = nearest(name, [*known, *figures()])
        raise ValueError(f"there is no task {name!r}.{near} `tiltlm list` shows them all.")
    made: Preset = importlib.import_module(known[name][0]).preset(name)
    return made


def recipe(name: str, compared: Sequence[str] | None = None) -> Recipe:
    """The recipe called `task/stage`, with its default settings; compared: the methods of `evaluate`."""
    if name in figures():
        alone: Recipe = importlib.import_module(figures()[name][0]).figure(name)
        return alone
    from tiltlm.recipes.stages import stage_of

    task, slash, stage = name.partition("/")
    if not slash or "/" in stage:
        raise ValueError(f"a recipe is called TASK/STAGE, animals/ctl say; got {name!r}. `tiltlm list` shows both")
    return stage_of(preset_of(task), stage, compared)

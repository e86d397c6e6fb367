"""Recipes: the papers as values. One file per system.

A file holds two literals, FAMILIES {name: one line} and STAGES {name: one line}, that `tiltlm list` reads
without importing anything heavy, and `recipe("family/stage")`, which makes the value. A new file is a new
entry; nothing else needs to know.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiltlm.run import Recipe


@dataclass(frozen=True)
class Entry:
    """One recipe file: its module, families and stages (name -> one line each)."""

    module: str
    families: dict[str, str]
    stages: dict[str, str]

    def names(self) -> list[str]:
        return [f"{family}/{stage}" for family in self.families for stage in self.stages]


@cache
def catalogue() -> list[Entry]:
    """Every recipe file. The files are parsed, not imported."""
    found = []
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        literals = _literals(ast.parse(path.read_text(encoding="utf-8")))
        if {"FAMILIES", "STAGES"} <= literals.keys():
            found.append(Entry(path.stem, literals["FAMILIES"], literals["STAGES"]))
    return found


def _literals(tree: ast.Module) -> dict[str, dict[str, str]]:
    return {
        node.target.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None
        if node.target.id in ("FAMILIES", "STAGES")
    }


def recipe(name: str) -> Recipe:
    """The recipe called `name`, with its default settings. Unknown names raise, naming the nearest."""
    modules = {known: entry.module for entry in catalogue() for known in entry.names()}
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"there is no recipe {name!r}.{hint} `tiltlm list` shows them all.")
    return importlib.import_module(f"tiltlm.recipes.{modules[name]}").recipe(name)

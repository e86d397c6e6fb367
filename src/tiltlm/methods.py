"""Methods by name. A method's file says what it is called; the files are found by looking (parsed, not imported).

Each has two literals: NAMES {name: one line} and METHODS {name: its value}. A new file is a new entry.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tiltlm.literals import literal
from tiltlm.mistakes import nearest

if TYPE_CHECKING:
    from tiltlm.method import Method

ROADS = {
    "policies": "train a policy",
    "twists": "train a twist or a value, and decode with it",
    "decoders": "draw, and train nothing",
}
"""The folders that hold methods, and what those do."""


@cache
def catalogue() -> dict[str, dict[str, tuple[str, str]]]:
    """folder -> {name: (module, one line)}, without importing anything heavy."""
    here = Path(__file__).parent
    return {
        folder: {
            name: (f"tiltlm.{folder}.{path.stem}", line)
            for path in sorted((here / folder).glob("[a-z]*.py"))
            for name, line in literal(path, "NAMES").items()
        }
        for folder in ROADS
    }


def names() -> dict[str, str]:
    """Every method's name and line."""
    return {name: line for found in catalogue().values() for name, (_, line) in found.items()}


def method(name: str) -> Method:
    """The method called `name`, with its default settings. Unknown names raise, naming the nearest."""
    modules = {known: module for found in catalogue().values() for known, (module, _) in found.items()}
    if name not in modules:
        raise ValueError(f"there is no method {name!r}.{nearest(name, modules)} There are {', '.join(modules)}")
    made: Method = importlib.import_module(modules[name]).METHODS[name]
    return made

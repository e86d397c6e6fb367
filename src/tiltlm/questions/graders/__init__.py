"""Graders by name: who reads an answer off a completion.

A file of this folder says what is in it, GRADERS {name: one line}, and makes the one called `name`: grader(name). The files
are found by looking.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path

from tiltlm.literals import literal
from tiltlm.mistakes import nearest
from tiltlm.questions.base import Grader


@cache
def catalogue() -> dict[str, tuple[str, str]]:
    """name -> (module, one line), nothing of it imported."""
    return {
        name: (f"{__name__}.{path.stem}", line)
        for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))
        for name, line in literal(path, "GRADERS").items()
    }


def grader(name: str) -> Grader:
    """The grader called `name`. Raises ValueError naming those there are, and for one that lacks a package."""
    known = catalogue()
    if name not in known:
        raise ValueError(f"there is no grader {name!r}.{nearest(name, known)} Known: {', '.join(known)}")
    made: Grader = import_module(known[name][0]).grader(name)
    return made

"""A command's arguments as its settings, read by tyro. What they cannot mean ends in one line here, too."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

import tyro

T = TypeVar("T")

STYLE = re.compile(r"\x1b\[[0-9;]*m")
HELP = ("For full helptext", "Argument helptext")
"""How those parts of tyro's boxes begin that say no more than its help."""


def settings_from(args: Sequence[str], kind: Callable[..., T], command: str) -> T:
    """What `args` say of a command's settings. Raises ValueError for what they cannot mean, SystemExit for --help."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(kind, prog=f"tiltlm {command}", args=args)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise ValueError(f"{'; '.join(unboxed(told.getvalue()))} (`tiltlm {command} --help`)")


def unboxed(text: str) -> Iterator[str]:
    """The parts of one of tyro's boxes, a line each, without what describes options. (On an output that is not UTF-8 a box
    is its title, a rule, and what would be inside.)"""
    plain = [STYLE.sub("", line) for line in text.splitlines()]
    inside = [line[2:-1].rstrip() for line in plain if line.startswith("│")]
    inside = inside or [line[2:].rstrip() for line in plain[2:]]
    for ruled, part in groupby(inside, key=lambda line: set(line) in ({"─"}, {"-"})):
        lines = [line for line in part if line and not line.startswith(8 * " ")]
        if not ruled and lines and not lines[0].startswith(HELP):
            head = " ".join(line for line in lines if not line.startswith(4 * " "))
            yield f"{head} {', '.join(line.strip() for line in lines if line.startswith(4 * ' '))}".strip(" .")

"""The graph of runs as a scheduler gets it: what is to be built, each run after those that it needs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tiltlm.run import Run


def in_order(tops: Iterable[Run[Any]]) -> list[Run[Any]]:
    """The runs that are still to be built for `tops`, themselves included: each once, its inputs before it."""
    found: dict[Path, Run[Any]] = {}

    def visit(run: Run[Any]) -> None:
        if not run.done and run.folder not in found:
            for needed in run.inputs.values():
                visit(needed)
            found[run.folder] = run

    for top in tops:
        visit(top)
    return list(found.values())


def needs(run: Run[Any]) -> list[Path]:
    """The folders of the inputs that are still to be built."""
    return list(dict.fromkeys(needed.folder for needed in run.inputs.values() if not needed.done))


def apart(missing: Iterable[Run[Any]]) -> tuple[list[Run[Any]], list[Run[Any]]]:
    """Of runs that were not built: those that failed, and those that wait on them."""
    runs = list(missing)
    return [run for run in runs if not needs(run)], [run for run in runs if needs(run)]

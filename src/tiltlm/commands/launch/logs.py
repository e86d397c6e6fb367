"""What is said of runs that were not built: which failed, how its log ends, what waits on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from tiltlm.progress import note
from tiltlm.rewards.masking import mask
from tiltlm.run import Run

LAST_LINES = 15


def say_failures(failed: Sequence[Run[Any]], waited: Sequence[Run[Any]], logs: Mapping[Path, Path]) -> ValueError:
    """Say how each log ends, and return the error that names all."""
    for run in failed:
        note(escape(f"{run.recipe.name} {run.key} failed; {logs[run.folder]} ends:\n{tail(logs[run.folder])}"))
    names = ", ".join(f"{run.folder} failed (see above; log {logs[run.folder]})" for run in failed)
    behind = f"; not built, for they wait on it: {', '.join(str(run.folder) for run in waited)}" if waited else ""
    return ValueError(f"{names}{behind}. The same command goes on from there")


def tail(log: Path) -> str:
    """The last lines of a log, indented."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = ["(there is no such file: the job never ran, or its machine does not share this folder)"]
    return "\n".join(f"    {mask(line)}" for line in lines[-LAST_LINES:])

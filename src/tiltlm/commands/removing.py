"""`tiltlm runs rm`: remove runs, and none that a finished one needs, that is being built, or that lies elsewhere."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from filelock import FileLock, Timeout

from tiltlm.commands.folders import folders, in_bytes, named, object_in, size, state_of
from tiltlm.commands.models import recipe_in
from tiltlm.lock import LOCK
from tiltlm.progress import note
from tiltlm.run import Run, find


@dataclass(frozen=True)
class Rm:
    """Remove runs. One that a finished run needs, or one that is being built, is refused."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders or keys."""

    yes: bool = False
    """Do not ask."""

    force: bool = False
    """Also what other finished runs need: they keep their reports, and can no longer be sampled or measured anew."""


def rm(settings: Rm, root: Path) -> None:
    """Remove runs, having asked."""
    chosen = list(dict.fromkeys(within(named(name, root), root) for name in settings.runs))
    if not chosen:
        raise ValueError("name the runs to remove; `tiltlm runs ls` shows them")
    if not settings.force:
        refuse_needed(chosen, root)
    total = in_bytes(sum(map(size, chosen)))
    print("\n".join(str(folder) for folder in chosen))
    if not (settings.yes or _confirmed(f"remove these {len(chosen)} runs, {total}?")):
        note("nothing was removed")
        return
    for folder in chosen:
        _remove(folder, root)
    note(f"removed {len(chosen)} runs, {total}")


def within(folder: Path, root: Path) -> Path:
    """`folder`, where it is TASK/STAGE/KEY under `root` itself. Raises ValueError for what only leads or lies elsewhere."""
    above, own = folder.absolute().parts[:-3], folder.absolute().parts[-3:]
    inside = bool(above) and Path(*above).resolve() == root.resolve()
    if not inside or folder.resolve() != root.resolve().joinpath(*own):  # else a link leads elsewhere
        raise ValueError(
            f"{folder} is no run in {root}: only those are removed ($TILTLM_RUNS names another folder)"
        )
    return folder.resolve()


def refuse_needed(chosen: Sequence[Path], root: Path) -> None:
    """Raise ValueError where a run that stays, done or being built, needs one of these: as an input, or by a file."""
    for folder in folders(root):
        if folder.resolve() in chosen or state_of(folder) == "half-way":
            continue
        needed = [each for each in _needs(folder, root) if any(each.is_relative_to(gone) for gone in chosen)]
        if needed:
            raise ValueError(
                f"{folder} needs {needed[0]}: remove it as well, or say --force (its report stays, but it can no longer be "
                "sampled or measured anew)"
            )


def _needs(folder: Path, root: Path) -> set[Path]:
    """What a run is made of: its inputs, theirs, and the files its settings name."""
    stored = object_in(folder / "config.json")
    files = stored.get("files") or {}
    found = {Path(name).resolve() for name in files}
    try:
        run = find(recipe_in(stored, folder / "config.json"), root, files)
        return found | {each.folder.resolve() for each in _inputs(run)}
    except ValueError as error:
        note(f"what {folder} needs is not known ({error})")
        return found


def _inputs(run: Run[Any]) -> Iterable[Run[Any]]:
    for each in run.inputs.values():
        yield each
        yield from _inputs(each)


def _confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise ValueError(f"{question} Nobody can be asked here: say --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _remove(folder: Path, root: Path) -> None:
    """Remove a run and the folders above it that are empty then. First it is no longer done: half of it is never taken for
    a whole one."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder} is being built: stop that first, then remove it") from None
    try:
        (folder / "DONE").unlink(missing_ok=True)
        shutil.rmtree(folder)
    finally:
        lock.release()
    for parent in folder.parents[:2]:
        if parent != root.resolve() and not any(parent.iterdir()):
            parent.rmdir()

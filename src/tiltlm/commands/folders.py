"""The folders of runs, TASK/STAGE/KEY in the runs folder: which there are, what each holds, how large they are."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tiltlm.jsonl import read_json
from tiltlm.lock import LOCK


def folders(root: Path) -> list[Path]:
    """Every run's folder, TASK/STAGE/KEY under `root`, in the order in which they were begun."""
    found = [config.parent for config in root.glob("*/*/*/config.json")]
    return sorted(found, key=lambda folder: (began(folder), str(folder)))


def named(name: str, root: Path) -> Path:
    """The folder of a run that is named by it, or by its key. Raises ValueError where there is none, or are several."""
    if (Path(name) / "config.json").is_file():
        return Path(name)
    found = [folder for folder in folders(root) if folder.name == name]
    if not found:
        raise ValueError(f"{name} is no run's folder, and no key; `tiltlm runs ls` shows what is in {root}")
    if len(found) > 1:
        raise ValueError(f"{len(found)} runs have the key {name}: name its folder, {' or '.join(map(str, found))}")
    return found[0]


def recipe_of(folder: Path) -> str:
    """TASK/STAGE."""
    return "/".join(folder.parts[-3:-1])


def began(folder: Path) -> float:
    """When the run was begun, in seconds since 1970."""
    return (folder / "config.json").stat().st_mtime


def state_of(folder: Path) -> str:
    """done, being built (by a process that holds its lock), or half-way: left unfinished."""
    return "done" if (folder / "DONE").is_file() else "being built" if _locked(folder) else "half-way"


def _locked(folder: Path) -> bool:
    """Whether a process holds the folder's lock."""
    if not (folder / LOCK).is_file():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def object_in(path: Path) -> Mapping[str, Any]:
    """The object in a run's .json file. Raises ValueError where there is none."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings of a run: an object was expected")
    return found


def size(folder: Path) -> int:
    """Bytes of the files in a folder, at any depth; what links lead to does not count."""
    return sum(_size_of(path) for path in folder.rglob("*"))


def _size_of(path: Path) -> int:
    try:
        about = path.lstat()
    except FileNotFoundError:  # of a run that is being built, files come and go
        return 0
    return about.st_size if stat.S_ISREG(about.st_mode) else 0


def in_bytes(count: int) -> str:
    """A number of bytes for people: 12.6 MB."""
    unit, name = next((each for each in ((1e9, "GB"), (1e6, "MB")) if count >= each[0]), (1e3, "kB"))
    return f"{count / unit:.1f} {name}"

"""Folders that hold models: checkpoints, and the runs that made them. A run's folder is a model's name wherever one is
asked for: it stands for the best model that the run trained."""

from __future__ import annotations

from functools import cache
from os.path import isfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "COMPLETE").is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def best_checkpoint(folder: Path) -> Path:
    """The checkpoint of the best evaluation in `folder`; the last one where no evaluation named a best.

    Raises FileNotFoundError where there is no checkpoint.
    """
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{folder} holds no whole checkpoint: train there first")
    trainer = found[-1] / "trainer.pt"
    if not trainer.is_file():  # a model that needed no training
        return found[-1]
    best = state_in(found[-1], mmap=True)["course"].get("best_step")
    return found[-1] if best is None else folder / f"checkpoint-{best}"


def state_in(checkpoint: Path, mmap: bool = False) -> dict[str, Any]:
    """What `trainer.pt` of a checkpoint holds. Raises ValueError, naming it, where that is not whole."""
    path = checkpoint / "trainer.pt"
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, mmap=mmap)
    except (RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        why = str(error).split("\n")[0]
        raise ValueError(
            f"{path} is not whole ({why}): remove {checkpoint}, and training goes on from the one before, or anew"
        ) from None
    return state


def is_run(name: str | Path) -> bool:
    """Whether `name` is the folder of a run."""
    return bool(str(name)) and isfile(Path(name) / "provenance.json")


def model_in(folder: Path) -> Path | None:
    """Where a run keeps its best model: the adapters merged, where it trained adapters and merged them, else its best
    checkpoint; None for a folder that is no run or trained nothing."""
    if not is_run(folder):
        return None
    if (folder / "merged").is_dir():
        return folder / "merged"
    done = folder / "DONE"
    if done.is_file():
        return _best_in(folder, done.stat().st_mtime_ns)
    return best_checkpoint(folder) if checkpoints(folder) else None


@cache
def _best_in(folder: Path, finished: int) -> Path | None:
    """The best checkpoint of a run that was `finished` then: asked for with every key, and read from a large file."""
    return best_checkpoint(folder) if checkpoints(folder) else None


def located(name: str | Path) -> str:
    """`name`, a run's folder replaced by the folder of its best model.

    Raises ValueError for a run that is not finished, trained nothing, or trained something else than a model by itself.
    """
    if not is_run(name):
        return str(name)
    if not (Path(name) / "DONE").is_file():
        raise ValueError(f"{name} is a run that is not finished: the command that began it completes it")
    best = model_in(Path(name))
    if best is None:
        raise ValueError(f"{name} is a run without a trained model: name one of a stage that trains")
    if (best / "head.json").is_file():
        raise ValueError(
            f"{name} is a run that trained a value or a twist beside its reference, no model by itself"
        )
    return str(best)

"""Trackers: a run's numbers sent on to the tools that draw curves, beside the jsonl files that are always written.

    TILTLM_TRACK=tensorboard tiltlm run …          event files in the run's folder
    TILTLM_TRACK=wandb,trackio tiltlm run …        two at once; WANDB_MODE=offline and the like are theirs

Nothing is sent anywhere unless the variable names it. After an interruption the steps since the last checkpoint are
sent again, as they are made again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tiltlm import ranks

VARIABLE = "TILTLM_TRACK"
PROJECT = "tiltlm"

Track = Callable[[int, dict[str, float]], None]
"""Takes a step and its numbers by name."""
Opened = tuple[Track, Callable[[], None]]
"""How to send, and how to close."""


class Tracker:
    """Sends numbers to every opened tracker when called; a context that closes them."""

    def __init__(self, opened: list[Opened]) -> None:
        self.opened = opened

    def __call__(self, step: int, numbers: dict[str, float]) -> None:
        for send, _ in self.opened:
            send(step, numbers)

    def under(self, group: str) -> Track:
        """The same, with every name put under `group`, as the tools group curves."""
        return lambda step, numbers: self(step, {f"{group}/{name}": value for name, value in numbers.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, close in self.opened:
            close()


def tracker(run_name: str, folder: Path, settings: dict[str, Any]) -> Tracker:
    """The trackers that the environment variable TILTLM_TRACK lists (none where it is empty), opened.

    run_name: what they call the run. folder: where those that write files put them. settings: shown beside the curves. Of
    several processes the first one alone sends.
    Raises ValueError for a name nobody knows and for a tracker that is not installed.
    """
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    if unknown := [name for name in names if name not in OPENERS]:
        raise ValueError(f"{VARIABLE} names {', '.join(unknown)}; known are {', '.join(OPENERS)}")
    if not ranks.is_first():
        return Tracker([])
    plain = json.loads(json.dumps(settings, default=str))
    return Tracker([_opened(name, run_name, folder, plain) for name in names])


def _opened(name: str, run_name: str, folder: Path, settings: dict[str, Any]) -> Opened:
    try:
        return OPENERS[name](run_name, folder, settings)
    except ImportError as error:
        raise ValueError(
            f"{VARIABLE} names {name}, which is not installed: pip install 'tiltlm[track]'"
        ) from error


def _tensorboard(run_name: str, folder: Path, settings: dict[str, Any]) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("settings", f"{run_name}\n\n```\n{json.dumps(settings, indent=1)}\n```")

    def send(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


def _wandb(run_name: str, folder: Path, settings: dict[str, Any]) -> Opened:
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    run = wandb.init(project=project, name=run_name, dir=str(folder), config=settings, reinit="finish_previous")
    return lambda step, numbers: run.log(numbers, step=step), run.finish


def _trackio(run_name: str, folder: Path, settings: dict[str, Any]) -> Opened:
    import trackio

    def finish() -> None:
        with redirect_stdout(sys.stderr):
            trackio.finish()

    with redirect_stdout(sys.stderr):  # it greets on standard output, where results go
        trackio.init(project=PROJECT, name=run_name, config=settings)
    return lambda step, numbers: trackio.log(numbers, step=step), finish


OPENERS: dict[str, Callable[[str, Path, dict[str, Any]], Opened]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}

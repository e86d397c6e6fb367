"""Training inside a run: with progress, trackers and checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from tiltlm.engine import Engine
from tiltlm.experience import Experience
from tiltlm.fit import Fit
from tiltlm.objective import Objective
from tiltlm.progress import OnStep, note, steps
from tiltlm.rewards.masking import without_secrets
from tiltlm.run import Run
from tiltlm.seeds import Stream
from tiltlm.tracking import Track, tracker
from tiltlm.train import Course, Pace, Training, Watch


def train(
    run: Run[Any],
    model: Any,
    objective: Objective,
    experience: Experience,
    how: Fit,
    device: torch.device,
    stream: Stream,
    passes: int = 1,
    watch: Watch | None = None,
) -> Course:
    """Train `model` in the run's folder, with progress, from the last checkpoint if there is one.

    how: with its steps counted (`Fit.of`). watch: as `how.watching(…)` makes it.
    """
    name = f"{run.recipe.name}/{run.key}"
    every = how.keep_every or how.checkpoint_every
    with steps(run.recipe.name) as show, tracker(name, run.folder, without_secrets(asdict(run.recipe))) as track:
        course = Training(
            model.to(device), Engine(model, how.optim), objective, experience, how.pace,
            stream.child(run.recipe.stage), run.folder, every, _both(show, track.under("train")), passes, how.keep,
            watch, how.keep_every, track.under("eval"),
        ).run()  # fmt: skip
    _report_unsolved(run.recipe.name, how.pace, course)
    return course


def _both(show: OnStep, send: Track) -> OnStep:
    """What is called after every step: the progress bar, and the trackers."""

    def on_step(step: int, limit: int, metrics: dict[str, float]) -> None:
        show(step, limit, metrics)
        send(step, metrics)

    return on_step


def _report_unsolved(name: str, pace: Pace, course: Course) -> None:
    if pace.until > 0 and course.solved_at is None:
        reached = ", ".join(f"{metric} {value:.3f}" for metric, value in course.running.items())
        note(f"[yellow]{name}: not solved within {pace.steps} steps ({reached})[/]: raise the limit")

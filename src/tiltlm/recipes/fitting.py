"""Training inside a run: the settings every stage that trains has, and the one way it is done."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from tiltlm.engine import Engine, Optim
from tiltlm.experience import Experience
from tiltlm.objective import Objective
from tiltlm.progress import note, steps
from tiltlm.run import Run
from tiltlm.seeds import Stream
from tiltlm.train import Course, Pace, Training


@dataclass(frozen=True)
class Fit:
    """How a stage trains."""

    optim: Optim = field(default_factory=Optim)
    pace: Pace = field(default_factory=Pace)
    batch_size: int = 64
    """Rows (graphs, completions, pairs) a step."""

    checkpoint_every: int = 200
    """Steps between checkpoints (0: only at the end)."""


def fit(
    run: Run[Any],
    model: Any,
    objective: Objective,
    experience: Experience,
    how: Fit,
    *,
    device: torch.device,
    stream: Stream,
    passes: int = 1,
    keep: Collection[int] = (),
) -> Course:
    """Train `model` in the run's folder, with progress, from the last checkpoint if there is one."""
    with steps(run.recipe.name) as on_step:
        training = Training(
            model.to(device),
            Engine(model, how.optim),
            objective,
            experience,
            how.pace,
            stream.child(run.recipe.stage),
            run.folder,
            how.checkpoint_every,
            on_step,
            passes,
            keep,
        )
        course = training.run()
    if how.pace.until > 0 and course.solved_at is None:
        reached = ", ".join(f"{name} {value:.3f}" for name, value in course.running.items())
        note(
            f"[yellow]{run.recipe.name}: not solved within {how.pace.steps} steps ({reached})[/]: raise the limit"
        )
    return course


def device_of(name: str) -> torch.device:
    """The device called `name`: cpu, cuda, cuda:1, …, or auto: cuda where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)

"""Training inside a run: the settings every stage that trains has, and the one way it is done."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tiltlm.engine import Engine, Optim
from tiltlm.experience import Experience
from tiltlm.objective import Objective
from tiltlm.progress import OnStep, note, steps
from tiltlm.rewards.masking import without_secrets
from tiltlm.run import Run
from tiltlm.seeds import Stream
from tiltlm.tracking import Track, tracker
from tiltlm.train import Course, Pace, Training, Watch


@dataclass(frozen=True)
class Fit:
    """How a stage trains."""

    optim: Optim = field(default_factory=Optim)
    pace: Pace = field(default_factory=Pace)
    batch_size: int = 64
    """Rows (graphs, completions, pairs) a step."""

    checkpoint_every: int = 200
    """Steps between checkpoints (0: only at the end)."""

    keep_every: int = 0
    """Keep the checkpoints of all multiples of so many steps (0: the last and the best alone)."""

    evaluate_every: int = 0
    """Steps between evaluations on held-out data, where the stage has any (0: none)."""

    patience: int = 0
    """End after so many evaluations without a new best (0: go on)."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or min(self.checkpoint_every, self.keep_every, self.evaluate_every) < 0:
            raise ValueError(f"batch_size must be ≥ 1, checkpoint_every, … not negative; got {self}")
        if self.patience and not self.evaluate_every:
            raise ValueError("patience counts evaluations, and there are none: set evaluate_every as well")

    def watch(self, measure: Callable[[], dict[str, float]], best: str = "", higher: bool = False) -> Watch | None:
        """`measure` made at this fit's rhythm; None where it never evaluates. Arguments as in `Watch`."""
        if not self.evaluate_every:
            return None
        return Watch(self.evaluate_every, measure, best, higher, self.patience)


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
    watch: Watch | None = None,
) -> Course:
    """Train `model` in the run's folder, with progress, from the last checkpoint if there is one.

    watch: as `how.watch(…)` makes it. Raises ValueError if `how` asks for evaluations and there is none.
    """
    if watch is None:
        refuse_evaluations(run.recipe.name, how)
    name = f"{run.recipe.name}/{run.key}"
    with steps(run.recipe.name) as show, tracker(name, run.folder, without_secrets(asdict(run.recipe))) as track:
        course = Training(
            model.to(device),
            Engine(model, how.optim),
            objective,
            experience,
            how.pace,
            stream.child(run.recipe.stage),
            run.folder,
            how.checkpoint_every,
            _both(show, track.under("train")),
            passes,
            keep,
            watch,
            how.keep_every,
            track.under("eval"),
        ).run()
    _report_unsolved(run.recipe.name, how.pace, course)
    return course


def refuse_evaluations(name: str, how: Fit) -> None:
    """Raise ValueError where a stage without held-out data is asked to evaluate on the way."""
    if how.evaluate_every:
        raise ValueError(f"{name} measures nothing while it trains: set its evaluate_every to 0")


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

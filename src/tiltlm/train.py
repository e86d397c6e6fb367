"""The one loop: experience -> objective -> update; every so often an evaluation and a checkpoint.

A checkpoint is written beside its place and renamed, so a folder called `checkpoint-N` is whole or not there;
COMPLETE is written last inside it. It holds the model (a `from_pretrained` folder), the optimizer, and the
course: where the pace and the evaluations stand. Random streams have no state: step N's randomness is a function
of N. So an interrupted run ends bit for bit where an uninterrupted one does, its logs included.

Several processes (`ranks`) walk through the loop side by side; the first one alone writes. Where each holds
a part of the model, each writes that (`parts`), and the first one makes a `from_pretrained` folder of the checkpoints that
others will read: those that are kept, and the one at the end.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from tiltlm import parts, ranks
from tiltlm.engine import Engine, Optim
from tiltlm.experience import Experience, Keeps, is_fixed
from tiltlm.jsonl import write_whole
from tiltlm.models.folders import best_checkpoint as best_checkpoint
from tiltlm.models.folders import checkpoints, state_in, step_of
from tiltlm.objective import Objective
from tiltlm.seeds import Stream
from tiltlm.stopping import Stopped, held
from tiltlm.tensors import writing

EXPERIENCE = "experience"
"""The folder in a checkpoint for what an experience keeps."""


class Saveable(Protocol):
    """A model that can write itself to a folder and read itself back."""

    def save(self, folder: Path) -> None: ...

    def restore(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Pace:
    """How long a stage trains, and the learning rate's course.

    The rate's factor rises linearly over `warmup`, then follows `decay` to `floor` at the last step. With
    `until` it stays flat instead until the stage is solved, and falls to 0 over `cool_down` steps. Reaching
    `steps` unsolved is reported, not hidden.
    """

    steps: int = 1000
    """Steps at most."""

    warmup: int = 0
    """Steps over which the learning rate rises."""

    decay: Literal["cosine", "linear", "none"] = "cosine"
    floor: float = 0.1
    """The factor that the decay ends at."""

    until: float = 0.0
    """End once every watched metric's running mean is below this (0: go on to the last step)."""

    watch: tuple[str, ...] = ()
    """The metrics that `until` looks at."""

    at_least: int = 200
    """`until` is not asked before this step."""

    smoothing: float = 0.97
    """Factor of the running means."""

    cool_down: int = 150
    """Steps from being solved to the end, the rate falling to 0."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more; got {self.steps}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative; got {self.warmup}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must lie within [0, 1]; got {self.floor}")
        if self.until > 0 and not self.watch:
            raise ValueError("a pace with `until` needs the names of the metrics to `watch`")

    def factor(self, step: int, course: Course) -> float:
        """The learning rate's factor at `step`."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.until > 0:
            left = 1.0 if course.solved_at is None else 1 - (step - course.solved_at) / (self.cool_down + 1)
            return warm * max(0.0, left)
        done = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        shape = {"none": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.decay]
        return warm * (self.floor + (1 - self.floor) * shape)

    def observe(self, step: int, metrics: dict[str, float], course: Course) -> None:
        """Take note of a step's metrics; may declare the stage solved."""
        for name in self.watch:
            if name not in metrics:
                raise ValueError(f"the pace watches {name!r}; this stage reports {', '.join(sorted(metrics))}")
            last = course.running.get(name, metrics[name])
            course.running[name] = self.smoothing * last + (1 - self.smoothing) * metrics[name]
        below = all(value < self.until for value in course.running.values())
        if self.until > 0 and course.solved_at is None and below and step + 1 >= self.at_least:
            course.solved_at = step + 1

    def over(self, step: int, course: Course) -> bool:
        """Whether `step` steps are enough."""
        solved = course.solved_at is not None and step >= course.solved_at + self.cool_down
        return step >= self.steps or solved


@dataclass
class Course:
    """Where a stage stands: running means of what its pace watches, the step at which it was solved; the step and
    value of the best evaluation so far, and how many evaluations have passed since."""

    running: dict[str, float] = field(default_factory=dict)
    solved_at: int | None = None
    best_step: int | None = None
    best_value: float | None = None
    stale: int = 0


@dataclass(frozen=True)
class Watch:
    """Evaluation during training: before the first step, after every `every` steps, and at the end.

    measure() -> numbers by name. It is called in evaluation mode, without gradients, torch's generators seeded by
    the step; it must depend on nothing but the model, or an interrupted run would not end where it should. Several
    processes call it side by side, and the first one's numbers count.
    best: the metric whose best model is kept ("" for none), the lowest value or, with `higher`, the highest.
    patience: training ends after so many evaluations in a row without a new best (0: never).
    """

    every: int
    measure: Callable[[], dict[str, float]]
    best: str = ""
    higher: bool = False
    patience: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.patience < 0:
            raise ValueError(f"every must be ≥ 1 and patience ≥ 0; got {self.every} and {self.patience}")
        if self.patience and not self.best:
            raise ValueError("patience waits for a better value of one metric: name it in `best`")

    def observe(self, step: int, numbers: dict[str, float], course: Course) -> None:
        """Take note of an evaluation's numbers.

        Raises FloatingPointError where one is not a number, ValueError where `best` is not among them.
        """
        if bad := [name for name, value in numbers.items() if math.isnan(value)]:
            raise FloatingPointError(f"evaluation at step {step}: {', '.join(bad)} is not a number (NaN)")
        if not self.best:
            return
        if self.best not in numbers:
            raise ValueError(f"the best {self.best!r} is asked for; measured were {', '.join(sorted(numbers))}")
        value, last = numbers[self.best], course.best_value
        if last is None or (value > last if self.higher else value < last):
            course.best_step, course.best_value, course.stale = step, value, 0
        else:
            course.stale += 1

    def over(self, course: Course) -> bool:
        """Whether patience has run out."""
        return 0 < self.patience <= course.stale


@dataclass
class Training:
    """One stage of training, resumable. `folder` receives metrics.jsonl, evals.jsonl and checkpoints.

    checkpoint_every: steps between checkpoints (0: only at the end). Kept are the last checkpoint, the one of the
    best evaluation, those of the steps in `keep`, and those of the multiples of `keep_every` (0: none).
    passes: optimizer steps on every batch. watch: evaluation along the way.
    on_step(step, limit, metrics): called after every step; on_evaluation(step, numbers): after every evaluation.
    """

    model: Any
    engine: Engine
    objective: Objective
    experience: Experience
    pace: Pace
    stream: Stream
    folder: Path
    checkpoint_every: int = 200
    on_step: Callable[[int, int, dict[str, float]], None] = lambda step, limit, metrics: None
    passes: int = 1
    keep: Collection[int] = ()
    watch: Watch | None = None
    keep_every: int = 0
    on_evaluation: Callable[[int, dict[str, float]], None] = lambda step, numbers: None

    def run(self) -> Course:
        """Train to the end of the pace, from the last checkpoint if there is one; returns the course taken.

        Asked to stop (`tiltlm.stopping`), it ends after the step it is in with a checkpoint, and `Stopped`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        found = ranks.from_first(lambda: checkpoints(self.folder))
        step, course = self._resume(found[-1]) if found else self._begin()
        with held() as stopped, self._log("metrics.jsonl").open("a", encoding="utf-8") as log:
            stop = ranks.any_of(stopped())
            while not self._over(step, course) and stop is None:
                metrics = self._step(step, course)
                log.write(json.dumps({"step": step, **metrics}) + "\n")
                step += 1
                self.on_step(step, self.pace.steps, metrics)
                if self.watch and (step % self.watch.every == 0 or self._over(step, course)):
                    self._evaluate(self.watch, step, course)
                if _multiple(step, self.checkpoint_every) or self._kept(step, course):
                    log.flush()
                    self._save(step, course)
                stop = ranks.any_of(stopped())
            log.flush()
            self._save(step, course)
            if stop is not None:
                raise Stopped(stop)
        self.engine.finish()
        return course

    def _log(self, name: str) -> Path:
        """Where lines are added: the first process's are kept."""
        return self.folder / name if ranks.is_first() else Path(os.devnull)

    def _over(self, step: int, course: Course) -> bool:
        return self.pace.over(step, course) or (self.watch is not None and self.watch.over(course))

    def _kept(self, step: int, course: Course) -> bool:
        """Whether the checkpoint of `step` outlives the ones after it."""
        return step in self.keep or _multiple(step, self.keep_every) or step == course.best_step

    def _evaluate(self, watch: Watch, step: int, course: Course) -> None:
        self.model.eval()
        device = self.engine.device
        with (
            self.engine.whole(),
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            self.stream.child("evaluation", step).seed_everything()
            measured = {name: float(x) for name, x in watch.measure().items()}
            numbers = ranks.from_first(lambda: measured)  # decisions follow: the same bits everywhere
        watch.observe(step, numbers, course)
        with self._log("evals.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, **numbers}) + "\n")
        self.on_evaluation(step, numbers)

    def _step(self, step: int, course: Course) -> dict[str, float]:
        self.model.eval()  # drawing and scoring happen without dropout
        with nullcontext() if is_fixed(self.experience) else self.engine.whole():
            batch = self.experience.batch(step)
        self.model.train()
        self.stream.child("dropout", step, *ranks.others()).seed_everything()
        metrics = self.engine.update(self.objective, batch, self.pace.factor(step, course), self.passes)
        if isinstance(self.experience, Keeps):
            metrics |= self.experience.numbers()
        self.pace.observe(step, metrics, course)
        return metrics

    def _save(self, step: int, course: Course) -> None:
        if ranks.from_first(lambda: (self.folder / f"checkpoint-{step}").exists()):
            return
        final, aside = self.folder / f"checkpoint-{step}", self.folder / f".checkpoint-{step}.tmp"
        if ranks.is_first():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        ranks.wait()
        with writing(final):
            self.engine.write_part(aside)
            if isinstance(self.experience, Keeps):
                self.experience.save(aside / EXPERIENCE)
        ranks.wait()
        if ranks.is_first():
            self._write(step, course, aside, final)
        ranks.wait()

    def _write(self, step: int, course: Course, aside: Path, final: Path) -> None:
        read = not self.engine.divided or self._kept(step, course) or self._over(step, course)
        with writing(final), (aside / "trainer.pt").open("wb") as file:
            if read:
                with self.engine.saving(aside):
                    self.model.save(aside)
            torch.save({"step": step, "course": asdict(course), "engine": self.engine.state()}, file)
        (aside / "COMPLETE").touch()
        aside.rename(final)
        for old in checkpoints(self.folder)[:-1]:
            if self._kept(step_of(old), course):
                (old / "trainer.pt").unlink(
                    missing_ok=True
                )  # twice a model's size, and of use in the last one alone
                for name in (EXPERIENCE, parts.FOLDER):
                    shutil.rmtree(old / name, ignore_errors=True)
            else:
                shutil.rmtree(old)

    def _begin(self) -> tuple[int, Course]:
        """A fresh start; what an earlier one left before its first checkpoint is forgotten."""
        if ranks.is_first():
            for name in ("metrics.jsonl", "evals.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
        course = Course()
        if self.watch:
            self._evaluate(self.watch, 0, course)
            if course.best_step == 0:
                self._save(0, course)
        return 0, course

    def _resume(self, checkpoint: Path) -> tuple[int, Course]:
        state = state_in(checkpoint)
        self.engine.restore(checkpoint, state["engine"])
        if isinstance(self.experience, Keeps):
            self.experience.restore(checkpoint / EXPERIENCE)
        if ranks.is_first():
            _forget_from(self.folder / "metrics.jsonl", state["step"])
            _forget_from(self.folder / "evals.jsonl", state["step"] + 1)  # the one at its own step came before it
        return state["step"], Course(**state["course"])


def fit(
    model: Any, objective: Objective, experience: Experience, *, steps: int, optim: Optim | None = None
) -> Any:
    """Train `model` in memory for `steps` at a constant rate: nothing is written, nothing resumes. Returns it."""
    engine = Engine(model, optim or Optim())
    for step in range(steps):
        model.eval()  # drawing and scoring happen without dropout
        with nullcontext() if is_fixed(experience) else engine.whole():
            batch = experience.batch(step)
        model.train()
        engine.update(objective, batch)
    return model.eval()


def keep_as_it_is(model: Saveable, folder: Path) -> None:
    """A model that needs no training, as checkpoint-0 of `folder`."""
    if checkpoints(folder) or not ranks.is_first():
        return
    aside = folder / ".checkpoint-0.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    with writing(folder / "checkpoint-0"):
        model.save(aside)
    (aside / "COMPLETE").touch()
    aside.rename(folder / "checkpoint-0")


def _multiple(step: int, of: int) -> bool:
    return of > 0 and step % of == 0


def _forget_from(path: Path, step: int) -> None:
    """Drop the lines of `step` and later, which the checkpoint does not know of (the last may be cut in half)."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            break
    write_whole(path, "".join(line + "\n" for line in kept))

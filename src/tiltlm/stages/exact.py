"""Exact draws of pi*: by rejection, or as the task makes them. Stored once, for every method of a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from tiltlm import ranks
from tiltlm.problem import Problem
from tiltlm.progress import note, steps
from tiltlm.run import Run
from tiltlm.samplers.exact_draws import confirm, marked
from tiltlm.samples import Samples
from tiltlm.settings import ADDED, at_least_one
from tiltlm.stages.task import OfTask, Task


@dataclass(frozen=True)
class ExactSettings:
    """Exact draws of pi*."""

    n: int = 2000
    """How many are stored: of one prompt; of each of several; of as many conditions, one of each."""

    stored: str = ""
    """Take the stored draws of this file (a run's exact.safetensors) instead of drawing."""

    batch_size: int = field(default=1000, metadata=ADDED)
    """Draws of the reference at once; a search counts whole batches."""

    max_tries: float = 1e7
    """Refuse if the search would take more draws of the reference than this."""

    def __post_init__(self) -> None:
        at_least_one(self, "n", "batch_size")
        if not self.max_tries >= 1:
            raise ValueError(f"max_tries must be 1 or more; got {self.max_tries}")

    def files(self) -> list[str]:
        """Files whose content decides the result."""
        return [self.stored] if self.stored else []


@dataclass(frozen=True)
class Exact(OfTask):
    """Exact draws of pi* for the test prompts, or to train on for the training prompt."""

    task: Task
    exact: ExactSettings = ExactSettings()
    purpose: Literal["measuring", "training"] = "measuring"
    """Draws to measure with, or others to train on: what a method learned from says little about it."""

    seed: int = 0
    stage: ClassVar[str] = "exact"
    shared: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        if self.exact.stored and not Path(self.exact.stored).is_file():
            raise FileNotFoundError(f"{self.exact.stored}: no such file (--exact.stored)")
        why = None if self.exact.stored else self.task.facts().no_exact_draws()
        if why:
            raise ValueError(why)

    def files(self) -> list[str]:
        return [*super().files(), *self.exact.files()]

    def draws(self) -> int:
        """How many exact draws there will be."""
        return len(Samples.load(self.exact.stored)) if self.exact.stored else self.exact.n

    def refuse_few(self, repeats: int, setting: str) -> None:
        """Raise ValueError where upper bounds want more exact draws than there will be: each wants one of its own."""
        if repeats > self.draws():
            raise ValueError(
                f"{repeats} upper bounds (--{setting}) want as many exact draws, and there are {self.draws()}: raise "
                f"--exact.n to {repeats}, or lower --{setting}"
            )

    def build(self, run: Run[Any]) -> None:
        problem = self.problem(run)
        fresh = problem.fresh
        if self.exact.stored:
            samples = self.read(problem)
        elif fresh is not None:
            samples = ranks.from_first(lambda: fresh(self.exact.n, problem.stream.child("conditions", "exact"))[1])
        else:
            samples = self.search(run, problem)
        run.save("exact.safetensors", samples)
        run.write_jsonl("samples.jsonl", problem.rows(samples.select(slice(0, 200))))

    def read(self, problem: Problem) -> Samples:
        """The draws of the file that the settings name. Raises ValueError if they are of another target or prompt."""
        samples = Samples.load(self.exact.stored)
        length, prompts = samples.tokens.shape[1], problem.prompts["test"]
        same = problem.facts.conditioned or samples.prompts.lists() == prompts.lists()
        if not same or length > problem.width or (length < problem.width and not problem.reference.eos_ids):
            raise ValueError(
                f"{self.exact.stored} holds draws of {length} tokens, the settings want {problem.width}; and its prompt is "
                f"{'the same' if same else 'another one'}"
            )
        samples = samples.to(problem.device)
        confirm(problem.target, samples, rewards=len(samples))
        return samples if samples.exact_at is not None else marked(samples, problem.beta)

    def search(self, run: Run[Any], problem: Problem) -> Samples:
        s, measuring = self.exact, self.purpose == "measuring"
        prompts = problem.prompts["test" if measuring else "train"]
        own = problem.stream.child("exact" if measuring else "training")
        with steps(self.name) as on_try:
            if len(prompts) > 1 and problem.exact is None:
                return problem.exact_draws(prompts, s.n, own, s.batch_size, max_tries=s.max_tries, on_try=on_try)
            return ranks.from_first(
                lambda: problem.exact_draws(
                    prompts,
                    s.n,
                    own,
                    s.batch_size,
                    max_tries=s.max_tries,
                    path=run.folder / "search.safetensors",
                    on_try=on_try,
                    tell=note,
                )
            )


def exact_of(run: Run[Any], name: str = "exact") -> Samples:
    """The stored exact draws of the stage `exact` among a run's inputs."""
    return Samples.load(run.inputs[name].folder / "exact.safetensors")

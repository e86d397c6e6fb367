"""What a task is to the stages: settings that say what must be built for it, and then make a `Problem`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from tiltlm.data.wording import Wording
from tiltlm.problem import Facts, Problem
from tiltlm.run import Recipe, Run


class Task:
    """A frozen dataclass in a file of its own (`tasks/`); its fields are its settings, and it knows no method.

    name   what the command line calls it, and where its runs live
    beta   the target's temperature
    """

    name: str
    beta: float
    device: str
    shows: ClassVar[tuple[str, ...]] = ()
    """The settings that people change first (dotted), for short help."""

    questions: ClassVar[bool] = False
    """Whether its prompts are questions, and its reward that an answer is right."""

    def facts(self) -> Facts:
        """What is known before anything is built."""
        raise NotImplementedError

    def needs(self, seed: int) -> dict[str, Recipe]:
        """What must be built before there is a problem, by the name that `problem` calls it."""
        return {}

    def problem(self, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
        """The problem, of the finished runs of what it `needs`."""
        raise NotImplementedError

    def stages(self, seed: int) -> dict[str, Recipe]:
        """Its own stages, by the name that the command line has for them."""
        return self.needs(seed)

    @property
    def wording(self) -> Wording:
        """How its prompts are put to a model."""
        return Wording()

    def at(self, beta: float) -> Self:
        """This task at another temperature."""
        return replace(self, beta=beta)  # type: ignore[type-var]

    def at_length(self, new_tokens: int) -> Self:
        """This task with completions of so many tokens, at most."""
        raise ValueError(f"{self.name}: its completions have the length that the task gives them")

    def untilted(self) -> Self:
        """This task with every setting that only the target depends on (reward, beta) at its default."""
        return self.at(1.0)

    def unrewarded(self) -> Self:
        """This task for work that asks for no reward: where one would have to be built, without it."""
        return self

    def files(self) -> list[str]:
        """Files that settings name and whose content decides the result."""
        return []

    def check(self) -> None:
        """Look at what the settings name before any work; raises if it is not there."""

    def files_of(self, comparison: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Further files of a comparison with these report rows: name -> what is written as JSON."""
        return {}

    def report_rows(self, run: Run[Any], problem: Problem) -> list[dict[str, Any]]:
        """Further report rows of a measurement; run: that of the stage that measures."""
        return []

    def doubts(self, runs: Mapping[str, Run[Any]]) -> list[str]:
        """What is to be said beside results that rest on these runs."""
        return []

    def title(self) -> str:
        """What stands over its tables."""
        return self.name

    def speech(self, runs: Mapping[str, Run[Any]]) -> tuple[Any, int | None, int | None]:
        """(tokenizer, length of its completions, tokens of a prompt that are read); None where there is none."""
        return None, None, None


class OfTask(Recipe):
    """A recipe about a task: frozen dataclasses with `task` and `seed` among their fields."""

    task: Any
    shared: ClassVar[bool] = False
    """Whether several processes draw and score for it, each its share; a reward that costs money the first alone asks."""

    @property
    def together(self) -> bool:
        return self.shared and not self.task.facts().paid

    @property
    def name(self) -> str:
        return f"{self.task.name}/{self.stage}"

    def inputs(self) -> dict[str, Recipe]:
        return self.needs()

    def needs(self) -> dict[str, Recipe]:
        """What the task itself needs."""
        found: dict[str, Recipe] = self.task.needs(self.seed)
        return found

    def files(self) -> list[str]:
        return list(self.task.files())

    def check(self) -> None:
        self.task.check()

    def problem(self, run: Run[Any]) -> Problem:
        """The problem, made of the finished inputs."""
        made: Problem = self.task.problem(run.inputs, self.seed)
        return made

    def speech(self, run: Run[Any]) -> tuple[Any, int | None]:
        found = self.task.speech(run.inputs)
        return found[0], found[1]

    def room(self, run: Run[Any]) -> int | None:
        """How many tokens of a prompt are read; longer ones lose their front. None: all."""
        room: int | None = self.task.speech(run.inputs)[2]
        return room

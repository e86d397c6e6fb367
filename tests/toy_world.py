"""A task small enough to run every command on: prompts that are numbers, three tokens, two steps, everything enumerable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import tyro

from tiltlm.exact import solve
from tiltlm.models.table import TableLM
from tiltlm.problem import Facts, Problem
from tiltlm.recipes.preset import Preset
from tiltlm.run import Run
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.stages.measure import RulerSettings
from tiltlm.stages.task import Task
from tiltlm.target import Target

TASKS: dict[str, str] = {"toy": "a table of three tokens", "toy-sharp": "the same, at another temperature"}
VOCAB, HORIZON = 3, 2


@dataclass(frozen=True)
class Table:
    """The reference."""

    prompts: int = 6
    """How many there are."""

    scale: float = 1.0
    """Spread of its logits."""


@dataclass(frozen=True)
class Toy(Task):
    """A table as the reference, and a table of rewards."""

    name: tyro.conf.Suppress[str] = "toy"
    beta: float = 0.5
    """Temperature: it divides the reward."""

    table: Table = Table()
    reward: str = "last"
    """last: whether the last token is 2. first: whether the first is. A URL: the same as first."""

    kind: Literal["plain", "fancy"] = "plain"
    """Of no use."""

    device: str = "cpu"
    shows: ClassVar[tuple[str, ...]] = ("beta", "table.prompts", "reward", "kind")

    def facts(self) -> Facts:
        return Facts(self.beta, "several", r_max=1.0, atoms=(0.0, 1.0), log_z=True, held_out=True, network=False)

    def problem(self, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
        own, n = stream(seed, "toy"), self.table.prompts
        reference = TableLM(n, VOCAB, HORIZON).randomise(own.child("table").generator(), self.table.scale)
        reference.requires_grad_(False)
        prompts = Tokens.of([[k] for k in range(n)])
        at = 1 if self.reward == "last" else 0

        def reward(samples: Samples) -> torch.Tensor:
            return (samples.tokens[:, at] == 2).double()

        def log_z(some: Tokens, beta: float) -> torch.Tensor:
            return solve(Target(reference, reward, beta), some, HORIZON).log_z

        return Problem(
            Target(reference, reward, self.beta), {"train": prompts, "valid": prompts, "test": prompts}, HORIZON, own,
            self.facts(), log_z=log_z, reference_name="toy",
        )  # fmt: skip

    def untilted(self) -> Toy:
        return Toy(self.name, 1.0, self.table, device=self.device)


def preset(name: str) -> Preset:
    return Preset(Toy(name, 0.5 if name == "toy" else 0.1), ruler=RulerSettings(n=50), methods=("dpo", "rloo"))


def install(monkeypatch: Any) -> None:
    """Put these tasks into the catalogue."""
    from tiltlm import recipes

    known = recipes.tasks()
    monkeypatch.setattr(recipes, "tasks", lambda: known | {n: ("toy_world", line) for n, line in TASKS.items()})

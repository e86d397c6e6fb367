"""Two hills of reward on a line, enumerated: where forward and reverse KL part ways, if the policy class is too small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tyro

from tiltlm.data.line import hills, line
from tiltlm.objective import positive
from tiltlm.problem import Facts, Problem
from tiltlm.run import Recipe, Run
from tiltlm.seeds import stream
from tiltlm.settings import SPEED
from tiltlm.stages.modes_clipped import Clipped
from tiltlm.stages.modes_solve import Solve
from tiltlm.stages.task import Task
from tiltlm.tasks.enumerated import enumerated


@dataclass(frozen=True)
class Modes(Task):
    """One token, a place on a line; r = exp(−(y + 2)²/2) + second·exp(−(y − 2)²/2)."""

    beta: float = 0.1
    """The target's temperature: smaller leans harder on the reward."""

    second: float = 0.9
    """Height of the second hill; the first is 1."""

    points: int = 121
    """Places on the line, from −6 to 6."""

    device: str = field(default="cpu", metadata=SPEED)
    name: tyro.conf.Suppress[str] = "modes"
    shows = ("beta", "second", "points")

    def __post_init__(self) -> None:
        positive(beta=self.beta, second=self.second)
        if self.points < 3:
            raise ValueError(f"a line has three points at least; got {self.points}")

    def facts(self) -> Facts:
        r_max = float(hills(self.points, self.second).max())
        return Facts(self.beta, r_max=r_max, log_z=True, network=False)

    def stages(self, seed: int) -> dict[str, Recipe]:
        return {"solve": Solve(self, seed=seed), "clipped": Clipped(self, seed=seed)}

    def problem(self, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
        higher = {"higher_hill": lambda samples: samples.tokens[:, 0] < self.points // 2}
        return enumerated(
            *line(self.points, self.second), self.facts(), stream(seed, "modes"), self.device, higher
        )

"""The two-branch tree of the Q# paper (fig. 4), enumerated: guided by E[r] one goes left, pi* goes right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tyro

from tiltlm.data.tree import ATOMS, RIGHT, tree
from tiltlm.objective import positive
from tiltlm.problem import Facts, Problem
from tiltlm.run import Recipe, Run
from tiltlm.seeds import stream
from tiltlm.settings import SPEED
from tiltlm.stages.task import Task
from tiltlm.stages.tree_solve import Solve
from tiltlm.tasks.enumerated import enumerated


@dataclass(frozen=True)
class Tree(Task):
    """Two tokens: left pays 0.1 for sure, right 1 with probability 0.05."""

    p_left: float = 0.5
    """The reference's probability of going left."""

    beta: float = 0.1
    """Divides the reward: smaller leans harder on it."""

    device: str = field(default="cpu", metadata=SPEED)
    name: tyro.conf.Suppress[str] = "tree"
    shows = ("p_left", "beta")

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        tree(self.p_left)  # refused here, before any work

    def facts(self) -> Facts:
        return Facts(self.beta, r_max=ATOMS[-1], atoms=ATOMS, log_z=True, network=False)

    def stages(self, seed: int) -> dict[str, Recipe]:
        return {"solve": Solve(called=self.name, seed=seed)}

    def problem(self, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
        checks = {"p_right": lambda samples: samples.tokens[:, 0] == RIGHT}
        return enumerated(*tree(self.p_left), self.facts(), stream(seed, "tree"), self.device, checks)

"""Reward against KL to the reference over temperatures: methods trained and measured at each, beside pi*'s own curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tiltlm.problem import Problem
from tiltlm.ruler.frontier import frontier_plot, tilted_curve
from tiltlm.run import Run
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.stages.evaluate import Evaluate
from tiltlm.stages.reporting import Row

BETAS = (1.0, 1 / 3, 0.1)
"""The temperatures of the paper's figure."""


@dataclass(frozen=True)
class Frontier(Evaluate):
    """Reward against KL to the reference over temperatures."""

    stage: ClassVar[str] = "frontier"

    def draw(self, run: Run[Any], problem: Problem, rows: list[Row], curve: list[Row]) -> None:
        best, label = self.best_curve(problem), "optimum, every beta (exact)"
        if best is None:
            best, label = self.curve_of_optimum(problem), "optimum, by importance sampling"
        points = [] if best is None else list(zip(*(x.tolist() for x in best), strict=True))
        run.write_json("optimum.json", [{"kl_to_reference": kl, "reward": reward} for kl, reward in points])
        title = f"{self.task.title()}: reward against KL to the reference"
        frontier_plot(rows, best, run.folder / "frontier.png", title, label)

    def curve_of_optimum(self, problem: Problem) -> tuple[Tensor, Tensor] | None:
        """pi*'s own frontier as far as plain draws can tell; None where every prompt or condition has another, and where
        the reward has no upper bound: nothing then tells what the draws missed."""
        most = problem.facts.r_max
        if problem.facts.measured != "one" or most is None:
            return None
        s = self.log_z
        drawn = draw_in_batches(
            problem.reference, problem.prompts["test"], n=s.draws, max_new_tokens=problem.width,
            stream=problem.stream.child("frontier"), batch_size=s.batch_size,
        )  # fmt: skip
        betas = torch.logspace(2, -2, 60) * max(self.at or (self.task.beta,))
        return tilted_curve(problem.target.reward(drawn), betas, most)

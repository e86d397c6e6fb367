"""Two twist objectives at once: alpha · first + (1 − alpha) · second, on the same draws.

The published mixtures put CTL, SIXO or soft Q beside DPG (`--ebm_combined_alpha`). Expected gradient zero where
both parts' are: with DPG as the second, at psi* up to what the first leaves free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tiltlm.method import Method
from tiltlm.models.base import Values
from tiltlm.objective import Outcome
from tiltlm.problem import Problem
from tiltlm.twists.ctl import CTL
from tiltlm.twists.dpg import DPG
from tiltlm.twists.objective import Draws, Rows, TwistMethod, TwistObjective
from tiltlm.twists.sixo import SIXO
from tiltlm.twists.soft_q import SoftQ


@dataclass(frozen=True)
class Both:
    """The rows of both objectives, the first's before the second's."""

    first: Rows
    second: Rows

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def select(self, index: Tensor | slice) -> Both:
        if isinstance(index, slice):
            index = torch.arange(len(self), device=self.first.samples.device)[index]
        n = len(self.first)
        return Both(self.first.select(index[index < n]), self.second.select(index[index >= n] - n))


@dataclass(frozen=True)
class Mixture(TwistMethod):
    """alpha · first + (1 − alpha) · second."""

    first: TwistObjective
    second: Any
    alpha: float = 0.5
    optimum: ClassVar[str] = "where both parts' expected gradients vanish"

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1; got {self.alpha}")
        if self.first.squashed or self.second.squashed:
            raise ValueError(
                "FUDGE's psi is a probability, that of other objectives is not: no mixture holds both"
            )

    def objective(self, problem: Problem) -> Mixture:
        first: Any = self.first.objective(problem)
        return replace(self, first=first, second=self.second.objective(problem))

    @property
    def induced(self) -> bool:  # type: ignore[override]
        return bool(self.first.induced)

    @property
    def backups(self) -> bool:
        return self.first.backups

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.first.needs, *self.second.needs)))

    @property
    def needs_beside_positives(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.first.needs_beside_positives, *self.second.needs_beside_positives)))

    def prepare(self, batch: Draws) -> Both:
        return Both(self.first.prepare(batch), self.second.prepare(batch))

    def weight(self, batch: Both) -> Tensor:
        """Halves, so that rows of both parts together count every prompt once."""
        return torch.cat([batch.first.share, batch.second.share]) / 2

    def loss(self, model: Values, batch: Both) -> Outcome:
        parts = []
        for objective, rows, by in (
            (self.first, batch.first, self.alpha),
            (self.second, batch.second, 1 - self.alpha),
        ):
            if len(rows):
                parts.append(by * objective.loss(model, rows).loss)
        notes = {}
        for name in set(batch.first.notes) & set(batch.second.notes):
            notes[name] = torch.cat([batch.first.notes[name], batch.second.notes[name]])
        return Outcome(torch.cat(parts), notes)


NAMES: dict[str, str] = {
    "ctl-dpg": "CTL and DPG on the same draws",
    "rl-dpg": "soft Q and DPG on the same draws",
    "sixo-dpg": "SIXO and DPG on the same draws",
}
METHODS: dict[str, Method] = {
    "ctl-dpg": Mixture(CTL(), DPG()),
    "rl-dpg": Mixture(SoftQ(), DPG()),
    "sixo-dpg": Mixture(SIXO(), DPG()),
}

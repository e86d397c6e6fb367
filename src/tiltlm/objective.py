"""What every method is to the training loop: an `Objective`, and the `Outcome` of one evaluation of it.

A method = objective × experience. The objective turns model and batch into one number per row; the loop alone
reduces, as Σ loss / Σ weight over the *global* batch, so a result depends neither on micro-batches nor on how
many processes share the work. The rows of a batch may count differently (tokens, say): `weight` says how.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


class Batch(Protocol):
    """Anything with rows: Samples, Pairs, …"""

    def __len__(self) -> int: ...

    def select(self, index: Tensor | slice) -> Any: ...


@dataclass(frozen=True)
class Outcome:
    """loss [n]: one number per row, with gradient. metrics: detached [n] each; NaN where one does not apply."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What is minimised. `optimum` says in one line where the expected gradient vanishes."""

    optimum: ClassVar[str]

    def prepare(self, batch: Any) -> Any:
        """Whole-batch quantities (baselines), computed once before the batch is cut into micro-batches."""

    def weight(self, batch: Any) -> Tensor:
        """Each row's share in the denominator, [n]."""

    def loss(self, model: Any, batch: Any) -> Outcome:
        """One number per row."""


class PerRow:
    """What most methods share: a batch is taken as it comes, and its rows count alike."""

    def prepare(self, batch: Any) -> Any:
        return batch

    def weight(self, batch: Any) -> Tensor:
        return one_per_row(batch)


@dataclass(frozen=True)
class Weighed:
    """Another objective, the loss of a row counting exp(log_w) times (of pairs, that of their chosen side).

    The denominator is the other objective's own: weights whose mean over *all* rows is 1 then mean the same in every batch,
    however it was put together.
    """

    objective: Any
    optimum: ClassVar[str] = "the other objective's, on rows that come so many times as often"

    def prepare(self, batch: Any) -> Any:
        return self.objective.prepare(batch)

    def weight(self, batch: Any) -> Tensor:
        weight: Tensor = self.objective.weight(batch)
        return weight

    def loss(self, model: Any, batch: Any) -> Outcome:
        rows = getattr(batch, "chosen", batch)
        if rows.log_w is None:
            raise ValueError("these rows have no log_w to be weighed by")
        found = self.objective.loss(model, batch)
        return Outcome(found.loss * rows.log_w.exp().to(found.loss.device), found.metrics)


def one_per_row(batch: Any) -> Tensor:
    """The weight of methods whose loss is averaged over rows: ones, [n]."""
    return torch.ones(len(batch))


def by_position(name: str, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """One metric per completion position, `name/1` for the first; NaN where a row has no such token."""
    values = torch.where(mask, values.detach(), torch.nan)
    return {f"{name}/{t + 1}": values[:, t] for t in range(values.shape[1])}


def stated(beta: float | None) -> float:
    """A temperature that could be left to the target. Raises ValueError where nobody stated it."""
    if beta is None:
        raise ValueError("this method's beta is the target's: name it, or take method.bound(beta)")
    return beta


def positive(**values: float | None) -> None:
    """Raise ValueError naming the first setting that is not a positive number (None: left to the target)."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive; got {value}")

"""How a network is trained, as settings: for how long, how fast, from which batches, and what is kept on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from tiltlm.engine import Optim
from tiltlm.settings import SPEED
from tiltlm.train import Pace, Watch


@dataclass(frozen=True)
class Fit:
    """How a method trains."""

    lr: float = 1e-4
    """Learning rate of AdamW at its highest."""

    steps: int = 1000
    """Updates at most (where `epochs` are named, these decide)."""

    epochs: float = 0.0
    """Passes over the data, a part of one allowed (0: `steps`)."""

    batch_size: int = 64
    """Rows (completions, pairs, groups) a step."""

    warmup: int = 0
    """Steps over which the learning rate rises."""

    decay: Literal["cosine", "linear", "none"] = "cosine"
    floor: float = 0.1
    """Part of the learning rate that the decay ends at."""

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of the gradient (0: never clipped)."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products inside the network."""

    micro_batch: int = field(default=0, metadata=SPEED)
    """Rows per forward pass (0: the whole batch); changes memory, not the result."""

    shard: bool = field(default=False, metadata=SPEED)
    """Each of several processes holds a part of every weight, instead of all (FSDP2); changes memory, not the result."""

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

    checkpoint_every: int = field(default=200, metadata=SPEED)
    """Steps between checkpoints, from which an interrupted training goes on (0: only at the end)."""

    checkpoints: int = 0
    """How many are kept and can be measured, evenly spread over the training (0: the last and the best alone)."""

    keep: tuple[int, ...] = ()
    """Further steps whose checkpoints stay."""

    evaluations: int = 0
    """How often held-out prompts are looked at on the way, and the best checkpoint chosen (0: never, the last is it)."""

    patience: int = 0
    """End after so many evaluations without a new best (0: go on)."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more; got {self.batch_size}")
        for name in ("checkpoint_every", "checkpoints", "evaluations", "patience", "epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        if self.patience and not self.evaluations:
            raise ValueError("patience counts evaluations, and there are none: set evaluations as well")
        _ = self.optim, self.pace  # refused here, before any work

    @property
    def optim(self) -> Optim:
        return Optim(
            self.lr, self.betas, self.weight_decay, self.clip, self.micro_batch, self.precision, self.shard
        )

    @property
    def pace(self) -> Pace:
        return Pace(
            self.steps, self.warmup, self.decay, self.floor, self.until, self.watch, self.at_least, self.smoothing,
            self.cool_down,
        )  # fmt: skip

    @property
    def keep_every(self) -> int:
        """Steps between the checkpoints that stay (0: none)."""
        return max(1, round(self.steps / self.checkpoints)) if self.checkpoints else 0

    def of(self, rows: int | None) -> Fit:
        """For so many rows of data (None: there is no end of them): epochs as steps, batches no larger than the data.

        Raises ValueError where there are none, or where epochs are asked for of endless data.
        """
        if rows is None:
            if self.epochs:
                raise ValueError(
                    "epochs count passes over fixed data, and here every batch is new: set steps instead"
                )
            return self
        if rows < 1:
            raise ValueError("there is nothing to train on: every row was left out")
        size = min(self.batch_size, rows)
        if not self.epochs:
            return replace(self, batch_size=size)
        return replace(self, batch_size=size, epochs=0.0, steps=max(1, round(self.epochs * rows / size)))

    def watching(
        self, measure: Callable[[], dict[str, float]], best: str = "", higher: bool = False
    ) -> Watch | None:
        """`measure` made as often as `evaluations` says; None where it never is. Arguments as in `Watch`."""
        if not self.evaluations:
            return None
        return Watch(max(1, round(self.steps / self.evaluations)), measure, best, higher, self.patience)

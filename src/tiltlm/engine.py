"""The engine turns an objective's numbers into an update of a model. Loop and methods speak to it alone.

The denominator of a step is the sum of weights over the *whole* batch, known before the first forward pass, so the
micro-batches of one process, and those of several (`ranks`), add up to the gradient of the batch in one piece. Every
process holds the whole batch, prepared as a whole, and computes the loss of its own share of the rows; gradients are
summed, and metrics are those of all rows. With `shard` each holds a part of the weights, too (`sharded`).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltlm import parts, ranks
from tiltlm.models.body import recomputes
from tiltlm.models.precision import Precision, autocast, wide_attention
from tiltlm.models.scattered import bring_trained, is_wanted
from tiltlm.models.weights import part_of
from tiltlm.objective import Objective
from tiltlm.progress import note
from tiltlm.sharded import Shards, all_of, why_not


@dataclass(frozen=True)
class Optim:
    """AdamW, gradient clipping and micro-batches."""

    lr: float = 1e-4
    """Learning rate at its highest; the pace says what becomes of it."""

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    """On tensors of two or more dimensions only."""

    clip: float = 1.0
    """Largest norm of the gradient (0: never clipped)."""

    micro_batch: int = 0
    """Rows per forward pass (0: the whole batch); changes memory, not the result."""

    precision: Precision = "float32"
    """Of the matrix products inside the network; weights, log-probabilities, losses and sums are float32."""

    shard: bool = False
    """Several processes hold a part of every weight each (`sharded`); with one it does nothing."""

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16; got {self.precision!r}")
        if not self.lr > 0 or self.weight_decay < 0 or self.clip < 0 or self.micro_batch < 0:
            raise ValueError(f"lr must be positive; weight_decay, clip, micro_batch not negative; got {self}")


class Engine:
    """A model in training: its optimizer, and one `update` per step."""

    def __init__(self, model: nn.Module, optim: Optim) -> None:
        self.model, self.optim = model, optim
        ranks.same_as_first([p for p in model.parameters() if p.requires_grad])
        self.shards = Shards(model) if self._divides() else None
        bring_trained(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("nothing to train: every parameter of the model is frozen")
        matrices = [p for p in self.parameters if p.ndim >= 2]
        others = [p for p in self.parameters if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": optim.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, fused=True
        )

    def _divides(self) -> bool:
        """Whether processes are to hold a part of the model each; where all networks are to be in parts, of what can be."""
        if ranks.size() == 1 or self.optim.shard:
            return ranks.size() > 1
        if not is_wanted():
            return False
        if reason := why_not(self.model):
            note(f"--shard: every process trains the whole model: {reason}")
        return not reason

    @property
    def device(self) -> torch.device:
        """Where the trained parameters live."""
        return self.parameters[0].device

    def update(
        self, objective: Objective, batch: Any, lr_factor: float = 1.0, passes: int = 1
    ) -> dict[str, float]:
        """One optimizer step on Σ loss / Σ weight over `batch`; returns the step's metrics, averaged over rows.

        passes: optimizer steps on the same prepared batch (PPO); the last one's metrics are returned.
        Raises FloatingPointError, before any weight is touched, if loss or gradient is not finite.
        """
        batch = objective.prepare(batch)
        for _ in range(passes):
            metrics = self._pass(objective, batch, lr_factor)
        return metrics

    def _pass(self, objective: Objective, batch: Any, lr_factor: float) -> dict[str, float]:
        total = self.total(objective.weight(batch))
        self.optimizer.zero_grad(set_to_none=True)
        with wide_attention(self.model, self.device, self.optim.precision):
            own = [self._accumulate(objective, batch, part, total) for part in self._micro(len(batch))]
            if self.shards is not None:
                self._keep_step(objective, batch, len(own))
        found = self._everyones(own, total)
        if self.shards is None:
            ranks.sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.optim.clip or math.inf)
        norm = norm if self.shards is None else all_of(norm)
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(
                f"the gradient's norm is {norm.item()}: nothing was updated; lower lr or check the data"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.optim.lr * lr_factor
        self.optimizer.step()
        metrics = {name: _mean([each[name] for each in found]) for name in found[0]}
        loss = sum(each["loss"].sum().item() for each in found) / total
        return metrics | {"loss": loss, "grad_norm": norm.item(), "lr": self.optim.lr * lr_factor}

    def total(self, weight: Tensor) -> float:
        """The denominator: the weight of the whole global batch."""
        total = float(weight.sum())
        if not total > 0:
            raise ValueError("this batch weighs nothing: every row is empty")
        return total

    def _micro(self, size: int) -> list[slice]:
        """This process's share of the rows, a micro-batch at a time."""
        first, end = ranks.share(size)
        step = self.optim.micro_batch or max(1, end - first)
        return [slice(begin, min(begin + step, end)) for begin in range(first, end, step)]

    def _everyones(self, own: list[dict[str, Tensor]], total: float) -> list[dict[str, Tensor]]:
        """The metrics of every process's rows, in the order of the batch."""
        found = ranks.gathered([(total, own)])
        if len({each for each, _ in found}) > 1:
            raise ValueError(
                f"the processes hold different batches: they weigh {', '.join(str(t) for t, _ in found)}"
            )
        return [each for _, its in found for each in its]

    def _accumulate(self, objective: Objective, batch: Any, part: slice, total: float) -> dict[str, Tensor]:
        with self._autocast():
            outcome = objective.loss(self.model, batch.select(part))
        if not bool(torch.isfinite(outcome.loss).all()):
            row = int((~torch.isfinite(outcome.loss)).nonzero()[0])
            value = outcome.loss[row].item()
            raise FloatingPointError(f"the loss of row {part.start + row} is {value}: nothing was updated")
        share = 1 if self.shards is None else ranks.size()  # shards come back averaged over processes
        (share * outcome.loss.sum() / total).backward()
        return {**outcome.metrics, "loss": outcome.loss.detach()}

    def _autocast(self) -> AbstractContextManager[Any]:
        """Layers that are computed again round their weights again: a copy of every weight would wait for nobody."""
        return autocast(self.device, self.optim.precision, keeps=not recomputes(self.model))

    def _keep_step(self, objective: Objective, batch: Any, done: int) -> None:
        """Run the network as often as the process with the most micro-batches does, on a row that counts nothing.

        How often that is follows from the batch's size: to ask the others would be to wait for those that need this one's
        weights now.
        """
        largest = -(-len(batch) // ranks.size())
        for _ in range(done, -(-largest // (self.optim.micro_batch or largest))):
            with self._autocast():
                loss = objective.loss(self.model, batch.select(slice(0, 1))).loss
            (0.0 * loss.sum()).backward()

    def whole(self) -> AbstractContextManager[None]:
        """Within, this process holds all weights: to draw and to score."""
        return nullcontext() if self.shards is None else self.shards.whole()

    def finish(self) -> None:
        """The model is trained: from now on it is drawn from and scored."""
        self.model.eval()
        if self.shards is not None:
            self.shards.open()

    @property
    def divided(self) -> bool:
        """Whether each of several processes holds a part of the model: a checkpoint then has its `parts`."""
        return self.shards is not None

    def write_part(self, folder: Path) -> None:
        """Write this process's part of weights and optimizer, as all others do; nothing where the model is not divided."""
        if self.divided:
            parts.write(folder, self.model, self.optimizer)

    def saving(self, folder: Path) -> AbstractContextManager[None]:
        """Within, one process may save the model as a whole: one that is divided from the parts in `folder`."""
        return parts.saving(folder, self.model) if self.divided else nullcontext()

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Take weights and optimizer from a checkpoint, of any number of processes; state: as `state` gave it there."""
        if parts.are_in(folder):
            parts.read(folder, self.model, self.optimizer)
            return
        model: Any = self.model
        model.restore(folder)
        self.load_state(state)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the model's own folder; empty where its parts have it."""
        return {} if self.divided else self.optimizer.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what `state` gave for the whole model; of that, where it is divided, this process's part."""
        numbered = [p for group in self.optimizer.param_groups for p in group["params"]]
        own = {
            k: {name: x if x.ndim == 0 else part_of(x, numbered[k]) for name, x in one.items()}
            for k, one in state["state"].items()
        }
        self.optimizer.load_state_dict(state | {"state": own})


def _mean(values: list[Tensor]) -> float:
    return torch.cat([each.float() for each in values]).nanmean().item()

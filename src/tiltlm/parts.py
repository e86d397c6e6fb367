"""Checkpoints in parts (torch.distributed.checkpoint): every process writes what it holds of weights and optimizer.

They are read by any number of processes, in parts or not, each its own: nothing is brought together. Their names are
`weight/NAME` of every trained parameter, and of AdamW's numbers `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltlm import ranks
from tiltlm.models.weights import in_parts, weights_from

FOLDER = "parts"
"""The folder in a checkpoint."""


def are_in(checkpoint: Path) -> bool:
    """Whether a checkpoint holds parts."""
    return (checkpoint / FOLDER).is_dir()


def write(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write this process's part, as all others do at the same time. Raises OSError where one cannot."""
    names = _names(model)
    tensors = {f"weight/{name}": p.detach() for p, name in names.items()}
    for p, numbers in () if optimizer is None else optimizer.state.items():
        tensors |= {f"{kind}/{names[p]}": x for kind, x in numbers.items()}
    with _library() as dcp:
        dcp.save(tensors, checkpoint_id=checkpoint / FOLDER, process_group=ranks.ready())


def read(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take from a checkpoint what this process holds, bit by bit. Raises ValueError where it is of another model."""
    tensors = {f"weight/{name}": p.detach() for p, name in _names(model).items()}
    optimizer.state.clear()
    with _library() as dcp:
        there = dcp.FileSystemReader(checkpoint / FOLDER).read_metadata().state_dict_metadata
        for p, name in _names(model).items():
            found = {
                kind: _room(p, kind) for kind in ("step", "exp_avg", "exp_avg_sq") if f"{kind}/{name}" in there
            }
            tensors |= {f"{kind}/{name}": x for kind, x in found.items()}
            if found:
                optimizer.state[p] = found
        if other := sorted(tensors.keys() ^ there.keys()):
            raise ValueError(f"{checkpoint / FOLDER} is of another model: {other[0]} is in one of them alone")
        dcp.load(tensors, checkpoint_id=checkpoint / FOLDER, no_dist=True)


def saving(checkpoint: Path, model: nn.Module) -> AbstractContextManager[None]:
    """Within, one process may write the model as a whole: what it does not hold it reads from the parts in a checkpoint."""
    names = _names(model)

    def found(some: Sequence[Tensor]) -> list[Tensor]:
        divided = [x for x in some if in_parts(x)]
        parts: dict[str, Any] = {f"weight/{names[x]}": torch.empty(x.shape, dtype=x.dtype) for x in divided}
        with _library() as dcp:
            dcp.load(parts, checkpoint_id=checkpoint / FOLDER, no_dist=True)
        return [parts[f"weight/{names[x]}"] if in_parts(x) else x.detach().cpu() for x in some]

    return weights_from(found)


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {p: name for name, p in model.named_parameters() if p.requires_grad}


def _room(p: Tensor, kind: str) -> Tensor:
    """Where one of AdamW's numbers of a parameter is read to."""
    if kind == "step":
        return torch.zeros((), device=p.device)
    return torch.zeros_like(p.detach())


@contextmanager
def _library() -> Iterator[Any]:
    """torch.distributed.checkpoint; what one process meets, all raise."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield dcp
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error

"""Weights on their way to and from a folder for `from_pretrained`, of models that processes hold in parts too (`sharded`).

Such a model is written by one process alone, from what all of them have written before: a file's worth at a time. It is
read by the first process, and every process takes its part, tensor by tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tiltlm import ranks
from tiltlm.models.scattered import scattered_in, together
from tiltlm.models.scattering import refill
from tiltlm.tensors import save_tensors

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FILE = 2 * 10**9
"""Bytes of weights in one file, and in memory at once, where they are written from parts."""

Source = Callable[[Sequence[Tensor]], list[Tensor]]
"""Parameters and buffers of a model in parts -> what they hold as a whole, on the CPU."""

_source: ContextVar[Source | None] = ContextVar("source", default=None)


@contextmanager
def weights_from(source: Source) -> Iterator[None]:
    """Within, what is written here comes from `source`, whatever this process holds of it."""
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)


# ---- to a folder -------------------------------------------------------------------------------------------


def save_pretrained(model: PreTrainedModel | PeftModel, folder: str | Path) -> None:
    """`model.save_pretrained(folder)`; of a model in parts, weights under the names of its modules, in files of `FILE`
    bytes."""
    source = _source.get()
    with together(model):
        if source is None:
            model.save_pretrained(str(folder))
        elif hasattr(model, "peft_config"):  # adapters are small
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            model.save_pretrained(str(folder), state_dict=_whole(trained, source))
        else:
            model.save_pretrained(str(folder), state_dict={})  # all but the weights
            _save_in_files(model, Path(folder), source)


def save_state(module: nn.Module, path: Path) -> None:
    """The state of a small module, a head, as one safetensors file."""
    source = _source.get()
    save_tensors(module.state_dict() if source is None else _whole(_named(module), source), path)


def _save_in_files(model: nn.Module, folder: Path, source: Source) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    tensors = _named(model)
    sizes = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in tensors.items()}
    files = split_torch_state_dict_into_shards(sizes, max_shard_size=FILE)
    for file, names in files.filename_to_tensors.items():
        save_file(_whole({name: tensors[name] for name in names}, source), folder / file, {"format": "pt"})
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _named(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, those of several names by the first, and the buffers that belong to a state. (`state_dict` would divide
    again what FSDP has just brought together.)"""
    apart = {
        f"{path}.{name}".lstrip(".")
        for path, each in module.named_modules()
        for name in each._non_persistent_buffers_set
    }
    buffers = {name: x for name, x in module.named_buffers() if name not in apart}
    return {**dict(module.named_parameters()), **buffers}


def _whole(tensors: Mapping[str, Tensor], source: Source) -> dict[str, Tensor]:
    return dict(zip(tensors, source(list(tensors.values())), strict=True))


# ---- from a folder -----------------------------------------------------------------------------------------


def load_state(module: nn.Module, read: Callable[[], Mapping[str, Tensor]]) -> None:
    """Put the state that is read into a module; where it is in parts, the first process alone reads."""
    if scattered_in(module):
        refill(module, read() if ranks.is_first() else None)
        return
    own = module.state_dict()
    if not any(in_parts(x) for x in own.values()):
        module.load_state_dict(read())
        return
    values = read() if ranks.is_first() else None
    ranks.wait()  # as long as that takes: sums and copies of tensors wait for `LOST` alone
    put(own, values)
    ranks.same_as_first([x for x in own.values() if not in_parts(x)])


@torch.no_grad()
def put(own: Mapping[str, Tensor], values: Mapping[str, Tensor] | None) -> None:
    """Copy values, in whole, into tensors of the same names; where each process holds a part of one, the first process's
    values are divided, and the others may have None."""
    for name, x in own.items():
        value = torch.empty(x.shape, dtype=x.dtype) if values is None else values[name]
        x.copy_(part_of(value, x))


def in_parts(x: Tensor) -> bool:
    """Whether this process holds a part of a tensor."""
    return hasattr(x, "full_tensor")


def is_divided(module: Any) -> bool:
    """Whether processes hold a module in parts, even while each has it in whole."""
    return hasattr(module, "set_reshard_after_forward")


def part_of(value: Tensor, like: Any) -> Tensor:
    """This process's part of a whole `value`, the first process's, divided as `like` is."""
    value = value.to(device=like.device, dtype=like.dtype)
    if not in_parts(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)

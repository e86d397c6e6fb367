"""FSDP2 (torch's `fully_shard`): every process holds a part of each weight, its gradient and its AdamW moments.

A layer's weights are brought together when it computes, and let go again; embedding and output head make a part with
what stands outside the layers, brought together by `log_prob`, the one call that losses make. All processes must
come to these in the same order, so a loss runs the network once for a batch, whatever its rows (prompts that several
rows answer are not run apart), and every process runs as many micro-batches as the others.

Drawing and scoring, whose number of calls depends on the rows, happen while every process holds all weights (`whole`).
Checkpoints are those of one process: the first gathers the weights in a copy on its CPU that writes and reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tiltlm import ranks
from tiltlm.models.body import body_of, trust_of
from tiltlm.models.causal import CausalLM
from tiltlm.samples import Samples, Tokens


class Shards:
    """A model of which every process holds a part. Raises ValueError for a model of which that cannot be had."""

    def __init__(self, model: nn.Module) -> None:
        if reason := why_not(model):
            raise ValueError(f"--fit.shard: {reason}; leave it off, and every process holds the whole model")
        assert isinstance(model, CausalLM)
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        ranks.ready()
        self.model: Any = model
        self.copy = copy.deepcopy(model).to("cpu") if ranks.is_first() else None
        layers = layers_of(model)
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
        register_fsdp_forward_method(model, "log_prob")
        vars(model.model)["tiltlm_trust"] = replace(trust_of(model.model), sharing=False)
        self.parts: list[FSDPModule] = [part for part in (*layers, model) if isinstance(part, FSDPModule)]
        one = Tokens.of([[0]], model.device)
        with torch.no_grad(), self.whole():  # the outermost part must be the first to run
            model.log_prob(Samples(one, torch.zeros(1, dtype=torch.int64, device=model.device), one.ids, one.mask))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, every process holds all weights, and may run the network as often as it likes."""
        for part in self.parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in self.parts:
                part.reshard()
                part.set_reshard_after_forward(part is not self.model, recurse=False)

    def gathered(self) -> CausalLM | None:
        """A copy with all weights, on the first process's CPU; the others get None."""
        own = self.copy.state_dict() if self.copy is not None else {}
        for name, weight in self.model.state_dict().items():
            value = all_of(weight)
            if self.copy is not None:
                own[name].copy_(value)
        return self.copy

    @torch.no_grad()
    def scatter(self) -> None:
        """Give every process its part of the weights that the first one's copy has."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        own = self.copy.state_dict() if self.copy is not None else {}
        for name, weight in self.model.state_dict().items():
            assert isinstance(weight, DTensor)
            value = (
                own[name].to(weight.device)
                if own
                else torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            )
            weight.copy_(distribute_tensor(value, weight.device_mesh, weight.placements))


def why_not(model: nn.Module) -> str:
    """Why a model cannot be held in parts; empty if it can."""
    if not isinstance(model, CausalLM):
        return f"only whole language models are held in parts so far, and this is a {type(model).__name__}"
    if not trust_of(model.model).padding:
        return (
            "rows of this network are run by length, as often as there are lengths, which differ between processes"
        )
    return "" if layers_of(model) else "no list of layers is found in this network"


def layers_of(model: CausalLM) -> list[nn.Module]:
    """The layers of a network's body: its longest list of modules."""
    lists = [found for found in body_of(model.model).modules() if isinstance(found, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def all_of(x: Tensor) -> Tensor:
    """A tensor of which every process holds a part, as a whole on each; other tensors as they are."""
    from torch.distributed.tensor import DTensor

    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state as one process would have it."""
    found = {k: {name: all_of(x) for name, x in one.items()} for k, one in state["state"].items()}
    return state | {"state": found}


def own_state(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """Of an optimizer's state in whole, every process's part; parameters: in the order that the optimizer numbers them."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    def part(x: Tensor, like: nn.Parameter) -> Tensor:
        if x.ndim == 0:  # the step
            return x
        assert isinstance(like, DTensor)
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)

    found = {k: {n: part(x, parameters[k]) for n, x in one.items()} for k, one in state["state"].items()}
    return state | {"state": found}

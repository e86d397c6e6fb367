"""Networks whose layers no process holds: each has a slice of every layer, and a layer is whole while it computes.

With `--shard`, what is loaded (`hub.network`) is scattered: the first process reads it into its machine's memory; the
others, which make the network on torch's `meta` device, get their slices of it, layer by layer (`scattering`). What stands
outside the layers (embedding, output head, norms) every process has. A process runs such a network in its turn (`turns`),
so it is drawn from, scored and copied as any other is; only gradients do not come to its layers. What is to be trained is
brought together layer by layer, and divided anew (`sharded`).

Every number is that of the whole network, bit by bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tiltlm import ranks, turns
from tiltlm.models.body import SCATTERED, body_of

_wanted: ContextVar[bool] = ContextVar("scattered", default=False)


@contextmanager
def in_parts(yes: bool = True) -> Iterator[None]:
    """Within, processes that work together hold a part each of whatever they load and train (`--shard`)."""
    token = _wanted.set(yes)
    try:
        yield
    finally:
        _wanted.reset(token)


def is_said() -> bool:
    """Whether `--shard` was said, for however many processes."""
    return _wanted.get()


def is_wanted() -> bool:
    """Whether there are several processes here that are to hold parts."""
    return is_said() and ranks.size() > 1


# ---- at rest and at work -----------------------------------------------------------------------------------


class Layer:
    """One layer of a scattered network: this process's slice of all its parameters, laid end to end, for every dtype."""

    def __init__(self, parameters: Sequence[nn.Parameter], shapes: Sequence[torch.Size]) -> None:
        """parameters: those of the layer that are scattered, at rest; shapes: what they have at work."""
        self.parameters, self.shapes = list(parameters), list(shapes)
        self.processes, self.is_whole = ranks.size(), False
        self.slices: dict[torch.dtype, Tensor] = {}

    @torch.no_grad()
    def fill(self, values: Sequence[Tensor] | None) -> None:
        """Share out what the parameters are on the first process; the others have None."""
        for dtype in dict.fromkeys(p.dtype for p in self.parameters):
            device, flat = self.parameters[0].device, None
            if values is not None:
                flat = torch.cat([x.flatten() for x in values if x.dtype == dtype]).to(device)
            self.slices[dtype] = _slice_of(flat, self._numbers(dtype), dtype, device)

    def gather(self) -> None:
        """Bring the layer together, as all processes do at the same time."""
        for dtype, own in self.slices.items():
            flat = own.new_empty(len(own) * self.processes)
            with ranks.connected() as (dist, _):
                dist.all_gather_single(flat, own)
            begin = 0
            for p, shape in self._of(dtype):
                p.data = flat[begin : begin + shape.numel()].view(shape)
                begin += shape.numel()

    def rest(self) -> None:
        """Let go of what other processes have."""
        for p in self.parameters:
            p.data = self.slices[p.dtype].new_empty(0)

    def bring(self) -> None:
        """Bring the layer together for good, on every process."""
        if not self.is_whole:
            self.gather()
            self.is_whole, self.slices, self.parameters, self.shapes = True, {}, [], []

    def _of(self, dtype: torch.dtype) -> list[tuple[nn.Parameter, torch.Size]]:
        return [(p, shape) for p, shape in zip(self.parameters, self.shapes, strict=True) if p.dtype == dtype]

    def _numbers(self, dtype: torch.dtype) -> int:
        return sum(shape.numel() for _, shape in self._of(dtype))


class Scattered:
    """The layers of a network. All processes make the same ones, in the same order.

    The network's hooks know it, and it knows no module: so its slices go when the network does, and wait for no collector.
    """

    def __init__(
        self, network: Any, layers: Sequence[tuple[nn.Module, list[nn.Parameter], list[torch.Size]]]
    ) -> None:
        """layers: with their parameters that are scattered, at rest, and these ones' shapes."""
        self.processes, self.is_held, self.ran = ranks.size(), False, 0
        self.layers = [Layer(parameters, shapes) for _, parameters, shapes in layers]
        for k, (module, _, _) in enumerate(layers):
            module.register_forward_pre_hook(partial(self._before, k), prepend=True)
            module.register_forward_hook(partial(self._behind, k), always_call=True)
        body_of(network).register_forward_hook(self._after)
        self.number = turns.join(self.lend)
        vars(network)[SCATTERED] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Scattered:
        """A copy of the network is another one, with turns of its own: all processes make it."""
        if ranks.size() != self.processes:
            raise RuntimeError("a network in parts is copied by all processes together, not by one alone")
        new = object.__new__(Scattered)
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(vars(self), memo))
        new.number = turns.join(new.lend)
        return new

    @property
    def resting(self) -> bool:
        """Whether layers are at rest while they do not compute."""
        return not self.is_held and not all(layer.is_whole for layer in self.layers)

    def lend(self) -> None:
        """Bring this process's slices to another one's run."""
        for layer in self.layers:
            layer.gather()
            layer.rest()

    def begin(self, place: int) -> bool:
        """A layer is about to compute; whether it has to be gathered. Raises RuntimeError where it is not next: the others
        lend layers in their order."""
        if not self.resting:
            return False
        due = self.ran % len(self.layers)
        if place != due:
            raise RuntimeError(f"layer {place} of this network runs where layer {due} should: leave out --shard")
        if place == 0:
            turns.take(self.number)
        self.ran = place + 1
        return True

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, this process holds the whole network, to write it, say; the others lend it their slices once."""
        if not self.resting:
            yield
            return
        turns.take(self.number)
        for layer in self.layers:
            layer.gather()
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
            for layer in self.layers:
                layer.rest()

    def _before(self, place: int, module: nn.Module, inputs: Any) -> None:
        if self.begin(place):
            self.layers[place].gather()

    def _behind(self, place: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.resting:
            self.layers[place].rest()

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.resting and self.ran != len(self.layers):
            raise RuntimeError(
                f"{self.ran} of this network's {len(self.layers)} layers have run: leave out --shard"
            )


def scattered_in(module: nn.Module) -> list[Scattered]:
    """The networks in a module that are scattered."""
    found = [vars(each).get(SCATTERED) for each in module.modules()]
    return [each for each in found if each is not None and each.resting]


def layers_in(network: Any) -> list[Layer]:
    """A network's layers that are scattered."""
    found: Scattered | None = vars(network).get(SCATTERED)
    return [] if found is None else found.layers


@contextmanager
def together(module: nn.Module) -> Iterator[None]:
    """Within, this process holds every network in a module as a whole."""
    with ExitStack() as stack:
        for each in scattered_in(module):
            stack.enter_context(each.together())
        yield


@contextmanager
def shaped(module: nn.Module) -> Iterator[None]:
    """Within, weights at rest have the shapes that they have at work, and no numbers."""
    layers = [layer for each in scattered_in(module) for layer in each.layers]
    for layer in layers:
        for p, shape in zip(layer.parameters, layer.shapes, strict=True):
            p.data = p.data.new_zeros(1).expand(shape)
    try:
        yield
    finally:
        for layer in layers:
            layer.rest()


def bring_trained(module: nn.Module) -> None:
    """Bring the networks in a module of which something is trained together for good, on every process."""
    for each in module.modules():
        if any(p.requires_grad for p in each.parameters()):
            for layer in layers_in(each):
                layer.bring()


def _slice_of(flat: Tensor | None, numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """This process's slice of so many numbers, which the first process has."""
    size = -(-numbers // ranks.size())
    own, slices = torch.empty(size, dtype=dtype, device=device), None
    if flat is not None:
        slices = list(torch.cat([flat, flat.new_zeros(size * ranks.size() - numbers)]).split(size))
    ranks.meet()
    with ranks.connected() as (dist, _):
        dist.scatter(own, slices, src=0)
    return own

"""Networks whose layers no process holds: each has a slice of every layer, and a layer is whole while it computes.

With `--shard`, what is loaded (`hub.network`) is scattered: the first process reads it into its machine's memory; the
others, which make the network on torch's `meta` device, get their slices of it, layer by layer. What stands outside the
layers (embedding, output head, norms) every process has. A process runs such a network in its turn (`turns`), so it is
drawn from, scored and copied as any other is; only gradients do not come to its layers. What is to be trained is brought
together layer by layer, and divided anew (`sharded`).

Every number is that of the whole network, bit by bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tiltlm import ranks, turns
from tiltlm.models.body import SCATTERED, body_of, layers_of, trust_of

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


# ---- from the first process to all -------------------------------------------------------------------------


def load(
    read: Callable[[], tuple[Any, Any]], device: torch.device | str, examine: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """The network that the first process reads, scattered, on `device`, and what it read beside it (a picklable value).

    examine: what is asked of the network while it is whole. Raises ValueError where the others do not make the same network
    of its configuration.
    """
    whole: list[Any] = []

    def described() -> Any:
        network, beside = read()
        examine(network)
        whole.append(network)
        about = type(network), network.config, network.generation_config if network.can_generate() else None
        return (
            *about,
            network.dtype,
            network.name_or_path,
            vars(network).get("tiltlm_trust"),
            _plan(network),
            beside,
        )

    kind, config, generation, dtype, name, trust, plan, beside = ranks.from_first(described)
    network = whole[0] if whole else _empty(kind, config, dtype)
    if (own := _plan(network)) != plan:
        odd = next(a for a, b in zip([*own, None], [*plan, None], strict=False) if a != b)
        raise ValueError(f"{name}: process {ranks.number()} makes another network of its configuration ({odd})")
    network.name_or_path = name
    if generation is not None:
        network.generation_config = generation
    if trust is not None:
        vars(network)["tiltlm_trust"] = trust
    scatter(network, device)
    return network, beside


def _empty(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """A network without numbers."""
    with torch.device("meta"):
        return kind._from_config(config, dtype=dtype).eval()


def _plan(network: nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """The tensors of a network, those of several names by the first."""
    return [(name, tuple(x.shape), x.dtype) for name, x in _tensors(network).items()]


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and tensors that are neither, once each."""
    found, seen = dict[str, Tensor](), set[int]()
    for path, module in network.named_modules():
        for store in _stores(module):
            for name, x in store.items():
                if isinstance(x, Tensor) and id(x) not in seen:
                    seen.add(id(x))
                    found[f"{path}.{name}"] = x
    return found


def _stores(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, vars(module)


@torch.no_grad()
def scatter(network: Any, device: torch.device | str) -> None:
    """Share out a network that the first process has in whole, and the others on `meta`; every tensor is then on `device`.

    Where rows cannot be padded, how often a network runs depends on them, and all of it goes to every process.
    """
    layers = layers_of(network) if trust_of(network).padding else []
    within = [_only_in(layer, network) for layer in layers]
    apart = {id(p) for some in within for p in some}
    _put(network, {id(x): _everywhere(x, device) for x in _tensors(network).values() if id(x) not in apart})
    if not layers:
        return
    rests = [
        [nn.Parameter(torch.empty(0, dtype=p.dtype, device=device), p.requires_grad) for p in some]
        for some in within
    ]
    shapes = [[p.shape for p in some] for some in within]
    found = Scattered(network, list(zip(layers, rests, shapes, strict=True)))
    for layer, module, rest in zip(found.layers, layers, rests, strict=True):
        some = within.pop(0)  # the first process forgets its layers one by one
        layer.fill([p.detach() for p in some] if ranks.is_first() else None)
        _put(module, {id(p): q for p, q in zip(some, rest, strict=True)})


def refill(module: nn.Module, values: Mapping[str, Tensor] | None) -> None:
    """Put other numbers into a module that is scattered: what its state holds on the first process; the others have None.

    Raises RuntimeError where they do not fit.
    """
    own = module.state_dict(keep_vars=True)
    names = {id(x): name for name, x in own.items()}
    layers = [layer for each in scattered_in(module) for layer in each.layers]
    shapes = {
        names[id(p)]: shape for layer in layers for p, shape in zip(layer.parameters, layer.shapes, strict=True)
    }
    if values is not None:
        wrong = [n for n, x in own.items() if n not in values or values[n].shape != shapes.get(n, x.shape)]
        if wrong:
            raise RuntimeError(
                f"{wrong[0]} is missing, or has another shape than {tuple(shapes.get(wrong[0], ()))}"
            )
    for layer in layers:
        of_layer = [names[id(p)] for p in layer.parameters]
        layer.fill(
            None
            if values is None
            else [values[n].to(p.dtype) for n, p in zip(of_layer, layer.parameters, strict=True)]
        )
    with torch.no_grad():
        for name, x in own.items():
            if name not in shapes:
                if values is not None:
                    x.copy_(values[name])
                ranks.same_as_first([x])


def _only_in(layer: nn.Module, network: nn.Module) -> list[nn.Parameter]:
    """The parameters of a layer that nothing else has."""
    inside = {id(module) for module in layer.modules()}
    elsewhere = {id(p) for m in network.modules() if id(m) not in inside for p in m._parameters.values()}
    return [p for p in layer.parameters() if id(p) not in elsewhere]


def _everywhere(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the first process, whole on every one."""
    value = x.detach().to(device, copy=True) if ranks.is_first() else torch.empty_like(x, device=device)
    ranks.same_as_first([value])
    return nn.Parameter(value, x.requires_grad) if isinstance(x, nn.Parameter) else value


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


def _put(module: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Put tensors in the place of others, wherever these stand."""
    for each in module.modules():
        for store in _stores(each):
            store.update({name: new[id(x)] for name, x in store.items() if isinstance(x, Tensor) and id(x) in new})

"""Networks on their way into slices: from the first process, which has them whole, to all (`scattered`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tiltlm import ranks
from tiltlm.models.body import layers_of, trust_of
from tiltlm.models.scattered import Scattered, scattered_in


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
    at_rest = {
        names[id(p)]: shape for layer in layers for p, shape in zip(layer.parameters, layer.shapes, strict=True)
    }
    shapes = {name: at_rest.get(name, x.shape) for name, x in own.items()}
    for name, shape in shapes.items():
        if values is not None and (name not in values or values[name].shape != shape):
            raise RuntimeError(f"{name} is missing, or has another shape than {tuple(shape)}")
    for layer in layers:
        of_layer = [names[id(p)] for p in layer.parameters]
        layer.fill(
            None
            if values is None
            else [values[n].to(p.dtype) for n, p in zip(of_layer, layer.parameters, strict=True)]
        )
    with torch.no_grad():
        for name, x in own.items():
            if name not in at_rest:
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


def _put(module: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Put tensors in the place of others, wherever these stand."""
    for each in module.modules():
        for store in _stores(each):
            store.update({name: new[id(x)] for name, x in store.items() if isinstance(x, Tensor) and id(x) in new})

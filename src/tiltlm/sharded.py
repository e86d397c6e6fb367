"""FSDP2 (torch's `fully_shard`): every process holds a part of each weight, its gradient and its AdamW moments.

What is divided are transformers networks and the heads on them: a policy, a value or twist on a body of its own, PPO's
policy and critic (two networks), a reward model. A layer's weights are brought together when it computes, and let go
again; what stands outside the layers makes a part with the head, brought together by the calls that losses make
(`ENTRIES`). All processes must come to these in the same order, so a loss runs the network once for a batch, whatever its
rows (prompts that several rows answer are not run apart), and every process runs as many micro-batches as the others. A
frozen body is the reference itself: it is held as that is.

Drawing and scoring, whose number of calls depends on the rows, happen while every process holds all weights (`whole`) or,
with `--shard`, layer by layer, when a process has its turn (`turns`). What becomes of the parts in a checkpoint: `parts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any, Literal

from torch import Tensor, nn

from tiltlm import ranks, turns
from tiltlm.models import scattered
from tiltlm.models.body import layers_of, trust_of
from tiltlm.models.causal import CausalLM
from tiltlm.models.classifier import TextClassifier
from tiltlm.models.heads import ValueHead
from tiltlm.models.reward_model import RewardModel
from tiltlm.models.weights import in_parts

ENTRIES: dict[type[nn.Module], tuple[str, ...]] = {
    CausalLM: ("log_prob",),
    ValueHead: ("values", "values_before", "values_and_log_prob", "tilted_log_prob"),
    RewardModel: ("score",),
    TextClassifier: ("logits",),
}
"""What can be divided, and the methods by which losses come to its parameters."""


class Shards:
    """A model of which every process holds a part. Raises ValueError for a model of which that cannot be had."""

    def __init__(self, model: nn.Module) -> None:
        if reason := why_not(model):
            raise ValueError(f"--fit.shard: {reason}; leave it off, and every process holds the whole model")
        ranks.ready()
        self.by_layers = scattered.is_said()
        self.roots = [_Root(root) for root in roots_of(model)]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, every process may run the network as often as it likes: it holds all weights, or gathers them as layers
        compute. A process that fails there waits for nobody: others may wait for its next layer."""
        self.open()
        yield
        ranks.meet()
        for root in self.roots:
            root.close()

    def open(self) -> None:
        """`whole` from now on: what has been trained is asked, and not trained any more."""
        ranks.meet()
        for root in self.roots:
            root.open(self.by_layers)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Within, processes hold their parts of what has been divided of a model, and no more: to write it, or to put
    other weights into it."""
    found = [vars(root)["tiltlm_root"] for root in roots_of(model) if "tiltlm_root" in vars(root)]
    how = [root.is_open for root in found]
    for root in found:
        root.close()
    yield
    for root, before in zip(found, how, strict=True):
        if before is not None:
            root.open(before == "layers")


class _Root:
    """The outermost module of what is divided, and its layers, which are divided apart."""

    is_open: Literal["whole", "layers"] | None
    """How it may be asked: not now; with all weights at hand; layer by layer."""

    def __init__(self, module: Any) -> None:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        network, frozen = network_of(module), frozen_in(module)
        self.module, self.is_open = module, None
        vars(module)["tiltlm_root"] = self
        self.layers: list[Any] = [] if frozen else layers_of(network)
        resting = scattered.layers_in(network)
        for k, layer in enumerate(self.layers):
            for own in resting[k : k + 1]:
                own.bring()  # one at a time, to be divided anew
            fully_shard(layer)
        fully_shard(module, ignored_params=frozen)
        if self.layers:
            vars(network)["tiltlm_trust"] = replace(trust_of(network), sharing=False)
            self.layers[0].register_forward_pre_hook(self._take, prepend=True)
            self.number = turns.join(self._lend)
        module.wake = MethodType(lambda self: None, module)
        for name in (*entries_of(module), "wake"):
            register_fsdp_forward_method(module, name)
        module.wake()  # the outermost part must be the first to run
        module.reset_iter_state()

    def open(self, by_layers: bool) -> None:
        """Bring together what stands outside the layers and, unless they are gathered as they compute, these."""
        self.is_open = "layers" if by_layers else "whole"
        for part in [self.module] if by_layers else [*self.layers, self.module]:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()

    def close(self) -> None:
        """Let go of it all."""
        self.is_open = None
        self.module.reset_iter_state()  # reshards, and forgets what was run: it differs between processes
        for part in [*self.layers, self.module]:
            part.set_reshard_after_forward(part is not self.module, recurse=False)

    def _take(self, module: nn.Module, inputs: Any) -> None:
        if self.is_open == "layers":
            turns.take(self.number)

    def _lend(self) -> None:
        for layer in self.layers:
            layer.unshard()
            layer.reshard()


def why_not(model: nn.Module) -> str:
    """Why a model cannot be held in parts; empty if it can."""
    roots = roots_of(model)
    divided = {p for root in roots for p in root.parameters()}
    if not roots or any(p.requires_grad and p not in divided for p in model.parameters()):
        return f"transformers networks and heads on them are held in parts, and this is a {type(model).__name__}"
    for root in roots:
        network = network_of(root)
        if frozen_in(root):
            continue
        if not trust_of(network).padding:
            return "rows of this network are run by length, as often as there are lengths, which differ between processes"
        if getattr(network.config, "layerdrop", None):
            return "layers of this network (layerdrop) are left out by chance, others on every process"
        if not layers_of(network):
            return "no list of layers is found in this network"
    return ""


def roots_of(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of a model that can be divided."""
    if isinstance(model, tuple(ENTRIES)):
        return [model]
    return [root for child in model.children() for root in roots_of(child)]


def entries_of(root: nn.Module) -> tuple[str, ...]:
    """The methods by which losses come to a root's parameters."""
    return next(names for kind, names in ENTRIES.items() if isinstance(root, kind))


def network_of(root: Any) -> Any:
    """The transformers network in a root."""
    inner = (
        root.body if isinstance(root, ValueHead) else root.classifier if isinstance(root, RewardModel) else root
    )
    return inner.model


def frozen_in(root: nn.Module) -> set[nn.Parameter]:
    """The parameters of a body that is the reference's own."""
    return set(root.body.parameters()) if isinstance(root, ValueHead) and root.frozen else set()


def all_of(x: Any) -> Tensor:
    """A tensor of which every process holds a part, as a whole on each; other tensors as they are."""
    whole: Tensor = x.full_tensor() if in_parts(x) else x
    return whole

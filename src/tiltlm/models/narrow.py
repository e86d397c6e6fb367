"""A language model that draws in bfloat16: matrix products in 16 bits, everything that is added up in float32.

`Narrow(model)` draws from the network that `--fit.precision bfloat16` trains: the same float32 weights, rounded where they
multiply, and on a CPU the same float32 attention, as `precision` says. So its log q is the log p of training, up to what a
kernel rounds otherwise for other shapes (checkpointed layers apart: they train with attention in 16 bits), and it is a
distribution of its own: log q is that of what drew, and to hold its draws against pi_ref or pi* means to score them with
those (`log_ref` in float32), the difference being part of the measured divergence, or of the weights log_ref − log_q.

Autocast would round all weights again at every token. A state here rounds them once, when it starts, into a copy of the
network that shares everything else; it goes with the state, so it is never older than the weights are.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tiltlm import ranks
from tiltlm.models.base import LanguageModel, State
from tiltlm.models.causal import CausalLM
from tiltlm.models.precision import autocast, computing_in
from tiltlm.models.scattered import scattered_in
from tiltlm.samples import Samples, Tokens


class Narrow(LanguageModel):
    """`model` in bfloat16; its weights stay as they are. Raises ValueError for what is no `CausalLM` in float32."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        if not isinstance(model, CausalLM) or model.model.dtype != torch.float32:
            kind = type(model).__name__ + (f" in {model.model.dtype}" if isinstance(model, CausalLM) else "")
            raise ValueError(
                f"a whole language model with float32 weights draws in bfloat16; this is a {kind}: leave draw.precision out"
            )
        self.model = model
        self.vocab_size, self.eos_ids = model.vocab_size, model.eos_ids

    def start(self, prompts: Tokens, capacity: int) -> State:
        drawing = rounded(self.model)
        with computing_in(drawing, self.device, "bfloat16"):
            return _NarrowState(drawing.start(prompts, capacity), drawing, self.device)

    def log_prob(self, samples: Samples) -> Tensor:
        with computing_in(self.model, self.device, "bfloat16"):
            return self.model.log_prob(samples)

    def next_logits(self, samples: Samples) -> Callable[[slice], Tensor]:
        with computing_in(self.model, self.device, "bfloat16"):
            logits = self.model.next_logits(samples)

        def part_of(part: slice) -> Tensor:
            with computing_in(self.model, self.device, "bfloat16"):
                return logits(part)

        return part_of


class _NarrowState(State):
    def __init__(self, state: State, model: CausalLM, device: torch.device) -> None:
        self.state, self.model, self.device = state, model, device

    def logits(self) -> Tensor:
        with autocast(self.device, "bfloat16"):
            return self.state.logits()

    def append(self, tokens: Tensor) -> None:
        with computing_in(self.model, self.device, "bfloat16"):
            self.state.append(tokens)

    def select(self, index: Tensor) -> None:
        self.state.select(index)


def _in_parts(model: CausalLM) -> bool:
    if ranks.size() == 1:
        return bool(scattered_in(model))
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule) or bool(scattered_in(model))


@torch.no_grad()
def rounded(model: CausalLM) -> CausalLM:
    """A copy of `model` to draw from: its layers' matrices in bfloat16, all else shared with it.

    An embedding that is tied to the output head stays in float32, as autocast leaves it. Weights of which a process holds
    a part alone cannot be copied: there autocast rounds them as they are used, and `model` itself is returned.
    """
    from transformers.pytorch_utils import Conv1D

    if _in_parts(model):
        return model
    kept: list[object] = [*itertools.chain(model.parameters(), model.buffers()), model.tokenizer]
    copied = copy.deepcopy(model, {id(each): each for each in kept})
    for module in copied.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.weight = nn.Parameter(module.weight.to(torch.bfloat16), requires_grad=False)
    return copied

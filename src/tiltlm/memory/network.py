"""A network of its configuration alone: parameters, and what a pass through it keeps, at any size, without a weight.

The network is made on torch's `meta` device and run on tensors that have a shape and no numbers (`FakeTensorMode`), by the
code that runs real ones: whatever a layer keeps for its backward pass, fused attention, autocast's copies of weights,
recomputed layers, is counted as it is, and nothing of it is guessed. The output head alone is added by hand (`head`).

Counted is what tensors hold. Left out: what a library takes for itself (a CUDA context, NCCL, some 1 to 2 GB a GPU), what
the allocator cannot use, and the numbers of a batch beside its tokens and hidden states.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import get_gradient_edge

from tiltlm.memory.counting import Counted
from tiltlm.memory.head import FLOAT, HALF, PLACE, Head
from tiltlm.memory.making import Adapters, made, unnumbered
from tiltlm.models.body import body_of, layers_of, run_body
from tiltlm.models.look import one_line
from tiltlm.models.output import HALF_TILE
from tiltlm.models.precision import Precision, autocast, wide_attention

TOKEN = 8 + 1
"""Bytes of a token and of its mask."""

CPU = torch.device("cpu")

Trains = Literal["nothing", "head", "adapters", "all"]
"""What of a network is trained; adapters and all include a head of its own."""

Outputs = Literal["none", "number", "vocabulary"]
"""A head of a network's own, beside the language model's: a value's, of one number, or of one for every token."""


@dataclass(frozen=True)
class Pass:
    """Rows that go through a network at once: `rows` of `length` tokens, `read` of which the head is asked about.

    gpu: attention in bfloat16 stays so, where a CPU trains it in float32.
    """

    rows: int
    length: int
    read: int
    bfloat16: bool = False
    gpu: bool = False

    @property
    def precision(self) -> Precision:
        return "bfloat16" if self.bfloat16 else "float32"


class Network:
    """The network of a transformers configuration.

    outputs: its own head. language: whether it is held as a language model, with that one's output head (a value's body is,
    though nothing reads it), or as a classifier. recomputes: layers are run again in the backward pass. Raises ValueError
    for layers that adapters cannot stand beside.
    """

    def __init__(
        self, config: Any, *, trains: Trains = "nothing", outputs: Outputs = "none", language: bool = True,
        adapters: Adapters | None = None, recomputes: bool = False,
    ) -> None:  # fmt: skip
        self.trains, self.outputs, self.adapters = trains, outputs, adapters
        self.model = made(config, language, adapters)
        self.body = body_of(self.model)
        self.out: nn.Linear | None = self.model.get_output_embeddings() if language else None
        self.tied = self.out is not None and self.out.weight is self.model.get_input_embeddings().weight
        unread = None if self.out is None or outputs == "none" or self.tied else self.out.weight
        for name, p in self.model.named_parameters():
            within = trains == "all" or (trains == "adapters" and ("lora_" in name or name.startswith("score.")))
            p.requires_grad_(within and p is not unread)
        self.mode = FakeTensorMode()
        self.known = unnumbered(self.model, self.mode)
        self.recomputes = recomputes and trains != "nothing"
        if self.recomputes:
            self.model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})

    @property
    def _text(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return _size(self.model) + self.own

    @property
    def own(self) -> int:
        """Parameters of a linear head of its own, beside the language model's."""
        width = {"none": 0, "number": 1, "vocabulary": self.out.out_features if self.out is not None else 0}
        return (int(self._text.hidden_size) + 1) * width[self.outputs]

    @property
    def trained(self) -> int:
        """How many of them have a gradient and AdamW's moments."""
        own = self.own if self.trains != "nothing" else 0
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad) + own

    @cached_property
    def parts(self) -> tuple[int, int]:
        """Parameters of its largest layer, and of what stands outside the layers, a head of its own among it."""
        sizes = [_size(layer) for layer in self._layers]
        return max(sizes, default=0), _size(self.model) - sum(sizes) + self.own

    @cached_property
    def trained_parts(self) -> tuple[int, int]:
        """Those of them that are trained."""
        sizes = [_size(layer, trained=True) for layer in self._layers]
        return max(sizes, default=0), self.trained - sum(sizes)

    @property
    def _layers(self) -> list[nn.Module]:
        return layers_of(self.model)

    # ---- passes ---------------------------------------------------------------------------------------------------

    def kept(self, batch: Pass) -> int:
        """The bytes that body and head keep for the backward pass."""
        with self._counted(learning=True) as counted:
            states = self._states(batch)
            edge = get_gradient_edge(states) if states.requires_grad else None
            del states
            kept = counted.now
        del edge
        return kept + self._head(batch)[0]

    def update(self, batch: Pass) -> int:
        """The most bytes, beside weights and gradients, that forward and backward pass hold."""
        _, forward, backward = self._head(batch)
        with self._counted(learning=True) as counted:
            with autocast(
                CPU, batch.precision, keeps=not self.recomputes
            ):  # copies of weights are kept until the loss
                states, theirs = self._states(batch), None
                if self.outputs == "vocabulary" and self.trains != "head":
                    with torch.no_grad():  # the reference's, of a body of its own
                        theirs = self._states(batch)
                forward += counted.now
            shape, edge = states.shape, get_gradient_edge(states) if states.requires_grad else None
            del states, theirs
            back = counted.now + backward
            if edge is not None:  # the states' gradient, where they are read and everywhere
                back = max(back, counted.now + FLOAT * batch.rows * (batch.length + batch.read) * shape[2])
                torch.autograd.backward(edge, torch.empty(shape))
        # where embedding and head share weights, the head's gradient waits for the embedding's, and both for their sum
        shared = self.out if self.tied and self.trains == "all" else None
        waits = 2 * FLOAT * shared.weight.numel() if shared is not None else 0
        return max(forward, back, counted.most + waits) + TOKEN * batch.rows * batch.length

    def score(self, batch: Pass) -> int:
        """The most bytes that a pass without gradients holds."""
        with self._counted() as counted, torch.no_grad(), autocast(CPU, batch.precision):
            states = self._states(batch)
            most = max(counted.most, counted.now + self._head(batch)[1])
        del states
        return most

    def _prefilled(self, batch: Pass) -> tuple[int, int]:
        """Bytes of the keys and values of rows, and the most that the pass by which they come holds beside them."""
        from transformers.cache_utils import Cache

        from tiltlm.models.cache import BufferLayer

        cache = Cache(layer_class_to_replicate=lambda: BufferLayer(batch.length))  # type: ignore[arg-type]
        narrow = torch.autocast("cpu", torch.bfloat16, enabled=batch.bfloat16, cache_enabled=False)
        with self._counted() as counted, torch.no_grad(), narrow:
            mask = torch.ones(batch.rows, batch.length, dtype=torch.bool)  # prompts are of unequal lengths
            run_body(self.body, *_ids(batch.rows, batch.length), mask, cache)
        stores: list[Any] = list(cache.layers)
        kept = sum(store.nbytes for each in stores for store in each.stores())
        return kept, counted.most - kept

    def cache(self, batch: Pass) -> int:
        """Bytes of a decoding cache at its largest, for rows as long as they may be; 0 where the network keeps none."""
        prompts = _prompts(batch)
        return self._prefilled(prompts)[0] * batch.length // prompts.length

    def draw(self, batch: Pass) -> int:
        """Bytes of a decoding cache, and beside it the most of two: the prompts' pass; a step's logits (as they are, and as
        weights), with a layer's part of the cache there twice while it grows or rows leave it. In bfloat16 the layers'
        matrices have a copy."""
        cache, (_, pass_) = self.cache(batch), self._prefilled(_prompts(batch))
        vocabulary = self.out.weight.shape[0] if self.out is not None else 0
        logits = 2 * FLOAT * vocabulary + (HALF * min(vocabulary, HALF_TILE) if batch.bfloat16 else 0)
        step = cache // max(1, int(self._text.num_hidden_layers)) + batch.rows * logits
        return cache + max(pass_, step) + (HALF * self._matrices if batch.bfloat16 else 0)

    @property
    def _matrices(self) -> int:
        """Parameters of its linear layers."""
        from transformers.pytorch_utils import Conv1D

        return sum(m.weight.numel() for m in self.model.modules() if isinstance(m, nn.Linear | Conv1D))

    @contextmanager
    def _counted(self, learning: bool = False) -> Iterator[Counted]:
        """Dropout stays off: a network is in training mode only to run layers again. Raises ValueError for a network whose
        passes depend on the numbers."""
        from transformers import masking_utils

        log, packed = (
            logging.getLogger("torch._subclasses.fake_tensor"),
            masking_utils.find_packed_sequence_indices,
        )
        before, log.disabled = log.disabled, True
        self.model.train(learning and self.recomputes)
        masking_utils.find_packed_sequence_indices = _one_sequence_a_row
        try:
            with self.mode, Counted(self.known) as counted:
                yield counted
        except Exception as error:  # foreign code, run on tensors that it may not know
            raise ValueError(
                f"a {self.model.config.model_type} cannot be run without numbers: {one_line(error)}"
            ) from None
        finally:
            log.disabled = before
            masking_utils.find_packed_sequence_indices = packed

    def _states(self, batch: Pass) -> Tensor:
        wide = nullcontext() if batch.gpu else wide_attention(self.model, CPU, batch.precision)
        with wide, autocast(CPU, batch.precision, keeps=not self.recomputes):
            return run_body(self.body, *_ids(batch.rows, batch.length))

    def _head(self, batch: Pass) -> tuple[int, int, int]:
        """Bytes that the head keeps, and the most in its forward and its backward pass."""
        places, width = batch.rows * batch.read, int(self._text.hidden_size)
        if self.out is None or self.outputs == "number":
            size, noted = FLOAT * places * width, PLACE * places
            return size + noted, 2 * size + noted, 4 * size + noted
        head = Head(
            places, width, int(self.out.out_features), batch.bfloat16,
            trained=self.trains != "nothing" and bool(self.own or self.out.weight.requires_grad),
            under=self.outputs == "vocabulary",
        )  # fmt: skip
        return head.kept, head.forward, head.backward


def _size(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _prompts(batch: Pass) -> Pass:
    return replace(batch, length=max(1, batch.length - batch.read))


def _ids(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and their positions."""
    return torch.zeros(rows, length, dtype=torch.int64), torch.arange(length).expand(rows, length)


def _one_sequence_a_row(position_ids: Tensor) -> None:
    """What transformers finds in positions that count up, by looking at their numbers: no mask is wanted."""

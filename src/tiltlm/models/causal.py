"""`CausalLM`: any Hugging Face causal language model, spoken to through the protocol of `base.py`.

Scoring never holds [B, T, V]: hidden states are gathered at completion positions only, and the output head is
applied to them tile by tile of the vocabulary. In the backward pass a tile's logits are computed again instead of
kept; with p = softmax(h·Wᵀ + b) and g the gradient reaching log p(y),

    d/d logits = g · (onehot(y) − p),   d/dh = (d/d logits)·W,   dW = (d/d logits)ᵀ·h.

A tile is computed as W·hᵀ, [tile, M]: each row of dW is then written once, and matrix kernels of the CPU take
their arguments as they lie (1.7 times the speed of h·Wᵀ over the whole of a large vocabulary).

Under autocast the body runs in bfloat16 and the head does not: a sum of log-probabilities is what every method
compares, and h is taken in the head's own dtype, in both directions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tiltlm.models.backbone import BackboneState, body_of, fuse_activations, hidden, hidden_of
from tiltlm.models.base import LanguageModel, State
from tiltlm.models.hub import pretrained
from tiltlm.models.packing import hidden_packed, why_not
from tiltlm.samples import Samples, Tokens
from tiltlm.tensors import load_tensors

if TYPE_CHECKING:
    from peft import PeftModel

CHUNK_ENTRIES = 1_000_000
"""Logits held at once while scoring, in entries: 4 MB of float32, which stays inside the processor's cache.

Never fewer than there are entries in the hidden states: thinner tiles would save no memory that matters.
"""

DECODING_TILE = 1024
"""Vocabulary entries per matrix product while decoding on a CPU: 1.5 times as fast as one product over 50257."""


class CausalLM(LanguageModel):
    """A Hugging Face causal LM with explicit positions, dtype and device.

    Args: `model`, a `PreTrainedModel` with a linear output head; `adapters`, the PEFT model that put adapters
    into it, if any; `eos_id`, the
    token that ends a completion (None: completions end at the caller's length). `tokenizer`, if set, is
    saved beside the weights, so that the folder is complete.
    Raises ValueError if the network does something between head and logits (soft-capping, scaling): that
    would be lost here.
    """

    def __init__(
        self, model: PreTrainedModel, eos_id: int | None = None, adapters: PeftModel | None = None
    ) -> None:
        super().__init__()
        self.model, self.adapters = model, adapters
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"the output head must be linear; this model's is a {type(head).__name__}")
        self.head = head
        self.tokenizer: Any = None
        self.temperature, self.packs = 1.0, False
        self.vocab_size, self.eos_id = int(self.model.config.vocab_size), eos_id
        fuse_activations(self.model)
        self._check_head()

    @staticmethod
    def load(
        name: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        eos_id: int | None = None,
    ) -> CausalLM:
        """Load a folder or hub name in `dtype` (a checkpoint's own dtype is never kept silently)."""
        if (Path(name) / "adapter_config.json").is_file():
            raise ValueError(
                f"{name} holds adapters alone: name a folder in which they are merged into their model"
            )
        model = pretrained(AutoModelForCausalLM, name, dtype=dtype)
        return CausalLM(model, eos_id).eval().to(device)

    @staticmethod
    def from_config(
        config: PretrainedConfig, *, seed: torch.Generator | int = 0, eos_id: int | None = None
    ) -> CausalLM:
        """A freshly initialised model; `seed` (an int, or a generator to draw one from) decides its weights.

        In evaluation mode, as `load` gives it: a reference with dropout would be another one at every call.
        """
        number = seed if isinstance(seed, int) else int(torch.randint(2**62, (1,), generator=seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return CausalLM(model, eos_id).eval()

    def at(self, temperature: float) -> CausalLM:
        """This very model with its logits divided by `temperature`, in drawing and in scoring alike.

        What was drawn at a temperature other than 1 has its density under the tempered model, and no other. Raises
        ValueError unless temperature > 0, and for a head with a bias (the bias would need dividing too).
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be positive: it divides the logits; got {temperature}")
        if temperature != 1 and self.head.bias is not None:
            raise ValueError(f"{type(self.model).__name__} has a bias in its output head: temperature must be 1")
        self.temperature = temperature
        return self

    def tempered(self, states: Tensor) -> Tensor:
        """Hidden states whose logits are those of `states` divided by the temperature."""
        return states if self.temperature == 1 else states / self.temperature

    def with_lora(self, rank: int = 8, alpha: int = 16, dropout: float = 0.0, **options: Any) -> CausalLM:
        """This model with LoRA adapters of `rank` injected; its own weights are frozen."""
        from peft import LoraConfig, get_peft_model  # takes seconds to import

        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, task_type="CAUSAL_LM", **options)
        adapters = get_peft_model(self.model, config)
        return CausalLM(self.model, self.eos_id, adapters)

    def with_checkpointing(self) -> CausalLM:
        """This very model, made to compute its layers' activations again in the backward pass of training.

        Gradients stay the same, dropout included, for a fraction of the memory and about a third more time. Raises
        ValueError for networks that transformers cannot do this with.
        """
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.model.disable_input_require_grads()  # wanted by re-entrant checkpointing alone; a frozen model has none
        return self

    def with_packing(self) -> CausalLM:
        """This very model, with rows of unequal lengths packed into fewer rows whenever it scores.

        Raises ValueError where packing would change the result; see `packing`.
        """
        if reason := why_not(self.model):
            raise ValueError(f"{type(self.model).__name__} cannot be packed: {reason}; leave packing off")
        self.packs = True
        return self

    def save(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` reads (LoRA: the adapter's files)."""
        (self.adapters or self.model).save_pretrained(str(folder))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))

    def restore(self, folder: str | Path) -> None:
        """Take the weights that `save` wrote to `folder` into this model, bit by bit."""
        if self.adapters is not None:
            from peft import set_peft_model_state_dict

            adapter = load_tensors(Path(folder) / "adapter_model.safetensors", self.device)
            set_peft_model_state_dict(self.adapters, adapter)
            return
        saved = AutoModelForCausalLM.from_pretrained(str(folder), dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def _check_head(self) -> None:
        """Head ∘ body must be the whole network: compared on a few tokens (not one: a padding id embeds to 0)."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            ids = torch.arange(min(8, self.vocab_size), device=self.device)[None]
            whole = self.model(input_ids=ids, use_cache=False).logits.float()
            parts = self.head(body_of(self.model)(input_ids=ids, use_cache=False).last_hidden_state).float()
        self.model.train(was_training)
        if not torch.allclose(whole, parts, atol=1e-3, rtol=1e-3):
            name = type(self.model).__name__
            raise ValueError(f"{name} changes its logits after the output head (soft-cap or scale): not supported")

    def start(self, prompts: Tokens, capacity: int) -> CausalState:
        return CausalState(self, BackboneState(self.model, prompts, capacity))

    def log_prob(self, samples: Samples) -> Tensor:
        states = hidden_of(self.model, samples, hidden_packed if self.packs else hidden)
        return self.log_prob_of_hidden(states, samples)

    def next_logits(self, samples: Samples) -> Callable[[slice], Tensor]:
        rows, _, before = samples.places(before=True)
        states = self.tempered(hidden_of(self.model, samples)[rows, before]).to(self.head.weight.dtype)
        return lambda part: self.head(states[part])

    def log_prob_of_hidden(self, states: Tensor, samples: Samples) -> Tensor:
        """`log_prob` from the hidden states [N, L, D] of `samples.sequences()`, for those who need both."""
        rows, columns, before = samples.places(before=True)
        picked = self.tempered(states[rows, before])
        values = head_log_prob(picked, self.head, samples.tokens[rows, columns])
        return values.new_zeros(samples.mask.shape).index_put((rows, columns), values)


class CausalState(State):
    """The decoding state of a `CausalLM`: a body's state with the output head on its last hidden states."""

    def __init__(self, model: CausalLM, state: BackboneState) -> None:
        self.model, self.state = model, state

    def logits(self) -> Tensor:
        return head_logits(self.model.tempered(self.state.last), self.model.head)

    def append(self, tokens: Tensor) -> None:
        self.state.append(tokens)

    def select(self, index: Tensor) -> None:
        self.state.select(index)


def head_logits(states: Tensor, head: nn.Linear) -> Tensor:
    """head(states), [M, D] -> [M, V]; on a CPU and without gradients, tile by tile of a large vocabulary."""
    size = head.weight.shape[0]
    if torch.is_grad_enabled() or states.device.type != "cpu" or size <= 4 * DECODING_TILE:
        return head(states)
    logits = states.new_empty(len(states), size)
    for tile in _tiles(size, DECODING_TILE):
        torch.mm(states, head.weight[tile].t(), out=logits[:, tile])
    return logits if head.bias is None else logits.add_(head.bias)


def head_log_prob(
    states: Tensor, head: nn.Linear, targets: Tensor, fixed: tuple[Tensor, nn.Linear] | None = None
) -> Tensor:
    """log softmax(head(states))[targets] in float32: [M, D], [M] -> [M], tile by tile in both directions.

    fixed: states [M, D'] and a head whose logits are added without gradient (a reference under a twist).
    """
    width = max(states.shape[1], CHUNK_ENTRIES // max(1, len(states)))
    states, under = states.to(head.weight.dtype), None
    if fixed is not None:
        weight = fixed[1].weight.detach()
        under = fixed[0].detach().to(weight.dtype), weight, _bias(fixed[1]).detach()
    with torch.autocast(states.device.type, enabled=False):
        return _HeadLogProb.apply(states, head.weight, _bias(head), targets, width, under)


def _bias(head: nn.Linear) -> Tensor:
    """The head's bias; an empty tensor where it has none."""
    return head.bias if head.bias is not None else head.weight.new_zeros(0)


def _tiles(size: int, width: int) -> list[slice]:
    return [slice(begin, min(begin + width, size)) for begin in range(0, size, width)]


Under = tuple[Tensor, Tensor, Tensor] | None
"""States, weight and bias of a head whose logits are added without gradient."""


def _logits_of(tile: slice, weight: Tensor, bias: Tensor, states: Tensor, under: Under) -> Tensor:
    """Logits of the vocabulary entries in `tile`, float32 or wider, [tile, M]."""
    logits = weight[tile] @ states.t()
    if bias.numel():
        logits += bias[tile, None]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if under is None else logits.add_(_logits_of(tile, under[1], under[2], under[0], None))


def _targets_in(tile: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets lie in `tile`: their places inside it, and their places in the batch."""
    column = ((targets >= tile.start) & (targets < tile.stop)).nonzero()[:, 0]
    return targets[column] - tile.start, column


class _HeadLogProb(torch.autograd.Function):
    """See the module's docstring. An empty bias stands for none."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, width: int, under: Under
    ) -> Tensor:
        picked = states.new_empty(len(states), dtype=torch.promote_types(states.dtype, torch.float32))
        norms: list[Tensor] = []
        for tile in _tiles(len(weight), width):
            logits = _logits_of(tile, weight, bias, states, under)
            row, column = _targets_in(tile, targets)
            picked[column] = logits[row, column]
            norms.append(logits.logsumexp(0))
        log_norm = torch.stack(norms).logsumexp(0)
        ctx.save_for_backward(states, weight, bias, targets, log_norm)
        ctx.width, ctx.under = width, under
        return picked - log_norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return _HeadLogProb._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, log_norm = ctx.saved_tensors
        to_states = torch.zeros_like(states, dtype=grad.dtype) if ctx.needs_input_grad[0] else None
        to_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] and bias.numel() else None
        for tile in _tiles(len(weight), ctx.width):
            d = _logits_of(tile, weight, bias, states, ctx.under).sub_(log_norm).exp_().mul_(-grad)
            row, column = _targets_in(tile, targets)
            d[row, column] += grad[column]
            if to_bias is not None:
                to_bias[tile] = d.sum(1)
            d = d.to(states.dtype)
            if to_states is not None:
                to_states += d.t() @ weight[tile]
            if to_weight is not None:
                torch.mm(d, states, out=to_weight[tile])
        return None if to_states is None else to_states.to(states.dtype), to_weight, to_bias, None, None, None


def copy_of(model: CausalLM) -> CausalLM:
    """An independent copy of `model`: its own parameters, the same values."""
    return copy.deepcopy(model)

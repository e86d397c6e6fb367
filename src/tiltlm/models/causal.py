"""`CausalLM`: any Hugging Face causal language model, spoken to through the protocol of `base.py`.

Hidden states are gathered at completion positions only; what makes log-probabilities of them, soft caps and scales
included, stands in `output.py` and `scoring.py`. How the body may be run, with a cache or without, is what its self-test
found (`selftest.py`).

Under autocast body and head multiply in bfloat16. A sum of log-probabilities is what every method compares, so the head's
logits are float32, rounded around a level (`output.py`), and their softmax is float32 in both directions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tiltlm.models import lora
from tiltlm.models.backbone import BodyState, fuse_activations, hidden, hidden_of
from tiltlm.models.base import LanguageModel, State
from tiltlm.models.ends import ends_of
from tiltlm.models.folders import located
from tiltlm.models.hub import network
from tiltlm.models.look import look
from tiltlm.models.output import Curve, head_logits
from tiltlm.models.packing import hidden_packed, why_not
from tiltlm.models.prefixes import body_state
from tiltlm.models.scoring import Fixed, head_log_prob
from tiltlm.models.selftest import examine
from tiltlm.models.weights import load_state, save_pretrained
from tiltlm.samples import Samples, Tokens

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel


class CausalLM(LanguageModel):
    """A Hugging Face causal LM with explicit positions, dtype and device.

    Args: `model`, a `PreTrainedModel` with a linear output head; `adapters`, the PEFT model that put adapters
    into it, if any; `eos_ids`, the tokens any of which ends a completion (none: completions end at the caller's
    length). `tokenizer`, if set, is saved beside the weights, so that the folder is complete.
    Raises ValueError, by name and reason, for a network that cannot be used: one that is not causal, say.
    """

    def __init__(
        self, model: PreTrainedModel, eos_ids: Sequence[int] = (), adapters: PeftModel | None = None
    ) -> None:
        super().__init__()
        self.model, self.adapters = model, adapters
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"the output head must be linear; this model's is a {type(head).__name__}")
        self.head = head
        self.tokenizer: Any = None
        self.temperature, self.packs = 1.0, False
        self.entry, self.plain_curve = look(self.model, head)
        self.eos_ids = tuple(eos_ids)
        self.vocab_size = self.plain_curve.entries or int(head.out_features)
        fuse_activations(self.model)
        self.trust = examine(self.model)

    @staticmethod
    def load(
        name: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        eos_ids: Sequence[int] | None = None,
    ) -> CausalLM:
        """Load a folder or hub name in `dtype` (a checkpoint's own dtype is never kept silently).

        eos_ids: None takes what the model's own files name (see `ends`); () gives completions the caller's length.
        """
        from transformers import AutoModelForCausalLM

        if (Path(located(name)) / "adapter_config.json").is_file():
            raise ValueError(
                f"{name} holds adapters alone: name a folder in which they are merged into their model"
            )
        model, _ = network(AutoModelForCausalLM, name, device, examine, dtype=dtype)
        return CausalLM(model, ends_of(name) if eos_ids is None else eos_ids).eval()

    @staticmethod
    def from_config(
        config: PretrainedConfig, *, seed: torch.Generator | int = 0, eos_ids: Sequence[int] = ()
    ) -> CausalLM:
        """A freshly initialised model; `seed` (an int, or a generator to draw one from) decides its weights.

        In evaluation mode, as `load` gives it: a reference with dropout would be another one at every call.
        """
        from transformers import AutoModelForCausalLM

        number = seed if isinstance(seed, int) else int(torch.randint(2**62, (1,), generator=seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return CausalLM(model, eos_ids).eval()

    def at(self, temperature: float) -> CausalLM:
        """This very model with its logits divided by `temperature`, in drawing and in scoring alike.

        What was drawn at a temperature other than 1 has its density under the tempered model, and no other. Raises
        ValueError unless temperature > 0.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be positive: it divides the logits; got {temperature}")
        self.temperature = temperature
        return self

    @property
    def curve(self) -> Curve:
        """What becomes of the head's output: the network's own scale and soft cap, and the temperature."""
        return replace(self.plain_curve, temperature=self.temperature)

    def logits_of(self, states: Tensor) -> Tensor:
        """Next-token logits [M, V] of last hidden states [M, D]."""
        return head_logits(self.entry(states).to(self.head.weight.dtype), self.head, self.curve)

    def fixed(self, states: Tensor) -> Fixed:
        """The same logits as something to be added, without gradient, to another head's; see `head_log_prob`."""
        return Fixed(self.entry(states), self.head, self.curve)

    def with_lora(self, rank: int = 8, alpha: float = 16, dropout: float = 0.0, **options: Any) -> CausalLM:
        """This model with LoRA adapters of `rank` injected; its own weights are frozen. See `lora.adapted`."""
        return CausalLM(self.model, self.eos_ids, lora.adapted(self.model, rank, alpha, dropout, **options))

    def merged(self) -> CausalLM:
        """This model with its adapters, if it has any, added into its weights for good: a whole model in their place."""
        if self.adapters is None:
            return self
        whole = CausalLM(self.adapters.merge_and_unload(), self.eos_ids)
        whole.tokenizer, whole.temperature, whole.packs = self.tokenizer, self.temperature, self.packs
        return whole

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
        """Write a folder that `from_pretrained` reads (LoRA: the adapter's files), end tokens included."""
        if self.eos_ids and self.model.generation_config is not None:
            self.model.generation_config.update(eos_token_id=list(self.eos_ids), _from_model_config=False)
        save_pretrained(self.adapters or self.model, folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))

    def restore(self, folder: str | Path) -> None:
        """Take the weights that `save` wrote to `folder` into this model, bit by bit."""
        if self.adapters is not None:
            lora.restore(self.adapters, folder, self.device)
            return
        from transformers import AutoModelForCausalLM

        dtype = self.model.dtype
        load_state(self.model, lambda: AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).state_dict())

    def start(self, prompts: Tokens, capacity: int) -> CausalState:
        return CausalState(self, body_state(self.model, prompts, capacity))

    def log_prob(self, samples: Samples) -> Tensor:
        states = hidden_of(self.model, samples, hidden_packed if self.packs else hidden)
        return self.log_prob_of_hidden(states, samples)

    def next_logits(self, samples: Samples) -> Callable[[slice], Tensor]:
        rows, _, before = samples.places(before=True)
        states = hidden_of(self.model, samples)[rows, before]
        return lambda part: self.logits_of(states[part])

    def log_prob_of_hidden(self, states: Tensor, samples: Samples) -> Tensor:
        """`log_prob` from the hidden states [N, L, D] of `samples.sequences()`, for those who need both."""
        rows, columns, before = samples.places(before=True)
        read, targets = self.entry(states[rows, before]), samples.tokens[rows, columns]
        values = head_log_prob(read, self.head, targets, curve=self.curve)
        return values.new_zeros(samples.mask.shape).index_put((rows, columns), values)


class CausalState(State):
    """The decoding state of a `CausalLM`: a body's state with the output head on its last hidden states."""

    def __init__(self, model: CausalLM, state: BodyState) -> None:
        self.model, self.state = model, state

    def logits(self) -> Tensor:
        return self.model.logits_of(self.state.last)

    def append(self, tokens: Tensor) -> None:
        self.state.append(tokens)

    def select(self, index: Tensor) -> None:
        self.state.select(index)


def copy_of(model: CausalLM) -> CausalLM:
    """An independent copy of `model`: its own parameters, the same values."""
    return copy.deepcopy(model)


def steady(reference: CausalLM) -> CausalLM:
    """A copy of the reference to train, without dropout: it would make ratios to what was drawn noisy."""
    copied = copy_of(reference).requires_grad_(True)
    for module in copied.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return copied

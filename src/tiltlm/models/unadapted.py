"""`Unadapted`: a policy's own network with its adapters switched off, as the reference that the policy started from.

LoRA leaves the weights it was put on as they are, so pi_ref is inside the policy already: one set of weights in
memory instead of two. The adapters are off while the reference computes, and at no other time; so is all dropout,
whatever mode the policy is in. Costs two to three milliseconds a call beside the network's own time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tiltlm.models.base import LanguageModel, State
from tiltlm.models.causal import CausalLM
from tiltlm.samples import Samples, Tokens


class Unadapted(LanguageModel):
    """What `policy` would say without its adapters, at the temperature it has now.

    It has no parameters of its own: freezing, moving or switching its mode does nothing to the policy. Raises
    ValueError for a policy without adapters, and for adapters that train biases (switched off, those stay changed).
    """

    def __init__(self, policy: CausalLM) -> None:
        super().__init__()
        if policy.adapters is None:
            raise ValueError("this model has no adapters to switch off: make it one with with_lora(…)")
        configs: dict[str, Any] = policy.adapters.peft_config
        for name, config in configs.items():
            if getattr(config, "bias", "none") != "none":
                raise ValueError(f"adapter {name!r} trains biases ({config.bias}): load the reference by itself")
        self._own = (copy.copy(policy),)  # in a tuple, where torch does not look for submodules
        self.vocab_size, self.eos_ids = policy.vocab_size, policy.eos_ids

    @property
    def device(self) -> torch.device:
        return self._own[0].device

    def start(self, prompts: Tokens, capacity: int) -> UnadaptedState:
        with self.bare() as model:
            return UnadaptedState(self, model.start(prompts, capacity))

    def log_prob(self, samples: Samples) -> Tensor:
        with self.bare() as model:
            return model.log_prob(samples)

    def next_logits(self, samples: Samples) -> Callable[[slice], Tensor]:
        with self.bare() as model:
            inner = model.next_logits(samples)

        def logits(part: slice) -> Tensor:
            with self.bare():
                return inner(part)

        return logits

    @contextmanager
    def bare(self) -> Iterator[CausalLM]:
        """The network without adapters and in evaluation mode; afterwards everything is as it was."""
        (model,) = self._own
        assert model.adapters is not None
        tuner: Any = model.adapters.base_model
        training = [module for module in model.modules() if module.training]
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            tuner.disable_adapter_layers()
            for module in training:
                module.training = False
            yield model
        finally:
            tuner.enable_adapter_layers()
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for parameter in learned:  # PEFT sets this flag for every adapter it switches
                parameter.requires_grad_(True)
            for module in training:
                module.training = True


class UnadaptedState(State):
    """A state of the network whose every step sees the adapters off."""

    def __init__(self, model: Unadapted, state: State) -> None:
        self.model, self.state = model, state

    def logits(self) -> Tensor:
        with self.model.bare():
            return self.state.logits()

    def append(self, tokens: Tensor) -> None:
        with self.model.bare():
            self.state.append(tokens)

    def select(self, index: Tensor) -> None:
        self.state.select(index)

"""Guided decoding: a reference and a twist make a language model with a density of its own.

    q(s | prefix) ∝ pi_ref(s | prefix)^(1/T) · psi(prefix, s)   over the reference's top-k tokens

With psi_t* = E_ref[exp(r/beta) | prefix] and T = 1, top-k = all, q is pi* itself (Zhao et al. 2024,
arXiv:2404.17546, eq. 8; Zhou et al. 2025, arXiv:2502.20548, eq. 5). Order of operations: temperature, then the
top-k cut, then the twist, so the twist's strength does not depend on the temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiltlm.models.base import LanguageModel, State, Twist, TwistState
from tiltlm.samples import Tokens


class Guided(LanguageModel):
    """The language model q above. `top_k` = 0 scores every token of the vocabulary."""

    def __init__(
        self, reference: LanguageModel, twist: Twist, *, top_k: int = 0, temperature: float = 1.0
    ) -> None:
        super().__init__()
        if not temperature > 0 or top_k < 0:
            raise ValueError(f"temperature must be > 0 and top_k >= 0; got {temperature} and {top_k}")
        self.reference, self.twist = reference, twist
        self.top_k = min(top_k, reference.vocab_size) or reference.vocab_size
        self.temperature = temperature
        self.vocab_size, self.eos_ids = reference.vocab_size, reference.eos_ids

    def start(self, prompts: Tokens, capacity: int) -> State:
        states = self.reference.start(prompts, capacity), self.twist.start(prompts, capacity)
        return _GuidedState(*states, self.top_k, self.temperature)


class _GuidedState(State):
    def __init__(self, reference: State, twist: TwistState, top_k: int, temperature: float) -> None:
        self.reference, self.twist = reference, twist
        self.top_k, self.temperature = top_k, temperature

    def logits(self) -> Tensor:
        log_ref = self.reference.logits() / self.temperature
        if self.top_k == log_ref.shape[1]:
            return log_ref + self.twist.log_psi(None)
        top = log_ref.topk(self.top_k, -1)
        guided = top.values + self.twist.log_psi(top.indices)
        return torch.full_like(log_ref, -torch.inf, dtype=guided.dtype).scatter(1, top.indices, guided)

    def append(self, tokens: Tensor) -> None:
        self.reference.append(tokens)
        self.twist.append(tokens)

    def select(self, index: Tensor) -> None:
        self.reference.select(index)
        self.twist.select(index)

"""Teacherless models: every completion token is predicted at once, from the prompt and dummies.

    p(y|x) = Π_t p(y_t | x, $ … $)        (t − 1 dummies stand where y_1 … y_{t−1} would)

So tokens are independent given the prompt, and nothing can be copied from the answer's own beginning
(Monea et al. 2023, arXiv:2311.13581; Bachmann & Nagarajan 2024, arXiv:2403.06963, §5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltlm.models.backbone import hidden
from tiltlm.models.base import State
from tiltlm.models.causal import CausalLM
from tiltlm.samples import Samples, Tokens

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Teacherless(CausalLM):
    """A causal LM that reads `dummy_id` in place of every completion token."""

    def __init__(
        self,
        model: PreTrainedModel,
        dummy_id: int,
        eos_ids: Sequence[int] = (),
        adapters: PeftModel | None = None,
    ) -> None:
        super().__init__(model, eos_ids, adapters)
        self.dummy_id = dummy_id

    def with_lora(self, rank: int = 8, alpha: float = 16, dropout: float = 0.0, **options: Any) -> Teacherless:
        plain = super().with_lora(rank, alpha, dropout, **options)
        return Teacherless(plain.model, self.dummy_id, self.eos_ids, plain.adapters)

    def merged(self) -> Teacherless:
        plain = super().merged()
        if plain is self:
            return self
        whole = Teacherless(plain.model, self.dummy_id, self.eos_ids)
        whole.tokenizer, whole.temperature, whole.packs = plain.tokenizer, plain.temperature, plain.packs
        return whole

    def log_prob(self, samples: Samples) -> Tensor:
        return self.log_prob_of_hidden(hidden(self.model, self.blind(samples).sequences()), samples)

    def next_logits(self, samples: Samples) -> Callable[[slice], Tensor]:
        return super().next_logits(self.blind(samples))

    def blind(self, samples: Samples) -> Samples:
        """`samples` as they are read: a dummy in place of every completion token."""
        return samples.with_(tokens=torch.full_like(samples.tokens, self.dummy_id))

    def start(self, prompts: Tokens, capacity: int) -> TeacherlessState:  # type: ignore[override]
        dummies = torch.full((len(prompts), capacity), self.dummy_id, device=prompts.device)
        states = hidden(self.model, prompts.followed_by(Tokens.full(dummies)))
        place = prompts.lengths[:, None] - 1 + torch.arange(capacity, device=prompts.device)
        return TeacherlessState(self, states.gather(1, place[:, :, None].expand(-1, -1, states.shape[2])))


class TeacherlessState(State):
    """All hidden states [N, capacity, D] at once; appending only moves on to the next."""

    def __init__(self, model: Teacherless, states: Tensor) -> None:
        self.model, self.states, self.depth = model, states, 0

    def logits(self) -> Tensor:
        return self.model.logits_of(self.states[:, self.depth])

    def append(self, tokens: Tensor) -> None:
        self.depth += 1

    def select(self, index: Tensor) -> None:
        self.states = self.states[index]

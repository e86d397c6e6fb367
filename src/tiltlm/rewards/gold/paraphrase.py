"""Paraphrases: near in meaning, far in words.

    r(x, y) = cos(e(x), e(y)) + |X ∪ Y| / max(|X|, |Y|)

e: the mean of a sentence encoder's last hidden states over a text's tokens (Reimers & Gurevych 2019, arXiv:1908.10084);
X, Y: the lower-cased tokens of prompt and response. The second part is 1 where one holds the other (and where both are
empty) and 2 where they share nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tiltlm.models.hub import config_of, pretrained
from tiltlm.rewards.gold.tokens import tokens
from tiltlm.rewards.of_texts import Column, OfTexts

NAMES: dict[str, str] = {
    "paraphrase": "cosine of prompt and response as sentences + how few words they share; paraphrase:MODEL"
}
NEEDS: dict[str, str] = {"paraphrase": "sentence-transformers/all-MiniLM-L6-v2 of the hub, or a model of your own"}

MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Sentences:
    """Embeddings by the encoder called `model`: the mean of its last hidden states; `batch_size` texts at once."""

    model: str = MODEL
    device: str = "cpu"
    batch_size: int = 64

    @cached_property
    def network(self) -> Any:
        from transformers import AutoModel

        return pretrained(AutoModel, self.model, dtype=torch.float32).eval().to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return pretrained(AutoTokenizer, self.model)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """float32 [len(texts), D], on the CPU; zeros for a text without tokens."""
        order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
        parts = [order[k : k + self.batch_size] for k in range(0, len(order), self.batch_size)]
        found = torch.zeros(len(texts), self.network.config.hidden_size)
        for part in parts:
            found[part] = self._means([texts[k] for k in part]).cpu()
        return found

    def _means(self, texts: Sequence[str]) -> Tensor:
        most = min(self.tokenizer.model_max_length, self.network.config.max_position_embeddings)
        rows = self.tokenizer(list(texts), truncation=True, max_length=most)["input_ids"]
        width = max(1, *(len(row) for row in rows))
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask, ids = mask.to(self.device), ids.to(self.device)
        states = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
        return (torch.where(mask[..., None] > 0, states, 0.0)).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class Paraphrase(OfTexts):
    """The cosine of the embeddings by `model`, and the share of words that differ."""

    model: str = MODEL
    device: str = "cpu"

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, 3.0

    @property
    def files(self) -> tuple[str, ...]:
        return (self.model,)

    def check(self) -> None:
        config_of(self.model)

    @cached_property
    def sentences(self) -> Sentences:
        return Sentences(self.model, self.device)

    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> Tensor:
        texts = list(dict.fromkeys([*prompts, *completions]))
        found = dict(zip(texts, self.sentences(texts), strict=True))
        pairs = list(zip(prompts, completions, strict=True))
        return torch.tensor([_cosine(found[x], found[y]) + apart(x, y) for x, y in pairs], dtype=torch.float64)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(cosine_similarity(one, other, dim=0).clamp(-1, 1))


def apart(prompt: str, response: str) -> float:
    """|X ∪ Y| / max(|X|, |Y|): from 1, where one holds the other, to 2."""
    x, y = ({token.lower() for token in tokens(text)} for text in (prompt, response))
    return len(x | y) / max(len(x), len(y)) if x or y else 1.0


def reward(name: str, argument: str, device: str) -> OfTexts:
    """The reward called `name`."""
    return Paraphrase(argument or MODEL, device)

"""Contrastive distillation: what a large model finds likelier than a small one does (Li et al. 2022, arXiv:2210.15097).

    r(x, y) = mean_t log p_BIG(token t | before) − mean_t log p_SMALL(token t | before)

over the tokens of prompt and response together, each model in its own tokens. Means are over a text's own length, however
long its neighbours in a batch are. The first token is scored where the tokenizer puts a start token in front (OPT's does);
a text without a token to score gets 0. Texts longer than a model's context are scored up to there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tiltlm.models.causal import CausalLM
from tiltlm.models.hub import config_of, pretrained
from tiltlm.rewards.of_texts import Column, OfTexts
from tiltlm.samples import Samples, Tokens

NAMES: dict[str, str] = {
    "contrastivedistill": "mean token log p under OPT-1.3b less that under OPT-125m; contrastivedistill:BIG:SMALL"
}
NEEDS: dict[str, str] = {"contrastivedistill": "the two models, of the hub or in folders"}

BIG, SMALL = "facebook/opt-1.3b", "facebook/opt-125m"


@dataclass(frozen=True)
class MeanLogProb:
    """The mean log-probability of a text's tokens under the language model called `model`; `batch_size` texts at once."""

    model: str
    device: str = "cpu"
    batch_size: int = 16

    @cached_property
    def network(self) -> CausalLM:
        return CausalLM.load(self.model, device=self.device, eos_ids=()).requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return pretrained(AutoTokenizer, self.model)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Nats per token, float64 [len(texts)]; 0 for a text without a token that has one before it."""
        found = torch.zeros(len(texts), dtype=torch.float64)
        rows = self._ids(texts)
        order = sorted((k for k, ids in enumerate(rows) if len(ids) > 1), key=lambda k: len(rows[k]))
        for begin in range(0, len(order), self.batch_size):
            some = order[begin : begin + self.batch_size]
            found[some] = self._means([rows[k] for k in some])
        return found

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        most = getattr(self.network.model.config, "max_position_embeddings", None)
        return [ids[:most] for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]]

    def _means(self, rows: Sequence[list[int]]) -> Tensor:
        device = self.network.device
        first, rest = (Tokens.of(part, device) for part in ([row[:1] for row in rows], [row[1:] for row in rows]))
        samples = Samples(first, torch.arange(len(rows), device=device), rest.ids, rest.mask)
        return (self.network.log_prob(samples).double().sum(1) / rest.mask.sum(1)).cpu()


@dataclass(frozen=True)
class Contrast(OfTexts):
    """mean log p under `big` less that under `small`."""

    big: str = BIG
    small: str = SMALL
    device: str = "cpu"

    @property
    def files(self) -> tuple[str, ...]:
        return self.big, self.small

    def check(self) -> None:
        config_of(self.big)
        config_of(self.small)

    @cached_property
    def scorers(self) -> tuple[MeanLogProb, MeanLogProb]:
        return MeanLogProb(self.big, self.device), MeanLogProb(self.small, self.device)

    def read(self) -> None:
        for scorer in self.scorers:
            _ = scorer.network

    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> Tensor:
        texts = [prompt + response for prompt, response in zip(prompts, completions, strict=True)]
        big, small = self.scorers
        return big(texts) - small(texts)


def reward(name: str, argument: str, device: str) -> OfTexts:
    """The reward called `name`. Raises ValueError unless there are two models behind its colon, or none."""
    big, _, small = argument.rpartition(":")
    if argument and not (big and small):
        raise ValueError(f"{name} takes two models, {name}:BIG:SMALL; got {name}:{argument}")
    return Contrast(big, small, device) if argument else Contrast(device=device)

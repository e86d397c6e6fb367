"""A small language model of the project's own making, where no pretrained one is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import tyro

from tiltlm.data.arithmetic import solutions
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.device import device_of
from tiltlm.experience import Offline
from tiltlm.fit import Fit
from tiltlm.models.causal import CausalLM
from tiltlm.policies.sft import SFT
from tiltlm.run import Recipe, Run
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream, stream
from tiltlm.settings import ADDED, SPEED, at_least_one
from tiltlm.stages.training import train

OWN_TOKENS = 512
"""Tokens that the own model holds."""

WIDTH = 96
"""Tokens of a story that it is trained on."""

FIT = Fit(lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01, steps=700, warmup=50, batch_size=32)
"""How it is trained."""


LAYERS = 5
"""Layers of the own model."""

BYTES = 257
"""Entries of a vocabulary that has every byte, the start token, and nothing longer: one token a character."""


@dataclass(frozen=True)
class Reference(Recipe):
    """A small language model of the project's own making."""

    stories: int = 6000
    """Stories, or worked solutions, that it is trained on."""

    fit: Fit = FIT
    text: Literal["stories", "arithmetic"] = field(default="stories", metadata=ADDED)
    """What it is trained on: stories, or arithmetic worked out step by step, one token a character."""

    layers: int = field(default=LAYERS, metadata=ADDED)
    device: str = field(default="cpu", metadata=SPEED)
    task: tyro.conf.Suppress[str] = ""
    """The name of the task that it is for."""

    seed: int = 0
    called: tyro.conf.Suppress[str] = field(default="base", metadata=ADDED)
    """What the task calls it, where it has several."""

    stage: ClassVar[str] = "base"
    together: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{self.task}/{self.called}"

    def __post_init__(self) -> None:
        at_least_one(self, "stories", "layers")

    def check(self) -> None:
        refuse_evaluations(self.name, self.fit)

    def build(self, run: Run[Any]) -> None:
        own = stream(self.seed, "twisted", "reference")
        device = device_of(self.device)
        if self.text == "arithmetic":
            texts = solutions(self.stories, own.child("arithmetic"))
            train_own_model(run, texts, self.fit, own, device, WIDTH, True, self.layers, BYTES)
        else:
            texts = stories(self.stories, own.child("stories"))
            train_own_model(run, texts, self.fit, own, device, WIDTH, layers=self.layers)


def own_config(vocabulary: int = 512, layers: int = LAYERS) -> Any:
    """The configuration of the project's own models."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=172, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=OWN_TOKENS, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def refuse_evaluations(name: str, how: Fit) -> None:
    """Raise ValueError where a stage without held-out data is asked to evaluate on the way."""
    if how.evaluations:
        raise ValueError(f"{name} measures nothing while it trains: set its evaluations to 0")


def train_own_model(
    run: Run[Any], texts: Sequence[str], how: Fit, own: Stream, device: torch.device, most_tokens: int, stop: bool = False,
    layers: int = LAYERS, vocabulary: int = 512,
) -> None:  # fmt: skip
    """A Llama of 0.3 million parameters on `texts`, each cut to `most_tokens`; its tokenizer is learnt from them too.

    stop: end every text that fits with the start token, as a model that is to stop by itself must see it. vocabulary: how
    many tokens the tokenizer has, at most.
    """
    tokenizer = train_tokenizer(texts[:2000], vocabulary)
    model = CausalLM.from_config(own_config(len(tokenizer), layers), seed=own.child("init").generator())
    model.tokenizer = tokenizer
    end = [tokenizer.bos_token_id] if stop else []
    rows = [[*ids, *end][: most_tokens + 1] for ids in tokenizer(list(texts))["input_ids"]]
    completions = Tokens.of([ids[1:] for ids in rows])
    start = Tokens.of([[tokenizer.bos_token_id]])
    index = torch.zeros(len(rows), dtype=torch.int64)
    data = Samples(start, index, completions.ids, completions.mask).to(device)
    how = how.of(len(rows))
    train(run, model, SFT(), Offline(data, how.batch_size, own.child("data")), how, device, own)

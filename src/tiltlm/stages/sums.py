"""The reference of sums: a small GPT-2 that imitates the teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import tyro

from tiltlm.data.sums import lessons, tokenizer
from tiltlm.device import device_of
from tiltlm.experience import Offline
from tiltlm.fit import Fit
from tiltlm.models.causal import CausalLM
from tiltlm.policies.sft import SFT
from tiltlm.run import Recipe, Run
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.settings import SPEED, at_least_one
from tiltlm.stages.reference import refuse_evaluations
from tiltlm.stages.training import train

POSITIONS = 96
"""Tokens that the model holds."""

HEADS = 4

FIT = Fit(
    lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, epochs=3.0, warmup=50, decay="linear", floor=0.05, batch_size=64
)  # fmt: skip
"""How it is trained."""


@dataclass(frozen=True)
class SumsBase(Recipe):
    """A small GPT-2 that imitates the teacher of sums."""

    digits: int = 3
    hints: bool = False
    texts: int = 16_000
    """Solutions that it is trained on."""

    fit: Fit = FIT
    layers: int = 3
    width: int = 96
    device: str = field(default="cpu", metadata=SPEED)
    task: tyro.conf.Suppress[str] = "sums"
    """The name of the task that it is for."""

    seed: int = 0
    stage: ClassVar[str] = "base"
    together: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{self.task}/{self.stage}"

    def __post_init__(self) -> None:
        at_least_one(self, "digits", "texts", "layers", "width")

    def check(self) -> None:
        refuse_evaluations(self.name, self.fit)

    def build(self, run: Run[Any]) -> None:
        own, device = stream(self.seed, "sums", "reference"), device_of(self.device)
        model, how = self.untrained(own.child("init").generator()), self.fit.of(self.texts)
        taught = lessons(self.texts, self.digits, self.hints, own.child("lessons"))
        experience = Offline(as_samples(taught, model.tokenizer).to(device), how.batch_size, own.child("data"))
        train(run, model, SFT(), experience, how, device, own)

    def untrained(self, first: torch.Generator | int = 0) -> CausalLM:
        """The network with its first weights, and its tokenizer."""
        from transformers import GPT2Config

        words = tokenizer()
        config = GPT2Config(
            vocab_size=len(words), n_positions=POSITIONS, n_embd=self.width, n_layer=self.layers, n_head=HEADS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.05, bos_token_id=None,
            eos_token_id=words.eos_token_id,
        )  # fmt: skip
        model = CausalLM.from_config(config, seed=first, eos_ids=(words.eos_token_id,))
        model.tokenizer = words
        return model


def as_samples(taught: list[tuple[str, str]], words: Any) -> Samples:
    """Prompts and solutions as tokens, each solution with its end."""
    prompts, texts = (words(list(side))["input_ids"] for side in zip(*taught, strict=True))
    completions = Tokens.of([[*ids, words.eos_token_id] for ids in texts])
    return Samples(Tokens.of(prompts), torch.arange(len(taught)), completions.ids, completions.mask)

"""How every model of preference alignment reads text: lengths, what ends a completion, the temperature; and the models so
read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltlm.data.encoding import Encoder
from tiltlm.device import device_of
from tiltlm.models.causal import CausalLM
from tiltlm.models.ends import ends_of, turn_id
from tiltlm.models.hub import config_of, pretrained
from tiltlm.objective import positive
from tiltlm.rewards.by_name import TextReward
from tiltlm.samples import Samples
from tiltlm.settings import SPEED, at_least_one
from tiltlm.stages.reference import OWN_TOKENS


@dataclass(frozen=True)
class Reader:
    """The model that everything begins with, and how every model here reads text."""

    model: str = ""
    """A hub name or folder; empty: a small Llama that the stage `base` trains on the dialogues themselves."""

    start: str = ""
    """A model (hub name, folder or run) to align instead of the one that the stage `sft-model` trains; it brings its
    tokenizer, and `model` is not needed."""

    most_tokens: int = 512
    """Prompt and completion together."""

    new_tokens: int = 200
    """Of a completion, at most; longer ones are cut and do not count as finished."""

    temperature: float = 0.8
    """Divides the logits of policy and reference alike: in drawing, in training, in measuring."""

    stop: tuple[str, ...] = ()
    """The tokens that end a completion, by id or text, the one that is written first (default: all that the model's own
    files name: tokenizer, generation_config, chat template)."""

    device: str = field(default="cpu", metadata=SPEED)
    """cpu, cuda, cuda:N, mps, or auto: the first of cuda, mps and cpu that is there."""

    @property
    def named(self) -> str:
        """The model that everything begins with; empty for the project's own."""
        return self.start or self.model

    @property
    def room(self) -> int:
        """Tokens of a prompt that are read."""
        return self.most_tokens - self.new_tokens

    def __post_init__(self) -> None:
        at_least_one(self, "most_tokens", "new_tokens")
        positive(temperature=self.temperature)
        if self.new_tokens >= self.most_tokens:
            raise ValueError(
                f"new_tokens ({self.new_tokens}) must leave room for a prompt in {self.most_tokens} tokens"
            )

    def check(self) -> None:
        """Raise ValueError where prompt and completion do not fit into the model."""
        held = config_of(self.named).to_dict() if self.named else {"max_position_embeddings": OWN_TOKENS}
        limit = held.get("max_position_embeddings") or self.most_tokens
        if self.most_tokens > limit:
            who = self.named or "the project's own model"
            raise ValueError(f"{who} holds {limit} tokens: lower --task.most-tokens, now {self.most_tokens}")


@dataclass(frozen=True)
class Reading:
    """A reader, and the folder or hub name of the model that everything starts from."""

    reader: Reader
    model: str

    @cached_property
    def device(self) -> torch.device:
        return device_of(self.reader.device, "--task.device")

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizer_in(self.model)

    @cached_property
    def encoder(self) -> Encoder:
        turn = None if self.reader.stop else turn_id(self.tokenizer)
        return Encoder(self.tokenizer, self.eos_ids, self.reader.most_tokens, self.reader.new_tokens, turn)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a completion, for every model here. Raises ValueError where nothing does."""
        found = ends_of(self.model, self.reader.stop, "--task.stop")
        if not found:
            raise ValueError(f"{self.model} names no token that ends a completion: name one (--task.stop)")
        return found

    def load(self, name: str | Path | None = None, temperature: float | None = None) -> CausalLM:
        """The model called `name` (default: what everything starts from), frozen, at the target's temperature."""
        model = CausalLM.load(name or self.model, device=self.device, eos_ids=self.eos_ids)
        model.tokenizer = self.tokenizer
        self._check(model, str(name or self.model))
        return model.at(temperature or self.reader.temperature).requires_grad_(False)

    def _check(self, model: CausalLM, name: str) -> None:
        """Raise ValueError for a model that is too short for the sequences, or knows too few tokens."""
        most = self.reader.most_tokens
        limit = getattr(model.model.config, "max_position_embeddings", None) or most
        if most > limit:
            raise ValueError(f"{name} holds {limit} tokens: lower --task.most-tokens, now {most}")
        if len(self.tokenizer) > model.vocab_size:
            both = f"{model.vocab_size} tokens, the tokenizer {len(self.tokenizer)}"
            raise ValueError(f"{name} knows {both}: they do not belong together")

    def trainable(
        self, name: str | Path | None = None, temperature: float | None = None, lora: int = 0,
        checkpointing: bool = False,
    ) -> CausalLM:  # fmt: skip
        """`load`, ready to be trained: every weight, or LoRA adapters of rank `lora`."""
        model = self.load(name).requires_grad_(True)
        if lora:
            model = model.with_lora(lora, 2 * lora)
            model.tokenizer = self.tokenizer
        if checkpointing:
            model = model.with_checkpointing()
        return model.at(temperature or self.reader.temperature)


@functools.lru_cache(maxsize=8)
def _tokenizer_in(name: str, changed: int) -> Any:
    from transformers import AutoTokenizer

    return pretrained(AutoTokenizer, name)


def tokenizer_in(name: str) -> Any:
    """The tokenizer of a folder or hub name, read once as long as the folder does not change."""
    path = Path(name)
    return _tokenizer_in(name, path.stat().st_mtime_ns if path.is_dir() else 0)


@dataclass(frozen=True)
class EncodedReward:
    """A reward of texts as r(x, y) of samples: labeller, ruler and the data's responses are judged by the same texts."""

    reward: TextReward
    encoder: Encoder

    def __call__(self, samples: Samples) -> Tensor:
        return torch.tensor(self.reward.of(*self.encoder.texts(samples)), device=samples.device)

    def of_texts(self, prompts: list[str], responses: list[str]) -> list[float]:
        """What whole responses are worth behind their prompts, as the policies see these."""
        asked = [self.encoder.prompt_text(self.encoder.prompt(text)) for text in prompts]
        return self.reward.of(asked, responses)

    def term(self, label: str) -> Callable[[Samples], Tensor]:
        """One term of a sum of rewards, unweighted, as a function of samples."""
        return lambda samples: torch.tensor(
            self.reward.terms(*self.encoder.texts(samples))[label], device=samples.device
        )

    def terms(self) -> dict[str, Callable[[Samples], Tensor]]:
        """Every term by the name that reports have for it; none where the reward is no sum."""
        return {f"reward[{label}]": self.term(label) for label in self.reward.function.labels}

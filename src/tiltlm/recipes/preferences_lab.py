"""What every stage of preference alignment works with: models at the target's temperature, ids, the reference's
log-probabilities (computed once, cached by content)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from tiltlm.data.encoding import Encoder
from tiltlm.device import device_of
from tiltlm.groups import Groups
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM
from tiltlm.models.ends import ends_of, turn_id
from tiltlm.models.hub import pretrained
from tiltlm.models.unadapted import Unadapted
from tiltlm.recipes.preferences_settings import Base
from tiltlm.rewards.by_name import TextReward
from tiltlm.samples import Pairs, Samples
from tiltlm.seeds import Stream, stream
from tiltlm.tensors import load_tensors, save_tensors

ROWS_AT_ONCE = 128
"""Rows that the reference scores in one pass."""


@dataclass(frozen=True)
class Lab:
    """`base`, and the folder or hub name of the model that everything starts from."""

    base: Base
    model: str
    seed: int

    @cached_property
    def device(self) -> torch.device:
        return device_of(self.base.device, "--base.device")

    @cached_property
    def stream(self) -> Stream:
        return stream(self.seed, "preferences")

    @cached_property
    def tokenizer(self) -> Any:
        return pretrained(AutoTokenizer, self.model)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.eos_ids, self.base.most_tokens, self.base.new_tokens, self.turn_id)

    @property
    def turn_id(self) -> int | None:
        """The token that ends a conversation's completions, where the chat template names one and no setting does."""
        return None if self.base.stop else turn_id(self.tokenizer)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a completion, for every model here. Raises ValueError where nothing does."""
        found = ends_of(self.model, self.base.stop, "--base.stop")
        if not found:
            raise ValueError(f"{self.model} names no token that ends a completion: name one (--base.stop)")
        return found

    def load(self, name: str | Path | None = None) -> CausalLM:
        """The model called `name` (default: what everything starts from), frozen, at the target's temperature."""
        model = CausalLM.load(name or self.model, device=self.device, eos_ids=self.eos_ids)
        model.tokenizer = self.tokenizer
        self.check(model, str(name or self.model))
        return model.at(self.base.temperature).requires_grad_(False)

    def check(self, model: CausalLM, name: str) -> None:
        """Raise ValueError for a model that is too short for the sequences, or knows too few tokens."""
        limit = getattr(model.model.config, "max_position_embeddings", None) or self.base.most_tokens
        if self.base.most_tokens > limit:
            raise ValueError(f"{name} holds {limit} tokens: lower --base.most-tokens, now {self.base.most_tokens}")
        if len(self.tokenizer) > model.vocab_size:
            both = f"{model.vocab_size} tokens, the tokenizer {len(self.tokenizer)}"
            raise ValueError(f"{name} knows {both}: they do not belong together")

    def trainable(self, name: str | Path | None = None, temperature: float | None = None) -> CausalLM:
        """`load`, ready to be trained: every weight, or LoRA adapters."""
        model = self.load(name).requires_grad_(True)
        if self.base.lora:
            model = model.with_lora(self.base.lora, 2 * self.base.lora)
            model.tokenizer = self.tokenizer
        if self.base.checkpointing:
            model = model.with_checkpointing()
        return model.at(temperature or self.base.temperature)

    def policy_and_reference(self, start: str | Path) -> tuple[CausalLM, LanguageModel]:
        """A policy that begins at `start`, and the reference it begins as: with adapters, the same weights without them."""
        policy = self.trainable(start)
        return policy, Unadapted(policy) if self.base.lora else self.load(start)

    def restored(self, start: str | Path, checkpoint: Path) -> CausalLM:
        """The policy that `checkpoint` holds: adapters on `start`, or a whole model."""
        if not self.base.lora:
            return self.load(checkpoint)
        policy = self.trainable(start).eval()
        policy.restore(checkpoint)
        return policy.requires_grad_(False)


def content_of(samples: Samples) -> str:
    """A short hash of what a language model sees of `samples`."""
    total = hashlib.blake2b(digest_size=8)
    for x in (samples.prompts.ids, samples.prompts.mask, samples.prompt_index, samples.tokens, samples.mask):
        total.update(str(tuple(x.shape)).encode() + x.cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def with_log_ref(
    samples: Samples, reference: LanguageModel, name: str, cache: Path, precision: str = "float32"
) -> Samples:
    """`samples` with the reference's log-probabilities: read from `cache`, or computed and written there.

    name: what tells this reference from others (its weights' hash, its temperature); the file's name holds it and the
    hash of the samples, so neither another model nor relabelled or redrawn data finds stale numbers. precision: what the
    policy will be trained in: at the start it must agree with its reference, to the last bit that bfloat16 rounds.
    """
    path = cache / f"log_ref-{name}-{precision}-{content_of(samples)}.safetensors"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # runs side by side may both get here
        save_tensors({"log_ref": score(samples, reference, precision)}, aside)
        aside.rename(path)
    return samples.with_(log_ref=load_tensors(path)["log_ref"])


@torch.no_grad()
def score(samples: Samples, model: LanguageModel, precision: str = "float32") -> Tensor:
    """`model`'s log-probability of every token, [N, T] on the CPU, `ROWS_AT_ONCE` rows a pass."""
    starts = range(0, len(samples), ROWS_AT_ONCE)
    parts = [samples.select(slice(begin, begin + ROWS_AT_ONCE)).to(model.device) for begin in starts]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return torch.cat([model.log_prob(part).cpu() for part in parts])


def pairs_with_log_ref(pairs: Pairs, reference: LanguageModel, name: str, cache: Path, precision: str) -> Pairs:
    """`with_log_ref` of both sides."""
    sides = (pairs.chosen, pairs.rejected)
    return Pairs(*(with_log_ref(side, reference, name, cache, precision) for side in sides))


def first_of(groups: Groups, size: int) -> Groups:
    """The first `size` rows of every group."""
    if size > groups.size:
        raise ValueError(f"groups of {groups.size} completions hold no {size}: draw more (--draws.n {size})")
    rows = torch.arange(len(groups))[:, None] * groups.size + torch.arange(size)
    return Groups(groups.samples.select(rows.flatten()), size)


def judged(samples: Pairs) -> Samples:
    """Pairs as answers judged one by one: chosen ones with reward 1, then rejected ones with 0."""
    both, n = samples.both(), len(samples)
    return both.with_(reward=torch.cat([torch.ones(n), torch.zeros(n)]).to(both.device))


@dataclass(frozen=True)
class EncodedReward:
    """A reward of texts as r(x, y) of samples: labeller, ruler and the data's responses are judged by the same texts."""

    reward: TextReward
    encoder: Encoder

    def __call__(self, samples: Samples) -> Tensor:
        return torch.tensor(self.reward.of(*self.encoder.texts(samples)), device=samples.device)

    def term(self, label: str) -> Callable[[Samples], Tensor]:
        """One term of a sum of rewards, unweighted, as a function of samples."""
        return lambda samples: torch.tensor(
            self.reward.terms(*self.encoder.texts(samples))[label], device=samples.device
        )

    def terms(self) -> dict[str, Callable[[Samples], Tensor]]:
        """Every term by the name that reports have for it; none where the reward is no sum."""
        return {f"reward[{label}]": self.term(label) for label in self.reward.function.labels}

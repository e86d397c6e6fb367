"""Scenes: the prompts of a training step, and exact draws of pi* for them where there are any.

OnePrompt     the same prompts at every step, with a fresh supply of exact draws or a `Pool` of stored ones
SomePrompts   a few prompts of a set, other ones at every step
Infilling     prompt and condition split off longer draws of the reference: the draw itself is exact by construction
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from tiltlm.models.base import LanguageModel
from tiltlm.samplers.ancestral import draw
from tiltlm.samplers.exact_draws import marked
from tiltlm.samples import Conditioned, Samples, Tokens, cat_samples
from tiltlm.seeds import Stream

Supply = Callable[[Stream], Samples]
"""Exact draws of pi* for the scene's prompts."""

ExactDraws = Callable[[Tokens, int, Stream], Samples]
"""(prompts, n, stream) -> n exact draws of pi* for each prompt, row i answering prompt i // n."""


class Scene(Protocol):
    """Prompts of a step, and exact draws of pi* for them (None: there are none)."""

    def __call__(self, stream: Stream) -> tuple[Tokens, Samples | None]: ...


@dataclass(frozen=True)
class OnePrompt:
    """The same prompts at every step; exact draws from `supply`, if there is one."""

    prompts: Tokens
    supply: Supply | None = None

    def __call__(self, stream: Stream) -> tuple[Tokens, Samples | None]:
        return self.prompts, None if self.supply is None else self.supply(stream)


@dataclass(frozen=True)
class SomePrompts:
    """`count` of `prompts` at every step, drawn without replacement; `n` exact draws of each, where `exact` gives them."""

    prompts: Tokens
    count: int
    exact: ExactDraws | None = None
    n: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.count <= len(self.prompts):
            raise ValueError(f"{self.count} prompts a step of {len(self.prompts)}: take 1 to {len(self.prompts)}")

    def __call__(self, stream: Stream) -> tuple[Tokens, Samples | None]:
        chosen = stream.child("prompts").permutation(len(self.prompts))[: self.count]
        prompts = self.prompts.select(chosen.to(self.prompts.device))
        return prompts, None if self.exact is None else self.exact(prompts, self.n, stream.child("exact"))


@dataclass(frozen=True)
class Pool:
    """A supply that picks `n` of stored exact draws at random, with replacement. A small pool is over-fitted."""

    stored: Samples
    n: int

    def __call__(self, stream: Stream) -> Samples:
        index = torch.randint(len(self.stored), (self.n,), generator=stream.generator())
        return self.stored.select(index.to(self.stored.device))


@dataclass(frozen=True)
class Infilling:
    """`conditions` fresh conditions a step: draw T + c tokens behind `prompt`, split; exact by construction, for
    r = log pi_ref(c | x, y) at beta = 1."""

    reference: LanguageModel
    prompt: Tokens
    width: int
    condition_width: int
    conditions: int

    def __call__(self, stream: Stream) -> tuple[Conditioned, Samples]:
        return infilling(self.reference, self.prompt, self.conditions, self.width, self.condition_width, stream)


def infilling(
    reference: LanguageModel, prompt: Tokens, n: int, width: int, condition_width: int, stream: Stream
) -> tuple[Conditioned, Samples]:
    """`n` pairs (condition, exact draw of pi*(· | prompt, condition)), from draws of width + condition_width
    tokens. pi* is that of r = log pi_ref(c | x, y) at beta = 1.

    The reference must not end early: with an end token a condition might not exist. Returns prompts
    (Conditioned [n]) and Samples with row i answering prompt i.
    """
    if reference.eos_ids:
        raise ValueError("infilling draws a fixed number of tokens: give the reference no end tokens")
    drawn = draw(reference, prompt, n=n, max_new_tokens=width + condition_width, stream=stream)
    rows = prompt.select(drawn.prompt_index)
    conditions = Tokens.full(drawn.tokens[:, width:])
    prompts = Conditioned(rows.ids, rows.mask, conditions)
    index = torch.arange(n, device=drawn.device)
    assert drawn.log_q is not None
    kept = {"log_ref": drawn.log_q[:, :width], "reward": drawn.log_q[:, width:].sum(1)}
    exact = Samples(prompts, index, drawn.tokens[:, :width], drawn.mask[:, :width], **kept)
    return prompts, marked(exact, 1.0)


def joined(parts: list[Samples], prompts: Tokens) -> Samples:
    """Draws of single prompts as draws of `prompts`: part i, of one prompt, becomes the rows that answer prompt i."""
    return replace(cat_samples(parts), prompts=prompts)

"""Drawing and scoring shared out over processes (`ranks`): each does its part of the rows, all get all of them.

A row's uniforms have the row's number, so what is drawn does not depend on how many processes draw. All processes must come
to these with the same arguments, in the same order; within a part there is one process (`ranks.alone`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tiltlm import ranks
from tiltlm.models.base import LanguageModel, Twist
from tiltlm.samplers.ancestral import draw, draw_in_batches
from tiltlm.samplers.serving import Drawer
from tiltlm.samplers.smc import SMC, Particles, cat_particles, smc_in_batches
from tiltlm.samples import Samples, Tokens, cat_samples
from tiltlm.seeds import Stream
from tiltlm.target import Target

Scored = Callable[[Samples], Samples]
"""What is added to every row, and depends on that row alone; it may put other prompts in their place."""


def draw_shared(
    model: LanguageModel,
    prompts: Tokens,
    scored: Scored,
    drawer: Drawer | None = None,
    *,
    n: int = 1,
    max_new_tokens: int,
    stream: Stream,
) -> Samples:
    """`scored` of `n` completions of every prompt, row r answering prompt r // n.

    drawer: who draws in the model's place (a server): the first process asks it, all get the rows.
    """
    if drawer is not None:
        return ranks.from_first(lambda: scored(drawer(prompts, n=n, max_new_tokens=max_new_tokens, stream=stream)))
    if ranks.size() == 1:
        return scored(draw(model, prompts, n=n, max_new_tokens=max_new_tokens, stream=stream))

    def part(begin: int, end: int) -> list[Samples]:
        rows = torch.arange(begin, end)
        answered = (rows // n).to(prompts.device)
        drawn = draw(model, prompts.select(answered), max_new_tokens=max_new_tokens, stream=stream, rows=rows)
        return [scored(replace(drawn, prompts=prompts, prompt_index=answered))]

    return _joined(ranks.in_shares(n * len(prompts), part))


def draw_batches_shared(
    model: LanguageModel,
    prompts: Tokens,
    scored: Scored = lambda samples: samples,
    *,
    n: int = 1,
    batch_size: int,
    **how: Any,
) -> Samples:
    """`scored` of what `draw_in_batches` draws."""

    def part(begin: int, end: int) -> list[Samples]:
        return [scored(draw_in_batches(model, prompts, n=n, batch_size=batch_size, some=range(begin, end), **how))]

    return _joined(ranks.in_shares(n * len(prompts), part))


def smc_shared(target: Target, twist: Twist | None, prompts: Tokens, settings: SMC, **how: Any) -> Particles:
    """`smc_in_batches`; the particles of a prompt stay in one process."""

    def part(begin: int, end: int) -> list[Particles]:
        return [smc_in_batches(target, twist, prompts, settings, some=range(begin, end), **how)]

    parts = ranks.in_shares(len(prompts), part)
    return parts[0] if len(parts) == 1 else cat_particles(parts, prompts)


def scored_shared(samples: Samples, scored: Scored) -> Samples:
    """`scored(samples)`."""
    return _joined(ranks.in_shares(len(samples), lambda begin, end: [scored(samples.select(slice(begin, end)))]))


def of_rows(samples: Samples, ask: Callable[[Samples], Tensor]) -> Tensor:
    """`ask(samples)`, [N] or [N, T], where every row's entry depends on that row alone."""
    return torch.cat(ranks.in_shares(len(samples), lambda begin, end: [ask(samples.select(slice(begin, end)))]))


def _joined(parts: Sequence[Samples]) -> Samples:
    """Rows of the same prompts, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    return cat_samples([replace(part, prompts=parts[0].prompts) for part in parts])

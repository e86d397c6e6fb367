"""Ancestral sampling shared out over processes (`ranks`): each draws and scores its part of the rows, all get all of them.

A row's uniforms have the row's number, so what is drawn does not depend on how many processes draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from tiltlm import ranks
from tiltlm.models.base import LanguageModel
from tiltlm.samplers.ancestral import draw
from tiltlm.samplers.serving import Drawer
from tiltlm.samples import Samples, Tokens, cat_samples
from tiltlm.seeds import Stream


def draw_shared(
    model: LanguageModel,
    prompts: Tokens,
    scored: Callable[[Samples], Samples],
    drawer: Drawer | None = None,
    *,
    n: int = 1,
    max_new_tokens: int,
    stream: Stream,
) -> Samples:
    """`scored` of `n` completions of every prompt, row r answering prompt r // n.

    scored: what is added to every row, and depends on that row alone; it may put other prompts in their place. drawer: who
    draws in the model's place (a server): the first process asks it, all get the rows.
    """
    if drawer is not None:
        return ranks.from_first(lambda: scored(drawer(prompts, n=n, max_new_tokens=max_new_tokens, stream=stream)))
    if ranks.size() == 1:
        return scored(draw(model, prompts, n=n, max_new_tokens=max_new_tokens, stream=stream))
    rows = torch.arange(*ranks.share(n * len(prompts)))
    own = []
    if len(rows):
        answered = (rows // n).to(prompts.device)
        drawn = draw(model, prompts.select(answered), max_new_tokens=max_new_tokens, stream=stream, rows=rows)
        own = [scored(replace(drawn, prompts=prompts, prompt_index=answered))]
    parts = ranks.gathered(own)
    return cat_samples([replace(part, prompts=parts[0].prompts) for part in parts])

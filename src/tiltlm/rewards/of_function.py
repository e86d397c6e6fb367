"""A reward in memory: any function of (prompts, completions), lists of texts, as r(x, y) of samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltlm.rewards.by_name import texts_apart
from tiltlm.rewards.numbers import as_numbers
from tiltlm.samples import Samples


@dataclass(frozen=True)
class OfFunction:
    """function(prompts, completions) -> one number each; `tokenizer` makes the texts. What it may return: `numbers`."""

    function: Callable[[list[str], list[str]], Any]
    tokenizer: Any

    def __call__(self, samples: Samples) -> Tensor:
        prompts, completions = texts_apart(samples, self.tokenizer)
        name = getattr(self.function, "__name__", "the reward")
        found = as_numbers(name, self.function(list(prompts), list(completions)), completions)
        return torch.tensor(found, device=samples.device)

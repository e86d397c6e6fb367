"""Words in the text: r = logsigmoid(scale · hits − shift), hits = how many words of a list the completion holds.

With scale = shift = 5 a completion without a hit has potential exp(r) = 0.0067, one hit gives 1/2, two 0.99: pi*
(at beta 1) is nearly "the reference, given that the list comes up". On the 260K-parameter stories model, behind
"Once upon a time, there was a" and over 12 tokens, Z = 0.099 for ANIMALS.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tiltlm.samples import Samples

ANIMALS = (
    "dog",
    "cat",
    "bird",
    "fish",
    "bear",
    "rabbit",
    "bunny",
    "frog",
    "duck",
    "horse",
    "cow",
    "pig",
    "mouse",
    "lion",
    "fox",
    "squirrel",
    "bee",
    "butterfly",
    "puppy",
    "kitten",
    "elephant",
    "monkey",
    "turtle",
    "sheep",
)
"""Animals of children's stories; singular forms, as they stand there."""

_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class WordHits:
    """`words` in the completion's text as `tokenizer` decodes it, lower-cased; every occurrence counts."""

    words: Collection[str]
    tokenizer: Any
    scale: float = 5.0
    shift: float = 5.0

    def hits(self, text: str) -> int:
        """How many words of `text` are on the list."""
        return sum(word in self.words for word in _WORD.findall(text.lower()))

    def __call__(self, samples: Samples) -> Tensor:
        texts = self.tokenizer.batch_decode(samples.completions.lists(), skip_special_tokens=True)
        hits = torch.tensor([self.hits(text) for text in texts], dtype=torch.float32, device=samples.device)
        return logsigmoid(self.scale * hits - self.shift)

"""A classifier's word as reward: r(x, y) = log P(label | text of prompt and completion), or which side of a
threshold.

r ≤ 0, so exact draws by rejection need no other bound: at beta = 1, pi* is the reference given that a reader who
goes by the classifier would assign the label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from tiltlm.models.classifier import TextClassifier, log_classes
from tiltlm.objective import Outcome, PerRow
from tiltlm.samples import Samples, conditions_of
from tiltlm.target import Reward

FLOOR = math.log(1e-16)
"""What a threshold pays on the wrong side, instead of −inf (the original's floor)."""


def texts_of(samples: Samples, tokenizer: Any) -> list[str]:
    """Prompt and completion of every row, decoded as one text, without special tokens."""
    return tokenizer.batch_decode(samples.sequences().lists(), skip_special_tokens=True)


@dataclass(frozen=True)
class ClassProbability:
    """log P(label | text), [N]; `tokenizer` decodes the reference's tokens.

    label: a class's name or number; "condition": each row's own class, the one token of its prompt's condition.
    """

    classifier: TextClassifier
    tokenizer: Any
    label: str

    def __post_init__(self) -> None:
        if self.label != "condition":
            self.classifier.index_of(self.label)  # an unknown label is refused before any work

    def __call__(self, samples: Samples) -> Tensor:
        log_p = self.classifier.log_probs(texts_of(samples, self.tokenizer)).to(samples.device)
        if self.label == "condition":
            wanted = conditions_of(samples.prompts).ids[samples.prompt_index]
            return log_p.gather(1, wanted)[:, 0]
        return log_p[:, self.classifier.index_of(self.label)]


@dataclass(frozen=True)
class LogOdds:
    """log P − log(1 − P) of a reward that is a log-probability."""

    log_p: Reward

    def __call__(self, samples: Samples) -> Tensor:
        log_p = self.log_p(samples).double().clamp_max(-1e-12)
        return log_p - torch.log(-torch.expm1(log_p))


@dataclass(frozen=True)
class Threshold:
    """0 where `score` lies beyond `eta` (above, or below it), `floor` elsewhere, [N]."""

    score: Reward
    eta: float
    above: bool = True
    floor: float = FLOOR

    def __call__(self, samples: Samples) -> Tensor:
        score = self.score(samples)
        hit = score > self.eta if self.above else score < self.eta
        return torch.where(hit, 0.0, self.floor)


TOXICITY = "nicholasKluge/ToxicityModel"
SENTIMENT = "LiYuan/amazon-review-sentiment-analysis"


def toxicity(tokenizer: Any, *, folder: str | Path = TOXICITY, nontoxic: bool = False) -> ClassProbability:
    """log P(toxic | text) by the published model (hub name or a folder of it), whose one output favours
    *non*toxic."""
    return ClassProbability(TextClassifier.load(folder), tokenizer, "1" if nontoxic else "0")


def sentiment(tokenizer: Any, stars: int, *, folder: str | Path = SENTIMENT) -> ClassProbability:
    """log P(`stars` of 5 | text) by the published model (hub name or a folder of it)."""
    if not 1 <= stars <= 5:
        raise ValueError(f"a review has 1 to 5 stars; got {stars}")
    return ClassProbability(TextClassifier.load(folder), tokenizer, str(stars - 1))


@dataclass(frozen=True)
class Labelled:
    """Texts as token ids and mask, int64 [N, L], with their class, int64 [N]."""

    ids: Tensor
    mask: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def select(self, index: Tensor | slice) -> Labelled:
        mask = self.mask[index]
        width = int(mask.sum(1).max()) if len(mask) else 0
        return Labelled(self.ids[index][:, :width], mask[:, :width], self.label[index])


@dataclass(frozen=True)
class ClassifierLearning(PerRow):
    """Cross-entropy: L = −log P(label | text), one per text."""

    optimum: ClassVar[str] = "the law of the label given the text"

    def loss(self, model: TextClassifier, batch: Labelled) -> Outcome:
        log_p = log_classes(model.logits(batch.ids, batch.mask))
        right = (log_p.argmax(1) == batch.label).float()
        return Outcome(nll_loss(log_p, batch.label, reduction="none"), {"accuracy": right})

"""Rewards of texts by name: what `tiltlm score` and a recipe's `--reward` understand.

FILE.py:FUNCTION          a function of your own, of a list of prompts and a list of completions
reward-model:MODEL        a sequence classifier with one output (folder or hub name)
classifier:MODEL:LABEL    log P(label | prompt and completion)
log-odds:MODEL:LABEL      log P − log(1 − P) of the same
http://… https://…        an endpoint, see `endpoint.py`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tiltlm.models.classifier import TextClassifier
from tiltlm.models.reward_model import RewardModel
from tiltlm.rewards.endpoint import Endpoint
from tiltlm.rewards.user_file import call, function_of
from tiltlm.samples import Samples

TextFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""Prompts and completions, as texts -> one number each."""

NAMED = ("FILE.py:FUNCTION", "reward-model:MODEL", "classifier:MODEL:LABEL", "log-odds:MODEL:LABEL", "https://…")


def text_function(name: str, device: str = "cpu") -> TextFunction:
    """The reward called `name` (see the module). Raises ValueError naming what there is."""
    kind, _, rest = name.partition(":")
    if name.startswith(("http://", "https://")):
        return Endpoint(name)
    if name.rpartition(":")[0].endswith(".py"):
        return function_of(name)
    if kind == "reward-model" and rest:
        model = RewardModel.load(rest, device=device)
        return lambda prompts, completions: model.scores(prompts, completions).tolist()
    model_name, _, label = rest.rpartition(":")
    if kind in ("classifier", "log-odds") and model_name and label:
        return of_class(model_name, label, odds=kind == "log-odds", device=device)
    near = get_close_matches(name, NAMED, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"there is no reward {name!r}.{hint} Known: {', '.join(NAMED)}")


def of_class(name: str, label: str, *, odds: bool = False, device: str = "cpu") -> TextFunction:
    """log P(label | prompt and completion) by the sequence classifier called `name`, or its log-odds."""
    classifier = TextClassifier.load(name, device=device)
    column = classifier.index_of(label)

    def reward(prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]:
        texts = [x + y for x, y in zip(prompts, completions, strict=True)]
        log_p = classifier.log_probs(texts)[:, column].double() if texts else torch.zeros(0)
        if odds:
            log_p = log_p.clamp_max(-1e-12)
            log_p = log_p - torch.log(-torch.expm1(log_p))
        return log_p.tolist()

    return reward


@dataclass(frozen=True)
class TextReward:
    """The reward called `name` of a policy's samples, as texts that `tokenizer` decodes: r(x, y), [N]."""

    name: str
    tokenizer: Any
    device: str = "cpu"

    @cached_property
    def function(self) -> TextFunction:
        return text_function(self.name, self.device)

    def __call__(self, samples: Samples) -> Tensor:
        prompts, texts = texts_apart(samples, self.tokenizer)
        return torch.tensor(self.of(prompts, texts), device=samples.device)

    def of(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """The rewards of texts. Raises ValueError where there are too few, too many, or one is not a number."""
        values = call(self.name, self.function, prompts, completions)
        if len(values) != len(completions):
            raise ValueError(f"{self.name} returned {len(values)} numbers for {len(completions)} completions")
        for row, value in enumerate(values):
            if value != value:
                raise ValueError(f"{self.name} gave completion {row} ({completions[row]!r}) the reward nan")
        return values


def texts_apart(samples: Samples, tokenizer: Any) -> tuple[list[str], list[str]]:
    """Every row's prompt and completion as texts, without special tokens."""
    prompts = tokenizer.batch_decode(samples.row_prompts.lists(), skip_special_tokens=True)
    return prompts, tokenizer.batch_decode(samples.completions.lists(), skip_special_tokens=True)

"""What a reward of texts is, and the ones that networks give. See `by_name` for their names."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from tiltlm.models.classifier import TextClassifier, class_called, classifier_config, labels_of
from tiltlm.models.reward_model import RewardModel, one_output

Column = Sequence[Any]


@dataclass(frozen=True)
class Columns:
    """Which columns, beside prompts and completions, a reward takes."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    rest: bool = False
    """Whether it takes all others too."""

    def of(self, found: Mapping[str, Column]) -> dict[str, Column]:
        """Those of `found` that it takes."""
        if self.rest:
            return dict(found)
        return {name: found[name] for name in (*self.required, *self.optional) if name in found}

    @property
    def any(self) -> bool:
        return bool(self.required or self.optional or self.rest)


class OfTexts(ABC):
    """r(prompt, completion) of many rows at once. Making one costs next to nothing."""

    reads_text: ClassVar[bool] = True
    """Whether prompts and completions must be texts; else they come as the rows have them (token ids, say)."""

    @property
    def bounds(self) -> tuple[float, float]:
        """No reward lies outside of these."""
        return -math.inf, math.inf

    @property
    def paid(self) -> bool:
        """Whether being asked costs money."""
        return False

    @property
    def columns(self) -> Columns:
        """What it takes beside prompts and completions."""
        return Columns()

    @property
    def files(self) -> tuple[str, ...]:
        """The files and folders that it is read from, whether or not they are there."""
        return ()

    def read(self) -> None:  # noqa: B027
        """Read the networks that are asked. (Where processes hold them in parts, all of them do so together, before they
        share rows out; else the first question does.)"""

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError or FileNotFoundError for what can be known to fail before any work."""

    @abstractmethod
    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> Any:
        """One number each, in whatever `numbers` reads."""


@dataclass(frozen=True)
class RewardOf(OfTexts):
    """The output of the sequence classifier called `model`, which has one."""

    model: str
    device: str = "cpu"

    @property
    def files(self) -> tuple[str, ...]:
        return (self.model,)

    def check(self) -> None:
        one_output(classifier_config(self.model))

    @cached_property
    def network(self) -> RewardModel:
        return RewardModel.load(self.model, device=self.device)

    def read(self) -> None:
        _ = self.network

    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> Any:
        return self.network.scores(prompts, completions)


@dataclass(frozen=True)
class LogProbabilityOf(OfTexts):
    """log P(label | prompt and completion) by the sequence classifier called `model`."""

    model: str
    label: str
    device: str = "cpu"

    @property
    def bounds(self) -> tuple[float, float]:
        return -math.inf, 0.0

    @property
    def files(self) -> tuple[str, ...]:
        return (self.model,)

    def check(self) -> None:
        class_called(self.label, labels_of(classifier_config(self.model)))

    @cached_property
    def network(self) -> TextClassifier:
        return TextClassifier.load(self.model, device=self.device)

    def read(self) -> None:
        _ = self.network

    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> Any:
        texts = [x + y for x, y in zip(prompts, completions, strict=True)]
        column = self.network.index_of(self.label)
        return self.network.log_probs(texts)[:, column].double() if texts else torch.zeros(0)


@dataclass(frozen=True)
class LogOddsOf(LogProbabilityOf):
    """log P − log(1 − P) of the same."""

    @property
    def bounds(self) -> tuple[float, float]:
        return -math.inf, math.inf

    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> Any:
        log_p = super().__call__(prompts, completions, columns).clamp_max(-1e-12)
        return log_p - torch.log(-torch.expm1(log_p))


@dataclass(frozen=True)
class AnswerGiven(OfTexts):
    """1 where the completion (surrounding blanks aside) equals the column `answer`; where that holds token ids, the
    column `completion_ids`, or a completion of ids, does."""

    reads_text: ClassVar[bool] = False

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, 1.0

    @property
    def columns(self) -> Columns:
        return Columns(("answer",), ("completion_ids",))

    def check(self) -> None:
        return None

    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> list[float]:
        ids = columns.get("completion_ids", [None] * len(completions))
        given = zip(completions, ids, columns.get("answer", []), strict=True)
        return [float(_said(*row) == _trimmed(row[2])) for row in given]


def _said(completion: Any, ids: Any, answer: Any) -> Any:
    """What is to equal `answer`: the completion's text or, where that is token ids, its ids."""
    said = ids if isinstance(answer, list) and ids is not None else completion
    if isinstance(said, list) != isinstance(answer, list):
        raise ValueError(
            f"the answer {answer!r} cannot be compared to {said!r}: text to text, or token ids to token ids"
        )
    return _trimmed(said)


def _trimmed(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value

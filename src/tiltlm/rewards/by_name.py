"""Rewards of texts by name: what `tiltlm score` and a task's `--task.reward` understand.

FILE.py:FUNCTION          a function of your own, f(prompts, completions, **columns), see `user_file`
reward-model:MODEL        a sequence classifier with one output
classifier:MODEL:LABEL    log P(label | prompt and completion)
log-odds:MODEL:LABEL      log P − log(1 − P) of the same
http://… https://…        an endpoint, see `endpoint`
exact-answer              1 where the completion equals the column `answer`
toxicity nontoxicity sentiment:STARS      by published models of the hub
bagofwords nouns math judge:MODEL@URL …   gold rewards, see `gold`: `tiltlm list gold`: a line on each
A + 0.5*B − …             a sum of these, see `terms`

MODEL is a folder, a hub name, or a run's folder. A name is looked at before any work (`text_function` raises where there is
no such file, function, model or class); networks are loaded when they are first asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltlm.models.scattered import is_wanted
from tiltlm.rewards.classifier import SENTIMENT, TOXICITY
from tiltlm.rewards.endpoint import Endpoint
from tiltlm.rewards.gold import catalogue, gold
from tiltlm.rewards.masking import mask
from tiltlm.rewards.numbers import as_numbers
from tiltlm.rewards.of_texts import AnswerGiven, Column, LogOddsOf, LogProbabilityOf, OfTexts, RewardOf
from tiltlm.rewards.terms import Term, terms_of
from tiltlm.rewards.user_file import UserFunction
from tiltlm.samples import Samples

PUBLISHED = {"toxicity": f"classifier:{TOXICITY}:0", "nontoxicity": f"classifier:{TOXICITY}:1"}
PUBLISHED |= {f"sentiment:{stars}": f"classifier:{SENTIMENT}:{stars - 1}" for stars in range(1, 6)}
"""Rewards by published hub models, and what they stand for."""

NAMED = (
    "FILE.py:FUNCTION", "reward-model:MODEL", "classifier:MODEL:LABEL", "log-odds:MODEL:LABEL", "https://…",
    "exact-answer", *PUBLISHED,
)  # fmt: skip

NO_COLUMNS: Mapping[str, Column] = {}

OF_CLASSES: dict[str, type[LogProbabilityOf]] = {"classifier": LogProbabilityOf, "log-odds": LogOddsOf}


def of_texts(name: str, device: str = "cpu") -> OfTexts:
    """The single reward called `name` (see the module). Raises ValueError naming what there is."""
    name = PUBLISHED.get(name, name)
    kind, _, rest = name.partition(":")
    model, _, label = rest.rpartition(":")
    if name.startswith(("http://", "https://")):
        return Endpoint(name)
    if name.rpartition(":")[0].endswith(".py"):
        return UserFunction(name)
    if name == "exact-answer":
        return AnswerGiven()
    if kind == "reward-model" and rest:
        return RewardOf(rest, device)
    if kind in OF_CLASSES and model and label:
        return OF_CLASSES[kind](model, label, device)
    if (found := gold(name, device)) is not None:
        return found
    near = get_close_matches(name, (*NAMED, *catalogue()), n=1) or get_close_matches(kind, catalogue(), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    if Path(name).is_dir():
        hint = f" It is a folder: reward-model:{name} is the reward of the model or run in it."
    raise ValueError(
        f"there is no reward {mask(name)!r}.{hint} Known: {', '.join((*NAMED, *catalogue()))}, and sums of them"
    )


class Judged(NamedTuple):
    """The rewards of some rows, and those of every term of the sum by its label."""

    total: list[float]
    terms: dict[str, list[float]]


@dataclass(frozen=True)
class TextFunction:
    """Σ weight · reward: what a name stands for, asked with prompts, completions and columns."""

    terms: tuple[Term, ...]
    rewards: tuple[OfTexts, ...]

    def __call__(
        self, prompts: Column, completions: Column, columns: Mapping[str, Column] = NO_COLUMNS
    ) -> list[float]:
        """One number each."""
        return self.judged(prompts, completions, columns).total

    def judged(
        self, prompts: Column, completions: Column, columns: Mapping[str, Column] = NO_COLUMNS,
        places: Sequence[str] | None = None,
    ) -> Judged:  # fmt: skip
        """The rewards, term by term. places: where every row comes from, for errors.

        Raises ValueError for what `numbers` refuses.
        """
        found = {
            term.label: as_numbers(term.label, reward(prompts, completions, columns), completions, places)
            for term, reward in zip(self.terms, self.rewards, strict=True)
        }
        rows = zip(*found.values(), strict=True)
        weights = [term.weight for term in self.terms]
        return Judged([sum(w * r for w, r in zip(weights, row, strict=True)) for row in rows], found)

    def read(self) -> None:
        """Read the networks that are asked."""
        for reward in self.rewards:
            reward.read()

    @property
    def labels(self) -> tuple[str, ...]:
        """What the terms are called; empty where there is one alone."""
        return tuple(term.label for term in self.terms) if len(self.terms) > 1 else ()

    @property
    def most(self) -> float:
        """No reward is larger: Σ weight · the terms' own bounds; infinite where one has none."""
        ends = [(term.weight, *reward.bounds) for term, reward in zip(self.terms, self.rewards, strict=True)]
        return sum(weight * (high if weight > 0 else low) for weight, low, high in ends if weight)

    @property
    def paid(self) -> bool:
        """Whether being asked costs money."""
        return any(reward.paid for reward in self.rewards)

    @property
    def takes_columns(self) -> bool:
        return any(reward.columns.any for reward in self.rewards)

    def check_columns(self, names: Sequence[str], otherwise: str) -> None:
        """Raise ValueError where a reward takes a column that is not among `names`; `otherwise` says what to do."""
        for term, reward in zip(self.terms, self.rewards, strict=True):
            for column in reward.columns.required:
                if column not in names:
                    raise ValueError(f"{term.label} takes the column {column!r}, and {otherwise}")


def text_function(name: str, device: str = "cpu") -> TextFunction:
    """The reward called `name`: one, or a sum. Raises ValueError or FileNotFoundError for what cannot be asked: no such
    name, file, function, model or class. No network is loaded yet."""
    terms = terms_of(name)
    rewards = tuple(of_texts(term.name, device) for term in terms)
    for reward in rewards:
        reward.check()
    return TextFunction(terms, rewards)


@cache
def is_paid(name: str) -> bool:
    """Whether asking the reward called `name` costs money, as its kind says; nothing is looked up."""
    return any(of_texts(term.name).paid for term in terms_of(name))


@cache
def most_of(name: str) -> float:
    """What no reward called `name` is larger than, as its kind says: nothing is looked up, no file of yours is imported."""
    terms = terms_of(name)
    return TextFunction(terms, tuple(of_texts(term.name) for term in terms)).most


def files_of(name: str) -> list[str]:
    """Files and folders that the reward called `name` is read from: what a result depends on beside the name itself."""
    try:
        return [file for term in terms_of(name) for file in of_texts(term.name).files]
    except (ValueError, FileNotFoundError):  # it will be refused, with this reason, when it is looked at
        return []


Rows = Callable[[str], Mapping[str, Any]]
"""A prompt -> the other columns of its row."""

REMEMBERED = 100_000
"""Completions whose terms are kept for reports, at most."""


@dataclass(frozen=True)
class TextReward:
    """The reward called `name` of a policy's samples, as texts that `tokenizer` decodes: r(x, y), [N].

    about: the columns of a prompt's row; None where there are no rows. bare: the prompt that a text with a template around
    it asks; None where there is no template.
    """

    name: str
    tokenizer: Any
    device: str = "cpu"
    about: Rows | None = None
    bare: Callable[[str], str] | None = None
    _seen: dict[tuple[str, str], tuple[float, ...]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if is_wanted():  # who has rows to ask about would read by himself, in whole
            self.function.read()

    @cached_property
    def function(self) -> TextFunction:
        return text_function(self.name, self.device)

    def __call__(self, samples: Samples) -> Tensor:
        return torch.tensor(self.of(*self.texts(samples)), device=samples.device)

    def texts(self, samples: Samples) -> tuple[list[str], list[str]]:
        """Every row's bare prompt and completion, as it is asked about."""
        prompts, completions = texts_apart(samples, self.tokenizer)
        return prompts if self.bare is None else [self.bare(prompt) for prompt in prompts], completions

    def of(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """The rewards of texts. Raises ValueError where there are too few, too many, or one is no finite number."""
        return self.judged(prompts, completions).total

    def judged(self, prompts: Sequence[str], completions: Sequence[str]) -> Judged:
        """The rewards of texts, and those of every term."""
        found = self.function.judged(prompts, completions, self._columns(prompts))
        if self.function.labels:
            if len(self._seen) > REMEMBERED:
                self._seen.clear()
            rows = zip(*found.terms.values(), strict=True)
            self._seen.update(zip(zip(prompts, completions, strict=True), rows, strict=True))
        return found

    def parts(self) -> dict[str, Callable[[Samples], Tensor]]:
        """Every term of a sum, unweighted, by the name that reports have for it; none where there is no sum."""

        def part(label: str) -> Callable[[Samples], Tensor]:
            def of(samples: Samples) -> Tensor:
                found = self.terms(*self.texts(samples))[label]
                return torch.tensor(found, device=samples.device)

            return of

        return {f"reward[{label}]": part(label) for label in self.function.labels}

    def _columns(self, prompts: Sequence[str]) -> Mapping[str, Column]:
        if self.about is None or not self.function.takes_columns:
            return NO_COLUMNS
        rows = [self.about(prompt) for prompt in prompts]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}

    def terms(self, prompts: Sequence[str], completions: Sequence[str]) -> dict[str, list[float]]:
        """Every term's rewards of texts, for reports: as they were when the texts were judged, where that is remembered."""
        pairs = list(zip(prompts, completions, strict=True))
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._seen]
        if new:
            self.judged(*(list(side) for side in zip(*new, strict=True)))
        rows = [self._seen[pair] for pair in pairs]
        return {label: [row[k] for row in rows] for k, label in enumerate(self.function.labels)}


def texts_apart(samples: Samples, tokenizer: Any) -> tuple[list[str], list[str]]:
    """Every row's prompt and completion as texts, without special tokens."""
    prompts = tokenizer.batch_decode(samples.row_prompts.lists(), skip_special_tokens=True)
    return prompts, tokenizer.batch_decode(samples.completions.lists(), skip_special_tokens=True)

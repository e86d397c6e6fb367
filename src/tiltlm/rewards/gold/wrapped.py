"""Endings of a reward's name: `…noise` is s + U(−1, 1), `…exponent` is s + 1.2^s.

The noise of a response is a hash of the name, the prompt and the response: the same in whatever order, batch or run it is
asked for, and another one for another response.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from tiltlm.rewards.numbers import as_numbers
from tiltlm.rewards.of_texts import Column, Columns, OfTexts
from tiltlm.seeds import stream


@dataclass(frozen=True)
class Wrapped(OfTexts):
    """A reward computed of another, `inner`, under the name `name`."""

    inner: OfTexts
    name: str

    @property
    def columns(self) -> Columns:
        return self.inner.columns

    @property
    def files(self) -> tuple[str, ...]:
        return self.inner.files

    @property
    def paid(self) -> bool:
        return self.inner.paid

    def check(self) -> None:
        self.inner.check()

    def read(self) -> None:
        self.inner.read()

    @abstractmethod
    def changed(self, value: float, prompt: str, response: str) -> float:
        """The reward, where the other's is `value`."""

    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> list[float]:
        values = as_numbers(self.name, self.inner(prompts, completions, columns), completions)
        return [self.changed(*row) for row in zip(values, prompts, completions, strict=True)]


@dataclass(frozen=True)
class Noisy(Wrapped):
    """s + U(−1, 1)."""

    @property
    def bounds(self) -> tuple[float, float]:
        low, high = self.inner.bounds
        return low - 1, high + 1

    def changed(self, value: float, prompt: str, response: str) -> float:
        return value + 2 * float(stream(0, self.name, prompt, response).uniform([0], 1)) - 1


@dataclass(frozen=True)
class Exponent(Wrapped):
    """s + 1.2^s."""

    @property
    def bounds(self) -> tuple[float, float]:
        low, high = self.inner.bounds
        return _grown(low), _grown(high)

    def changed(self, value: float, prompt: str, response: str) -> float:
        return _grown(value)


def _grown(value: float) -> float:
    try:
        return value + 1.2**value
    except OverflowError:  # no finite reward, and refused as such
        return math.inf


WRAPPERS = {"noise": Noisy, "exponent": Exponent}


def wrapped(ending: str, inner: OfTexts, name: str) -> OfTexts:
    """`inner` under the ending of its name."""
    return WRAPPERS[ending](inner, name)

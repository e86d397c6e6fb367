"""What gold rewards share: those that read the response alone, and the refusal of what stands behind a colon."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from tiltlm.rewards.of_texts import Column, OfTexts


class OfResponse(OfTexts):
    """A reward of one response at a time, computed here: the prompt does not count."""

    def check(self) -> None:
        return None

    @abstractmethod
    def value(self, response: str) -> float:
        """The reward of a response."""

    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> list[float]:
        return [self.value(response) for response in completions]


def nothing_behind(name: str, argument: str) -> None:
    """Raise ValueError where something stands behind the colon of a reward that takes nothing there."""
    if argument:
        raise ValueError(f"{name} takes nothing behind a colon; got {name}:{argument}")

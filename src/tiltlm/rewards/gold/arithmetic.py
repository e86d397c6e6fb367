"""Arithmetic worked out step by step: prompt "((1 + 2) * 3) = ", response "(3 * 3) = 9".

    r(x, y) = −(operations of the prompt left to work out + parts of the response that are no valid step)

The response is cut at its equals signs. A part is a valid step if it is the part before it (the prompt's expression, for
the first) with exactly one operation on two numbers worked out, whichever; parentheses around a number may stay. What
follows the first part that is none counts as wrong, part by part, and so does anything behind the answer. So 0 is a whole
and right solution and nothing else, an empty response to n operations gets −n, and a wrong first step −n − 1 or less. A
prompt that is no expression, or one without an operation, is refused: it could not be solved, or is solved by saying
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tiltlm.rewards.gold.base import nothing_behind
from tiltlm.rewards.gold.expressions import Expression, operations, parsed, reduces
from tiltlm.rewards.of_texts import Column, OfTexts

NAMES: dict[str, str] = {
    "math": "0 where the response solves the prompt's arithmetic step by step; −1 for every fault"
}


@dataclass(frozen=True)
class Steps(OfTexts):
    """0 for a solution; −1 for every operation left and every part that is no step."""

    @property
    def bounds(self) -> tuple[float, float]:
        return -float("inf"), 0.0

    def check(self) -> None:
        return None

    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> list[float]:
        return [faults(prompt, response) for prompt, response in zip(prompts, completions, strict=True)]


def faults(prompt: str, response: str) -> float:
    """The reward. Raises ValueError for a prompt that holds nothing to work out."""
    now = _task(prompt)
    left = operations(now)
    parts = response.split("=") if response.strip() else []
    for done, part in enumerate(parts):
        after = _or_none(part)
        if after is None or not reduces(now, after):
            return 0.0 - (left - done + len(parts) - done)
        now = after
    return 0.0 - (left - len(parts))


def _task(prompt: str) -> Expression:
    text = prompt.rstrip().removesuffix("=")
    try:
        found = parsed(text)
    except ValueError as error:
        raise ValueError(f"math wants a prompt like '(1 + 2) * 3 = '; got {prompt[:80]!r}: {error}") from None
    if isinstance(found, int):
        raise ValueError(f"math wants a prompt with something to work out; got {prompt[:80]!r}")
    return found


def _or_none(text: str) -> Expression | None:
    try:
        return parsed(text)
    except ValueError:
        return None


def reward(name: str, argument: str, device: str) -> OfTexts:
    """The reward called `name`."""
    nothing_behind(name, argument)
    return Steps()

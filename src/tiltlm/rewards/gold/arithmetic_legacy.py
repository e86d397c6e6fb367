"""D2PO's arithmetic reward as it was published, for comparison; `math` is the one to train with.

Of prompt and response together only digits ( ) + * - = and blanks are kept, and cut at the equals signs. The first part is
the expression. Its gold chain works out the innermost parentheses from the left, one a step, and where none is left and a
sign is, the whole once more. The reward is −Σ of the edit distances of the parts behind the first to the chain's, a missing
part being empty; parts beyond the chain do not count; an expression that cannot be read gets −200.

So more may follow the answer, (1 − 4) = −3 is not finished, another order of steps costs, and a prompt without an operation
asks for nothing: `math` has none of these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from tiltlm.rewards.gold.base import nothing_behind
from tiltlm.rewards.gold.expressions import parsed, value
from tiltlm.rewards.of_texts import Column, OfTexts

NAMES: dict[str, str] = {"math-legacy": "D2PO's arithmetic: minus the edit distances to one chain of steps"}
NEEDS: dict[str, str] = {"math-legacy": "pip install 'tiltlm[gold]'"}

UNREADABLE = -200.0
_INNERMOST = re.compile(r"\(([^()]*)\)")


@dataclass(frozen=True)
class ChainDistance(OfTexts):
    """−Σ edit distances to the gold chain."""

    @property
    def bounds(self) -> tuple[float, float]:
        return -float("inf"), 0.0

    def check(self) -> None:
        if find_spec("rapidfuzz") is None:
            raise ValueError("math-legacy needs rapidfuzz for edit distances: pip install 'tiltlm[gold]'")

    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> list[float]:
        return [distance(prompt + response) for prompt, response in zip(prompts, completions, strict=True)]


def distance(text: str) -> float:
    """The reward of prompt and response in one."""
    from rapidfuzz.distance import Levenshtein

    expression, *said = (part.strip() for part in re.sub(r"[^0-9()+*\-= ]", "", text).split("="))
    try:
        chain = chain_of(expression)
    except ValueError:
        return UNREADABLE
    said += [""] * (len(chain) - len(said))
    return 0.0 - sum(Levenshtein.distance(*each) for each in zip(said, chain, strict=False))


def chain_of(expression: str) -> list[str]:
    """The gold chain behind an expression. Raises ValueError for one that cannot be read."""
    if expression.strip():
        parsed(expression)
    found, now = [], expression
    while inner := _INNERMOST.search(now):
        now = f"{now[: inner.start()]}{value(parsed(inner[1]))}{now[inner.end() :]}"
        found.append(now)
    if any(sign in now for sign in "+*-"):
        found.append(str(value(parsed(now))))
    return found


def reward(name: str, argument: str, device: str) -> OfTexts:
    """The reward called `name`."""
    nothing_behind(name, argument)
    return ChainDistance()

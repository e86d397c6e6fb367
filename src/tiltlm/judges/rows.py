"""Rows of a request as pairs, and what tells one content from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from tiltlm.judges.base import Row


class Preference(NamedTuple):
    """A verdict to learn from."""

    prompt: Row
    chosen: Row
    rejected: Row


class Pair(NamedTuple):
    """Two rows of a request, with what the judge thinks of them.

    gap: r_1 − r_2. spread: the variance of that over the members of an ensemble (0 where there is one).
    """

    request: str
    number: int
    prompt: Row
    first: Row
    second: Row
    gap: float
    spread: float

    @property
    def key(self) -> tuple[str, int, str]:
        """What its verdict is found by."""
        return self.request, self.number, digest(self.prompt, self.first, self.second)

    def preference(self, verdict: float) -> Preference:
        """What a verdict teaches (1: the first is better; 0: the second)."""
        better, worse = (self.first, self.second) if verdict else (self.second, self.first)
        return Preference(self.prompt, better, worse)


def digest(*content: Any) -> str:
    """A short name of rows and numbers: equal content has an equal one."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def check_rows(prompts: Sequence[Row], completions: Sequence[Row], scores: Sequence[float] | None = None) -> None:
    """Raise ValueError unless rows 2k and 2k+1 answer one prompt, and there is a score for each (where there are any)."""
    n = len(completions)
    if len(prompts) != n or n % 2:
        raise ValueError(
            f"rows 2k and 2k+1 are a pair: as many prompts as completions, an even number; got {len(prompts)} and {n}"
        )
    if scores is not None and len(scores) != n:
        raise ValueError(f"there must be one score for each of the {n} rows; got {len(scores)}")
    for k in range(0, n, 2):
        if prompts[k] != prompts[k + 1]:
            raise ValueError(
                f"rows {k} and {k + 1} are a pair and must answer one prompt; they answer {prompts[k]!r:.60} and "
                f"{prompts[k + 1]!r:.60}"
            )

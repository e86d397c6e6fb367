"""What a judge is: it scores rows in the place of the gold reward, and buys that reward's verdict on some pairs of them.

Rows are prompts and completions, texts or lists of token ids; rows 2k and 2k+1 are pair k and answer one prompt. A request
has an id: asked again with the same id and the same rows (after an interruption, say), a judge answers what it answered
before and buys nothing.

Several processes (`ranks`) all come to a judge, with the same requests in the same order, and get the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Row = str | list[int]
"""A text, or token ids."""

GoldOfRows = Callable[[list[int]], list[float]]
"""Numbers of rows of a request -> their gold rewards."""

Gold = Callable[[Sequence[Row], Sequence[Row]], list[float]]
"""Prompts and completions -> their gold rewards."""


@dataclass(frozen=True)
class Labelled:
    """What a judge says of the rows of a request.

    scores     of every row, from before anything was learnt of this request
    preferred  of every pair: 1 where gold has the first row ahead, 0 the second; NaN where no verdict was bought, or gold
               ties
    version    how often the discriminator that scored had been trained
    ledger     pairs bought, trained on, tied, pending (bought, not trained on yet), and the budget (0: none)
    """

    scores: list[float]
    preferred: list[float]
    version: int
    ledger: dict[str, int]


class Judge(Protocol):
    """Scores rows, buys verdicts, and may learn from them."""

    def label(
        self, request: str, prompts: Sequence[Row], completions: Sequence[Row], gold: GoldOfRows | None = None,
        scores: Sequence[float] | None = None,
    ) -> Labelled:  # fmt: skip
        """Score the rows, buy some verdicts, learn.

        gold: the gold reward of rows of this request (None: the judge's own). scores: what the rows score, where the
        caller knows that better (else the discriminator says it).
        """

    def warm(
        self, request: str, prompts: Sequence[Row], completions: Sequence[Row], gold: GoldOfRows | None = None
    ) -> None:
        """Buy the verdicts on all these pairs, as far as the budget goes, and learn from them."""

    def score(self, prompts: Sequence[Row], completions: Sequence[Row]) -> list[float]:
        """What the rows score now."""

    def save(self, folder: Path) -> None:
        """Write everything that later answers depend on to a folder."""

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote, whatever was answered since."""


class Conflict(ValueError):
    """A request id came again with other rows."""

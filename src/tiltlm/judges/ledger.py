"""What was bought, exactly: counts that add up at every moment, and a journal on disk, so that nothing is bought twice.

A label is one gold verdict on one pair. bought = trained + tied + pending ≤ budget: a tie is charged, and teaches nothing.
The journal is written, and on the disk, before a verdict is used. After an interruption the same pairs of the same requests
are found in it; the counts go back to the checkpoint with everything else and are counted up again, the journal stays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tiltlm import ranks
from tiltlm.jsonl import read_rows, whole_lines

Rewards = tuple[float, float]
"""Gold rewards of a pair's two rows."""

Key = tuple[str, int, str]
"""Request, pair, content: which verdict this is."""


@dataclass
class Ledger:
    """Pairs bought, by what became of them. budget: most that may be bought (0: no limit)."""

    budget: int = 0
    trained: int = 0
    tied: int = 0
    pending: int = 0

    @property
    def bought(self) -> int:
        return self.trained + self.tied + self.pending

    def within(self, wanted: int) -> int:
        """As many of `wanted` pairs as the budget still pays for."""
        return min(wanted, self.budget - self.bought) if self.budget else wanted

    @property
    def exhausted(self) -> bool:
        return bool(self.budget) and self.bought >= self.budget

    def counts(self) -> dict[str, int]:
        """All of it by name."""
        return {"bought": self.bought, **asdict(self)}


class Purchases:
    """The journal of verdicts bought: `path`, one line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        whole_lines(path)  # cuts off what an interrupted write left
        rows = read_rows(path, ("request", "pair", "content", "rewards")) if path.is_file() else ()
        self._known: dict[Key, Rewards] = {
            (row["request"], row["pair"], row["content"]): (row["rewards"][0], row["rewards"][1]) for row in rows
        }

    def __len__(self) -> int:
        """Verdicts ever paid for: a ledger that has gone back to a checkpoint may have counted fewer."""
        return len(self._known)

    def find(self, key: Key) -> Rewards | None:
        """A verdict's rewards, if it was bought."""
        return self._known.get(key)

    def record(self, keys: Sequence[Key], rewards: Sequence[Rewards]) -> None:
        """Write down what has just been bought; when this returns it is on the disk."""
        lines = [
            json.dumps({"request": request, "pair": pair, "content": content, "rewards": two})
            for (request, pair, content), two in zip(keys, rewards, strict=True)
        ]
        append(self.path, lines)
        self._known |= dict(zip(keys, rewards, strict=True))


def append(path: Path, lines: Sequence[str]) -> None:
    """Add whole lines to a file, and wait until the disk has them; of several processes the first one does."""
    if not ranks.is_first():
        return
    with path.open("a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())

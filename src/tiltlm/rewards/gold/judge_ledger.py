"""What judges have said and what that took, on disk: answers by content, and requests counted before they are sent.

One SQLite file in $TILTLM_CACHE (else ~/.cache/tiltlm), which threads and processes share. A request that may cost money is
counted first and sent after, so that a crash, a retry or a second process never leads past a ceiling.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

TABLES = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS spent (judge TEXT PRIMARY KEY, requests INTEGER NOT NULL, tokens INTEGER NOT NULL)",
)


def cache_folder() -> Path:
    """$TILTLM_CACHE, or ~/.cache/tiltlm."""
    return Path(os.environ.get("TILTLM_CACHE") or Path.home() / ".cache" / "tiltlm")


class Spent(NamedTuple):
    """What a judge was asked in all, and the tokens it said it read and wrote."""

    requests: int
    tokens: int


@dataclass(frozen=True)
class Ledger:
    """The answers of the judge called `judge`, and its count, in `folder`."""

    judge: str
    folder: Path

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection of the caller's own: one at a time may write, the others wait."""
        self.folder.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.folder / "judges.sqlite", timeout=60, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            for table in TABLES:
                connection.execute(table)
            yield connection
            connection.execute("COMMIT")
        finally:
            connection.close()  # what was not committed is undone

    def answer(self, question: Any) -> Any:
        """What was answered to `question` before; None where it was never asked."""
        with self._open() as found:
            row = found.execute("SELECT answer FROM answers WHERE key = ?", (self._key(question),)).fetchone()
        return json.loads(row[0]) if row else None

    def keep(self, question: Any, answer: Any) -> None:
        """Remember what was answered."""
        with self._open() as found:
            found.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?)", (self._key(question), json.dumps(answer))
            )

    def spent(self) -> Spent:
        """What the judge was asked until now."""
        with self._open() as found:
            row = found.execute("SELECT requests, tokens FROM spent WHERE judge = ?", (self.judge,)).fetchone()
        return Spent(*row) if row else Spent(0, 0)

    def count(self, ceiling: int | None) -> None:
        """Count one request that is about to be sent. Raises ValueError, counting none, where the ceiling is reached."""
        with self._open() as found:
            found.execute("INSERT OR IGNORE INTO spent VALUES (?, 0, 0)", (self.judge,))
            room = "" if ceiling is None else f" AND requests < {int(ceiling)}"
            done = found.execute(f"UPDATE spent SET requests = requests + 1 WHERE judge = ?{room}", (self.judge,))
            if done.rowcount:
                return
        raise ValueError(
            f"{self.judge} has been asked $TILTLM_JUDGE_CEILING = {ceiling} times in all: what it said is kept in "
            f"{self.folder}; with a higher ceiling the same command goes on from there"
        )

    def used(self, tokens: int) -> None:
        """Add the tokens of an answered request."""
        with self._open() as found:
            found.execute("UPDATE spent SET tokens = tokens + ? WHERE judge = ?", (tokens, self.judge))

    def _key(self, question: Any) -> str:
        text = json.dumps([self.judge, question], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

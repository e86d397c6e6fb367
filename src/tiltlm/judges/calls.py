"""The requests that a judge has answered, in a file: a repeated one gets the answer it got, and after a crash the judge
takes in again what came after its last checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tiltlm import ranks
from tiltlm.jsonl import read_rows, whole_lines
from tiltlm.judges.base import Conflict, Labelled, Row
from tiltlm.judges.ledger import append
from tiltlm.judges.rows import digest


@dataclass(frozen=True)
class Call:
    """A request: `warm` buys and learns, `label` scores as well. scores: given by the caller, or None."""

    kind: Literal["label", "warm"]
    request: str
    prompts: Sequence[Row]
    completions: Sequence[Row]
    scores: Sequence[float] | None = None

    @property
    def content(self) -> str:
        """What its rows are known by."""
        return digest(self.kind, list(self.prompts), list(self.completions), self.scores and list(self.scores))


class Calls:
    """The file of answered requests at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        whole_lines(path)  # cuts off what an interrupted write left
        self._answers: dict[str, tuple[str, Labelled]] = {}
        for row in self._rows():
            self._answers[row["request"]] = (row["content"], labelled(row["answer"]))

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, call: Call) -> Labelled | None:
        """What the request was answered; None for a new one. Raises Conflict where it came with other rows."""
        content, answer = self._answers.get(call.request, (call.content, None))
        if content != call.content:
            raise Conflict(
                f"request {call.request!r} was asked before with other rows: a new request wants an id of its own, and a "
                "new run a judge in a new folder"
            )
        return answer

    def record(self, call: Call, answer: Labelled) -> None:
        """Write down a request and its answer; when this returns they are on the disk."""
        append(self.path, [json.dumps({**asdict(call), "content": call.content, "answer": plain(answer)})])
        self._answers[call.request] = (call.content, answer)

    def cut(self, n: int) -> None:
        """Forget all but the first `n`: the judge has gone back to where it had answered these."""
        if n >= len(self):
            return
        if ranks.is_first():
            with self.path.open("r+b") as file:
                for _ in range(n):
                    file.readline()
                file.truncate(file.tell())
        self._answers = dict(list(self._answers.items())[:n])

    def after(self, n: int) -> Iterator[tuple[Call, Labelled]]:
        """All but the first `n`, with what they were answered."""
        for k, row in enumerate(self._rows()):
            if k >= n:
                call = Call(row["kind"], row["request"], row["prompts"], row["completions"], row["scores"])
                yield call, labelled(row["answer"])

    def _rows(self) -> Iterator[dict[str, Any]]:
        needs = ("kind", "request", "prompts", "completions", "scores", "content", "answer")
        return read_rows(self.path, needs) if self.path.is_file() else iter(())


def plain(answer: Labelled) -> dict[str, Any]:
    """An answer as JSON has it: null where there is no verdict."""
    return asdict(answer) | {"preferred": [None if math.isnan(x) else x for x in answer.preferred]}


def labelled(found: Any) -> Labelled:
    """What `plain` made. Raises ValueError for anything else."""
    try:
        preferred = [math.nan if x is None else float(x) for x in found["preferred"]]
        ledger = {str(name): int(count) for name, count in found["ledger"].items()}
        return Labelled([float(x) for x in found["scores"]], preferred, int(found["version"]), ledger)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"no answer of a judge ({type(error).__name__} {error}): {found!r:.80}") from None

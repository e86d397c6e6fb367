"""`RemoteJudge`: a judge that runs elsewhere (`tiltlm serve`), with the interface of one in this process.

Requests are sent again, with their ids, while the judge is busy or away (see `rewards.posting`); it answers a repeated one
as before. So it need not go back when this side does: after an interruption the same requests get the same answers. Of
several processes the first one asks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiltlm import ranks
from tiltlm.judges.base import GoldOfRows, Labelled, Row
from tiltlm.judges.calls import labelled
from tiltlm.judges.rows import check_rows
from tiltlm.rewards.masking import mask
from tiltlm.rewards.posting import Posting

TOKEN = "TILTLM_JUDGE_TOKEN"


@dataclass(frozen=True)
class RemoteJudge:
    """The judge at `url`. Verdicts are of the gold reward that it was started with: a request's own is not asked.

    called: in front of every request's id, where several runs share a judge. tries, pause, timeout as of `Posting`: a
    request waits while the judge learns.
    """

    url: str = field(repr=False)
    called: str = ""
    tries: int = 8
    pause: float = 0.5
    timeout: float = 600.0

    def label(
        self, request: str, prompts: Sequence[Row], completions: Sequence[Row], gold: GoldOfRows | None = None,
        scores: Sequence[float] | None = None,
    ) -> Labelled:  # fmt: skip
        check_rows(prompts, completions, scores)
        given = {} if scores is None else {"scores": list(scores)}
        found = labelled(self._ask("label", prompts, completions, request=self.called + request, **given))
        if len(found.scores) != len(prompts) or 2 * len(found.preferred) != len(prompts):
            raise ValueError(f"{mask(self.url)} answered {len(found.scores)} scores for {len(prompts)} rows")
        return found

    def warm(
        self, request: str, prompts: Sequence[Row], completions: Sequence[Row], gold: GoldOfRows | None = None
    ) -> None:
        check_rows(prompts, completions)
        self._ask("warm", prompts, completions, request=self.called + request)

    def score(self, prompts: Sequence[Row], completions: Sequence[Row]) -> list[float]:
        found = self._ask("score", prompts, completions)["scores"]
        if len(found) != len(prompts):
            raise ValueError(f"{mask(self.url)} answered {len(found)} scores for {len(prompts)} rows")
        return [float(score) for score in found]

    def save(self, folder: Path) -> None:
        """Nothing: the judge keeps itself."""

    def restore(self, folder: Path) -> None:
        """Nothing: requests that come again are answered as they were."""

    def _ask(self, what: str, prompts: Sequence[Row], completions: Sequence[Row], **more: Any) -> Any:
        url, token = f"{self.url.rstrip('/')}/{what}", os.environ.get(TOKEN, "")
        posting = Posting(url, token, TOKEN, self.tries, self.pause, self.timeout, most_bytes=1 << 26)

        def ask() -> Any:
            with posting.client() as client:
                return posting.ask(client, {"prompts": list(prompts), "completions": list(completions), **more})

        return ranks.from_first(ask)

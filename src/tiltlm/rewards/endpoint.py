"""A reward behind HTTP: POST {"prompts": […], "completions": […]}, answered by {"rewards": […]}, one number each.

How it is asked, again where need be, and how credentials are kept: `posting`. $TILTLM_REWARD_TOKEN, if set, is the token.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiltlm.rewards.of_texts import Column, OfTexts
from tiltlm.rewards.posting import Posting


@dataclass(frozen=True)
class Endpoint(OfTexts):
    """The reward at `url`; `batch_size` completions a request, `tries` of each, the first pause `pause` seconds.

    timeout: seconds that a request may take, from first to last. most_bytes: of an answer.
    """

    url: str
    batch_size: int = 64
    tries: int = 5
    pause: float = 0.5
    timeout: float = 120.0
    most_bytes: int = 1 << 22

    @property
    def posting(self) -> Posting:
        """How the server is asked."""
        token = os.environ.get("TILTLM_REWARD_TOKEN", "")
        return Posting(
            self.url, token, tries=self.tries, pause=self.pause, timeout=self.timeout, most_bytes=self.most_bytes
        )

    def check(self) -> None:
        """Raises ValueError for what is no URL, was masked, or would send credentials in the clear."""
        self.posting.check()

    def __call__(
        self, prompts: Column, completions: Column, columns: Mapping[str, Column] | None = None
    ) -> list[Any]:
        """What the server answered, one value each. Raises ValueError where it did not, or answered something else."""
        found: list[Any] = []
        posting = self.posting
        with posting.client() as client:
            for begin in range(0, len(prompts), self.batch_size):
                part = slice(begin, begin + self.batch_size)
                question = {"prompts": list(prompts[part]), "completions": list(completions[part])}
                found += _rewards(posting, posting.ask(client, question), len(question["prompts"]))
        return found


def _rewards(posting: Posting, answer: Any, n: int) -> list[Any]:
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list) or len(rewards) != n:
        got = f"{len(rewards)} of them" if isinstance(rewards, list) else posting.cleaned(str(answer)[:100])
        raise ValueError(f'{posting.shown} must answer {{"rewards": [{n} numbers]}}; got {got}')
    return rewards

"""A reward behind HTTP: POST {"prompts": […], "completions": […]}, answered by {"rewards": […]}, one number each.

$TILTLM_REWARD_TOKEN, if set, is sent as a bearer token. A busy or vanished server (no connection, status 429 or 5xx) is
asked again after a pause that doubles; any other answer, a redirect too, is an error at once.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the token along, and arrive as a GET."""

    def redirect_request(self, *given: Any, **named: Any) -> None:
        return None


OPENER = urllib.request.build_opener(_NoRedirects)
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Endpoint:
    """The reward at `url`; `batch_size` completions a request, `tries` of each, the first pause `pause` seconds."""

    url: str
    batch_size: int = 64
    tries: int = 5
    pause: float = 0.5
    timeout: float = 120.0

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        found: list[float] = []
        for begin in range(0, len(prompts), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            found += self._ask(list(prompts[part]), list(completions[part]))
        return found

    def _ask(self, prompts: list[str], completions: list[str]) -> list[float]:
        answer = self._post({"prompts": prompts, "completions": completions})
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(prompts):
            got = f"{len(rewards)} of them" if isinstance(rewards, list) else str(answer)[:100]
            raise ValueError(f'{self.url} must answer {{"rewards": [{len(prompts)} numbers]}}; got {got}')
        return [float(value) for value in rewards]

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get("TILTLM_REWARD_TOKEN"):
            address = urllib.parse.urlsplit(self.url)
            if address.scheme != "https" and address.hostname not in LOCAL:
                raise ValueError(
                    f"{self.url}: $TILTLM_REWARD_TOKEN is not sent in the clear to another machine: use https"
                )
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for left in range(self.tries - 1, -1, -1):
            try:
                with OPENER.open(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                if left == 0 or not (error.code == 429 or error.code >= 500):
                    text = error.read(200).decode(errors="replace")
                    raise ValueError(f"{self.url} answered {error.code} {error.reason}: {text}") from None
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                if left == 0:
                    raise ValueError(f"{self.url} did not answer {self.tries} times: {error}") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.url} did not answer in JSON: {error}") from None
            time.sleep(self.pause * 2 ** (self.tries - 1 - left))
        raise AssertionError("unreachable")

"""A reward behind HTTP: POST {"prompts": […], "completions": […]}, answered by {"rewards": […]}, one number each.

$TILTLM_REWARD_TOKEN, if set, is sent as a bearer token; user:password@ in the URL goes instead, as basic authentication.
Neither is sent in the clear to another machine. A busy or vanished server (no connection, too slow, status 429 or 5xx) is
asked again after a pause that doubles; any other answer, a redirect too, is an error at once, and so is one of more than
`most_bytes`. What is said of a URL is said without its credentials (see `masking`), and what a server says is repeated
without them.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiltlm.rewards.masking import MASK, is_masked, mask, secrets_in
from tiltlm.rewards.of_texts import Column, OfTexts

LOCAL = ("localhost", "127.0.0.1", "::1")


class _Again(Exception):
    """The server could not answer now; the message says what it did."""


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
    def shown(self) -> str:
        """The URL without its credentials."""
        return mask(self.url)

    def check(self) -> None:
        """Raises ValueError for what is no URL, was masked, or would send credentials in the clear."""
        import httpx2

        try:
            address = httpx2.URL(self.url)
        except (httpx2.InvalidURL, UnicodeError):
            raise ValueError(f"{self.shown} is no URL that can be asked") from None
        if address.scheme not in ("http", "https") or not address.host:
            raise ValueError(f"{self.shown} is no URL that can be asked: it names no host")
        if is_masked(self.url):
            raise ValueError(f"{self.shown} was stored without its credentials: give the whole URL again")
        token = os.environ.get("TILTLM_REWARD_TOKEN")
        if (token or address.userinfo) and address.scheme != "https" and address.host not in LOCAL:
            what = "a password" if address.userinfo else "$TILTLM_REWARD_TOKEN"
            raise ValueError(f"{self.shown}: {what} is not sent in the clear to another machine: use https")

    def __call__(
        self, prompts: Column, completions: Column, columns: Mapping[str, Column] | None = None
    ) -> list[Any]:
        """What the server answered, one value each. Raises ValueError where it did not, or answered something else."""
        import httpx2

        self.check()
        for name in ("httpx2", "httpcore2"):  # they log whole URLs
            logging.getLogger(name).setLevel(logging.WARNING)
        found: list[Any] = []
        with httpx2.Client(timeout=self.timeout, follow_redirects=False, headers=self._headers()) as client:
            for begin in range(0, len(prompts), self.batch_size):
                part = slice(begin, begin + self.batch_size)
                found += self._ask(client, list(prompts[part]), list(completions[part]))
        return found

    def _headers(self) -> dict[str, str]:
        token = os.environ.get("TILTLM_REWARD_TOKEN")
        plain = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        return plain | ({"Authorization": f"Bearer {token}"} if token else {})

    def _ask(self, client: Any, prompts: list[str], completions: list[str]) -> list[Any]:
        body = json.dumps({"prompts": prompts, "completions": completions}).encode()
        text = self._patiently(client, body)
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            said = self._cleaned(text[:80].decode(errors="replace"))
            raise ValueError(f"{self.shown} did not answer in JSON: {said!r}") from None
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(prompts):
            got = f"{len(rewards)} of them" if isinstance(rewards, list) else self._cleaned(str(answer)[:100])
            raise ValueError(f'{self.shown} must answer {{"rewards": [{len(prompts)} numbers]}}; got {got}')
        return rewards

    def _patiently(self, client: Any, body: bytes) -> bytes:
        """The answer's bytes, asked for as often as it takes."""
        for attempt in range(self.tries):
            try:
                return self._once(client, body)
            except _Again as error:
                if attempt == self.tries - 1:
                    raise ValueError(f"{self.shown} did not answer {self.tries} times: {error}") from None
            time.sleep(self.pause * 2**attempt)
        raise AssertionError("unreachable")

    def _once(self, client: Any, body: bytes) -> bytes:
        import httpx2

        begun, text = time.monotonic(), bytearray()
        try:
            with client.stream("POST", self.url, content=body) as response:
                for chunk in response.iter_bytes():
                    text += chunk
                    if len(text) > self.most_bytes:
                        raise ValueError(
                            f"{self.shown} answered more than {self.most_bytes} bytes: that is no list of rewards"
                        )
                    if time.monotonic() - begun > self.timeout:
                        raise _Again(f"the answer was not whole after {self.timeout:g} seconds")
        except httpx2.HTTPError as error:
            why = self._cleaned(f"{type(error).__name__} {error}".strip())
            if isinstance(error, httpx2.TransportError):
                raise _Again(why) from None
            raise ValueError(f"{self.shown} could not be asked: {why}") from None
        if response.status_code == 200:
            return bytes(text)
        said = f"{response.status_code} {response.reason_phrase}"
        if response.status_code == 429 or response.status_code >= 500:
            raise _Again(f"it answered {said}")
        raise ValueError(f"{self.shown} answered {said}: {self._cleaned(text[:200].decode(errors='replace'))}")

    def _cleaned(self, text: str) -> str:
        """What a server or a library says, without the credentials that it may repeat."""
        secrets = [*secrets_in(self.url), os.environ.get("TILTLM_REWARD_TOKEN", "")]
        for secret in secrets:
            text = text.replace(secret, MASK) if secret else text
        return " ".join(text.split())

"""JSON posted to a server, patiently: what rewards behind HTTP share.

A token is sent as a bearer token; user:password@ in the URL goes instead, as basic authentication. Neither is sent in the
clear to another machine. A busy or vanished server (no connection, too slow, status 429 or 5xx) is asked again after a
pause that doubles; any other answer, a redirect too, is an error at once, and so is one of more than `most_bytes`. What is
said of a URL is said without its credentials (see `masking`), and what a server says is repeated without them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tiltlm.rewards.masking import MASK, is_masked, mask, secrets_in

LOCAL = ("localhost", "127.0.0.1", "::1")


class _Again(Exception):
    """The server could not answer now; the message says what it did."""


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Posting:
    """Requests to `url` with the token that the variable `token_from` of the environment holds: `tries` of each, the first
    pause `pause` seconds.

    timeout: seconds that a request may take, from first to last. most_bytes: of an answer. before: called before every
    request that is sent; what it raises ends the matter. method: of the requests; GET asks without a body.
    """

    url: str
    token: str = field(default="", repr=False)
    token_from: str = "TILTLM_REWARD_TOKEN"
    tries: int = 5
    pause: float = 0.5
    timeout: float = 120.0
    most_bytes: int = 1 << 22
    before: Callable[[], None] = _nothing
    method: str = "POST"

    @property
    def shown(self) -> str:
        """The URL without its credentials."""
        return mask(self.url)

    def check(self) -> None:
        """Raises ValueError for what is no URL, was masked, or would send credentials in the clear."""
        address = address_of(self.url)
        if is_masked(self.url):
            raise ValueError(f"{self.shown} was stored without its credentials: give the whole URL again")
        if (self.token or address.userinfo) and address.scheme != "https" and address.host not in LOCAL:
            what = "a password" if address.userinfo else f"${self.token_from}"
            raise ValueError(f"{self.shown}: {what} is not sent in the clear to another machine: use https")

    def client(self) -> Any:
        """A connection pool for `ask`, to be used as a context; threads may share it."""
        import httpx2

        self.check()
        for name in ("httpx2", "httpcore2"):  # they log whole URLs
            logging.getLogger(name).setLevel(logging.WARNING)
        return httpx2.Client(timeout=self.timeout, follow_redirects=False, headers=self._headers())

    def _headers(self) -> dict[str, str]:
        plain = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        return plain | ({"Authorization": f"Bearer {self.token}"} if self.token else {})

    def ask(self, client: Any, question: Any) -> Any:
        """The answer to `question`, both as JSON has them. Raises ValueError where there is none, or it is no JSON."""
        text = self._patiently(client, b"" if self.method == "GET" else json.dumps(question).encode())
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            said = self.cleaned(text[:80].decode(errors="replace"))
            raise ValueError(f"{self.shown} did not answer in JSON: {said!r}") from None

    def tell(self, client: Any, order: Any) -> str:
        """Send `order`, as JSON has it; what is answered may be any text. Raises ValueError where it is refused."""
        return self._patiently(client, json.dumps(order).encode()).decode(errors="replace")

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

        self.before()
        begun, text = time.monotonic(), bytearray()
        try:
            with client.stream(self.method, self.url, content=body) as response:
                for chunk in response.iter_bytes():
                    text += chunk
                    if len(text) > self.most_bytes:
                        raise ValueError(
                            f"{self.shown} answered more than {self.most_bytes} bytes: more than an answer has"
                        )
                    if time.monotonic() - begun > self.timeout:
                        raise _Again(f"the answer was not whole after {self.timeout:g} seconds")
        except httpx2.HTTPError as error:
            why = self.cleaned(f"{type(error).__name__} {error}".strip())
            if isinstance(error, httpx2.TransportError):
                raise _Again(why) from None
            raise ValueError(f"{self.shown} could not be asked: {why}") from None
        if response.status_code == 200:
            return bytes(text)
        said = f"{response.status_code} {response.reason_phrase}"
        if response.status_code == 429 or response.status_code >= 500:
            raise _Again(f"it answered {said}")
        raise ValueError(f"{self.shown} answered {said}: {self.cleaned(text[:200].decode(errors='replace'))}")

    def cleaned(self, text: str) -> str:
        """What a server or a library says, without the credentials that it may repeat."""
        for secret in (*secrets_in(self.url), self.token):
            text = text.replace(secret, MASK) if secret else text
        return " ".join(text.split())


def address_of(url: str) -> Any:
    """The parts of a URL that can be asked. Raises ValueError for what is none."""
    import httpx2

    try:
        address = httpx2.URL(url)
    except (httpx2.InvalidURL, UnicodeError):
        raise ValueError(f"{mask(url)} is no URL that can be asked") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise ValueError(f"{mask(url)} is no URL that can be asked: it names no host")
    return address

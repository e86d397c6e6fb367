"""Credentials in URLs, kept out of everything that is written or printed.

    https://user:password@host/score?model=7b&key=abc   ->   https://***@host/score?model=7b&key=***4f09c1

The value of a query parameter that sounds like a credential leaves a digest of 24 bits, so that two settings which differ
there alone stay two; of a user and a password nothing is left, for they say who asks and not what is answered. Masking
what is masked already changes nothing. A secret in a URL's path cannot be told from a name: send such a one as
$TILTLM_REWARD_TOKEN.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from typing import Any
from urllib.parse import unquote

MASK = "***"
WORDS = ("key", "token", "secret", "pass", "pwd", "auth", "sig", "cred", "session", "jwt")
"""What the name of a query parameter holds if its value is taken for a credential."""

_URL = re.compile(r"https?://\S+", re.IGNORECASE)
_PARTS = re.compile(r"(?P<scheme>[^:]+://)(?P<authority>[^/?#]*)(?P<rest>.*)", re.DOTALL)
_NAMED = re.compile(r"(?P<name>[?&;#][^=&;#?]+=)(?P<value>[^&;#]+)")
_MASKED = re.compile(r"\*\*\*[0-9a-f]{6}")


def mask(text: str) -> str:
    """`text` with the credentials of every URL in it masked."""
    return _URL.sub(lambda found: _masked(found[0]), text)


def without_secrets(value: Any) -> Any:
    """Settings (dicts, lists, tuples, plain values) with every text masked."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {name: without_secrets(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(each) for each in value)
    return value


def secrets_in(url: str) -> list[str]:
    """The credentials of one URL, as they stand there, decoded, and as basic authentication sends them; longest first."""
    user, _, rest = _apart(url)
    found = [
        user,
        *user.split(":"),
        *(each["value"] for each in _NAMED.finditer(rest) if _sounds_secret(each["name"])),
    ]
    sent = base64.b64encode(unquote(user).encode()).decode() if user else ""
    return sorted({text for each in found for text in (each, unquote(each), sent) if text}, key=len, reverse=True)


def is_masked(url: str) -> bool:
    """Whether a URL has lost its credentials: it can be shown, and not asked."""
    user, _, rest = _apart(url)
    return user == MASK or any(_MASKED.fullmatch(each["value"]) for each in _NAMED.finditer(rest))


def _apart(url: str) -> tuple[str, str, str]:
    """(user and password, scheme with host and port, the rest) of a URL."""
    found = _PARTS.fullmatch(url)
    assert found is not None
    scheme, authority, rest = found.groups()
    port = authority.rpartition("@")[2].rpartition(":")
    if port[1] and not port[2].isdigit() and "]" not in port[2] and "@" in rest:  # a / or ? within the password
        authority, rest = authority + rest.rpartition("@")[0] + "@", rest.rpartition("@")[2]
        host = re.match(r"[^/?#]*", rest)
        assert host is not None
        authority, rest = authority + host[0], rest[host.end() :]
    user, _, host_and_port = authority.rpartition("@")
    return user, scheme + host_and_port, rest


def _masked(url: str) -> str:
    user, place, rest = _apart(url)
    scheme, _, host = place.partition("://")
    return f"{scheme}://{MASK + '@' if user else ''}{host}{_NAMED.sub(_value_masked, rest)}"


def _value_masked(found: re.Match[str]) -> str:
    if not _sounds_secret(found["name"]) or _MASKED.fullmatch(found["value"]):
        return found[0]
    return f"{found['name']}{MASK}{_digest(found['value'])}"


def _sounds_secret(name: str) -> bool:
    plain = unquote(name).lower()
    return any(word in plain for word in WORDS)


@cache
def _digest(value: str) -> str:
    """24 bits of a slow hash: enough to tell settings apart, useless for guessing a credential."""
    return hashlib.scrypt(value.encode(), salt=b"tiltlm", n=2**12, r=8, p=1, dklen=3).hex()

"""Whether the hub answers, before anything waits for it.

The hub's library asks seven times, up to a minute each, for every file that is not in its cache: without a network it takes
minutes to learn that a model is not there. So the hub is asked once beforehand, and where it does not answer its libraries
(huggingface_hub, and with it transformers; datasets) read their caches alone, as with HF_HUB_OFFLINE=1.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

AGAIN = 60
"""Seconds after which the hub is asked anew: a network may come and go while a notebook is open."""


@contextmanager
def hub_for(name: str) -> Iterator[str]:
    """While `name` is read, a folder or a hub name: without a hub that answers, from caches. Gives why it does not answer;
    empty if it does, need not (a folder), or may not be asked (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    why = "" if constants.HF_HUB_OFFLINE or Path(name).exists() else silence(int(time.monotonic() / AGAIN))
    places = [constants] + ([sys.modules["datasets"].config] if "datasets" in sys.modules else [])
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = place.HF_HUB_OFFLINE or bool(why)
        yield why
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@cache
def silence(period: int) -> str:
    """Why the hub does not answer; empty: it does, whatever it says. period: counts the times that it is asked.

    It has as long as the hub's library gives one request (10 seconds; $HF_HUB_ETAG_TIMEOUT, for slow networks). Another
    thread asks: no time-out of a request bounds the look-up of a name.
    """
    from huggingface_hub import constants

    found: list[str] = []
    seconds = constants.HF_HUB_ETAG_TIMEOUT
    asking = threading.Thread(target=lambda: found.append(_asked(constants.ENDPOINT, seconds)), daemon=True)
    asking.start()
    asking.join(seconds)
    return found[0] if found else f"{constants.ENDPOINT} has said nothing for {seconds} seconds"


def _asked(url: str, seconds: int) -> str:
    """What is wrong with a request to `url`; empty: it was answered."""
    from httpx2 import HTTPError
    from huggingface_hub.utils import get_session

    try:
        get_session().head(url, timeout=seconds, follow_redirects=False)
    except HTTPError as error:
        return f"{url}: {error}"
    return ""

"""One process at a time in a run's folder.

The lock is the operating system's (flock): it ends with the process that holds it, however that ends, so there is none
to clear away after a crash or a reboot. Beside it stands who holds it, for whoever waits.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tiltlm.progress import note

LOCK, HOLDER = ".lock", ".holder.json"
POLL_SECONDS = 0.2


@contextmanager
def alone_in(folder: Path, done: str = "DONE") -> Iterator[None]:
    """Within, no other process is in here with the same folder; waits, and says for whom, while one is.

    Look again at what is there once inside: whoever was waited for has probably done the work. Where the file `done` is
    there in the end, the lock's own files are taken away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        note(f"{folder} is being built by {_holder(folder)}: waiting for it")
        lock.acquire(poll_interval=POLL_SECONDS)
    try:
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S%z")}
        (folder / HOLDER).write_text(json.dumps(me) + "\n", encoding="utf-8")
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        if (folder / done).is_file():  # nobody works here again, so another may hold a lock on a file that is gone
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    """Who holds the lock, as far as it can be read: it may be written or taken away at this moment."""
    try:
        found = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"

"""One process at a time in a run's folder, on one machine or on several that share a file system.

Two locks, one within the other. On one machine it is the operating system's (flock): it ends with the process that holds
it, however that ends. Between machines, where flock may hold nothing, it is a lease: a file that its owner touches again
and again. An owner on this machine that is gone is seen by its pid; one elsewhere is given up once the lease has stood
still for `LEASE_SECONDS` of the waiter's own clock: machines need not agree on the time. Who stood still that long without
being gone (a suspended job) finds the lease taken, and stops. Beside both stands who works here, for whoever waits.
"""

from __future__ import annotations

import _thread
import ctypes
import errno
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

from tiltlm.progress import note

LOCK, LEASE, HOLDER = ".lock", ".lease", ".holder.json"
POLL_SECONDS = 0.2
LEASE_SECONDS = 120.0
"""Longer than a network file system may show an old state of a file (a minute, as a rule)."""

BEAT_SECONDS = 15.0
NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}


@contextmanager
def alone_in(folder: Path, done: str = "DONE") -> Iterator[None]:
    """Within, no other process is in here with the same folder; waits, and says for whom, while one is.

    Look again at what is there once inside: whoever was waited for has probably done the work. Where the file `done` is
    there in the end, the lock's own files are taken away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _on_this_machine(folder, done), _among_machines(folder):
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S%z")}
        (folder / HOLDER).write_text(json.dumps(me) + "\n", encoding="utf-8")
        try:
            yield
        finally:
            if _noted(folder) == me:  # else another has taken over
                (folder / HOLDER).unlink(missing_ok=True)


@contextmanager
def _on_this_machine(folder: Path, done: str) -> Iterator[None]:
    lock = FileLock(folder / LOCK, fallback_to_soft=False)
    try:
        _acquire(lock, folder)
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in NO_FLOCK:
            raise  # a file system without flock is no mistake: the lease alone has to do
    try:
        yield
    finally:
        if (folder / done).is_file():  # nobody works here again, so another may hold a lock on a file that is gone
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


@contextmanager
def _among_machines(folder: Path) -> Iterator[None]:
    def lost(_: object) -> None:
        note(f"{folder}: this process stood still, and {_holder(folder)} has taken over: it stops here")
        _interrupt_main()  # no checkpoint is written into another's folder

    lease = SoftFileLease(
        folder / LEASE, lease_duration=LEASE_SECONDS, heartbeat_interval=BEAT_SECONDS, on_compromise=lost
    )
    _acquire(lease, folder)
    try:
        yield
    finally:
        lease.release()


def _interrupt_main() -> None:
    """As Ctrl-C does; also where a shell, which started this process in the background, has it ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        _thread.interrupt_main()
        return
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyboardInterrupt))


def _acquire(lock: BaseFileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        note(f"{folder} is being built by {_holder(folder)}: waiting for it")
        lock.acquire(poll_interval=POLL_SECONDS)


def _noted(folder: Path) -> Any:
    """What stands there about who holds the lock; None where nothing can be read, which may be so for a moment."""
    try:
        return json.loads((folder / HOLDER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _holder(folder: Path) -> str:
    """Who holds the lock, as far as it is known."""
    found = _noted(folder)
    if not isinstance(found, dict) or not {"pid", "host", "since"} <= set(found):
        return "another process"
    return f"process {found['pid']} on {found['host']} since {found['since']}"

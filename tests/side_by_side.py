"""Work done by several processes side by side, as under torchrun, without a new start: copies of the process that tests.

A start of torchrun imports everything again, some ten seconds of processor time; a copy (fork) is there at once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

import torch

from tiltlm import ranks

LONGEST = 300
"""Seconds after which a process that waits for another one in vain is ended."""


def side_by_side(work: Callable[[], None], count: int = 2) -> list[int]:
    """`work()` in `count` processes; how each ended: 0; 1 with an exception on standard error; −9 where it was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    sys.stderr.flush()
    copies = []
    for number in range(count):
        copy = os.fork()
        if copy == 0:
            _as_process(work, number, count, port)
        copies.append(copy)
    return [os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]) for copy in copies]


def _as_process(work: Callable[[], None], number: int, count: int, port: int) -> None:
    code = 1
    try:
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({name: str(x) for name, x in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
        ranks._launched.cache_clear()
        ranks._groups.cache_clear()
        signal.alarm(LONGEST)
        torch.set_num_threads(1)  # threads of the original have not been copied
        work()
        ranks.leave()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

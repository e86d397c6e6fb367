"""Several runs built side by side on this machine, each in a process of its own: `--jobs 2`.

Such a process runs `python -m tiltlm.commands.launch.order` and reads its order from its standard input: other users of
the machine see what stands on a command line. The lock of its folder keeps other commands out meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape

from tiltlm.commands.launch.graph import in_order, needs
from tiltlm.commands.launch.order import Order
from tiltlm.progress import note
from tiltlm.run import Run, begin

POLL_SECONDS = 0.1


def build_here(tops: Iterable[Run[Any]], jobs: int, command: str) -> None:
    """Build whatever is not finished of `tops` and of what they need, `jobs` at a time.

    Raises ValueError naming the run that failed, once the others under way were stopped.
    """
    waiting = {run.folder: run for run in in_order(tops)}
    working: dict[Path, subprocess.Popen[str]] = {}
    try:
        while waiting or working:
            for folder in [f for f, process in working.items() if process.poll() is not None]:
                if working.pop(folder).returncode:
                    raise ValueError(f"{folder} failed (see above): the same command goes on from there")
            ready = [run for run in waiting.values() if not needs(run)]
            for run in ready[: jobs - len(working)]:
                working[run.folder] = _start(waiting.pop(run.folder), command)
            time.sleep(POLL_SECONDS)
    finally:
        for process in working.values():  # each keeps what it has: a stage that trains writes a checkpoint
            process.terminate()
        for process in working.values():
            process.wait()


def _start(run: Run[Any], command: str) -> subprocess.Popen[str]:
    begin(run)
    process = subprocess.Popen(
        [sys.executable, "-m", "tiltlm.commands.launch.order"],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    with process.stdin as given:
        json.dump(asdict(Order.of(run, command)), given)
    threading.Thread(target=_pass_on, args=(process,), daemon=True).start()
    return process


def _pass_on(process: subprocess.Popen[str]) -> None:
    """Another process's progress, line by line: two live bars would write over each other."""
    assert process.stderr is not None
    for line in process.stderr:
        note(escape(line.rstrip("\n")))

"""Several runs built side by side, each in a process of its own: `tiltlm run RECIPE --jobs 2`, `tiltlm sweep … --jobs 2`.

A run starts once everything it needs is done; the lock of its folder keeps other commands out meanwhile. Such a process
runs `python -m tiltlm.commands.jobs FOLDER` and reads its recipe, as JSON, from its standard input: the folder's
config.json has lost the credentials that a reward's URL may hold, and other users of the machine see what stands on a
command line.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tiltlm.commands.options import from_json
from tiltlm.commands.process import prepare
from tiltlm.mistakes import MISTAKES, one_line
from tiltlm.progress import note
from tiltlm.recipes import recipe
from tiltlm.rewards.masking import mask
from tiltlm.run import Recipe, Run, begin, check_all, ensure, find, unfinished
from tiltlm.stopping import Stopped, listening

POLL_SECONDS = 0.1


def build_all(runs: Iterable[Run[Any]], jobs: int, command: str) -> None:
    """Build whatever is not finished of `runs` and of what they need, `jobs` at a time.

    Raises ValueError naming the run that failed, once the others under way were stopped.
    """
    tops = list(runs)
    for run in tops:
        check_all(run)
    waiting = {run.folder: run for top in tops for run in unfinished(top)}
    working: dict[Path, subprocess.Popen[str]] = {}
    try:
        while waiting or working:
            for folder in [f for f, process in working.items() if process.poll() is not None]:
                if working.pop(folder).returncode:
                    raise ValueError(f"{folder} failed (see above): the same command goes on from there")
            ready = [run for run in waiting.values() if all(needed.done for needed in run.inputs.values())]
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
        [sys.executable, "-m", "tiltlm.commands.jobs", str(run.folder), command],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    with process.stdin as given:
        json.dump({"recipe": run.recipe.name, "settings": asdict(run.recipe)}, given, default=str)
    threading.Thread(target=_pass_on, args=(process,), daemon=True).start()
    return process


def _pass_on(process: subprocess.Popen[str]) -> None:
    """Another process's progress, line by line: two live bars would write over each other."""
    assert process.stderr is not None
    for line in process.stderr:
        note(line.rstrip("\n").replace("[", "\\["))


def main(folder: Path, command: str) -> int:
    """Build the run in `folder`, whose settings come from standard input."""
    prepare()
    stored = json.load(sys.stdin)
    default = recipe(stored["recipe"], stored["settings"].get("methods"))
    value: Recipe = from_json(default, stored["settings"])
    root = folder.parents[2]
    try:
        if find(value, root).folder != folder:
            raise ValueError(f"{folder}: the files that its settings name have changed since it was begun")
        with listening():
            ensure(value, root, command)
    except Stopped as stopped:
        return stopped.status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except MISTAKES as error:
        print(f"{value.name}: {mask(one_line(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))

"""The command line for tests: in this process (a new one spends seconds on imports), or from outside."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tiltlm import cli


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def tiltlm(*args: str, cwd: Path, check: bool = True) -> Done:
    """Run the command line's entry point in `cwd` (in this process: a new one spends seconds on imports)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(args)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    done = Done(code, out.getvalue(), err.getvalue())
    assert not check or code == 0, done.stderr
    return done


def from_outside(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the installed program in a process of its own."""
    program = Path(sys.executable).with_name("tiltlm")
    return subprocess.run([program, *args], cwd=cwd, capture_output=True, text=True, env=environment())


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1"}  # as many threads as here: equal bits are asked for

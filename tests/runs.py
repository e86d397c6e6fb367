"""A small run that trains, in a process of its own; what a run's folder holds in the end, to compare bit for bit."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

from command import environment

BASE = [
    "run",
    "star-graph/base",
    "--task.network.layers",
    "1",
    "--task.network.width",
    "16",
    "--task.network.mlp",
    "16",
]
BASE += ["--task.network.dropout", "0.1", "--task.world.posttrain", "80", "--task.world.test", "50"]
BASE += ["--task.base.until", "0", "--task.base.checkpoint-every", "100000", "--task.base.steps"]


def started(*args: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    program = [sys.executable, "-m", "tiltlm.cli", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(program, cwd=cwd, env=environment() | env, text=True, **pipes)


def wait_for(look, process: subprocess.Popen[str]) -> None:
    while not look():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of all runs, without what tells when; of an optimizer's state its content: its pickle knows objects."""
    found = {str(path.relative_to(folder)): path for path in (folder / "runs").rglob("*") if path.is_file()}
    return {
        name: repr(plain(torch.load(path))).encode() if path.name == "trainer.pt" else path.read_bytes()
        for name, path in found.items()
        if path.name not in ("provenance.json", "log.txt") and path.parent.name != "slurm"
    }


def plain(value):
    """Nested values with their tensors as lists."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value

"""Several processes, as torchrun starts them, end where one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ranked
from close import NETWORK, close
from tiltlm import ranks
from tiltlm.engine import Optim

HERE = Path(__file__).resolve().parent
MICRO = {"dpo": 2, "rloo": 4, "ctl": 3}
"""Cases that are also cut into micro-batches, and how."""


def torchrun(*args: str | Path, cwd: Path, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine, of a script or, behind -m, a module."""
    path = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *args]
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Every case, trained by two processes."""
    folder = tmp_path_factory.mktemp("two")
    torchrun(HERE / "ranked.py", folder, *ranked.CASES, *(f"{name}@{k}" for name, k in MICRO.items()), cwd=folder)
    return folder


@pytest.mark.parametrize("name", [*ranked.CASES, *(f"{name}@{k}" for name, k in MICRO.items())])
def test_two_processes_end_where_one_does(name, two):
    """Losses, every other metric, drawn rows and weights of four steps; 15 rows, so that shares are unequal."""
    alone = ranked.CASES[name.partition("@")[0]](Optim(lr=1e-2))
    first, second = (torch.load(two / f"{name}-{k}.pt", weights_only=True) for k in range(2))
    assert torch.equal(first["weights"], second["weights"]) and first["metrics"] == second["metrics"]
    close(first["weights"], alone.weights, NETWORK)
    assert torch.equal(first["tokens"], alone.tokens) and torch.equal(second["tokens"], alone.tokens)
    for step, (got, expected) in enumerate(zip(first["metrics"], alone.metrics, strict=True)):
        some = {
            n: x for n, x in expected.items() if step or n != "reward_accuracy"
        }  # at first all rows tie, to rounding
        assert {n: got[n] for n in some} == pytest.approx(some, rel=1e-5, abs=1e-6, nan_ok=True)
    assert alone.metrics[-1]["loss"] != alone.metrics[0]["loss"]


def test_with_one_process_nothing_is_set_up():
    """No group, no copy: lists, results and parameters are those that were given."""
    made, parameter = object(), torch.ones(2, requires_grad=True)
    ranks.sum_gradients([parameter])
    ranks.same_as_first([parameter])
    assert ranks.gathered([made])[0] is made and ranks.from_first(lambda: made) is made and parameter.grad is None
    assert (ranks.size(), ranks.number(), ranks.share(5), ranks.others()) == (1, 0, (0, 5), ())
    assert ranks._groups.cache_info().currsize == 0 and not torch.distributed.is_initialized()

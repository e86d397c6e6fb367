"""On a real Ray (`make test-ray`): a sweep with dependencies, workers that are killed or stopped, a run that fails."""

from __future__ import annotations

import json
import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from command import tiltlm
from runs import BASE, files_of, started, wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'tiltlm[ray]'"),
]
SWEEP = ["sweep", "star-graph/rollouts", *BASE[2:], "600", "--task.base.checkpoint-every", "100"]
SWEEP += ["--task.rollouts.n", "1", "--seed", "1,2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The sweep as this machine builds it, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    tiltlm(*SWEEP, cwd=folder)
    return folder


def holder(run: Path) -> int:
    """The process that works in a run's folder; 0 for none."""
    try:
        return json.loads((run / ".holder.json").read_text())["pid"]
    except (OSError, ValueError):
        return 0


def steps_in(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_text().count("\n")
    except OSError:
        return 0


def test_a_sweep_whose_workers_die_resumes_and_ends_bit_for_bit_the_same(whole, tmp_path):
    """One worker is killed after its first checkpoint and goes on from there; the other is asked to stop (SIGTERM)."""
    command = started(*SWEEP, "--on", "ray", cwd=tmp_path)
    wait_for(lambda: len(list(tmp_path.rglob("base/*/checkpoint-*/COMPLETE"))) == 2, command)
    killed, stopped = sorted((tmp_path / "runs/star-graph/base").iterdir())
    first = holder(killed)
    os.kill(holder(stopped), signal.SIGTERM)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: holder(killed) not in (0, first), command)
    time.sleep(0.2)
    wait_for(lambda: steps_in(killed) > 0, command)
    assert steps_in(killed) >= 100 and not (killed / "DONE").is_file()
    err = command.communicate(timeout=400)[1]
    assert command.returncode == 0, err
    for run in (killed, stopped):
        assert (run / "log.txt").read_text().count("star-graph/base  ->") == 2
    assert files_of(tmp_path) == files_of(whole)


def test_a_run_that_fails_is_named_once_with_its_log_and_what_waits_on_it(tmp_path):
    """A row that does not fit shows only when the stage reads it."""
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "chosen": "a"}\n' * 3 + '{"prompt": 1}\n')
    args = ["run", "pairs/sft-model", "--task.data", "bad.jsonl", "--task.model=", "--on", "ray"]
    done = tiltlm(*args, cwd=tmp_path, check=False)
    (log,) = tmp_path.rglob("log.txt")
    assert done.returncode == 2 and "bad.jsonl:4" in done.stderr and "bad.jsonl:4" in log.read_text(), done.stderr
    assert str(log.relative_to(tmp_path)) in done.stderr and "not built, for they wait on it: " in done.stderr
    assert not list(tmp_path.rglob("DONE"))

"""On a real SLURM (`make test-slurm`): a sweep with dependencies, a job that is stopped and requeued, one that fails."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from command import tiltlm
from runs import BASE, files_of, started, wait_for

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="there is no SLURM on this machine"),
]
STEPS = "300"
SWEEP = ["sweep", "star-graph/rollouts", *BASE[2:], STEPS, "--task.rollouts.n", "1", "--seed", "1,2"]
SLURM = ["--on", "slurm", "--slurm.mem", "1G", "--slurm.time", "10"]


def jobs_in(folder: Path) -> dict[str, dict]:
    """The jobs that were submitted, by the stage and seed of their runs."""
    found = {}
    for record in folder.rglob("slurm/job.json"):
        config = json.loads((record.parents[1] / "config.json").read_text())
        found[f"{config['recipe'].partition('/')[2]} {config['settings']['seed']}"] = json.loads(
            record.read_text()
        )
    return found


def script_of(folder: Path, job: dict) -> str:
    return (folder / job["log"]).with_name(f"{job['job']}_submission.sh").read_text()


def slurm(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@pytest.fixture(autouse=True)
def nothing_left(tmp_path):
    """No job of a test that failed stands in the next one's way."""
    yield
    for record in tmp_path.rglob("slurm/job.json"):
        subprocess.run(["scancel", json.loads(record.read_text())["job"]], check=False)


def states_of(jobs: dict[str, dict]) -> list[str]:
    numbers = ",".join(job["job"] for job in jobs.values())
    return slurm("squeue", "--noheader", "--format=%T", f"--jobs={numbers}").split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The sweep as this machine builds it, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    tiltlm(*SWEEP, cwd=folder)
    return folder


def test_a_sweep_whose_jobs_are_stopped_and_requeued_ends_bit_for_bit_the_same(whole, tmp_path):
    """One base is told that its time is over (SIGUSR1) and requeues itself; the other is preempted: SLURM ends it and
    requeues it. What waits on them goes on waiting."""
    command = started(*SWEEP, *SLURM, cwd=tmp_path)
    wait_for(lambda: len(list(tmp_path.rglob("base/*/metrics.jsonl"))) == 2, command)
    time.sleep(0.5)
    jobs = jobs_in(tmp_path)
    warned, preempted = jobs["base 1"], jobs["base 2"]
    assert f"--dependency=afterok:{warned['job']}" in script_of(tmp_path, jobs["rollouts 1"])
    slurm("scancel", "--signal=USR1", warned["job"])
    slurm("scontrol", "requeue", preempted["job"])
    err = command.communicate(timeout=400)[1]
    assert command.returncode == 0, err
    logs = {name: (tmp_path / job["log"]).read_text() for name, job in jobs.items()}
    assert "Requeued job" in logs["base 1"] and logs["base 1"].count("Starting with JobEnvironment") == 2
    assert logs["base 2"].count("Starting with JobEnvironment") == 2
    assert logs["rollouts 1"].count("Starting with JobEnvironment") == 1
    assert {name: job["job"] for name, job in jobs_in(tmp_path).items()} == {n: j["job"] for n, j in jobs.items()}
    assert files_of(tmp_path) == files_of(whole)


def test_a_cancelled_job_is_named_with_its_log_and_the_same_command_goes_on(whole, tmp_path):
    """scancel ends a job with a checkpoint and requeues nothing; what waits on it is never begun, the other seed is."""
    command = started(*SWEEP, *SLURM, cwd=tmp_path)
    wait_for(lambda: len(list(tmp_path.rglob("base/*/metrics.jsonl"))) == 2, command)
    time.sleep(0.5)
    job = jobs_in(tmp_path)["base 1"]
    slurm("scancel", job["job"])
    err = command.communicate(timeout=400)[1]
    assert command.returncode == 2 and "Traceback" not in err, err
    assert err.count(" failed; ") == 1 and job["log"] in err
    assert re.search(r"not built, for they wait on it: runs/star-graph/rollouts/\w+\. The same command", err)
    assert len(list(tmp_path.rglob("DONE"))) == 2 and len(list(tmp_path.rglob("base/*/checkpoint-*"))) == 2
    done = tiltlm(*SWEEP, *SLURM, cwd=tmp_path)
    assert "job" in done.stderr and files_of(tmp_path) == files_of(whole)


def test_what_was_left_to_slurm_is_found_by_the_same_command(whole, tmp_path):
    """--detach returns at once; said again, it submits nothing; without it the command waits and shows the results."""
    first = tiltlm(*SWEEP, *SLURM, "--detach", cwd=tmp_path)
    jobs = jobs_in(tmp_path)
    again = tiltlm(*SWEEP, *SLURM, "--detach", cwd=tmp_path)
    assert len(jobs) == 4 and jobs_in(tmp_path) == jobs and not first.stdout
    assert re.search(rf"job {jobs['base 1']['job']} \((pending|running)\)", again.stderr)
    watching = started(*SWEEP, *SLURM, cwd=tmp_path)
    wait_for(lambda: ": job" in watching.stderr.readline(), watching)
    watching.send_signal(signal.SIGINT)
    assert "jobs go on, and the same command" in watching.communicate(timeout=60)[1]
    done = tiltlm(*SWEEP, *SLURM, cwd=tmp_path)
    assert done.stdout.count("runs/star-graph/rollouts/") == 2 and jobs_in(tmp_path) == jobs
    assert files_of(tmp_path) == files_of(whole)


def test_never_more_jobs_run_than_were_asked_for(tmp_path):
    """Two seeds in one lane: the second base waits for the end of the job before it."""
    tiltlm(*SWEEP, *SLURM, "--slurm.parallel", "1", "--detach", cwd=tmp_path)
    jobs = jobs_in(tmp_path)
    assert f"afterany:{jobs['rollouts 1']['job']}" in script_of(tmp_path, jobs["base 2"])
    until = time.monotonic() + 120
    while (running := states_of(jobs).count("RUNNING")) == 0:
        assert time.monotonic() < until
        time.sleep(0.5)
    assert running == 1


def test_several_processes_of_a_job_train_one_model_and_go_on_after_a_requeue(tmp_path):
    """srun starts them, without torchrun; stages that do not train have one. Stopped, they end where they would have."""
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    together = [*SWEEP[:-1], "1", *SLURM, "--slurm.processes", "2"]
    tiltlm(*together, cwd=tmp_path / "whole")
    command = started(*together, cwd=tmp_path / "cut")
    wait_for(lambda: list((tmp_path / "cut").rglob("base/*/metrics.jsonl")), command)
    time.sleep(0.5)
    jobs = jobs_in(tmp_path / "cut")
    slurm("scancel", "--signal=USR1", jobs["base 1"]["job"])
    err = command.communicate(timeout=500)[1]
    assert command.returncode == 0, err
    assert "--ntasks-per-node=2" in script_of(tmp_path / "cut", jobs["base 1"])
    assert "--ntasks-per-node=1" in script_of(tmp_path / "cut", jobs["rollouts 1"])
    log = (tmp_path / "cut" / jobs["base 1"]["log"]).read_text()
    assert log.count("global_rank=0(2)") == 2 and "Requeued job" in log
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")

"""Runs as jobs of SLURM, submitted by submitit: one job a run, `afterok` of the jobs that build its inputs.

A job that is told that its time is nearly over (SIGUSR1) ends with a checkpoint and is requeued under its own number, and
what waits on it goes on waiting. SIGTERM ends it with a checkpoint too, and requeues nothing: where SLURM preempts, it
requeues the job itself, and where the user cancels, it shall not come back. The command that submitted only watches: it
can be stopped and said again, and finds its jobs by their numbers in the runs' folders.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiltlm import ranks
from tiltlm.commands.launch.graph import apart, in_order, needs
from tiltlm.commands.launch.logs import say_failures
from tiltlm.commands.launch.order import Order
from tiltlm.commands.launch.settings import Launch, Slurm
from tiltlm.jsonl import read_json
from tiltlm.progress import note
from tiltlm.run import Run, begin

ORDER = "TILTLM_ORDER"
"""The variable that hands a job its order where that holds credentials: submitit writes what it submits to a file."""

FOLDER = "slurm"
"""Within a run's folder: what was submitted, the job's number, its logs."""

JOB = "job.json"
FIRST_POLL, LAST_POLL = 1.0, 30.0
PATIENCE = 300.0
"""Seconds for which SLURM may leave the question for its queue unanswered."""

SETTLING = 5.0
"""Seconds from a job's end until a network file system shows what it wrote."""


@dataclass(frozen=True)
class Job:
    """A job of SLURM that builds a run: its number, and where its output goes."""

    run: Run[Any]
    number: str
    log: Path


@dataclass(frozen=True)
class Work:
    """What submitit calls in a job. order: None where the environment has it."""

    order: Order | None
    requeue: bool

    def __call__(self) -> None:
        order = self.order or Order(**json.loads(os.environ[ORDER]))
        if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            _join_the_others()
        status = order.carry_out()
        ranks.leave()
        if status == 128 + signal.SIGUSR1 and self.requeue:
            # submitit's handler is back: it asks for `checkpoint`, and requeues
            os.kill(os.getpid(), signal.SIGUSR1)
            return  # who is not the first comes here: the first one requeues for all
        if status:
            sys.exit(status)

    def checkpoint(self) -> Any:
        """What the requeued job calls: the same, which goes on from the run's checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _join_the_others() -> None:
    """Say to `ranks` which of the job's processes this is, in the words that torchrun has for it."""
    from submitit.helpers import TorchDistributedEnvironment

    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def build_on_slurm(tops: Iterable[Run[Any]], launch: Launch, command: str) -> bool:
    """Have SLURM build whatever is not finished of `tops` and of what they need; whether all is done (else: detached).

    Raises ValueError naming the runs that failed, once no job is left.
    """
    _check_here()
    runs, queued = in_order(tops), queue() or {}
    jobs: list[Job] = []
    try:
        for job in submitted(runs, launch.slurm, command, queued):
            jobs.append(job)
            state = f" ({queued[job.number].lower()})" if job.number in queued else ""
            note(f"{job.run.recipe.name}  ->  {job.run.folder}  job {job.number}{state}, log {job.log}")
        if launch.detach:
            return not runs
        watch(jobs)
    except BaseException:
        if numbers := [job.number for job in jobs if not job.run.done]:
            note(f"jobs go on, and the same command watches them again; to end them: scancel {' '.join(numbers)}")
        raise
    failed, waited = apart(run for run in runs if not run.done)
    logs = {job.run.folder: job.log for job in jobs}
    if failed:
        raise say_failures(failed, waited, logs)
    return True


def _check_here() -> None:
    """Raise ValueError where nothing can be submitted."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ValueError("--on slurm wants submitit: pip install 'tiltlm[slurm]'") from None
    if missing := [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]:
        raise ValueError(f"--on slurm: there is no {missing[0]} on this machine; say it where jobs are submitted")


# ---- submitting -----------------------------------------------------------------------------------------------------


def submitted(runs: Iterable[Run[Any]], how: Slurm, command: str, queued: Mapping[str, str]) -> Iterator[Job]:
    """A job for every run, which come in their order; one that an earlier command submitted is taken as it is."""
    jobs: dict[Path, Job] = {}
    for run in runs:
        job = _earlier(run, queued)
        if job is None:
            before = [jobs[folder].number for folder in needs(run)]
            lane = [*jobs.values()][-how.parallel].number if 0 < how.parallel <= len(jobs) else None
            job = _submit(run, how, command, dependency(before, lane))
        jobs[run.folder] = job
        yield job


def _earlier(run: Run[Any], queued: Mapping[str, str]) -> Job | None:
    record = run.folder / FOLDER / JOB
    found = read_json(record) if record.is_file() else {}
    return Job(run, found["job"], Path(found["log"])) if found.get("job") in queued else None


def dependency(before: Iterable[str], lane: str | None) -> str:
    """What a job waits for: the success of its inputs' jobs, and the end of the one before it in its lane.

    Of N lanes, job k is in lane k mod N, so that never more than N run; an array's limit would hold for one set of
    dependencies alone.
    """
    parts = [f"afterok:{':'.join(before)}"] if (before := list(before)) else []
    return ",".join([*parts, *([f"afterany:{lane}"] if lane else [])])


def _submit(run: Run[Any], how: Slurm, command: str, after: str) -> Job:
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    begin(run)
    folder = run.folder.absolute() / FOLDER
    order = Order.of(run, command)
    work = Work(None if order.secret else order, how.requeue > 0)
    executor = SlurmExecutor(folder, max_num_timeout=how.requeue)
    executor.update_parameters(**parameters(run, how, after))
    try:
        with _exported({ORDER: json.dumps(asdict(order))} if order.secret else {}):
            number = executor.submit(work).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        raise ValueError(f"{run.recipe.name}: SLURM took no job: {' '.join(str(error).split())}") from None
    log = run.folder / FOLDER / f"{number}_0_log.out"
    (folder / JOB).write_text(json.dumps({"job": number, "log": str(log)}) + "\n", encoding="utf-8")
    return Job(run, number, log)


def parameters(run: Run[Any], how: Slurm, after: str) -> dict[str, Any]:
    """What submitit writes into the script of a run's job."""
    also: dict[str, Any] = dict(each.split("=", 1) for each in how.more)
    also |= {"requeue" if how.requeue else "no-requeue": True, "kill-on-invalid-dep": "yes"}
    also |= {"signal": f"USR1@{how.warning}"} | ({"mem": how.mem} if how.mem else {})
    found = {
        "job_name": f"tiltlm-{run.recipe.name.replace('/', '-')}",
        "partition": how.partition or None,
        "qos": how.qos or None,
        "account": how.account or None,
        "time": how.time,
        "nodes": how.nodes if run.recipe.together else 1,
        "ntasks_per_node": how.processes if run.recipe.together else 1,
        "cpus_per_task": how.cpus,
        "gpus_per_node": how.gpus if run.recipe.computes and how.gpus else None,
        "dependency": after or None,
        "stderr_to_stdout": True,
        "srun_args": ["--kill-on-bad-exit=1"],
        "setup": ["export SUBMITIT_PREEMPT_SIGNAL=USR1", *how.setup],
        "additional_parameters": also,
    }
    return {name: value for name, value in found.items() if value is not None}


@contextmanager
def _exported(more: Mapping[str, str]) -> Iterator[None]:
    """Within, these are in the environment, which sbatch hands on to the job."""
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


# ---- watching -------------------------------------------------------------------------------------------------------


def queue() -> dict[str, str] | None:
    """The user's jobs that are not over: number -> state. None where SLURM does not answer."""
    asked = ["squeue", f"--user={os.getuid()}", "--noheader", "--format=%i %T"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return None
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip())


def watch(jobs: Iterable[Job]) -> None:
    """Wait until no job is left, and say what changes."""
    states: dict[str, str] = {}
    going, pause, silent_since = list(jobs), FIRST_POLL, time.monotonic()
    while going:
        time.sleep(pause)
        queued = queue()
        if queued is None:
            if time.monotonic() - silent_since > PATIENCE:
                raise ValueError(f"SLURM (squeue) has not answered for {PATIENCE:.0f} s")
            continue
        silent_since = time.monotonic()
        changed = [
            job for job in going if job.number not in queued or states.get(job.number) != queued[job.number]
        ]
        for job in changed:
            _say(job, queued)
        states, going = queued, [job for job in going if job.number in queued]
        pause = FIRST_POLL if changed else min(LAST_POLL, 1.3 * pause)


def _say(job: Job, queued: Mapping[str, str]) -> None:
    if job.number not in queued:
        _settle(job.run)
    state = queued.get(job.number, "done" if job.run.done else "not done").lower()
    note(f"{job.run.recipe.name} {job.run.key}: job {job.number} {state}")


def _settle(run: Run[Any]) -> None:
    """Give the file system a moment to show that a run whose job has ended is done."""
    until = time.monotonic() + SETTLING
    while not run.done and time.monotonic() < until:
        os.listdir(run.folder)
        time.sleep(0.2)

"""Runs as tasks of Ray: a task's arguments are the results of the tasks that build its inputs, so the graph is Ray's.

A run is built within Ray's worker. A worker that dies (killed, out of memory, its node gone) takes its lock along, and
the task's next try goes on from the checkpoint; so does one after SIGTERM or SIGUSR1, which write one first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tiltlm.commands.launch.graph import apart, in_order, needs
from tiltlm.commands.launch.logs import say_failures
from tiltlm.commands.launch.order import Order
from tiltlm.commands.launch.settings import Ray
from tiltlm.progress import note
from tiltlm.run import Run, begin

LOG = "log.txt"


class Interrupted(Exception):
    """The run was asked to stop: it has a checkpoint, and goes on in another try."""


class Failed(Exception):
    """The run was not built, for a reason that its log says."""


def carry_out(order: Order, *inputs: None) -> None:
    """What Ray calls in a worker. What the run says goes to the log in its folder."""
    path = Path(order.cwd) / order.folder / LOG
    with (
        path.open("a", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stderr(log),
        contextlib.redirect_stdout(log),
    ):
        status = order.carry_out()
    if status > 128:
        raise Interrupted(f"{order.folder}: stopped by signal {status - 128}")
    if status:
        raise Failed(f"{order.folder}: see {LOG}")


def build_on_ray(tops: Iterable[Run[Any]], how: Ray, command: str) -> None:
    """Have Ray build whatever is not finished of `tops` and of what they need.

    Raises ValueError naming the runs that failed, once nothing is left to do.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--on ray wants Ray: pip install 'tiltlm[ray]'") from None
    runs = in_order(tops)
    if not runs:
        return
    with _cluster(ray, how.address):
        _watch(ray, _tasks(ray, runs, how, command))
    failed, waited = apart(run for run in runs if not run.done)
    if failed:
        raise say_failures(failed, waited, {run.folder: run.folder / LOG for run in runs})


@contextlib.contextmanager
def _cluster(ray: Any, address: str) -> Any:
    try:
        ray.init(address or "local", include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"--ray.address {address or '(none)'}: {' '.join(str(error).split())}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _tasks(ray: Any, runs: Iterable[Run[Any]], how: Ray, command: str) -> dict[Any, Run[Any]]:
    """A task for every run: its result -> the run."""
    results: dict[Path, Any] = {}
    tasks: dict[Any, Run[Any]] = {}
    for run in runs:
        begin(run)
        task = ray.remote(carry_out).options(
            name=run.recipe.name, num_cpus=how.cpus, num_gpus=how.gpus if run.recipe.computes else 0,
            max_retries=how.retries, retry_exceptions=[Interrupted],
        )  # fmt: skip
        results[run.folder] = task.remote(Order.of(run, command), *(results[each] for each in needs(run)))
        tasks[results[run.folder]] = run
        note(f"{run.recipe.name}  ->  {run.folder}  log {run.folder / LOG}")
    return tasks


def _watch(ray: Any, tasks: dict[Any, Run[Any]]) -> None:
    """Wait until no task is left, and say which run is done."""
    going = list(tasks)
    while going:
        (over, *_), going = ray.wait(going)
        run = tasks[over]
        note(f"{run.recipe.name} {run.key}: {'done' if run.done else 'not done'}, {len(going)} to go")

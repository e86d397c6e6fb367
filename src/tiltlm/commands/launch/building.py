"""Building runs wherever the user says: here side by side, on SLURM, on Ray."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tiltlm import ranks
from tiltlm.commands.launch.settings import Launch
from tiltlm.progress import note
from tiltlm.run import Run, check_all


def build_all(runs: Iterable[Run[Any]], launch: Launch, command: str) -> bool:
    """Build side by side whatever is not finished of `runs` and of what they need; False: jobs were left behind.

    After True, `ensure` finds every run, or builds it: here with one job nothing is side by side, and all is left to it.
    Raises ValueError naming what failed.
    """
    tops = list(runs)
    together = launch.slurm.nodes * launch.slurm.processes if launch.on == "slurm" else ranks.size()
    if launch.shard and together == 1:
        note("--shard: one process holds everything; several are started by torchrun, or with --slurm.processes")
    if ranks.size() > 1 and replace(launch, shard=False) != Launch():
        raise ValueError("--jobs and --on start processes of their own: start the command without torchrun")
    for run in tops:
        check_all(run, here=launch.on == "local")
    if launch.on == "slurm":
        from tiltlm.commands.launch.slurm import build_on_slurm

        return build_on_slurm(tops, launch, command)
    if launch.on == "ray":
        from tiltlm.commands.launch.ray import build_on_ray

        build_on_ray(tops, launch.ray, command)
    elif launch.jobs > 1:
        from tiltlm.commands.launch.local import build_here

        build_here(tops, launch.jobs, command)
    return True

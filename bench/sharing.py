"""A measurement, and a round, of one process and of two: what sharing rows out costs and saves.

    python bench/sharing.py [measure round]

The work: a GPT-2 of 6 layers of width 256 over 8,192 tokens (7 million parameters), float32. A measurement: 4 draws of 16
prompts of 32 tokens, 32 new tokens, by a policy that is not the reference, 16 rows at once; E[r] and KL(q‖pi_ref) of them.
A round, from an empty folder: 4 answers to each of 32 such prompts, graded; the pairs in them, 4 DPO steps of 16; 8 prompts
to validate on. Each process has one thread. Times are medians over the pieces of work after the first (of a round there is
one); CPU-seconds are summed over the processes, and those of the busiest one stand beside them; memory is the highest that
one process held, less what it held once the work was made ready.

With as many processors as processes, wall time is what one is after. On a busy machine the busiest process's CPU-seconds
say what it would be: `speed` is those of one process over those of the busiest of two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from common import ONE_THREAD, QUIET, Size, random_ids
from tiltlm import ranks
from tiltlm.feeds import Feed, Rounds
from tiltlm.fit import Fit
from tiltlm.models.causal import CausalLM
from tiltlm.nets import Net
from tiltlm.policies.dpo import DPO
from tiltlm.problem import Facts, Problem
from tiltlm.ruler.measure import Ruler
from tiltlm.ruler.table import read_report
from tiltlm.run import Run, ensure
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.stages.cells import Cell
from tiltlm.stages.rounds import Round
from tiltlm.stages.task import Task
from tiltlm.target import Target

SIZE, STEPS, OWN = Size(6, 256, 8192), 4, stream(0, "bench", "ranks")
WORKER = "worker"
"""The second word of a process that works."""

FOLDER = "TILTLM_BENCH_FOLDER"
"""The environment variable that names an empty folder, for runs."""


def mean_token(samples: Samples) -> Tensor:
    """A reward between 0 and 1 that half of what a random network draws differs in."""
    return samples.tokens.float().mean(1) / SIZE.vocab


def network(seed: int = 0) -> CausalLM:
    return CausalLM.from_config(SIZE.config(), seed=seed)


def measurement() -> Callable[[], float]:
    """What measures a policy, and gives KL(q‖pi_ref)."""
    policy, reference = network(1).eval(), network().requires_grad_(False).eval()
    prompts = Tokens.full(random_ids(0, 16, 32, SIZE.vocab))
    ruler = Ruler(Target(reference, mean_token, 0.1), prompts, 32, OWN, n=4, batch_size=16)
    return lambda: float(ruler.measure(policy)[0].values["kl_to_reference"].mean())


@dataclass(frozen=True)
class Random(Task):
    """A random network, prompts of random tokens."""

    name: str = "random"
    beta: float = 1.0
    device: str = "cpu"

    def facts(self) -> Facts:
        return Facts(self.beta, "several", r_max=1.0, held_out=True)

    def problem(self, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
        ids = random_ids(0, 48, 32, SIZE.vocab)
        prompts: Any = {
            "train": Tokens.full(ids[:32]),
            "valid": Tokens.full(ids[32:40]),
            "test": Tokens.full(ids[40:]),
        }
        target = Target(network().requires_grad_(False).eval(), mean_token, self.beta)
        return Problem(target, prompts, 32, OWN, self.facts())


def a_round() -> Callable[[], float]:
    """What builds a round in an empty folder, and gives its loss on validation pairs."""
    feed = Feed("rounds", rounds=Rounds(count=1, n=4, right=0.5, batch_size=16))
    fit = Fit(lr=1e-5, steps=4, epochs=0.0, batch_size=16)
    made = Round.last_of(Random(), Cell(DPO(0.1), feed, fit, Net()), "dpo", 0)

    def build() -> float:
        rows = read_report(ensure(made, Path(os.environ[FOLDER])).folder / "report.json")
        return float(next(row["value"] for row in rows if row["metric"] == "valid_loss"))

    return build


WORK: dict[str, Callable[[], Callable[[], float]]] = {"measure": measurement, "round": a_round}


def memory(name: str) -> int:
    """Bytes that this process holds (VmRSS), or has held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def worker(kind: str) -> None:
    """One process: its pieces of work, their wall and CPU-seconds, and the memory that they took."""
    torch.set_num_threads(1)
    work = WORK[kind]()
    before, took, numbers = memory("VmRSS"), [], []
    for _ in range(1 if kind == "round" else STEPS + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        numbers.append(work())
        took.append((time.perf_counter() - wall, time.process_time() - cpu))
    walls, cpus = (median(side) for side in zip(*(took[1:] or took), strict=True))
    found = ranks.gathered([(walls, cpus, memory("VmHWM") - before)])
    if ranks.is_first():
        wall, busiest, most = (max(side) for side in zip(*found, strict=True))
        told = [wall, sum(x[1] for x in found), busiest, most, numbers[0]]
        print("FOUND " + json.dumps(told))
    ranks.leave()


def measured(kind: str, processes: int) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory(prefix="tiltlm-bench-") as folder:
        done = subprocess.run(
            [*command, __file__, kind, WORKER], capture_output=True, text=True,
            env=os.environ | ONE_THREAD | QUIET | {FOLDER: folder},
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.split("FOUND ")[1])


def main(kinds: Sequence[str]) -> None:
    print(f"{'':<28}{'wall s':>9}{'CPU s':>9}{'busiest':>9}{'speed':>8}{'memory MB':>11}{'number':>13}")
    for kind in kinds:
        numbers, alone = [], 0.0
        for processes in (1, 2):
            wall, cpu, busiest, most, number = measured(kind, processes)
            alone = alone or busiest
            name = f"{kind}, {processes} process{'es' if processes > 1 else ''}"
            told = (
                f"{wall:>9.2f}{cpu:>9.2f}{busiest:>9.2f}{alone / busiest:>8.2f}{most / 1e6:>11.0f}{number:>13.7f}"
            )
            print(f"{name:<28}{told}", flush=True)
            numbers.append(number)
        if max(numbers) - min(numbers) > 1e-5 * max(1.0, abs(numbers[0])):
            raise SystemExit(f"{kind}: the numbers differ: {numbers}")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2] == WORKER:
        worker(sys.argv[1])
    else:
        main(sys.argv[1:] or list(WORK))

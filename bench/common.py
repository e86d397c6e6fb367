"""Two sides of one job, measured in turn: what every script of this folder shares.

Each side runs in a process of its own, on one thread, and the processes alternate (ours, peer, ours, peer, …),
so that neither inherits the other's memory and a busy moment of the machine hits both. A process builds its
side, then works 1 + `steps` times:

- *CPU-seconds*: `time.process_time` around each piece of work, the first (warm-up) left out if it is not the only one; the
  median over all pieces of all processes is reported. Wall time stands beside it and is not judged.
- *peak memory*: the highest resident size, warm-up included, median over processes. It is the kernel's high-water
  mark of this very process (VmHWM): `getrusage` starts a child at its parent's peak.
  `growth` is that peak less what was resident once the side was built, before its first piece of work: what the
  work itself needs, free of what the libraries weigh when imported.

A script first prints both sides' figures and its check that they did the same work, and ends with one line per
ratio: `ratio NAME VALUE goal GOAL`. Linux only (it reads /proc).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

Work = Callable[[], Any]
"""One piece of work; what it returns (JSON) is handed to the script's check."""

MARK = "MEASURED "
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Size:
    """A GPT-2: layers, width (heads of 64, as in every GPT-2), vocabulary."""

    layers: int
    width: int
    vocab: int

    def config(self) -> Any:
        from transformers import GPT2Config

        return GPT2Config(
            n_layer=self.layers,
            n_embd=self.width,
            n_head=self.width // 64,
            vocab_size=self.vocab,
            n_positions=256,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )


LARGE, SMALL = Size(6, 384, 50257), Size(4, 128, 1000)


@dataclass(frozen=True)
class Side:
    """What the processes of one side measured: seconds and bytes, medians; `results` of each process's work."""

    cpu: float
    wall: float
    peak: float
    growth: float
    results: list[list[Any]]


Report = Callable[[str, dict[str, Side]], list[str]]
"""Checks the sides of a case against each other and returns its ratio lines."""


def random_ids(seed: int, rows: int, columns: int, vocab: int) -> torch.Tensor:
    """Token ids int64 [rows, columns], the same for both sides."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (rows, columns), generator=generator)


def options(description: str, **several: tuple[str, ...]) -> argparse.Namespace:
    """The command line every script answers to (`--side` and `--case` are for its own processes).

    several: a script's own options, each with the values of which one or more are named.
    """
    parser = argparse.ArgumentParser(description=description.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats: the numbers are rough")
    parser.add_argument("--only", help="run only the case of this name")
    for name, choices in several.items():
        parser.add_argument(f"--{name}", nargs="+", choices=choices, help=f"only these {name}")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(work: Work, steps: int) -> None:
    """Measure `work` here and print what was found, for the parent to read."""
    base = _memory("VmRSS")
    _forget_peak()
    cpu, wall, results = [], [], []
    for _ in range(1 + steps):
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        results.append(work())
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
    memory = {"base": base, "peak": _memory("VmHWM")}
    print(MARK + json.dumps({"cpu": cpu[1:] or cpu, "wall": wall[1:] or wall, "results": results} | memory))


def alternate(script: str, sides: tuple[str, ...], case: str, *, rounds: int, steps: int) -> dict[str, Side]:
    """`rounds` processes of every side, in turn; prints one line a side."""
    raw: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            raw[side].append(_process(script, side, case, steps))
    found = {side: _summary(raw[side]) for side in sides}
    for name, side in found.items():
        print(
            f"{case:12s} {name:9s} CPU {side.cpu:8.3f} s   wall {side.wall:8.3f} s   "
            f"peak {side.peak / 2**20:7.0f} MiB   growth {side.growth / 2**20:7.0f} MiB",
            flush=True,
        )
    return found


def ratio(name: str, value: float, goal: str) -> str:
    """One line of the result; a goal starting with <= wants a small value, >= a large one."""
    return f"ratio {name} {value:.2f} goal {goal}"


def run(
    script: Any,
    sides: Mapping[str, Callable[[Any], Work]],
    cases: Mapping[str, Any],
    report: Report,
    rounds: int,
    short: int = 1,
) -> None:
    """The whole of a script (its module): a child measures one side, the parent runs all and reports.

    short: how many times as often a process works, where a piece of work takes fractions of a second.
    """
    told = options(script.__doc__)
    torch.set_num_threads(1)
    if told.side:
        return child(sides[told.side](cases[told.case]), told.steps)
    lines: list[str] = []
    for case in [told.only] if told.only else cases:
        often = {"rounds": 1, "steps": 2 * short} if told.quick else {"rounds": rounds, "steps": 3 * short}
        lines += report(case, alternate(script.__file__, tuple(sides), case, **often))
    print("\n".join(lines))


def _process(script: str, side: str, case: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, script, "--side", side, "--case", case, "--steps", str(steps)]
    env = os.environ | ONE_THREAD | QUIET
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(script).parent)
    marked = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not marked:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(marked[-1].removeprefix(MARK))


def _summary(processes: list[dict[str, Any]]) -> Side:
    cpu = median(x for p in processes for x in p["cpu"])
    wall = median(x for p in processes for x in p["wall"])
    peak = median(p["peak"] for p in processes)
    growth = median(p["peak"] - p["base"] for p in processes)
    return Side(cpu, wall, peak, growth, [p["results"] for p in processes])


def _memory(name: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def _forget_peak() -> None:
    """Let the peak start from the present size, so that building a side does not count (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5")

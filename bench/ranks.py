"""Steps of DPO, of RLOO, and of RLOO on a judge's scores, of one process and of two: what sharing the rows out costs and
saves.

    python bench/ranks.py            # all of it
    python bench/ranks.py save       # checkpoints alone
    python bench/ranks.py deep       # weights in parts alone

The work: a GPT-2 of 6 layers of width 256 over 8,192 tokens (7 million parameters), float32, AdamW. DPO: 16 pairs, 64 + 64
tokens, fixed rows. RLOO: 4 draws of 8 prompts of 32 tokens, 32 new tokens, drawn, scored and learnt from. Judged: a judge
of the model's size scores these, and learns from one pass over their 16 pairs. Each process has one thread. Times are
medians over the steps after the first; CPU-seconds are summed over the processes, and those of the busiest one; memory is
the highest that one process held, less what it held once models were read.

Checkpoints: a GPT-2 of 8 layers of width 512 over 50,257 tokens (51 million parameters) that two processes hold in parts;
what one process held at most while it was written, beyond what it held before. "gathered": the first process has weights
and moments in whole and writes them. "in parts": each writes its own. "and a folder": from these, for `from_pretrained`.

Weights: a GPT-2 of 24 layers of width 512 over 8,192 tokens (80 million parameters, 320 MB) is read, copied as a policy,
and takes two RLOO steps (2 draws of 4 prompts, 8 + 8 tokens) on two processes: in whole; what is trained in parts
(`--fit.shard`); everything in parts (`--shard`). Memory is what a process held at most beyond what it held before that: at
the start, and in all; the first process and the second.

With as many processors as processes, wall time is what one is after; on a busy machine only CPU-seconds say something.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from common import ONE_THREAD, QUIET, Size, random_ids
from tiltlm import ranks
from tiltlm.engine import Engine, Optim
from tiltlm.experience import Live, Offline, referenced_pairs
from tiltlm.judges.discriminator import Discriminator
from tiltlm.judges.judged import JudgedBy, as_rows
from tiltlm.judges.learning import LearningJudge
from tiltlm.judges.networks import LastValue
from tiltlm.judges.settings import Judging
from tiltlm.models import weights
from tiltlm.models.causal import CausalLM, copy_of, steady
from tiltlm.models.heads import ValueHead
from tiltlm.models.scattered import in_parts as divided
from tiltlm.policies.dpo import DPO
from tiltlm.policies.reinforce import Reinforce
from tiltlm.policies.sft import SFT
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.sharded import all_of

SIZE, STEPS, OWN = Size(6, 256, 8192), 4, stream(0, "bench", "ranks")
LARGE = Size(8, 512, 50257)
WAYS = ((1, "whole"), (2, "whole"), (2, "fit.shard"), (2, "shard"))
"""Processes, and what each holds a part of: nothing; what is trained, which is whole while it draws; everything, always."""


def dpo(model: CausalLM) -> tuple[Any, Any]:
    asked, done = Tokens.full(random_ids(0, 16, 64, SIZE.vocab)), random_ids(1, 32, 64, SIZE.vocab)
    index, mask = torch.arange(16), torch.ones(16, 64, dtype=torch.bool)
    pairs = Pairs(Samples(asked, index, done[:16], mask), Samples(asked, index, done[16:], mask))
    return DPO(0.1), Offline(referenced_pairs(pairs, model), 16, OWN)


def rloo(model: CausalLM) -> tuple[Any, Any]:
    asked, reference = Tokens.full(random_ids(0, 8, 32, SIZE.vocab)), copy_of(model).requires_grad_(False)
    live = Live(model, lambda s: s.tokens.float().mean(1), asked, 8, 32, OWN, n=4, reference=reference)
    return Reinforce("leave_one_out", beta=0.1), live


def judged(model: CausalLM, shard: bool) -> tuple[Any, Any]:
    objective, live = rloo(model)
    reward, how = live.reward, Judging("reward-model", window=32, relabels=16, epochs=1, lr=1e-5)
    networks = [LastValue(ValueHead(copy_of(model)))]
    folder = Path(tempfile.mkdtemp())  # a few kB
    judge = LearningJudge(Discriminator(networks, how.lr, how.batch_size, shard), None, how, OWN, folder)
    return objective, JudgedBy(
        replace(live, reward=None), judge, reward, partial(as_rows, tokenizer=None, eos_ids=())
    )


KINDS: dict[str, Callable[[CausalLM, bool], tuple[Any, Any]]] = {
    "dpo": lambda model, shard: dpo(model), "rloo": lambda model, shard: rloo(model), "judged": judged,
}  # fmt: skip


def memory(name: str) -> int:
    """Bytes that this process holds (VmRSS), or has held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def worker(kind: str, way: str) -> None:
    """One process: its steps' wall and CPU-seconds, and the memory that they took."""
    torch.set_num_threads(1)
    model = CausalLM.from_config(SIZE.config(), seed=0)
    with divided(way == "shard"):
        objective, experience = KINDS[kind](model, way == "fit.shard")
        before = memory("VmRSS")
        engine, took = Engine(model, Optim(lr=1e-5, shard=way == "fit.shard")), []
    for step in range(STEPS + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        model.eval()
        with engine.whole():
            batch = experience.batch(step)
        model.train()
        loss = engine.update(objective, batch)["loss"]
        took.append((time.perf_counter() - wall, time.process_time() - cpu))
        if step == 0:
            first = loss
    walls, cpus = (median(side) for side in zip(*took[1:], strict=True))
    found = ranks.gathered([(walls, cpus, memory("VmHWM") - before)])
    if ranks.is_first():
        print(
            "FOUND "
            + json.dumps(
                [
                    max(x[0] for x in found),
                    *(f(x[1] for x in found) for f in (sum, max)),
                    max(x[2] for x in found),
                    first,
                ]
            )
        )
    ranks.leave()


DEEP = Size(24, 512, 8192)
EAGER = {"MALLOC_MMAP_THRESHOLD_": "200000"}
"""Has the C library hand back to the system what is let go of, at the cost of time: what is held shows."""


def reader(way: str, folder: str) -> None:
    """One of two processes, from reading two networks to two steps of one of them."""
    torch.set_num_threads(1)
    ranks.wait()
    Path("/proc/self/clear_refs").write_text("5")  # the highest is what is held now
    before = memory("VmRSS")
    with divided(way == "shard"):
        reference = CausalLM.load(folder, eos_ids=()).requires_grad_(False)
        model = steady(reference)
        asked = Tokens.full(random_ids(0, 4, 8, DEEP.vocab))
        live = Live(model, lambda s: s.tokens.float().mean(1), asked, 4, 8, OWN, n=2, reference=reference)
        engine = Engine(model, Optim(lr=1e-5, shard=way == "fit.shard"))
        start = memory("VmHWM") - before
        for step in range(2):
            with engine.whole():
                batch = live.batch(step)
            loss = engine.update(Reinforce("leave_one_out", beta=0.1), batch)["loss"]
    both = ranks.gathered([(start, memory("VmHWM") - before)])
    if ranks.is_first():
        megabytes = "".join(f"{each[k] / 1e6:>11.0f}" for k in range(2) for each in both)
        print(f"FOUND {way:<11}{megabytes}{loss:>13.4f}")
    ranks.leave()


def deep() -> None:
    """Print what `reader` found."""
    heads = "".join(f"{head:>11}" for head in ("start, 1st", "2nd", "most, 1st", "2nd"))
    print(f"{'':<11}{heads}{'second loss':>13}   (MB)")
    with tempfile.TemporaryDirectory() as folder:
        CausalLM.from_config(DEEP.config(), seed=0).save(folder)
        for way in ("whole", "fit.shard", "shard"):
            found(["deep", way, folder], EAGER)


def gathered(engine: Engine, folder: Path) -> None:
    """Weights and moments in whole, by the first process."""
    tensors = [*engine.parameters, *(x for one in engine.optimizer.state.values() for x in one.values())]
    whole = [x if ranks.is_first() else None for x in (all_of(x.detach()) for x in tensors)]
    if ranks.is_first():
        torch.save(whole, folder / "whole.pt")


def in_parts(engine: Engine, folder: Path) -> None:
    engine.write_part(folder)


def and_a_folder(engine: Engine, folder: Path) -> None:
    model: Any = engine.model
    if ranks.is_first():
        with engine.saving(folder):
            model.save(folder)


SAVES: dict[str, Callable[[Engine, Path], None]] = {
    "in parts": in_parts, "and a folder": and_a_folder, "gathered": gathered,
}  # fmt: skip


def saver(folder: Path) -> None:
    """One of two processes: what it holds of a model in parts, and takes beyond that while a checkpoint is written."""
    torch.set_num_threads(1)
    weights.FILE = 32 * 2**20  # several files even here; one tensor, the embedding, is larger
    model = CausalLM.from_config(LARGE.config(), seed=0)
    engine = Engine(model, Optim(lr=1e-5, shard=True))
    index, mask = torch.arange(2), torch.ones(2, 8, dtype=torch.bool)
    asked = Tokens.full(random_ids(0, 2, 8, LARGE.vocab))
    engine.update(SFT(), Samples(asked, index, random_ids(1, 2, 8, LARGE.vocab), mask))
    engine.optimizer.zero_grad()
    for name, save in SAVES.items():
        ranks.wait()
        Path("/proc/self/clear_refs").write_text("5")  # the highest is what is held now
        before, wall = memory("VmRSS"), time.perf_counter()
        save(engine, folder)
        took = memory("VmHWM") - before
        ranks.wait()
        found = max(ranks.gathered([took])), time.perf_counter() - wall
        if ranks.is_first():
            print(f"FOUND {name:<28}{found[1]:>9.2f}{'':>9}{found[0] / 1e6:>11.0f}", flush=True)
    if ranks.is_first():
        read = CausalLM.load(folder)
        parameters = sum(p.numel() for p in read.parameters())
        print(
            f"FOUND {parameters / 1e6:.0f} million parameters read from the folder, weights {4 * parameters / 1e6:.0f} MB"
        )
    ranks.leave()


def found(args: list[str], more: dict[str, str] = {}) -> None:  # noqa: B006
    """Print what two processes find."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run(
        [*command, *args], capture_output=True, text=True, env=os.environ | ONE_THREAD | QUIET | more
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    for line in done.stdout.splitlines():
        if line.startswith("FOUND "):
            print(line.removeprefix("FOUND "), flush=True)


def saved() -> None:
    """Print what `saver` found."""
    with tempfile.TemporaryDirectory() as folder:
        found(["save", folder])


def measured(kind: str, processes: int, way: str) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, __file__, kind, way], capture_output=True, text=True,
        env=os.environ | ONE_THREAD | QUIET,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.split("FOUND ")[1])


def main() -> None:
    print(f"{'':<28}{'wall s':>9}{'CPU s':>9}{'busiest':>9}{'memory MB':>11}{'first loss':>13}")
    for kind in KINDS:
        losses = []
        for processes, way in WAYS:
            wall, cpu, busiest, most, loss = measured(kind, processes, way)
            name = (
                f"{kind}, {processes} process{'es' if processes > 1 else ''}{'' if way == 'whole' else f', {way}'}"
            )
            print(f"{name:<28}{wall:>9.2f}{cpu:>9.2f}{busiest:>9.2f}{most / 1e6:>11.0f}{loss:>13.7f}", flush=True)
            losses.append(loss)
        if max(losses) - min(losses) > 1e-5 * max(1.0, abs(losses[0])):
            raise SystemExit(f"{kind}: the first losses differ: {losses}")
    saved()
    deep()


if __name__ == "__main__":
    if sys.argv[1:2] == ["save"]:
        saver(Path(sys.argv[2])) if sys.argv[2:] else saved()
    elif sys.argv[1:2] == ["deep"]:
        reader(*sys.argv[2:]) if sys.argv[2:] else deep()
    elif len(sys.argv) == 3:
        worker(*sys.argv[1:])
    else:
        main()

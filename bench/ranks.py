"""Steps of DPO, of RLOO, and of RLOO on a judge's scores, of one process and of two: what sharing the rows out costs and
saves.

    python bench/ranks.py            # all of it
    python bench/ranks.py save       # checkpoints alone

The work: a GPT-2 of 6 layers of width 256 over 8,192 tokens (7 million parameters), float32, AdamW. DPO: 16 pairs, 64 + 64
tokens, fixed rows. RLOO: 4 draws of 8 prompts of 32 tokens, 32 new tokens, drawn, scored and learnt from. Judged: a judge
of the model's size scores these, and learns from one pass over their 16 pairs. Each process has one thread. Times are
medians over the steps after the first; CPU-seconds are summed over the processes, and those of the busiest one; memory is
the highest that one process held, less what it held once models were read.

Checkpoints: a GPT-2 of 8 layers of width 512 over 50,257 tokens (51 million parameters) that two processes hold in parts;
what one process held at most while it was written, beyond what it held before. "gathered": the first process has weights
and moments in whole and writes them. "in parts": each writes its own. "and a folder": from these, for `from_pretrained`.

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
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.policies.dpo import DPO
from tiltlm.policies.reinforce import Reinforce
from tiltlm.policies.sft import SFT
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.sharded import all_of

SIZE, STEPS, OWN = Size(6, 256, 8192), 4, stream(0, "bench", "ranks")
LARGE = Size(8, 512, 50257)
WAYS = ((1, False), (2, False), (2, True))
"""Processes, and whether each holds a part of the weights."""


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


def worker(kind: str, shard: bool) -> None:
    """One process: its steps' wall and CPU-seconds, and the memory that they took."""
    torch.set_num_threads(1)
    model = CausalLM.from_config(SIZE.config(), seed=0)
    objective, experience = KINDS[kind](model, shard)
    before = memory("VmRSS")
    engine, took = Engine(model, Optim(lr=1e-5, shard=shard)), []
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


def saved() -> None:
    """Print what `saver` found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, __file__, "save", folder],
            capture_output=True,
            text=True,
            env=os.environ | ONE_THREAD | QUIET,
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    for line in done.stdout.splitlines():
        if line.startswith("FOUND "):
            print(line.removeprefix("FOUND "))


def measured(kind: str, processes: int, shard: bool) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, __file__, kind, "shard" if shard else "whole"], capture_output=True, text=True,
        env=os.environ | ONE_THREAD | QUIET,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.split("FOUND ")[1])


def main() -> None:
    print(f"{'':<28}{'wall s':>9}{'CPU s':>9}{'busiest':>9}{'memory MB':>11}{'first loss':>13}")
    for kind in KINDS:
        losses = []
        for processes, shard in WAYS:
            wall, cpu, busiest, most, loss = measured(kind, processes, shard)
            name = f"{kind}, {processes} process{'es' if processes > 1 else ''}{', in parts' if shard else ''}"
            print(f"{name:<28}{wall:>9.2f}{cpu:>9.2f}{busiest:>9.2f}{most / 1e6:>11.0f}{loss:>13.7f}", flush=True)
            losses.append(loss)
        if max(losses) - min(losses) > 1e-5 * max(1.0, abs(losses[0])):
            raise SystemExit(f"{kind}: the first losses differ: {losses}")
    saved()


if __name__ == "__main__":
    if sys.argv[1:2] == ["save"]:
        saver(Path(sys.argv[2])) if sys.argv[2:] else saved()
    elif len(sys.argv) == 3:
        worker(sys.argv[1], sys.argv[2] == "shard")
    else:
        main()

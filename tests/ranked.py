"""Short trainings whose results must not depend on how many processes share them; under torchrun, each writes its own.

torchrun --nproc-per-node 2 tests/ranked.py FOLDER NAME…
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiltlm as tl
from families import build
from tiltlm import ranks
from tiltlm.engine import Engine, Optim
from tiltlm.experience import Live, Offline, referenced_pairs
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.policies.dpo import DPO
from tiltlm.policies.reinforce import Reinforce
from tiltlm.policies.sft import SFT
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.sharded import all_of
from tiltlm.train import Pace, Training, Watch
from toy import Toy

STEPS, ROWS = 4, 15
"""Fifteen rows on two processes: seven and eight."""

OWN = stream(0, "test-ranks")


@dataclass(frozen=True)
class Found:
    """What a training came to: its metrics, step by step, the weights after it, and the last batch's tokens."""

    metrics: list[dict[str, float]]
    weights: Tensor
    tokens: Tensor


def ragged(n: int = 3 * ROWS) -> Samples:
    """Prompts and completions of unequal lengths."""
    rng = OWN.child("ragged").numpy()
    prompts = Tokens.of([rng.integers(0, 23, rng.integers(1, 6)).tolist() for _ in range(n)])
    done = Tokens.of([rng.integers(0, 23, rng.integers(1, 9)).tolist() for _ in range(n)])
    return Samples(prompts, torch.arange(n), done.ids, done.mask)


def trained(model: Any, objective: Any, experience: Any, optim: Optim) -> Found:
    engine, metrics, batch = Engine(model, optim), [], None
    for step in range(STEPS):
        with engine.whole():
            batch = experience.batch(step)
        metrics.append(engine.update(objective, batch))
    return Found(metrics, weights(model), batch.tokens if isinstance(batch, Samples) else batch.chosen.tokens)


def weights(model: Any) -> Tensor:
    return torch.cat([all_of(p.detach()).flatten() for p in model.parameters()])


def network() -> CausalLM:
    return build("llama", torch.float64, eos_ids=(3,))


def pairs(reference: CausalLM) -> Pairs:
    chosen = ragged()
    rejected = replace(chosen, tokens=(chosen.tokens + 3) % 23 * chosen.mask)
    return referenced_pairs(Pairs(chosen, rejected), reference)


def sft(optim: Optim) -> Found:
    return trained(network(), SFT(), Offline(ragged(), ROWS, OWN.child("rows")), optim)


def dpo(optim: Optim) -> Found:
    model = network()
    return trained(model, DPO(0.5), Offline(pairs(copy_of(model)), ROWS, OWN.child("rows")), optim)


def lora(optim: Optim) -> Found:
    """Adapters on random first weights, of which every process draws its own."""
    data = pairs(network())
    torch.manual_seed(ranks.number())
    return trained(network().with_lora(2).double(), DPO(0.5), Offline(data, ROWS, OWN.child("rows")), optim)


def rloo(optim: Optim) -> Found:
    model = network()
    prompts = Tokens.of([[k, k + 1][: 1 + k % 2] for k in range(9)])
    live = Live(model, total, prompts, 5, 6, OWN.child("live"), n=3, reference=copy_of(model))
    return trained(model, Reinforce("leave_one_out", beta=0.1), live, optim)


def total(samples: Samples) -> Tensor:
    return (samples.tokens * samples.mask).sum(1).double()


def learnt(name: str, rows: int = ROWS) -> Callable[[Optim], Found]:
    """A method of the catalogue on tables."""

    def run(optim: Optim) -> Found:
        fit = tl.Fit(lr=optim.lr, steps=STEPS, batch_size=rows, micro_batch=optim.micro_batch)
        found = tl.learn(Toy().problem({}, 0), name, fit=fit, progress=False)
        return Found([dict(m) for m in found.metrics], weights(found.learner.module), torch.zeros(0))

    return run


PARTICLES = tl.Fit().batch_size
"""A twist's batch has the size of its population, and this setting its default."""

CASES: dict[str, Callable[[Optim], Found]] = {
    "sft": sft, "dpo": dpo, "lora": lora, "rloo": rloo, "grpo": learnt("grpo"), "ppo": learnt("ppo"),
    "dapo": learnt("dapo"), "ctl": learnt("ctl", PARTICLES), "soft-q": learnt("rl", PARTICLES), "kto": learnt("kto"),
    "exo-rw": learnt("exo-rw"), "fudge": learnt("fudge", PARTICLES),
}  # fmt: skip


def course(folder: Path, steps: int, shard: bool = False) -> Training:
    """A live training in a folder, from its last checkpoint to `steps`."""
    model = network()
    prompts = Tokens.of([[k, k + 1][: 1 + k % 2] for k in range(9)])
    live = Live(model, total, prompts, 5, 6, OWN.child("live"), n=3)
    watch = Watch(
        2, lambda: {"size": float(sum(p.detach().square().sum() for p in model.parameters()))}, best="size"
    )
    pace = Pace(steps, decay="none")
    engine = Engine(model, Optim(lr=1e-2, shard=shard))
    return Training(model, engine, Reinforce(), live, pace, OWN.child("course"), folder, 0, watch=watch)


def broken(folder: Path) -> None:
    """The second process fails at its third step; the first waits for it."""

    def on_step(step: int, limit: int, metrics: dict[str, float]) -> None:
        if step == 2 and ranks.number() == 1:
            (folder / "planted").touch()
            raise ValueError("planted")

    replace(course(folder, 1000), on_step=on_step).run()


def main(folder: Path, asked: list[str]) -> None:
    for name in asked:
        called, _, how = name.removesuffix("+shard").partition("@")
        shard = name.endswith("+shard")
        if called == "broken":
            broken(folder)
        elif called in CASES:
            found = CASES[called](Optim(lr=1e-2, micro_batch=int(how or 0), shard=shard))
            torch.save(vars(found), folder / f"{name}-{ranks.number()}.pt")
        else:
            course(folder / called, int(how), shard).run()
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

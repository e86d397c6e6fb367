"""Short trainings whose results must not depend on how many processes share them; under torchrun, each writes its own.

torchrun --nproc-per-node 2 tests/ranked.py FOLDER NAME…
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig

import tiltlm as tl
from families import build
from tiltlm import ranks
from tiltlm.engine import Engine, Optim
from tiltlm.experience import Keeps, Live, Offline, referenced_pairs
from tiltlm.feeds.served import Followed, Following
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.models.reward_model import RewardModel
from tiltlm.models.scattered import in_parts
from tiltlm.policies.dpo import DPO
from tiltlm.policies.ppo import PPO, ActorCritic, Valued
from tiltlm.policies.reinforce import Reinforce
from tiltlm.policies.sft import SFT
from tiltlm.rewards.bradley_terry import BradleyTerry, Comparisons
from tiltlm.samplers.ancestral import draw
from tiltlm.samplers.serving import Serving
from tiltlm.samples import Conditioned, Pairs, Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.sharded import all_of
from tiltlm.target import Target
from tiltlm.train import Pace, Training, Watch, checkpoints, step_of
from tiltlm.twists.ctl import CTL
from tiltlm.twists.draws import TwistDraws
from tiltlm.twists.learned import LearnedTwist, TiltedPolicy
from tiltlm.twists.value import ValueLearning
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
        if isinstance(experience, Keeps):
            metrics[-1] |= experience.numbers()
    if engine.divided and FOLDERS[-1].name in SAVED:
        written_and_read(engine, FOLDERS[-1])
    return Found(metrics, weights(model), tokens_of(batch))


FOLDERS: list[Path] = []
"""Where cases write, the last one now."""

SAVED = {f"{name}+shard-saved" for name in ("lora", "ppo", "judge", "head", "frozen")}
"""Those that do."""


def written_and_read(engine: Engine, folder: Path) -> None:
    """Write a divided network, and take it back bit by bit: from its parts, and from what one process wrote of them."""
    model: Any = engine.model
    expected = weights(model)
    ranks.from_first(folder.mkdir)
    engine.write_part(folder)
    if ranks.is_first():
        with engine.saving(folder):
            model.save(folder)
    for name in ("parts", "whole"):
        with torch.no_grad():
            for p in engine.parameters:
                p.zero_()
        assert not torch.equal(weights(model), expected)
        engine.restore(folder, engine.state()) if name == "parts" else model.restore(folder)
        assert torch.equal(weights(model), expected), name
        ranks.wait()


def tokens_of(batch: Any) -> Tensor:
    """The tokens of a batch, whatever holds them."""
    while not isinstance(batch, Samples):
        names = ("pairs", "chosen", "proposal", "samples")
        batch = next(getattr(batch, name) for name in names if hasattr(batch, name))
    return batch.tokens


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


@dataclass(frozen=True)
class Beside:
    """A server, but for the network between: it draws with weights of its own."""

    model: CausalLM
    how: Serving = Serving("http://localhost:1/v1", every=2)

    def __call__(self, prompts: Tokens, *, rows: Tensor | None = None, **how: Any) -> Samples:
        return draw(self.model, prompts, **how)


def served(optim: Optim) -> Found:
    """A server that follows the policy every second step; of several processes the first sends, and asks."""
    model, prompts, sent = network(), Tokens.of([[k, k + 1][: 1 + k % 2] for k in range(9)]), []
    beside = Beside(copy_of(model))
    place = Path(ranks.from_first(tempfile.mkdtemp))

    def send(folder: Path) -> None:
        sent.append(folder)
        beside.model.restore(folder)

    drawer: Any = Following(beside, model, place, send)  # type: ignore[arg-type]
    live = Live(model, total, prompts, 5, 6, OWN.child("live"), n=3, reference=copy_of(model), drawer=drawer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "what the server draws with")  # weights a step old
        found = trained(model, Reinforce("leave_one_out", beta=0.1), Followed(live, drawer), optim)
    assert len(sent) == 2 * ranks.is_first()
    return found


def ppo(optim: Optim) -> Found:
    """Two networks, each with methods of its own."""
    model = network()
    pair = ActorCritic(model, ValueHead(network(), mlp_layers=1))
    prompts = Tokens.of([[k, k + 1][: 1 + k % 2] for k in range(9)])
    live = Live(model, total, prompts, 5, 6, OWN.child("live"), n=3, reference=copy_of(model))
    found = trained(pair, PPO(0.1, passes=2), Valued(live, pair.critic), optim)
    return replace(found, metrics=[{n: x for n, x in each.items() if n != "clipped"} for each in found.metrics])


def ctl(optim: Optim) -> Found:
    """A twist that reads conditions, beside the prompts; a population to a process."""
    twist = ValueHead(network(), per_token=True, reads="tokens")
    prompts = Conditioned(*vars(Tokens.of([[1], [2, 3]])).values(), Tokens.of([[4, 5], [6]]))
    target = Target(network(), total, 20.0)
    draws = TwistDraws(
        target, LearnedTwist(twist), lambda stream: (prompts, None), 6, OWN.child("draws"), CTL.needs, particles=7
    )
    return trained(twist, CTL(), draws, optim)


def values(optim: Optim) -> Found:
    """A value behind every prefix, its body's language modelling beside it."""
    value = ValueHead(network(), mlp_layers=1)
    return trained(value, ValueLearning(lm_weight=0.5), Offline(told(), ROWS, OWN.child("rows")), optim)


def told() -> Samples:
    samples = ragged()
    return samples.with_(reward=total(samples) % 2)


def tilted(optim: Optim, **how: Any) -> Found:
    """A head on the reference as a policy."""
    reference = network().requires_grad_(False)
    body = reference if how.get("frozen") else network()
    policy = TiltedPolicy(reference, ValueHead(body, **how))
    return trained(policy, DPO(0.5), Offline(pairs(reference), ROWS, OWN.child("rows")), optim)


SMALL: dict[str, Any] = {
    "vocab_size": 23, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 32, "max_position_embeddings": 64,
}  # fmt: skip


def judge(optim: Optim) -> Found:
    """A reward model."""
    config = LlamaConfig(**SMALL, num_labels=1, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).double()
    data = Comparisons(pairs(network()), torch.zeros(3 * ROWS))
    judge = RewardModel(model, SimpleNamespace(model_max_length=64, save_pretrained=lambda folder: None))
    return trained(judge, BradleyTerry(center=0.1), Offline(data, ROWS, OWN.child("rows")), optim)


DIVIDED: dict[str, Callable[[Optim], Found]] = {
    "sft": sft, "dpo": dpo, "lora": lora, "rloo": rloo, "ppo": ppo, "ctl": ctl, "values": values, "judge": judge,
    "served": served,
    "head": partial(tilted, per_token=True), "frozen": partial(tilted, per_token=True, frozen=True),
}  # fmt: skip
"""Networks, for weights in parts."""

PARTICLES = tl.Fit().batch_size
"""A twist's batch has the size of its population, and this setting its default."""

CASES: dict[str, Callable[[Optim], Found]] = {
    "sft": sft, "dpo": dpo, "lora": lora, "rloo": rloo, "grpo": learnt("grpo"), "ppo": learnt("ppo"),
    "dapo": learnt("dapo"), "served": served, "ctl": learnt("ctl", PARTICLES), "soft-q": learnt("rl", PARTICLES),
    "kto": learnt("kto"), "exo-rw": learnt("exo-rw"), "fudge": learnt("fudge", PARTICLES),
}  # fmt: skip


def course(folder: Path, steps: int, shard: bool = False) -> Training:
    """A live training in a folder, from its last checkpoint to `steps`."""
    model = network()
    prompts = Tokens.of([[k, k + 1][: 1 + k % 2] for k in range(9)])
    live = Live(model, total, prompts, 5, 6, OWN.child("live"), n=3)
    seen: list[tuple[int, list[str]]] = []

    def look(step: int, limit: int, metrics: dict[str, float]) -> None:
        seen.extend((step_of(path), sorted(each.name for each in path.iterdir())) for path in checkpoints(folder))
        if ranks.is_first():
            (folder / "seen.json").write_text(json.dumps(seen))

    watch = Watch(
        2, lambda: {"size": float(sum(p.detach().square().sum() for p in model.parameters()))}, best="size"
    )
    pace = Pace(steps, decay="none")
    engine = Engine(model, Optim(lr=1e-2, shard=shard))
    return Training(model, engine, Reinforce(), live, pace, OWN.child("course"), folder, 3, look, watch=watch)


def broken(folder: Path) -> None:
    """The second process fails at its third step; the first waits for it."""

    def on_step(step: int, limit: int, metrics: dict[str, float]) -> None:
        if step == 2 and ranks.number() == 1:
            (folder / "planted").touch()
            raise ValueError("planted")

    replace(course(folder, 1000), on_step=on_step).run()


def main(folder: Path, asked: list[str]) -> None:
    for name in asked:
        called, _, how = name.removesuffix("+shard").removesuffix("+layers").partition("@")
        shard = name.endswith(("+shard", "+layers"))
        if called == "broken":
            broken(folder)
        elif called in CASES or (shard and called in DIVIDED):
            FOLDERS.append(folder / f"{name}-saved")
            with in_parts(name.endswith("+layers")):
                found = (DIVIDED if shard else CASES)[called](
                    Optim(lr=1e-2, micro_batch=int(how or 0), shard=shard)
                )
            torch.save(vars(found), folder / f"{name}-{ranks.number()}.pt")
        else:
            course(folder / called, int(how), shard).run()
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

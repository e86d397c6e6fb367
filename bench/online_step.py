"""One online step of each kind, draws included: drawn, scored, learnt from, against the trainers of TRL.

    opo      2 draws of 16 prompts, hard labels, DPO      OnlineDPOTrainer
    grpo     4 draws of 8 prompts, clipped steps, k3      GRPOTrainer, loss_type grpo

The work: 32 completions of 64 tokens behind prompts of 64, drawn by the policy at temperature 1; a reward that costs
nothing; the reference's log-probabilities; forward and backward pass, clipping to norm 1 and AdamW. Our side is what
`tiltlm run` does in a step: the experience that `course_of` makes, and `Engine.update`. TRL's is its `training_step`,
and what its loop does next. Both start from the same weights (the policy is a perturbed copy of the reference), end a
completion at token 0, and run in float32 without dropout, gradient checkpointing and logs. Each takes several steps in
a row.

The check: we learn from what TRL drew, step by step. Losses and norms of the gradient must agree to 1e-4 of their size,
or the script fails. (In its first pass over a batch GRPO's loss is beta·k3 alone, its advantages adding up to 0: they
show in the gradient.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from tempfile import mkdtemp
from typing import Any

import torch

from common import LARGE, SMALL, Side, Size, Work, random_ids, ratio, run
from preference_step import networks, words

ROWS, PROMPT, COMPLETION = 32, 64, 64
BETA, LR, CLIP, END = 1.0, 1e-5, 1.0, 0
APART = 1e-4


@dataclass(frozen=True)
class Case:
    """A kind of step (n draws of each prompt) at a size, and what is asked of us: CPU-seconds and memory growth over the
    peer's."""

    n: int
    method: Callable[[], Any]
    trl: Callable[[Case], Any]
    size: Size
    cpu: str = "<=0.5"
    memory: str = "<=0.5"

    def prompts(self) -> torch.Tensor:
        """Distinct prompts without the token that ends completions, [ROWS / n, 64]."""
        return 1 + random_ids(0, ROWS // self.n, PROMPT, self.size.vocab - 1)


def points(completion: list[int], vocab: int) -> float:
    """The reward: the sum of the ids, so that rows hardly ever tie; in units in which what is added to a standard deviation
    (1e-6 by us, 1e-4 by TRL) does not show."""
    return 100 * sum(completion) / vocab


# ---- ours ------------------------------------------------------------------------------------------------------


def opo() -> Any:
    from tiltlm.policies.opo import OPO

    return OPO(labels="hard", beta_pi=BETA)


def grpo() -> Any:
    from tiltlm.policies.grpo import GRPO

    return GRPO(beta=BETA)


def ours(case: Case) -> Work:
    """Draw and learn."""
    problem, method, who, engine, objective = learning(case)
    from tiltlm.feeds import Feed, course_of
    from tiltlm.fit import Fit

    groups = method.fed == "groups"
    feed = Feed(n=1, size=case.n) if groups else Feed(n=case.n)
    fit = Fit(batch_size=ROWS // case.n if groups else ROWS)
    experience, step = course_of(problem, method, who, feed, fit, "bench").experience, count()

    def work() -> dict[str, float]:
        who.module.eval()
        batch = experience.batch(next(step))
        who.module.train()
        found = engine.update(objective, batch)
        return {"loss": found["loss"], "norm": found["grad_norm"]}

    return work


def learning(case: Case) -> tuple[Any, ...]:
    """Problem, method, learner, engine, objective."""
    from tiltlm.engine import Engine, Optim
    from tiltlm.models.causal import CausalLM
    from tiltlm.nets import Net, learner
    from tiltlm.problem import Problem
    from tiltlm.samples import Tokens
    from tiltlm.seeds import stream

    policy, reference = networks(case.size)
    problem = Problem.of(
        CausalLM(reference, eos_ids=(END,)), reward=lambda samples: rewards(samples, case.size.vocab),
        prompts=Tokens.full(case.prompts()), beta=1.0, max_new_tokens=COMPLETION,
    )  # fmt: skip
    method = case.method()
    problem, who = learner(problem, method, Net(), stream(0, "bench"))
    who.module.model.load_state_dict(policy.state_dict())
    return problem, method, who, Engine(who.module, Optim(lr=LR, clip=CLIP)), method.objective(problem)


def rewards(samples: Any, vocab: int) -> torch.Tensor:
    return torch.tensor([points(row, vocab) for row in samples.completions.lists()])


def replayed(case: Case, steps: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Our losses and norms on what the peer drew in its steps."""
    problem, method, who, engine, objective = learning(case)
    from tiltlm.groups import Groups
    from tiltlm.samples import Samples, Tokens

    asked, found = case.prompts().tolist(), []
    for step in steps:
        rows = sorted((asked.index(x), y) for x, y in zip(step["prompts"], step["completions"], strict=True))
        done = Tokens.of([y for _, y in rows])
        index = torch.tensor([k for k, _ in rows])
        samples = Samples(problem.prompts["train"], index, done.ids, done.mask)
        with torch.no_grad():
            samples = problem.target.scored(samples.with_(log_q=who.policy.log_prob(samples)))
        batch = Groups(samples, case.n) if method.fed == "groups" else samples
        metrics = engine.update(objective, batch)
        found.append({"loss": metrics["loss"], "norm": metrics["grad_norm"]})
    return found


# ---- TRL -------------------------------------------------------------------------------------------------------

SHARED: dict[str, Any] = {
    "learning_rate": LR,
    "weight_decay": 0.0,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": [],
    "temperature": 1.0,
    "beta": BETA,
}
"""Settings of both TRL trainers; they draw without top-k and top-p as they are."""


def theirs(case: Case) -> Work:
    """A training step on every prompt, and what it drew."""
    trainer, rows, drawn = case.trl(case)
    optimizer = trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, optimizer)
    trainer.current_gradient_accumulation_steps = 1

    def work() -> dict[str, Any]:
        loss = trainer.training_step(model, rows, None)
        norm = trainer.accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        model.zero_grad()
        return {"loss": loss.item(), "norm": norm.item(), **drawn()}

    return work


def online_dpo(case: Case) -> Any:
    """Trainer, its rows, and what says what it drew last."""
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    settings = OnlineDPOConfig(
        **SHARED, output_dir=mkdtemp(), max_new_tokens=COMPLETION, per_device_train_batch_size=ROWS // case.n
    )
    policy, reference = networks(case.size)
    texts = texts_of(case)
    trainer = OnlineDPOTrainer(
        policy,
        reference,
        reward_of(case),
        settings,
        train_dataset=data(texts),
        processing_class=words(case.size.vocab),
    )
    drawn = remembered(trainer, "_generate")

    def last() -> dict[str, Any]:
        prompts, _, completions, mask, _ = drawn[0]
        return {"prompts": prompts.tolist(), "completions": unpadded(completions, mask)}

    return trainer, {"prompt": texts}, last


def group_relative(case: Case) -> Any:
    """Trainer, its rows, and what says what it drew last."""
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(
        **SHARED, output_dir=mkdtemp(), max_completion_length=COMPLETION, per_device_train_batch_size=ROWS,
        num_generations=case.n, loss_type="grpo", epsilon=0.2, use_bias_correction_kl=False,
    )  # fmt: skip
    policy, reference = networks(case.size)
    policy.config._name_or_path = mkdtemp()  # where it takes its reference from
    reference.save_pretrained(policy.config._name_or_path)
    texts = [text for text in texts_of(case) for _ in range(case.n)]
    trainer = GRPOTrainer(
        policy, reward_of(case), settings, train_dataset=data(texts), processing_class=words(case.size.vocab)
    )
    drawn = remembered(trainer, "_generate_and_score_completions")

    def last() -> dict[str, Any]:
        found = drawn[0]
        completions = unpadded(found["completion_ids"], found["completion_mask"])
        return {"prompts": found["prompt_ids"].tolist(), "completions": completions}

    return trainer, [{"prompt": text} for text in texts], last


def texts_of(case: Case) -> list[str]:
    """The prompts as texts, which the trainers tokenize themselves."""
    return [" ".join(f"t{i}" for i in row) for row in case.prompts().tolist()]


def data(texts: list[str]) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": text} for text in texts])


def reward_of(case: Case) -> Any:
    def reward(completion_ids: list[list[int]], **others: Any) -> list[float]:
        return [points(row, case.size.vocab) for row in completion_ids]

    return reward


def remembered(trainer: Any, name: str) -> list[Any]:
    """A list that holds what the trainer's method of this name returned last."""
    method, last = getattr(trainer, name), [None]

    def kept(*args: Any, **options: Any) -> Any:
        last[0] = method(*args, **options)
        return last[0]

    setattr(trainer, name, kept)
    return last


def unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[: int(n)].tolist() for row, n in zip(ids, mask.sum(1), strict=True)]


# ---- both ------------------------------------------------------------------------------------------------------


def apart(mine: list[dict[str, float]], theirs: list[dict[str, Any]]) -> float:
    """The largest relative difference of losses and norms."""
    pairs = ((a[name], b[name]) for a, b in zip(mine, theirs, strict=True) for name in ("loss", "norm"))
    return max(abs(a - b) / abs(b) for a, b in pairs)


def report(name: str, found: dict[str, Side]) -> list[str]:
    mine, peer, case = found["ours"], found["trl"], CASES[name]
    their_steps = peer.results[0]
    again = replayed(case, their_steps)
    difference = apart(again, their_steps)
    print(
        f"{name:12s} TRL's draws: losses {[round(x['loss'], 5) for x in again]}, apart by at most {difference:.1e}"
    )
    if not difference < APART:
        raise SystemExit(
            f"{name}: not the same work: {again}, TRL {[(x['loss'], x['norm']) for x in their_steps]}"
        )
    print(f"{name:12s} wall {mine.wall / peer.wall:.2f}, total peak {mine.peak / peer.peak:.2f} of the peer's")
    kind, size = name.split("-")
    return [
        ratio(f"{kind}-cpu-{size}", mine.cpu / peer.cpu, case.cpu),
        ratio(f"{kind}-memory-{size}", mine.growth / peer.growth, case.memory),
    ]


CASES = {
    "opo-6x384": Case(2, opo, online_dpo, LARGE),
    "grpo-6x384": Case(4, grpo, group_relative, LARGE),
    "opo-4x128": Case(2, opo, online_dpo, SMALL),
    "grpo-4x128": Case(4, grpo, group_relative, SMALL),
}

SIDES = {"ours": ours, "trl": theirs}

if __name__ == "__main__":
    run(sys.modules[__name__], SIDES, CASES, report, rounds=2)

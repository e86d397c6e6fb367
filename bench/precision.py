"""bfloat16 against float32: our drawing and our DPO step, each in both.

    drawing-N   100 completions of N tokens, one of each of 100 prompts of 8 tokens; `Narrow` draws in bfloat16
    dpo         an update on 16 pairs of 64 + 64 tokens, and the reference's pass on them, both in the one precision

Weights are float32 on both sides, and equal. What must agree: losses to a hundredth; log q of what was drawn in bfloat16
with the same rows' log p in float32: the mean and the largest difference of a row's sum are printed.

The ceiling is measured beside it, in one process: products of the network's own shapes, in GFLOP a CPU-second in both
precisions. What is not a product (exponentials, norms, attention's softmax, the draw itself) gains nothing from bfloat16.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch

from common import LARGE, Side, Work, random_ids, ratio, run
from preference_step import BETA, CLIP, LR, ROWS, networks, samples
from sampling import network

DRAWN, PROMPT = 100, 8
SHAPES = {"layer": (2048, 384, 1536), "layer, one token": (100, 384, 1536), "head": (976, 384, 2048)}
"""Rows, inputs and outputs of a matrix product; the head's is a tile of the vocabulary, as scoring multiplies it."""


@dataclass(frozen=True)
class Case:
    """Tokens a row (0: a DPO step), and what is asked of the ratio."""

    new: int
    goal: str


CASES = {"drawing-20": Case(20, ">=2"), "drawing-64": Case(64, ">=2"), "dpo": Case(0, "<=0.4")}


def side(case: Case, precision: str) -> Work:
    return drawing(case, precision) if case.new else step(precision)


def drawing(case: Case, precision: str) -> Work:
    from tiltlm.models.causal import CausalLM
    from tiltlm.models.narrow import Narrow
    from tiltlm.samplers.ancestral import draw
    from tiltlm.samples import Tokens
    from tiltlm.seeds import stream

    model = CausalLM(network(LARGE))
    drawer = model if precision == "float32" else Narrow(model)
    prompts, number = Tokens.full(random_ids(1, DRAWN, PROMPT, LARGE.vocab)), count()

    def work() -> list[Any]:
        drawn = draw(drawer, prompts, max_new_tokens=case.new, stream=stream(next(number), "bench"))
        assert drawn.log_q is not None
        return [drawn.tokens.tolist(), drawn.log_q.sum(1).tolist()]

    return work


def step(precision: str) -> Work:
    from tiltlm.engine import Engine, Optim
    from tiltlm.experience import Offline, Referenced
    from tiltlm.models.causal import CausalLM
    from tiltlm.models.precision import computing_in
    from tiltlm.policies.dpo import DPO
    from tiltlm.samples import Pairs
    from tiltlm.seeds import stream

    policy, reference = (CausalLM(each) for each in networks(LARGE))
    experience = Referenced(Offline(Pairs(*samples(LARGE)), ROWS, stream(0, "bench")), reference)
    engine = Engine(policy.train(), Optim(lr=LR, clip=CLIP, precision=precision))

    def work() -> float:
        with computing_in(reference, reference.device, precision):
            batch = experience.batch(0)
        return engine.update(DPO(BETA), batch)["loss"]

    return work


def report(name: str, found: dict[str, Side]) -> list[str]:
    case, narrow, wide = CASES[name], found["bfloat16"], found["float32"]
    if not case.new:
        apart = max(abs(a - b) for a, b in zip(narrow.results[0], wide.results[0], strict=True))
        print(
            f"{name:10s} losses {[round(x, 5) for x in wide.results[0]]}, bfloat16's apart by at most {apart:.1e}"
        )
        if not apart < 1e-2:
            raise SystemExit(f"the losses of both precisions differ: {narrow.results[0]} and {wide.results[0]}")
        lines = [ratio("dpo-memory-bfloat16-6x384", narrow.growth / wide.growth, "none")]
        return [ratio("dpo-cpu-bfloat16-6x384", narrow.cpu / wide.cpu, case.goal), *lines]
    error = error_of(*narrow.results[0][-1])
    print(
        f"{name:10s} |log q − log p in float32| of a row: mean {error.mean():.3f}, largest {error.max():.3f} nats"
    )
    rates = {side: DRAWN * case.new / one.cpu for side, one in found.items()}
    print(f"{name:10s} tokens per CPU-second: " + ", ".join(f"{side} {rate:.0f}" for side, rate in rates.items()))
    if not error.max() < 1:
        raise SystemExit("bfloat16 draws from another distribution")
    return [ratio(f"{name}-bfloat16-6x384", wide.cpu / narrow.cpu, case.goal)]


@torch.no_grad()
def error_of(tokens: list[list[int]], log_q: list[float]) -> torch.Tensor:
    """|log q − log p| of every row's sum, p the same weights in float32; [N]."""
    from tiltlm.models.causal import CausalLM
    from tiltlm.samples import Samples, Tokens

    done, asked = torch.tensor(tokens), Tokens.full(random_ids(1, DRAWN, PROMPT, LARGE.vocab))
    rows = Samples(asked, torch.arange(DRAWN), done, torch.ones_like(done, dtype=torch.bool))
    return (torch.tensor(log_q) - CausalLM(network(LARGE)).log_prob(rows).sum(1)).abs()


def ceiling() -> None:
    """Print how fast this processor multiplies in both precisions."""
    for name, (rows, inside, outside) in SHAPES.items():
        rates = []
        for dtype in (torch.float32, torch.bfloat16):
            a, b = torch.randn(rows, inside).to(dtype), torch.randn(inside, outside).to(dtype)
            product = torch.zeros(rows, outside, dtype=dtype)  # new memory would be measured with it
            seconds = []
            for _ in range(10):
                start = time.process_time()
                torch.mm(a, b, out=product)
                seconds.append(time.process_time() - start)
            rates.append(2e-9 * rows * inside * outside / min(seconds))
        print(f"products   {name:18s} float32 {rates[0]:5.0f}, bfloat16 {rates[1]:5.0f} GFLOP/s", flush=True)


SIDES = {name: partial(side, precision=name) for name in ("float32", "bfloat16")}

if __name__ == "__main__":
    if "--side" not in sys.argv:
        torch.set_num_threads(1)
        ceiling()
    run(sys.modules[__name__], SIDES, CASES, report, rounds=3)

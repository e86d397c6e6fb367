"""One CTL update: draw by twisted SMC, weigh, one forward and backward pass of the twist, AdamW.

The work: 100 particles, prompt 8, 20 tokens, float32, a twist on a body of its own, positives by the particles' own
weights (no exact draws). The goals in seconds stand against the original JAX code, measured on such a machine (12.8
CPU-seconds at vocabulary 1000, 134.5 at 50257, 9.6 GB). *engine* alone is the same update without the drawing, and is
not judged.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import count

import torch

from common import Side, Size, Work, ratio, run
from smc import NEW, PARTICLES, problem


@dataclass(frozen=True)
class Case:
    """A model's size, and what is asked of us there: CPU-seconds of an update, and GB at its peak."""

    size: Size
    seconds: str
    gigabytes: str = "<=1.2"


CASES = {"4x128-1000": Case(Size(4, 128, 1000), "<=0.6"), "4x128-50257": Case(Size(4, 128, 50257), "<=4.5")}


def update(case: Case, redraw: bool = True) -> Work:
    from tiltlm.engine import Engine, Optim
    from tiltlm.models.causal import copy_of
    from tiltlm.models.heads import ValueHead
    from tiltlm.samplers.scenes import OnePrompt
    from tiltlm.seeds import stream
    from tiltlm.twists.ctl import CTL
    from tiltlm.twists.draws import TwistDraws
    from tiltlm.twists.learned import LearnedTwist

    target, prompt = problem(case)
    values = ValueHead(copy_of(target.reference).requires_grad_(True), per_token=True)
    torch.nn.init.normal_(values.head[-1].weight, std=0.002)
    objective = CTL()
    draws = TwistDraws(
        target, LearnedTwist(values), OnePrompt(prompt), NEW, stream(0, "bench"), objective.needs, PARTICLES
    )
    engine, number = Engine(values, Optim(lr=1e-4, clip=0.0)), count()
    once = None if redraw else draws.batch(0)

    def work() -> float:
        values.eval()
        batch = draws.batch(next(number)) if once is None else once
        values.train()
        return engine.update(objective, batch)["loss"]

    return work


def report(case: str, found: dict[str, Side]) -> list[str]:
    """Every loss is a number and the twist moved; the case's ratio lines."""
    losses = [loss for process in found["ctl"].results for loss in process]
    if not all(map(math.isfinite, losses)) or len(set(losses)) < 2:
        raise SystemExit(f"{case}: the losses {losses} are no training")
    return [
        ratio(f"ctl-seconds-{case}", found["ctl"].cpu, CASES[case].seconds),
        ratio(f"ctl-gigabytes-{case}", found["ctl"].peak / 1e9, CASES[case].gigabytes),
    ]


SIDES = {"ctl": update, "engine": lambda case: update(case, redraw=False)}

if __name__ == "__main__":
    run(sys.modules[__name__], SIDES, CASES, report, rounds=5)

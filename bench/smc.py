"""Twisted SMC on one prompt, SMC without a twist, and plain sampling of as many rows.

The work: 100 particles, prompt 8, 20 tokens, float32. *twisted*: the twist-induced proposal with a twist on a body of
its own, resampling at every step but the last, the reward known in closed form. *untwisted*: the same call without a
twist, never resampling (importance sampling by the reference). *draw*: plain sampling with log-probabilities. No peer
runs here: the goals in seconds stand against the original JAX code, measured on such a machine (2.3 CPU-seconds at
vocabulary 1000, 19.8 at 50257). Checked: untwisted SMC draws what `draw` draws, and twisted SMC's estimate of Z agrees
with that of importance sampling within 4 standard errors of their averages over all passes.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import count
from statistics import mean, stdev
from typing import Any

import torch

from common import Side, Size, Work, random_ids, ratio, run

PARTICLES, PROMPT, NEW = 100, 8, 20
BETA = 1.0


@dataclass(frozen=True)
class Case:
    """A model's size, and what is asked of us there: CPU-seconds of a twisted pass; untwisted over plain."""

    size: Size
    seconds: str
    over: str = "<=1.15"


CASES = {"4x128-1000": Case(Size(4, 128, 1000), "<=0.45"), "4x128-50257": Case(Size(4, 128, 50257), "<=4.0")}


def network(size: Size) -> Any:
    """A random network."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(size.config()).eval()


def reward(samples: Any) -> torch.Tensor:
    """0.3 for every even token."""
    return 0.3 * (samples.tokens % 2 == 0).float().sum(1)


def problem(case: Case) -> tuple[Any, Any]:
    """Target and prompt."""
    from tiltlm.models.causal import CausalLM
    from tiltlm.samples import Tokens
    from tiltlm.target import Target

    reference = CausalLM(network(case.size)).requires_grad_(False)
    return Target(reference, reward, BETA), Tokens.full(random_ids(1, 1, PROMPT, case.size.vocab))


def smc_pass(case: Case, twisted: bool) -> Work:
    from tiltlm.models.causal import copy_of
    from tiltlm.models.heads import ValueHead
    from tiltlm.samplers.smc import SMC, smc
    from tiltlm.seeds import stream
    from tiltlm.twists.learned import LearnedTwist

    target, prompt = problem(case)
    twist = None
    if twisted:
        values = ValueHead(copy_of(target.reference), per_token=True).requires_grad_(False)
        torch.nn.init.normal_(values.head[-1].weight, std=0.002)
        twist = LearnedTwist(values)
    settings, number = SMC(PARTICLES, 1.0 if twisted else 0.0), count()

    def work() -> list[Any]:
        own = stream(next(number), "bench")
        found = smc(target, twist, prompt, settings, max_new_tokens=NEW, stream=own)
        return [float(found.log_z[0]), found.samples.log_ref.sum(1).mean().item()]

    return work


def draw_pass(case: Case) -> Work:
    from tiltlm.samplers.ancestral import draw
    from tiltlm.seeds import stream

    target, prompt = problem(case)
    number = count()

    def work() -> list[Any]:
        own = stream(next(number), "bench")
        drawn = draw(target.reference, prompt, n=PARTICLES, max_new_tokens=NEW, stream=own)
        log_z = (reward(drawn) / BETA).logsumexp(0) - math.log(PARTICLES)
        return [float(log_z), drawn.log_q.sum(1).mean().item()]

    return work


def agree(name: str, one: list[float], other: list[float]) -> None:
    """Averages within 4 standard errors of their difference, or the script fails."""
    error = math.hypot(stdev(one) / len(one) ** 0.5, stdev(other) / len(other) ** 0.5)
    if not abs(mean(one) - mean(other)) <= 4 * error + 1e-9:
        raise SystemExit(f"{name}: {mean(one):.4f} and {mean(other):.4f} differ by more than 4 × {error:.4f}")
    print(f"{name}: {mean(one):.4f} and {mean(other):.4f}, standard error of the difference {error:.4f}")


def report(case: str, found: dict[str, Side]) -> list[str]:
    """Checks the estimates; the case's ratio lines."""

    def column(side: str, k: int) -> list[float]:
        return [result[k] for process in found[side].results for result in process]

    agree(
        f"{case} Z, twisted and by plain draws",
        *([math.exp(z) for z in column(s, 0)] for s in ("twisted", "draw")),
    )
    agree(f"{case} log p, untwisted and plain", column("untwisted", 1), column("draw", 1))
    wanted = CASES[case]
    return [
        ratio(f"smc-seconds-{case}", found["twisted"].cpu, wanted.seconds),
        ratio(f"smc-untwisted-over-draw-{case}", found["untwisted"].cpu / found["draw"].cpu, wanted.over),
    ]


SIDES = {
    "twisted": lambda case: smc_pass(case, True),
    "untwisted": lambda case: smc_pass(case, False),
    "draw": draw_pass,
}

if __name__ == "__main__":
    run(sys.modules[__name__], SIDES, CASES, report, rounds=5, short=8)

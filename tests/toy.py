"""A task small enough to enumerate: tables over several prompts, a bounded reward, pairs of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltlm.exact import solve
from tiltlm.models.table import TableLM
from tiltlm.problem import Facts, Problem
from tiltlm.run import Run
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.stages.task import Task
from tiltlm.target import Target

PROMPTS, VOCABULARY, HORIZON = 6, 3, 3


@dataclass(frozen=True)
class Toy(Task):
    """Count the 2s: r = their number / 3, over random tables."""

    name: str = "toy"
    beta: float = 0.5
    device: str = "cpu"
    source: Any = "fresh"
    one: bool = False
    bounded: bool = True

    def facts(self) -> Facts:
        return Facts(
            self.beta, "one" if self.one else "several", frozenset({"pairs", "answers"}), 1.0 if self.bounded else None,
            (0.0, 1 / 3, 2 / 3, 1.0), held_out=True, network=False, source=self.source,
        )  # fmt: skip

    def problem(self, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
        own = stream(seed, "toy")
        reference = TableLM(PROMPTS, VOCABULARY, HORIZON).randomise(own.child("reference").generator(), 0.7)
        reference.requires_grad_(False)
        target = Target(reference, twos, self.beta)
        numbers = Tokens.of([[k] for k in range(1 if self.one else PROMPTS)])
        prompts: Any = dict.fromkeys(("train", "valid", "test"), numbers)

        def pairs(split: str) -> Pairs:
            drawn = draw(reference, numbers, n=8, max_new_tokens=HORIZON, stream=own.child("pairs", split))
            drawn = target.scored(drawn.with_(log_ref=drawn.log_q))
            assert drawn.reward is not None
            a = torch.arange(0, len(drawn), 2)
            better = drawn.reward[a] >= drawn.reward[a + 1]
            return Pairs(drawn.select(torch.where(better, a, a + 1)), drawn.select(torch.where(better, a + 1, a)))

        return Problem(
            target, prompts, HORIZON, own, self.facts(), own={"pairs": pairs, "answers": lambda s: pairs(s).chosen},
            solve=lambda some: solve(target, some, HORIZON),
        )  # fmt: skip


def twos(samples: Samples) -> Tensor:
    return ((samples.tokens == 2) & samples.mask).sum(1).double() / HORIZON

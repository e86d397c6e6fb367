"""The enumerable worlds that `calibrate.py` measures: three tokens, three steps, r = (share of token 2)²."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tiltlm.exact import Solution, solve
from tiltlm.models.table import TableLM, TableValues
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.target import Target
from tiltlm.twists.learned import LearnedTwist

VOCAB, HORIZON = 3, 3


def share_of_two(samples: Samples) -> Tensor:
    """The reward: the square of the share of tokens that are 2."""
    return ((samples.tokens == 2) & samples.mask).double().mean(1) ** 2


@dataclass(frozen=True)
class World:
    """`prompts` prompts, enumerated at one beta."""

    prompts: int
    beta: float
    own: Stream

    @cached_property
    def reference(self) -> TableLM:
        return self.table("reference")

    def table(self, name: str) -> TableLM:
        found = TableLM(self.prompts, VOCAB, HORIZON).randomise(self.own.child(name).generator())
        return found.requires_grad_(False)

    @cached_property
    def target(self) -> Target:
        return Target(self.reference, share_of_two, self.beta)

    @cached_property
    def solution(self) -> Solution:
        return solve(self.target, Tokens.of([[p] for p in range(self.prompts)]), HORIZON)

    def twist(self, noise: float) -> LearnedTwist:
        """psi* with noise, as a table."""
        values, samples = TableValues(self.prompts, VOCAB, HORIZON), self.solution.samples
        log_psi, code = self.solution.log_psi_star(), torch.zeros(len(samples), dtype=torch.int64)
        generator = self.own.child("twist", noise).generator()
        for t in range(HORIZON):
            code = code * VOCAB + samples.tokens[:, t]
            table = values.tables[t].data
            table[samples.prompt_index, code, 0] = log_psi[:, t]
            table += noise * torch.randn(table.shape, generator=generator, dtype=table.dtype)
        return LearnedTwist(values.requires_grad_(False))

    def drawn(self, log_p: Tensor, rows: Tensor, n: int, own: Stream) -> Tensor:
        """Numbers of `n` completions drawn for each of the prompts `rows` [...], from log_p [P, S]: [..., n]."""
        flat = torch.multinomial(log_p.exp()[rows.flatten()], n, replacement=True, generator=own.generator())
        return flat.reshape(*rows.shape, n)

    def pins(self, n: int, own: Stream) -> Samples:
        """`n` exact draws of pi* for prompt 0."""
        return self.solution.samples.select(
            self.drawn(self.solution.log_pi_star, torch.zeros(1, dtype=torch.int64), n, own)[0]
        )

"""Enumerable worlds (2 prompts, 3 tokens, up to 3 steps) and exact expected gradients over them.

Everything here is worked out from plain sums over the list of completions, by other code than `tiltlm.exact`,
so that the two can be held against each other. [P, S] = prompts × completions, rows prompt by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from tiltlm.models.table import TableLM, TableValues
from tiltlm.samples import Samples, Tokens
from tiltlm.target import Target

N_PROMPTS, VOCAB, HORIZON = 2, 3, 3
PROMPTS = Tokens.of([[p] for p in range(N_PROMPTS)])
BINARY = (0.0, 1.0)
GRADED = (-0.5, 0.0, 0.3, 1.0)

ZERO = 1e-10  # identities
CLEARLY = 1e-2  # the norm of a gradient that is not zero; those below are 0.03 to 1

Prefix = tuple[int, ...]  # the prompt's number, then tokens


def completions(vocab: int, horizon: int, eos_ids: Collection[int]) -> list[Prefix]:
    """All completions, by hand: grow every one that has not ended."""
    done: list[Prefix] = []
    growing: list[Prefix] = [()]
    for _ in range(horizon):
        grown = [(*y, v) for y in growing for v in range(vocab)]
        done += [y for y in grown if y[-1] in eos_ids]
        growing = [y for y in grown if y[-1] not in eos_ids]
    return done + growing


@dataclass(frozen=True)
class World:
    """A reference, a reward and a temperature; `rows` names every (prompt, completion)."""

    reference: TableLM
    rows: list[Prefix]
    reward: Tensor  # [P, S]
    atoms: tuple[float, ...]
    beta: float

    @property
    def prompts(self) -> Tokens:
        return PROMPTS

    def reward_of(self, samples: Samples) -> Tensor:
        """The reward as a function of samples, [N]."""
        table = dict(zip(self.rows, self.reward.flatten().tolist(), strict=True))
        prompts = samples.row_prompts.lists()
        keys = [(*x, *y) for x, y in zip(prompts, samples.completions.lists(), strict=True)]
        return torch.tensor([table[key] for key in keys], dtype=torch.float64)

    def target(self, beta: float | None = None) -> Target:
        return Target(self.reference, self.reward_of, self.beta if beta is None else beta)

    def samples(self) -> Samples:
        """Every row, with reward and log_ref."""
        done = Tokens.of([row[1:] for row in self.rows])
        index = torch.tensor([row[0] for row in self.rows])
        samples = Samples(PROMPTS, index, done.ids, done.mask, reward=self.reward.flatten())
        return samples.with_(log_ref=self.reference.log_prob(samples).detach())

    def density(self, model: nn.Module) -> Tensor:
        """Probability of every completion under `model`, [P, S]."""
        with torch.no_grad():
            return model.log_prob(self.samples()).sum(1).exp().reshape(self.reward.shape)

    def p_ref(self) -> Tensor:
        return self.density(self.reference)

    def p_star(self, beta: float | None = None) -> Tensor:
        """pi* [P, S]: multiply, then normalise."""
        tilted = self.p_ref() * (self.reward / (self.beta if beta is None else beta)).exp()
        return tilted / tilted.sum(1, keepdim=True)

    def mass(self, weights: Tensor) -> dict[Prefix, float]:
        """Sum of `weights` [P, S] over the completions that begin with each prefix."""
        total: dict[Prefix, float] = {}
        for row, weight in zip(self.rows, weights.flatten().tolist(), strict=True):
            for end in range(1, len(row) + 1):
                total[row[:end]] = total.get(row[:end], 0.0) + weight
        return total

    def table_of(self, p: Tensor) -> TableLM:
        """The policy whose distribution is `p` [P, S]."""
        policy = TableLM(N_PROMPTS, VOCAB, HORIZON, self.reference.eos_ids)
        for prefix, mass in self.mass(p).items():
            if len(prefix) > 1:
                policy.tables[len(prefix) - 2].data[prefix[0], code(prefix[1:-1]), prefix[-1]] = safe_log(mass)
        return policy

    def optimum(self) -> TableLM:
        return self.table_of(self.p_star())

    def shifted(self, by: float) -> World:
        """The same world with every reward changed by a constant: pi* is the same."""
        return replace(self, reward=self.reward + by, atoms=tuple(a + by for a in self.atoms))

    def evenly(self) -> Samples:
        """Every completion as if tokens were drawn uniformly: rows that end early stand there as often as they would.

        log_q is that of the uniform draw, so that importance weights over the rows are exact.
        """
        rows = [row for row in self.rows for _ in range(VOCAB ** (HORIZON + 1 - len(row)))]
        done = Tokens.of([row[1:] for row in rows])
        samples = Samples(PROMPTS, torch.tensor([row[0] for row in rows]), done.ids, done.mask)
        log_q = -math.log(VOCAB) * samples.mask.double()
        log_ref = self.reference.log_prob(samples).detach()
        reward = self.reward_of(samples)
        log_w = (log_ref - log_q).sum(1) + reward / self.beta
        return samples.with_(log_q=log_q, log_ref=log_ref, reward=reward, log_w=log_w)

    def law(self, atoms: tuple[float, ...] | None = None, p: Tensor | None = None, width: int = 0) -> TableValues:
        """The exact law of the reward given each prefix, when completions follow `p` (default: pi_ref).

        `width` 1: one success logit; else one logit per atom. Impossible rewards get −inf (or ±inf).
        """
        atoms, p = atoms or self.atoms, self.p_ref() if p is None else p
        width = width or len(atoms)
        values = TableValues(N_PROMPTS, VOCAB, HORIZON, width)
        by_atom = [self.mass(torch.where(self.reward == atom, p, 0.0)) for atom in atoms]
        for prefix in self.mass(p):
            if len(prefix) > 1:
                logs = [safe_log(mass[prefix]) for mass in by_atom]
                row = [logs[1] - logs[0]] if width == 1 else logs
                at = values.tables[len(prefix) - 2].data[prefix[0], code(prefix[1:])]
                at.copy_(torch.tensor(row, dtype=torch.float64))
        return values

    def log_psi_star(self) -> dict[Prefix, float]:
        """log psi* of every prefix: log E_ref[exp(r/beta) | prefix], as a ratio of two sums."""
        total, tilted = self.mass(self.p_ref()), self.mass(self.p_ref() * (self.reward / self.beta).exp())
        return {prefix: math.log(tilted[prefix] / total[prefix]) for prefix in total}

    def log_z(self) -> Tensor:
        """log Z of every prompt, [P]."""
        return (self.p_ref() * (self.reward / self.beta).exp()).sum(1).log()

    def twist(self, log_psi: dict[Prefix, float]) -> TableValues:
        """Values of width 1 in a table, one number per prefix (prompt alone: left out)."""
        values = TableValues(N_PROMPTS, VOCAB, HORIZON)
        for prefix, x in log_psi.items():
            if len(prefix) > 1:
                values.tables[len(prefix) - 2].data[prefix[0], code(prefix[1:]), 0] = x
        return values


def code(tokens: Iterable[int]) -> int:
    """A prefix as a number in base V."""
    value = 0
    for token in tokens:
        value = value * VOCAB + token
    return value


def safe_log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def world(*, eos_ids: tuple[int, ...] = (), binary: bool = False, seed: int = 0, beta: float = 0.6) -> World:
    """A random world. Rewards are 0 or 1 (`binary`), or drawn from four atoms; every atom occurs per prompt."""
    generator = torch.Generator().manual_seed(seed)
    reference = TableLM(N_PROMPTS, VOCAB, HORIZON, eos_ids).randomise(generator)
    rows = [(x, *y) for x in range(N_PROMPTS) for y in completions(VOCAB, HORIZON, eos_ids)]
    atoms = BINARY if binary else GRADED
    size = len(rows) // N_PROMPTS
    orders = [torch.randperm(size, generator=generator) % len(atoms) for _ in range(N_PROMPTS)]
    reward = torch.tensor(atoms, dtype=torch.float64)[torch.stack(orders)]
    return World(reference, rows, reward, atoms, beta)


WORLDS: dict[str, Callable[[], World]] = {
    f"{ending}, {kind}": lambda e=eos_ids, b=binary: world(eos_ids=e, binary=b)
    for (ending, eos_ids), (kind, binary) in product(
        [("fixed length", ()), ("with eos", (2,))], [("graded", False), ("binary", True)]
    )
}
WORLDS["two ends, graded"] = lambda: world(eos_ids=(1, 2))


def perturbed(model: nn.Module, scale: float = 0.5, seed: int = 1) -> nn.Module:
    """A copy of a table with noise on every finite logit."""
    shape = (model.n_prompts, model.vocab_size, model.horizon)
    last = model.width if isinstance(model, TableValues) else model.eos_ids
    copy, generator = type(model)(*shape, last), torch.Generator().manual_seed(seed)
    for new, old in zip(copy.tables, model.tables, strict=True):
        noise = torch.empty_like(old).normal_(0.0, scale, generator=generator)
        new.data = old.detach().nan_to_num(neginf=-3.0, posinf=3.0) + noise
    return copy


def expected_gradient(objective: Any, model: nn.Module, batch: Any, p: Tensor) -> Tensor:
    """∇ of the loop's reduction Σ loss / Σ weight, row i of the population counting `p[i]`; flat."""
    prepared = objective.prepare(batch)
    total = (p * objective.loss(model, prepared).loss).sum() / (p * objective.weight(prepared)).sum()
    return flat_gradient(total, model)


def on_policy(w: World, model: nn.Module) -> tuple[Samples, Tensor]:
    """Every completion as `model` itself would draw it: log_q filled in, probability per row."""
    samples = w.samples()
    log_q = model.log_prob(samples).detach()
    return samples.with_(log_q=log_q), log_q.sum(1).exp() / N_PROMPTS


def flat_gradient(total: Tensor, model: nn.Module) -> Tensor:
    """d total / d every parameter of `model`, in one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])


def all_batches(samples: Samples, p: Tensor, slots: list[list[int]]) -> tuple[list[Samples], Tensor, Tensor]:
    """Every batch whose slot k holds one of the rows `slots[k]`, with its exact chance.

    Slots are independent, and slot k holds row i with probability `p[i]`. Returns the B batches, their rows'
    numbers [B, len(slots)] and their probabilities [B].
    """
    index = torch.tensor(list(product(*slots)))
    return [samples.select(rows) for rows in index], index, p[index].prod(1)


# ---- worlds of counts: every probability is a fraction, so a list of rows can be a population -----------------


@dataclass(frozen=True)
class Counted(World):
    """A world in which counting is exact: pi_ref = counts / total, phi = exp(r/beta) = hits / 4 ≤ 3/4.

    A batch with `counts` copies of every completion *is* the population of the reference, one with counts·hits
    copies that of pi*: weights that a method normalises within the batch are then the exact ones.
    """

    counts: Tensor  # int64 [P, S]
    hits: Tensor  # int64 [P, S], 1 to 3

    def drawn(self, counts: Tensor) -> Samples:
        """`counts` copies of every row, drawn by the model whose probabilities the counts are; log_w to pi*."""
        rows = torch.arange(counts.numel()).repeat_interleave(counts.flatten())
        samples = self.samples().select(rows)
        log_q = self.table_of(counts.double() / counts.sum(1, keepdim=True)).log_prob(samples).detach()
        log_w = (samples.log_ref - log_q).sum(1) + samples.reward / self.beta
        return samples.with_(log_q=log_q, log_w=log_w)

    def exact(self) -> Samples:
        """The population of pi*, as exact draws come: equally weighted."""
        return self.drawn(self.counts * self.hits).with_(log_q=None, log_w=None)


def counted(*, eos_ids: tuple[int, ...] = (), seed: int = 0, beta: float = 0.6) -> Counted:
    """A random world of counts."""
    generator = torch.Generator().manual_seed(seed)
    rows = [(x, *y) for x in range(N_PROMPTS) for y in completions(VOCAB, HORIZON, eos_ids)]
    shape = (N_PROMPTS, len(rows) // N_PROMPTS)
    counts, hits = (torch.randint(1, high, shape, generator=generator) for high in (6, 4))
    reward = beta * (hits.double() / 4).log()
    unknown = World(TableLM(N_PROMPTS, VOCAB, HORIZON, eos_ids), rows, reward, (), beta)
    reference = unknown.table_of(counts.double() / counts.sum(1, keepdim=True)).requires_grad_(False)
    return Counted(reference, rows, reward, (), beta, counts, hits)


COUNTED: dict[str, Callable[[], Counted]] = {
    "fixed length": lambda: counted(),
    "with eos": lambda: counted(eos_ids=(2,)),
}

"""The value-learning core of Q#, CD and FUDGE: the law of the reward-to-go under the reference, by likelihood.

Draw completions from pi_ref, score each once, and fit at every prefix the distribution of the final reward:

    L = Σ_t − log pmf_t[bin(r)] / number of tokens          (binary rewards: cross-entropy on one logit)

Expected gradient zero at: the true law P_ref(r | prefix), whatever beta will be used; one value model serves
every beta and all three ways of turning a law into a twist (Zhou et al. 2025, arXiv:2502.20548, §3). With
`lm_weight` > 0 the body's own language-modelling loss on the same completions is added (same optimum: it asks
the body's own head for pi_ref), which keeps the features that pre-training found. The number of tokens is the batch's
own: where completions are of unequal length, the gradient of one batch of B rows vanishes there up to order 1/B.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tiltlm.method import Learner, Method, Trains
from tiltlm.models.base import TwistState, Values, ValueState
from tiltlm.models.heads import ValueHead
from tiltlm.objective import Outcome, by_position
from tiltlm.problem import Facts, Fed, Problem
from tiltlm.samplers.guided import Guided
from tiltlm.samples import Samples, Tokens

BINARY = (0.0, 1.0)
"""Atoms of a reward that is 0 or 1."""


def log_pmf(values: Tensor) -> Tensor:
    """The law a value model states, in log space: [..., A] -> [..., number of atoms].

    A = 1 is one success logit z: (log σ(−z), log σ(z)). A > 1 are the logits of a histogram.
    """
    if values.shape[-1] == 1:
        return torch.cat([logsigmoid(-values), logsigmoid(values)], -1)
    return torch.log_softmax(values, -1)


def width(atoms: tuple[float, ...]) -> int:
    """How many outputs a value model needs: one logit for two atoms, else one per atom."""
    return 1 if len(atoms) == 2 else len(atoms)


def nearest_atom(reward: Tensor, atoms: tuple[float, ...]) -> Tensor:
    """Index of the atom nearest to each reward, int64. Binary atoms demand rewards of exactly 0 or 1."""
    if bool(reward.isnan().any()):
        raise ValueError(f"the reward of row {int(reward.isnan().nonzero()[0, 0])} is nan")
    grid = torch.tensor(atoms, dtype=reward.dtype, device=reward.device)
    distance = (reward[..., None] - grid).abs()
    if len(atoms) == 2 and bool((distance.amin(-1) > 0).any()):
        bad = reward[distance.amin(-1) > 0][0].item()
        raise ValueError(f"reward {bad} is neither {atoms[0]} nor {atoms[1]}: give the value model more atoms")
    return distance.argmin(-1)


def value_loss(values: Tensor, reward: Tensor, atoms: tuple[float, ...] = BINARY) -> Tensor:
    """−log pmf[bin(r)] at every prefix: [n, T, A], [n] -> [n, T]."""
    law = log_pmf(values)
    if law.shape[-1] != len(atoms):
        raise ValueError(f"{len(atoms)} atoms need values of width {width(atoms)}; got width {values.shape[-1]}")
    index = nearest_atom(reward, atoms)[:, None, None].expand(*values.shape[:2], 1)
    return -law.gather(2, index)[..., 0]


@dataclass(frozen=True)
class ValueLearning(Method):
    """Fit the law of r over `atoms` at every prefix; `lm_weight` adds the body's language-modelling loss."""

    atoms: tuple[float, ...] | None = None
    """The rewards the law is over; others count as the nearest. None: those of the problem, else 0 and 1."""

    lm_weight: float = 0.0
    watch_positions: bool = False
    fed: ClassVar[Fed] = "values"
    trains: ClassVar[Trains] = "value"
    optimum: ClassVar[str] = (
        "the reference's law of the reward given the prefix, psi* through Q# (of unequal length: as B grows)"
    )

    def __post_init__(self) -> None:
        if len(self.grid) < 2 or list(self.grid) != sorted(set(self.grid)):
            raise ValueError(f"atoms must be two or more increasing numbers; got {self.atoms}")
        if self.lm_weight < 0:
            raise ValueError(f"lm_weight must not be negative; got {self.lm_weight}")

    @property
    def grid(self) -> tuple[float, ...]:
        """The atoms as numbers."""
        return BINARY if self.atoms is None else self.atoms

    @property
    def width(self) -> int:
        """How many outputs a value model needs for these atoms."""
        return width(self.grid)

    def objective(self, problem: Problem) -> ValueLearning:
        """With the problem's atoms where none are named."""
        return replace(self, atoms=problem.atoms) if self.atoms is None else self

    def why_not(self, facts: Facts) -> str | None:
        if facts.teacherless and self.lm_weight > 0:
            return "a teacherless reference reads no answers: set lm_weight to 0 (--method.value.lm-weight 0)"
        if not facts.network and self.lm_weight > 0:
            return "a table of values models no language: set lm_weight to 0 (--method.value.lm-weight 0)"
        return None

    def prepare(self, batch: Samples) -> Samples:
        if batch.reward is None:
            raise ValueError("these samples have no reward: score them first")
        return batch

    def weight(self, batch: Samples) -> Tensor:
        return batch.mask.sum(1)

    def loss(self, model: Values, batch: Samples) -> Outcome:
        assert batch.reward is not None
        if self.lm_weight > 0:
            if not isinstance(model, ValueHead):
                raise ValueError(
                    f"lm_weight > 0 needs a ValueHead, whose body models language; got {type(model).__name__}"
                )
            values, log_p = model.values_and_log_prob(batch)
            extra = -self.lm_weight * log_p.sum(1)
        else:
            values, extra = model.values(batch), torch.zeros(())
        per_token = torch.where(batch.mask, value_loss(values, batch.reward, self.grid), 0.0)
        loss = per_token.sum(1)
        metrics = {"value_loss": loss.detach() / batch.mask.sum(1)}
        if self.watch_positions:
            metrics |= by_position("value_loss", per_token, batch.mask)
        return Outcome(loss + extra, metrics)


@dataclass(frozen=True)
class Decode:
    """Guided decoding by a value."""

    top_k: int = 0
    """The reference's likeliest tokens that the value scores at each step (0: all)."""

    temperature: float = 1.0
    """Divides the reference's logits before the value's offset is added."""

    calibrate: bool = False
    """Add the logit of the reference's mean success rate to a value learnt on pairs, which leave it out."""


class ValueRule(Method, ABC):
    """A rule that makes a twist of the law of the reward; one value, trained once, serves all rules and temperatures."""

    fed: ClassVar[Fed] = "values"
    trains: ClassVar[Trains] = "value"
    value: ValueLearning
    decode: Decode

    @abstractmethod
    def log_psi(self, law: Tensor, atoms: Tensor) -> Tensor:
        """law: log pmf [..., A]; atoms [A] -> log psi [...], up to a constant shared by all prefixes."""

    def trained(self) -> ValueLearning:
        return self.value

    def decoder(self, problem: Problem, learner: Learner) -> Guided:
        """The reference tilted by what the rule makes of the law."""
        assert learner.values is not None
        log_odds = problem.log_odds() if self.decode.calibrate and problem.log_odds is not None else 0.0
        twist = ValueTwist(learner.values, self.bound(problem.beta), self.value.objective(problem).grid, log_odds)
        return Guided(problem.reference, twist, top_k=self.decode.top_k, temperature=self.decode.temperature)

    def why_not(self, facts: Facts) -> str | None:
        if self.decode.calibrate and not facts.halved:
            return "calibrate puts right what *pairs* leave out; a value learnt on the reference's own draws needs none"
        return None


class Rule(Protocol):
    """How a law of the reward becomes a twist."""

    def log_psi(self, law: Tensor, atoms: Tensor) -> Tensor:
        """law: log pmf [..., A]; atoms [A] -> log psi [...], up to a constant shared by all prefixes."""


@dataclass(frozen=True)
class ValueTwist:
    """The twist that `rule` makes of the law that `values` states.

    `log_odds` is added to a binary value's logit: a value trained on half successes, half failures states
    logit p̃ = logit p − logit p₀(x), with p₀ the reference's success rate; log_odds = logit p₀ puts it right.
    """

    values: Values
    rule: Rule
    atoms: tuple[float, ...] = BINARY
    log_odds: float = 0.0

    def __post_init__(self) -> None:
        if self.log_odds and len(self.atoms) != 2:
            raise ValueError("log_odds corrects a binary value; this one has more than two atoms")

    def start(self, prompts: Tokens, capacity: int) -> TwistState:
        return _ValueTwistState(self, self.values.start(prompts, capacity))


class _ValueTwistState:
    def __init__(self, twist: ValueTwist, state: ValueState) -> None:
        self.twist, self.state = twist, state

    def log_psi(self, candidates: Tensor | None) -> Tensor:
        values = self.state.peek(candidates)
        law = log_pmf(values.to(torch.promote_types(values.dtype, torch.float32)))
        if self.twist.log_odds:
            law = torch.log_softmax(law + law.new_tensor([0.0, self.twist.log_odds]), -1)
        return self.twist.rule.log_psi(law, law.new_tensor(self.twist.atoms))

    def append(self, tokens: Tensor) -> None:
        self.state.append(tokens)

    def select(self, index: Tensor) -> None:
        self.state.select(index)

"""A learned twist whose output *is* log psi: one number for every token that could come next.

CTL, soft Q, SIXO and DPG train such a twist directly; FUDGE's is squashed, log psi = log σ(output), for it is the
logarithm of a probability. The twists of Q# and CD come from a law of the reward instead (`value.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tiltlm.models.base import LanguageModel, Twist, TwistState, Values, ValueState
from tiltlm.samplers.guided import Guided
from tiltlm.samples import Samples, Tokens


@dataclass(frozen=True)
class LearnedTwist:
    """log psi = values[..., 0], or its log σ where `squashed`."""

    values: Values
    squashed: bool = False

    def start(self, prompts: Tokens, capacity: int) -> TwistState:
        return _LearnedTwistState(self.values.start(prompts, capacity), self.squashed)


class _LearnedTwistState:
    def __init__(self, state: ValueState, squashed: bool) -> None:
        self.state, self.squashed = state, squashed

    def log_psi(self, candidates: Tensor | None) -> Tensor:
        out = self.state.peek(candidates)[..., 0]
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        return logsigmoid(out) if self.squashed else out

    def append(self, tokens: Tensor) -> None:
        self.state.append(tokens)

    def select(self, index: Tensor) -> None:
        self.state.select(index)


@dataclass(frozen=True)
class Scaled:
    """Another twist to the power `by`: a tempered proposal, flatter for by < 1."""

    twist: Twist
    by: float

    def start(self, prompts: Tokens, capacity: int) -> TwistState:
        return _ScaledState(self.twist.start(prompts, capacity), self.by)


class _ScaledState:
    def __init__(self, state: TwistState, by: float) -> None:
        self.state, self.by = state, by

    def log_psi(self, candidates: Tensor | None) -> Tensor:
        return self.by * self.state.log_psi(candidates)

    def append(self, tokens: Tensor) -> None:
        self.state.append(tokens)

    def select(self, index: Tensor) -> None:
        self.state.select(index)


class TiltedPolicy(nn.Module):
    """The reference tilted by a twist's head, as a policy to train (PPO's "logits plus head"): q ∝
    pi_ref·exp(values).

    Policy and twist are the same object here; only the values' parameters are trained.
    """

    def __init__(self, reference: LanguageModel, values: Any) -> None:
        super().__init__()
        self.values = values
        self._reference = [reference]  # in a list: not a part of this module, so neither trained nor saved

    def decoder(self) -> Guided:
        """The language model that draws."""
        return Guided(self._reference[0], LearnedTwist(self.values))

    def log_prob(self, samples: Samples) -> Tensor:
        return self.values.tilted_log_prob(self._reference[0], samples)

    def save(self, folder: str | Path) -> None:
        self.values.save(folder)

    def restore(self, folder: str | Path) -> None:
        self.values.restore(folder)

"""Measure one decoder against one target: draw, score, and average per prompt.

What comes out is one number per prompt and metric, kept with the run, so that two methods measured on the same
prompts can be compared in pairs (`compare.py`) and tables can be made again without drawing again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltlm.models.base import LanguageModel
from tiltlm.ruler.estimate import Estimate, mean, per_prompt
from tiltlm.ruler.kl import kl_along_in_batches
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.target import Target

UNITS = {
    "reward": "reward",
    "objective": "reward",
    "objective_gap": "reward",
    "kl_to_reference": "nats",
    "kl_to_target": "nats",
    "log_z": "nats",
    "forced_loss": "nats",
}
"""Units of the ruler's own metrics; what a task checks is a rate."""

Check = Callable[[Samples], Tensor]
"""A task's own verdict on every row: Samples -> bool or float [N]."""


@dataclass(frozen=True)
class Measurement:
    """Independent observations of every metric, float64 [n]: one a prompt; of a single prompt, one a draw."""

    values: Mapping[str, Tensor]

    def estimates(self) -> dict[str, Estimate]:
        """Means, with standard errors from the spread of the observations.

        Over prompts that is the error as an estimate for *all* prompts, also where each prompt's value is exact.
        """
        return {name: mean(x) for name, x in self.values.items()}

    def rows(self, recipe: str, method: str, seed: int) -> list[dict[str, Any]]:
        """Report rows {recipe, method, metric, value, stderr, n, unit, seed}; stderr null where n = 1."""
        head, tail = {"recipe": recipe, "method": method}, {"seed": seed}
        rows = []
        for name, e in self.estimates().items():
            stderr = None if math.isnan(e.stderr) else e.stderr
            numbers = {"metric": name, "value": e.value, "stderr": stderr, "n": e.n, "unit": unit_of(name)}
            rows.append({**head, **numbers, **tail})
        return rows

    def save(self, path: str | Path) -> None:
        """Write the observations to a safetensors file."""
        save_file({name: x.contiguous() for name, x in self.values.items()}, str(path))

    @staticmethod
    def load(path: str | Path) -> Measurement:
        return Measurement(load_file(str(path)))


def unit_of(metric: str) -> str:
    return "nats" if metric.startswith("value_loss") else UNITS.get(metric, "rate")


@dataclass(frozen=True)
class Ruler:
    """How every method of a comparison is measured: the same prompts, the same number of draws, one log Z.

    log_z [P]: exact (or one common estimate) per prompt; without it absolute distances are left out, and
    `objective` = E_q[r] − beta·KL(q‖pi_ref) still ranks methods. checks: the task's own rates.
    expected_reward: where E_q[r | x] can be computed (one right answer: q's probability of it), it replaces the
    drawn rewards in every metric but the checks, and takes most of the noise out of the distances.

    With several prompts the draws of each are averaged and errors come from the spread over prompts; with one
    prompt they come from the spread over its draws.
    """

    target: Target
    prompts: Tokens
    max_new_tokens: int
    stream: Stream
    n: int = 1
    batch_size: int = 512
    log_z: Tensor | None = None
    checks: Mapping[str, Check] | None = None
    expected_reward: Callable[[LanguageModel], Tensor] | None = None

    def measure(self, q: LanguageModel) -> tuple[Measurement, Samples]:
        """Draw `n` completions of every prompt from `q` and measure; returns the scored samples too."""
        samples = draw_in_batches(
            q,
            self.prompts,
            n=self.n,
            max_new_tokens=self.max_new_tokens,
            stream=self.stream,
            batch_size=self.batch_size,
        )
        samples = self.target.scored(samples)
        kl_to_reference = self._average(
            kl_along_in_batches(q, self.target.reference, samples, self.batch_size), samples
        )
        assert samples.reward is not None
        reward = self._average(samples.reward, samples)
        if self.expected_reward is not None:
            reward = self.expected_reward(q).double().expand_as(reward)
        values = {name: self._average(check(samples), samples) for name, check in (self.checks or {}).items()}
        return Measurement(values | self.distances(reward, kl_to_reference)), samples

    def distances(self, reward: Tensor, kl_to_reference: Tensor) -> dict[str, Tensor]:
        """The ruler's metrics from E_q[r] and KL(q‖pi_ref), one of each per observation."""
        beta = self.target.beta
        values = {"reward": reward, "kl_to_reference": kl_to_reference}
        values["objective"] = reward - beta * kl_to_reference
        if self.log_z is not None:
            log_z = self.log_z.double().expand_as(reward)
            values["kl_to_target"] = kl_to_reference - reward / beta + log_z
            values["objective_gap"] = beta * values["kl_to_target"]
            values["log_z"] = log_z
        return values

    def _average(self, x: Tensor, samples: Samples) -> Tensor:
        if len(self.prompts) == 1:
            return x.double()
        return per_prompt(x.double(), samples.prompt_index, len(self.prompts))

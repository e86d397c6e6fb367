"""Measure one decoder against one target: draw, score, and average per prompt.

    F = E_q[log w] = E_q[r]/beta − KL(q‖pi_ref),   G = E_pi*[log w],     log w = log pi_ref + r/beta − log q
    KL(q‖pi*) = log Z − F,   KL(pi*‖q) = G − log Z,   and their sum G − F needs no log Z at all

What comes out is one number per prompt and metric, kept with the run, so that two methods measured on the same
prompts can be compared in pairs (`compare.py`) and tables can be made again without drawing again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltlm import ranks
from tiltlm.exact import log_density
from tiltlm.models.base import LanguageModel
from tiltlm.ruler.agreement import DIVERGENCES, possible
from tiltlm.ruler.estimate import Estimate, mean, per_prompt
from tiltlm.ruler.intervals import Interval, of_mean
from tiltlm.ruler.kl import kl_along_in_batches
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.units import AT_LEAST, AT_MOST, unit_of
from tiltlm.ruler.weights import effective_sample_size, pareto_k
from tiltlm.samplers.exact_draws import confirm
from tiltlm.samplers.shared import draw_batches_shared, of_rows
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.target import Target
from tiltlm.tensors import load_tensors, notes_of, save_tensors

Check = Callable[[Samples], Tensor]
"""A task's own verdict on every row: Samples -> bool or float [N]."""


@dataclass(frozen=True)
class Measurement:
    """Independent observations of every metric, float64 [n]: one a prompt; of a single prompt, one a draw.

    log_z: the common log Z the distances were taken with, where it is not exact per prompt; beta divides the
    reward. shares: further metrics that log Z went into, and how many times.
    """

    values: Mapping[str, Tensor]
    log_z: LogZ | None = None
    beta: float = 1.0
    shares: Mapping[str, float] = field(default_factory=dict)

    def estimates(self) -> dict[str, Estimate]:
        """Means, with standard errors from the spread of the observations.

        Over prompts that is the error as an estimate for *all* prompts, also where each prompt's value is exact.
        """
        return {name: mean(x) for name, x in self.values.items()}

    def rows(self, recipe: str, method: str, seed: int) -> list[dict[str, Any]]:
        """Report rows {recipe, method, metric, value, stderr, n, unit, low, high, interval, seed}.

        low, high: the 95% interval (`intervals.py`; null: unknown), interval: of which kind. doubt: why it may not hold,
        where something says so. Distances taken with a common log Z have its part of the error too (`_with_log_z`).
        Raises ValueError for a KL below 0 beyond chance.
        """
        head, tail = {"recipe": recipe, "method": method}, {"seed": seed}
        rows = []
        for name, e in self.estimates().items():
            stderr = None if math.isnan(e.stderr) else e.stderr
            numbers = {"metric": name, "value": e.value, "stderr": stderr, "n": e.n, "unit": unit_of(name)}
            rows.append(possible({**head, **numbers, **self._interval(name, e), **tail}))
        return rows

    def _interval(self, name: str, e: Estimate) -> dict[str, Any]:
        """The 95% interval of a metric, as entries of its row."""
        computed = e.stderr == 0 and (
            name in ("log_z", "kl_to_reference_at_most") or (name in DIVERGENCES and e.value == 0)
        )
        own = (
            Interval(e.value, e.value, "exact")
            if computed
            else of_mean(self.values[name], unit_of(name) == "rate")
        )
        scale = {
            "kl_to_target": 1.0,
            "kl_from_target": -1.0,
            "objective_gap": self.beta,
            "kl_to_target_at_least": 1.0,
            "kl_to_target_at_most": 1.0,
            **self.shares,
        }
        found: dict[str, Any] = {"low": own.low, "high": own.high, "interval": own.kind}
        doubt = own.doubt
        each = self.log_z is not None and self.log_z.paired and self.log_z.lower is None  # in the spread already
        if self.log_z is not None and name in scale and not computed:
            if not each:
                found |= self._with_log_z(e, own, self.log_z, scale[name], name in (*AT_MOST, *AT_LEAST))
            doubt = "; ".join(filter(None, (own.doubt, self.log_z.doubt)))
        found |= {"low": -math.inf} if name in AT_MOST else {"high": math.inf} if name in AT_LEAST else {}
        found |= {end: None for end in ("low", "high") if math.isinf(found[end])}
        return found | ({"doubt": doubt} if doubt else {})

    def _with_log_z(self, e: Estimate, own: Interval, z: LogZ, scale: float, one_sided: bool) -> dict[str, Any]:
        """The interval of a distance and log Z together: how far each may be off, in quadrature (Zou & Donner 2008), from
        the bound of log Z on either side where it is bracketed.

        `gap`: log Z is known less well than the distance is long; then only the interval means something.
        """
        size, ends = abs(scale), z.sides if scale > 0 else (z.sides[1], z.sides[0])
        (below, down), (above, up) = ends
        low = e.value - size * abs(z.value - below) - math.hypot(e.value - own.low, size * down)
        high = math.inf if math.isinf(above) else e.value + size * abs(above - z.value)
        high += math.hypot(own.high - e.value, size * up)
        stderr = math.hypot(0.0 if math.isnan(e.stderr) else e.stderr, size * z.shared_stderr)
        found = {"stderr": stderr, "stderr_log_z": size * z.shared_stderr, "low": low, "high": high}
        if one_sided or size * z.width <= abs(e.value):
            return found
        return found | {"gap": size * z.width}

    def save(self, path: str | Path) -> None:
        """Write the observations to a safetensors file, the common log Z in its header."""
        notes = {"beta": repr(self.beta), "log_z": json.dumps(self.log_z.to_json() if self.log_z else None)}
        notes |= {"shares": json.dumps(dict(self.shares))} if self.shares else {}
        save_tensors(self.values, path, notes)

    @staticmethod
    def load(path: str | Path) -> Measurement:
        notes = notes_of(path)
        log_z = json.loads(notes.get("log_z", "null"))
        shared = None if log_z is None else LogZ.from_json(log_z)
        shares = json.loads(notes.get("shares", "{}"))
        return Measurement(load_tensors(path), shared, float(notes.get("beta", 1.0)), shares)


@dataclass(frozen=True)
class Ruler:
    """How every method of a comparison is measured: the same prompts, the same number of draws, one log Z.

    log_z: [P], exact per prompt; or one common `LogZ` (over prompts: of its mean), whose error and gap then stand
    beside every distance. Without it absolute distances are left out, and `objective` = E_q[r] − beta·KL(q‖pi_ref)
    still ranks methods; a LogZ with a lower bound alone gives a lower bound of KL(q‖pi*). exact: exact draws of
    pi* for the same prompts, for KL(pi*‖q); refused with a ValueError if they are not of this target (`confirm`).
    checks: the task's own rates.
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
    log_z: Tensor | LogZ | None = None
    exact: Samples | None = None
    checks: Mapping[str, Check] | None = None
    expected_reward: Callable[[LanguageModel], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.exact is not None:
            confirm(self.target, self.exact)

    def measure(self, q: LanguageModel) -> tuple[Measurement, Samples]:
        """Draw `n` completions of every prompt from `q` and measure; returns the scored samples too."""
        samples = draw_batches_shared(
            q, self.prompts, lambda drawn: self.target.scored(drawn, self.batch_size), n=self.n,
            max_new_tokens=self.max_new_tokens, stream=self.stream, batch_size=self.batch_size,
        )  # fmt: skip
        kl = of_rows(samples, lambda some: kl_along_in_batches(q, self.target.reference, some, self.batch_size))
        kl_to_reference = self._average(kl, samples)
        assert samples.reward is not None
        reward = self._average(samples.reward, samples)
        if self.expected_reward is not None:
            expected = self.expected_reward
            reward = ranks.from_first(lambda: expected(q)).double().expand_as(reward)
        values = self.verdicts(samples)
        samples = samples.with_(log_w=log_weights(samples, self.target.beta))
        values |= (
            self.distances(reward, kl_to_reference) | self._from_target(q, kl_to_reference) | self._tails(samples)
        )
        return self.measurement(values), samples

    def _common(self, log_z: LogZ) -> Tensor | float:
        """The log Z that distances are taken with: a number, or one per prompt."""
        found = log_z.per_prompt(len(self.prompts))
        return found.to(self.prompts.device) if isinstance(found, Tensor) else found

    def _shared(self) -> LogZ | None:
        return self.log_z if isinstance(self.log_z, LogZ) else None

    def _from_target(self, q: LanguageModel, like: Tensor) -> dict[str, Tensor]:
        """G and KL(pi*‖q), from the exact draws."""
        if self.exact is None:
            return {}
        log_w = of_rows(self.exact, lambda some: self._log_w_of_exact(q, some))
        found = {"log_w_exact": self._average(log_w, self.exact)}
        if isinstance(self.log_z, LogZ) and (self.log_z.upper is not None or self.log_z.lower is None):
            found["kl_from_target"] = found["log_w_exact"] - self._common(self.log_z)
        elif isinstance(self.log_z, Tensor):
            log_z = self.log_z.double().to(log_w.device)
            found["kl_from_target"] = found["log_w_exact"] - log_z.expand_as(found["log_w_exact"])
        return found

    def _log_w_of_exact(self, q: LanguageModel, exact: Samples) -> Tensor:
        """log w of exact draws under `q`, [N]."""
        exact = self.target.scored(exact, self.batch_size)
        assert exact.log_ref is not None and exact.reward is not None
        log_q = log_density(q, exact, self.batch_size)
        return exact.log_ref.double().sum(1) + exact.reward.double() / self.target.beta - log_q.double()

    def _tails(self, samples: Samples) -> dict[str, Tensor]:
        """ESS (part of the draws) and Pareto shape of q's own importance weights, mean over prompts."""
        assert samples.log_w is not None
        if self.n < 25 and len(self.prompts) > 1:
            return {}
        rows = samples.log_w.reshape(len(self.prompts), self.n)
        shape = torch.tensor([pareto_k(row) for row in rows], dtype=torch.float64)
        return {"ess": effective_sample_size(rows).cpu() / self.n, "pareto_k": shape}

    def distances(self, reward: Tensor, kl_to_reference: Tensor) -> dict[str, Tensor]:
        """The ruler's metrics from E_q[r] and KL(q‖pi_ref), one of each per observation."""
        beta = self.target.beta
        values = {"reward": reward, "kl_to_reference": kl_to_reference}
        values["objective"] = reward - beta * kl_to_reference
        values["log_w"] = reward / beta - kl_to_reference
        if isinstance(self.log_z, LogZ):
            distance = self._common(self.log_z) - values["log_w"]
            if self.log_z.lower is not None and self.log_z.upper is None:
                return values | {"kl_to_target_at_least": distance}
            return values | {"kl_to_target": distance, "objective_gap": beta * distance}
        if self.log_z is not None:
            log_z = self.log_z.double().expand_as(reward)
            values["kl_to_target"] = kl_to_reference - reward / beta + log_z
            values["objective_gap"] = beta * values["kl_to_target"]
            values["log_z"] = log_z
        return values

    def bounded(self, reward: Tensor, kl_at_most: Tensor) -> dict[str, Tensor]:
        """The metrics of what has no density of a single draw, from E_q[r] and an upper bound of KL(q‖pi_ref):

        J(q) ≥ E_q[r] − beta·bound,     KL(q‖pi*) ≤ log Z − E_q[r]/beta + bound
        """
        beta = self.target.beta
        values = {"reward": reward, "kl_to_reference_at_most": kl_at_most}
        values["objective_at_least"] = reward - beta * kl_at_most
        log_z = self.known_log_z()
        if log_z is not None:
            values["kl_to_target_at_most"] = log_z - reward / beta + kl_at_most
        return values

    def known_log_z(self) -> Tensor | float | None:
        """log Z of every prompt, or the common number; None where there is none but a one-sided bound."""
        if isinstance(self.log_z, Tensor):
            return self.log_z.double()
        if self.log_z is None or (self.log_z.lower is not None and self.log_z.upper is None):
            return None
        return self._common(self.log_z)

    def measurement(self, values: Mapping[str, Tensor], shares: Mapping[str, float] | None = None) -> Measurement:
        """`values`, taken with this ruler's log Z and beta; shares: as in `Measurement`."""
        return Measurement(values, self._shared(), self.target.beta, shares or {})

    def verdicts(self, samples: Samples) -> dict[str, Tensor]:
        """The task's own checks of drawn rows."""
        found = {name: of_rows(samples, check) for name, check in (self.checks or {}).items()}
        return {name: self._average(x, samples) for name, x in found.items()}

    def _average(self, x: Tensor, samples: Samples) -> Tensor:
        if len(self.prompts) == 1:
            return x.double()
        return per_prompt(x.double(), samples.prompt_index, len(self.prompts))


def log_weights(samples: Samples, beta: float) -> Tensor:
    """log w = log pi_ref + r/beta − log q of scored rows, float64 [N], nats."""
    if samples.log_q is None or samples.log_ref is None or samples.reward is None:
        raise ValueError("log-weights need log_q, log_ref and reward of every row")
    return (samples.log_ref.double() - samples.log_q.double()).sum(1) + samples.reward.double() / beta

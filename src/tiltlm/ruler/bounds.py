"""Stochastic bounds on log Z: lower ones from importance sampling and SMC, upper ones around exact draws of pi*.

    E[log Ẑ] ≤ log Z             free runs (Jensen, for E[Ẑ] = Z)
    E[log Ẑ_c] ≥ log Z           conditional runs: one particle pinned to an exact draw (E[1/Ẑ_c] = 1/Z)

(Grosse et al. 2015 call the pair bidirectional Monte Carlo; Brekelmans et al. 2022, Zhao et al. 2024 for SMC.)
Each is what the bound is *on average*; what R runs of it certify, and at what price, is in `certificate.py`.
Both close as particles are added: SMC's gap like 1/K, importance sampling's only logarithmically. The middle of
SMC's pair is a good value; of importance sampling's it is not, and none is given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiltlm.models.base import LanguageModel, Twist
from tiltlm.ruler.agreement import refuse_disagreement
from tiltlm.ruler.certificate import certified, one_sided
from tiltlm.ruler.estimate import Estimate, mean, per_prompt
from tiltlm.ruler.log_z import LogZ
from tiltlm.samplers.exact_draws import confirm
from tiltlm.samplers.shared import smc_shared
from tiltlm.samplers.smc import SMC, Particles
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.target import Target

ESTIMATORS: dict[str, SMC] = {
    "iwae": SMC(threshold=0.0),
    "smc": SMC(threshold=1.0),
    "smc-ess": SMC(threshold=0.5),
}
"""Importance sampling; resampling at every step; resampling when the effective sample size has halved."""


@dataclass(frozen=True)
class Bounds:
    """Repeated bounds: (particles, proposal, estimator, side) -> log Ẑ, float64 [repeats, prompts], nats."""

    values: Mapping[tuple[int, str, str, str], Tensor]

    def estimate(self, k: int, proposal: str, estimator: str, side: str) -> Estimate:
        """Mean and standard error; over several prompts, of their means (prompts are the independent units)."""
        x = self.values[k, proposal, estimator, side]
        return mean(x[:, 0]) if x.shape[1] == 1 else mean(x.mean(0))

    def rows(self) -> list[dict[str, Any]]:
        """{k, proposal, estimator, side, value, stderr, repeats, low, high, certified}, for tables and plots.

        low, high: Student's 95% interval of the bound's own mean. certified: where log Z cannot lie beyond on this side,
        at 97.5% (with the other side's, 95%).
        """
        rows = []
        for (k, proposal, estimator, side), x in self.values.items():
            e = self.estimate(k, proposal, estimator, side)
            head = {"k": k, "proposal": proposal, "estimator": estimator, "side": side}
            low, high = (None if math.isinf(end) else end for end in e.interval())
            about = {"repeats": x.shape[0], "low": low, "high": high, "certified": one_sided(x, side)}
            rows.append({**head, "value": e.value, "stderr": e.stderr, **about})
        return rows

    def tensors(self) -> dict[str, Tensor]:
        """Every repeat, for safetensors: names like 64/twist/smc/lower."""
        return {"/".join(map(str, key)): x.contiguous() for key, x in self.values.items()}

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor]) -> Bounds:
        found = {}
        for name, x in tensors.items():
            k, *rest = name.split("/")
            found[int(k), rest[0], rest[1], rest[2]] = x
        return Bounds(found)


@torch.no_grad()
def bound_repeats(
    target: Target,
    twist: Twist | None,
    prompts: Tokens,
    exact: Samples,
    *,
    ks: Sequence[int],
    repeats: int,
    max_new_tokens: int,
    stream: Stream,
    estimators: Sequence[str] = ("smc-ess",),
    proposals: Sequence[str] = ("twist",),
    batch_size: int = 2000,
    on_step: Callable[[int, int, dict[str, float]], None] = lambda step, limit, metrics: None,
) -> Bounds:
    """Lower and upper bounds of log Z for every prompt, `repeats` times, at every number of particles in `ks`.

    exact: exact draws of pi*, `repeats` per prompt at least; each upper bound uses another one. Of a single prompt
    the draws are taken in their order; of several, the first ones of each prompt. proposals: "twist", the
    twist-induced one; "reference", the reference with the twist in the weights.

    Exact draws of another target are refused with a ValueError: by what they say of themselves (`confirm`), and where the
    bounds come so close that free runs draw nearly from pi*, by their mean reward.
    """
    confirm(target, exact)
    unknown = set(estimators) - set(ESTIMATORS)
    if unknown:
        raise ValueError(f"unknown estimators {sorted(unknown)}; there are {', '.join(ESTIMATORS)}")
    n, pinned = len(prompts), _pins(prompts, exact, repeats)
    many = pinned.prompts
    values: dict[tuple[int, str, str, str], Tensor] = {}
    cases = list(itertools.product(ks, proposals, estimators, ("lower", "upper")))
    for step, (k, proposal, estimator, side) in enumerate(cases):
        who: LanguageModel | None = target.reference if proposal == "reference" else None
        settings = SMC(k, ESTIMATORS[estimator].threshold)
        found = smc_shared(
            target,
            twist,
            many,
            settings,
            max_new_tokens=max_new_tokens,
            stream=stream.child(k, proposal, estimator, side),
            proposal=who,
            pinned=pinned if side == "upper" else None,
            batch_size=batch_size,
        )
        values[k, proposal, estimator, side] = found.log_z.reshape(repeats, n).cpu()
        if side == "lower":
            weighted = mean_reward(found, repeats, n)
        elif k == max(ks) and exact.reward is not None:
            gap = (values[k, proposal, estimator, side] - values[k, proposal, estimator, "lower"]).mean()
            if float(gap) < CLOSE:
                refuse_disagreement(_mean_reward_of(exact, n), *weighted)
        on_step(step + 1, len(cases), {})
    return Bounds(values)


CLOSE = 0.5
"""Nats between the bounds from which free runs have to agree with exact draws."""


def mean_reward(found: Particles, repeats: int, n: int) -> tuple[Estimate, float]:
    """E_pi*[r] by the particles' weights, from `repeats` runs for each of n prompts: a ratio of means over the runs. And
    the spread of r that the weights show.
    """
    samples = found.samples
    assert samples.log_w is not None and samples.reward is not None
    shape = (repeats, n, -1)
    log_w, reward = samples.log_w.double().reshape(shape), samples.reward.double().reshape(shape)
    own = (log_w.softmax(2) * reward).sum(2)  # [R, P]
    weight = found.log_z.double().reshape(repeats, n).softmax(0) * repeats
    value = (weight * own).mean()
    square = (weight * (log_w.softmax(2) * reward**2).sum(2)).mean()
    spread = float((square - value**2).clamp_min(0).sqrt())
    if n > 1:
        return mean((weight * own).mean(0).cpu()), spread
    error = mean((weight * (own - value))[:, 0].cpu())
    return Estimate(float(value), error.stderr, repeats), spread


def _mean_reward_of(exact: Samples, n: int) -> Estimate:
    """E_pi*[r] by exact draws; of several prompts each one's mean is a unit."""
    assert exact.reward is not None
    reward = exact.reward.double().cpu()
    return mean(reward if n == 1 else per_prompt(reward, exact.prompt_index.cpu(), n))


def _pins(prompts: Tokens, exact: Samples, repeats: int) -> Samples:
    """One exact draw for every repeat and prompt; row r·P + p answers prompt p."""
    picked = []
    for p in range(len(prompts)):
        own = (exact.prompt_index == p).nonzero()[:, 0]
        if len(own) < repeats:
            raise ValueError(
                f"{repeats} upper bounds need as many exact draws per prompt; prompt {p} has {len(own)}"
            )
        picked.append(own[:repeats])
    rows = torch.stack(picked, 1).flatten()
    many = prompts.select(torch.arange(len(prompts), device=prompts.device).repeat(repeats))
    index = torch.arange(len(many), device=prompts.device)
    return Samples(many, index, exact.tokens[rows], exact.mask[rows])


def log_z_of(bounds: Bounds) -> LogZ:
    """The common log Z: SMC's midpoint at the largest number of particles, the twist's proposal before the reference's,
    resampling by ESS before resampling always.

    That is settled before any bound is looked at. To take the narrowest of several intervals favours those that are
    narrow by chance: of intervals that cover 95% each, the narrowest of eight covers 73 to 84%. Raises ValueError without
    bounds by SMC, or where lower and upper ones contradict each other.
    """
    settings = [(k, p, e) for k, p, e, side in bounds.values if e != "iwae" and side == "lower"]
    if not settings:
        raise ValueError("importance sampling's midpoint can be nats away from log Z: give bounds by SMC")
    k, proposal, estimator = max(settings, key=lambda s: (s[0], s[1] == "twist", s[2] == "smc-ess"))
    lower, upper = (bounds.values[k, proposal, estimator, side] for side in ("lower", "upper"))
    source = f"{estimator} bounds, {k} particles, {proposal} proposal, {lower.shape[0]} repeats"
    if len(settings) > 1:
        source += f", the most particles of {len(settings)} settings"
    if lower.shape[1] == 1:
        return LogZ.of_bounds(lower[:, 0], upper[:, 0], source)
    if lower.shape[0] > 1:
        source += ", averaged prompt by prompt"
    found = LogZ.of_pairs(lower.mean(0), upper.mean(0), f"{source}, {lower.shape[1]} prompts")
    return replace(found, certificate=certified(lower, upper))

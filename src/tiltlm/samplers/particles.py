"""What one asks of sequential Monte Carlo and gets from it: its settings, weighted particles, and their trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltlm.samplers.resampling import Scheme
from tiltlm.samples import Samples, Tokens, cat_samples
from tiltlm.seeds import Stream


@dataclass(frozen=True)
class SMC:
    """How particles are weighed and resampled."""

    particles: int = 64
    """K, per prompt."""

    threshold: float = 0.5
    """Resample a prompt's particles when ESS ≤ threshold·K: 1 always, 0 never (importance sampling)."""

    scheme: Scheme = "systematic"
    """systematic, stratified, residual or multinomial."""

    resample_first: bool = True
    """Weigh and resample before the next token is drawn (twist-induced proposal only); else after."""

    def __post_init__(self) -> None:
        if self.particles < 1 or not 0 <= self.threshold <= 1:
            raise ValueError(f"particles must be ≥ 1 and threshold within [0, 1]; got {self}")


IMPORTANCE = SMC(threshold=0.0)
"""Importance sampling: no resampling (the IWAE bound)."""


@dataclass(frozen=True)
class Trace:
    """What happened step by step. Steps: 0 … T−1 before the final weights, T after them.

    ess        [T + 1, G] effective sample size of the weights since the last resampling, before any at that step
    resampled  bool [T + 1, G]
    log_z      [T + 1, G] running estimate of the log normaliser
    ancestors  int64 [T, G, K]: slot of the parent of the particle that drew its t-th token in slot k
    """

    ess: Tensor
    resampled: Tensor
    log_z: Tensor
    ancestors: Tensor


@dataclass(frozen=True)
class Particles:
    """Weighted samples: G prompts × K rows, and the estimate of log Z [G].

    samples carry log_q, log_ref, log_psi, reward, and log_w: the mean of exp(log_w) over a prompt's rows is Ẑ.
    """

    samples: Samples
    log_z: Tensor
    trace: Trace

    def resampled(self, n: int, stream: Stream) -> Samples:
        """`n` equally weighted draws per prompt, by systematic resampling of the weights."""
        g, k = len(self.log_z), len(self.samples) // len(self.log_z)
        assert self.samples.log_w is not None
        weights = torch.softmax(self.samples.log_w.double().reshape(g, k), 1)
        offset = stream.uniform(range(g), 1).to(weights.device)
        points = (torch.arange(n, device=weights.device) + offset) / n
        slot = torch.searchsorted(weights.cumsum(1), points.contiguous()).clamp_max(k - 1)
        rows = slot + torch.arange(g, device=slot.device)[:, None] * k
        return self.samples.select(rows.flatten()).with_(log_w=None)


def cat_particles(parts: Sequence[Particles], prompts: Tokens) -> Particles:
    """Particles of several batches of prompts, side by side; `prompts`: all of them. Short traces are held on."""
    steps = max(len(part.trace.ess) for part in parts)
    traces = [_held_on(part.trace, steps) for part in parts]
    names = ("ess", "resampled", "log_z", "ancestors")
    trace = Trace(*(torch.cat([getattr(trace, name) for trace in traces], 1) for name in names))
    samples = replace(cat_samples([part.samples for part in parts]), prompts=prompts)
    return Particles(samples, torch.cat([part.log_z for part in parts]), trace)


def _held_on(trace: Trace, steps: int) -> Trace:
    """A trace as if nothing happened in further steps, up to `steps`."""
    more = steps - len(trace.ess)
    if more == 0:
        return trace

    def last(x: Tensor) -> Tensor:
        return torch.cat([x, x[-1:].expand(more, *x.shape[1:])])

    slots = torch.arange(trace.ancestors.shape[2], device=trace.ancestors.device)
    stay = slots.expand(more, *trace.ancestors.shape[1:])
    no = trace.resampled.new_zeros(more, trace.resampled.shape[1])
    return Trace(
        last(trace.ess), torch.cat([trace.resampled, no]), last(trace.log_z), torch.cat([trace.ancestors, stay])
    )

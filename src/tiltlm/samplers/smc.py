"""Twisted sequential Monte Carlo: weighted particles for pi*, and an unbiased estimate of Z.

K particles per prompt grow token by token. After t tokens a particle stands for the intermediate target
pi_ref(y_≤t)·psi_t(y_≤t); after the last token always for the true one, pi_ref(y)·exp(r/beta). With y_t ~ q, its
weight is multiplied by

    pi_ref(y_t|·)·psi_t / (psi_{t−1}·q(y_t|·))        (psi_0 = 1; a twist enters as a ratio, never by itself)

and when weights have become uneven (ESS ≤ threshold·K) the particles of a prompt are resampled. The
*twist-induced* proposal q ∝ pi_ref·psi_t makes the factor n_t/psi_{t−1}, n_t = Σ_v pi_ref(v|·)·psi_t(v), known
before y_t is drawn: weigh, resample, *then* draw, so that copies of a particle part at once (`resample_first`; the
other order is the original's). Without resampling this is importance sampling.

E[Ẑ] = Z for every schedule and scheme, so E[log Ẑ] ≤ log Z. *Conditional* SMC pins one particle to an exact draw
from pi*; then E[1/Ẑ] = 1/Z and E[log Ẑ] ≥ log Z.

Zhao et al. 2024 (arXiv:2404.17546), §3; Andrieu, Doucet & Holenstein 2010 for the conditional form. A row that
ends (end of text) takes its final weight at once, then keeps it and costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiltlm.models.base import LanguageModel, Twist
from tiltlm.samplers.particles import IMPORTANCE, SMC, Particles, Trace, cat_particles
from tiltlm.samplers.population import Population
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.target import Target

__all__ = ["IMPORTANCE", "SMC", "Particles", "Trace", "cat_particles", "smc", "smc_in_batches"]


@torch.no_grad()
def smc(
    target: Target,
    twist: Twist | None,
    prompts: Tokens,
    settings: SMC,
    *,
    max_new_tokens: int,
    stream: Stream,
    proposal: LanguageModel | None = None,
    pinned: Samples | None = None,
    groups: Tensor | None = None,
) -> Particles:
    """K weighted particles for every prompt.

    twist: psi_t (None: 1). proposal: what draws (None: the twist-induced proposal; without twist, the reference).
    pinned: one exact draw of pi* per prompt, in the prompts' order: conditional SMC with that row in slot 0.
    groups: the prompts' own numbers, which name their random numbers (default 0, 1, …): how prompts are batched
    changes nothing. Raises FloatingPointError naming the step at which weights are NaN or all zero.
    """
    if proposal is target.reference and twist is None:
        proposal = None
    population = Population(target, twist, prompts, settings, max_new_tokens, stream, proposal, pinned, groups)
    for t in range(max_new_tokens):
        if not population.step(t):
            break
    return population.finish()


def smc_in_batches(
    target: Target,
    twist: Twist | None,
    prompts: Tokens,
    settings: SMC,
    *,
    max_new_tokens: int,
    stream: Stream,
    proposal: LanguageModel | None = None,
    pinned: Samples | None = None,
    batch_size: int = 512,
    some: range | None = None,
) -> Particles:
    """`smc` over many prompts, about `batch_size` particles at once; the same result for every batch size.

    some: the numbers of the prompts that are wanted, one after the other (default: all).
    """
    wanted = torch.arange(len(prompts)) if some is None else torch.tensor(some)
    parts: list[Particles] = []
    for numbers in wanted.split(max(1, batch_size // settings.particles)):
        own = None if pinned is None else pinned.select(numbers.to(pinned.device))
        parts.append(
            smc(
                target,
                twist,
                prompts.select(numbers.to(prompts.device)),
                settings,
                max_new_tokens=max_new_tokens,
                stream=stream,
                proposal=proposal,
                pinned=own,
                groups=numbers,
            )
        )
    return cat_particles(parts, prompts if some is None else prompts.select(wanted.to(prompts.device)))

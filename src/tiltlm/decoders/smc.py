"""Sequential Monte Carlo as a decoder: of every run of K particles one is drawn by weight.

What that particle's law q is, no formula says, but how far it is from pi* at most does the run's own estimate of Z. Let
V be everything a run draws, k the particle that is picked, with P(k | V) = W_k, its share of the weights. The estimates
are unbiased,

    E_V[ Ẑ · Σ_k W_k·f(y_k) ] = Z · E_pi*[f]        for every f, resampling by ESS included,

so the law with density Ẑ/Z against that of (V, k) is a probability law under which y_k follows pi*. Dropping everything
but y_k cannot make two laws easier to tell apart (the data-processing inequality), and therefore

    KL(q‖pi*) ≤ E[ log( q(V, k) / (q(V, k)·Ẑ/Z) ) ] = log Z − E[log Ẑ].

With log(q/pi_ref) = log(q/pi*) + r/beta − log Z, also KL(q‖pi_ref) ≤ E[r]/beta − E[log Ẑ], and J(q) ≥ beta·E[log Ẑ],
which need no log Z. The extended target is Andrieu, Doucet & Holenstein's (2010, §4); Grosse, Ghahramani & Adams (2015)
use the bound for sequential Monte Carlo, Zhao et al. (2024, arXiv:2404.17546, §3) for twisted SMC of language models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm import ranks
from tiltlm.decoders.sampler import Sampler
from tiltlm.method import Learner, Method
from tiltlm.models.base import Twist
from tiltlm.problem import Problem
from tiltlm.ruler.estimate import per_prompt
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.samplers.smc import SMC, Particles, smc
from tiltlm.samples import Samples, Tokens, cat_samples
from tiltlm.seeds import Stream
from tiltlm.twists.ctl import CTL


@dataclass(frozen=True)
class SMCDecoding(Sampler):
    """One particle of a run of `particles`, picked by weight."""

    particles: int = 64
    """K, of every run."""

    threshold: float = 0.5
    """Resample when ESS ≤ threshold·K: 1 always, 0 never (importance resampling of whole completions)."""

    twist: CTL | None = None
    """How the twist is learnt; none: the reference proposes, and the reward is met at the end alone."""

    trained_as: ClassVar[str] = "ctl"
    """The method whose training this one decodes with."""

    optimum: ClassVar[str] = "pi* as the number of particles grows, with any twist"

    def __post_init__(self) -> None:
        _ = self.settings  # refused here, before any work

    @property
    def settings(self) -> SMC:
        return SMC(self.particles, self.threshold)

    def trained(self) -> Method:
        return self if self.twist is None else self.twist

    def of(self, problem: Problem, learner: Learner) -> Twist | None:
        """The twist that has been learnt."""
        return None if self.twist is None else self.twist.decoder(problem, learner).twist

    def draw(
        self, problem: Problem, learner: Learner, prompts: Tokens, n: int, stream: Stream, batch_size: int = 512
    ) -> Samples:
        return self.runs(problem, learner, prompts, n, stream, batch_size)[0]

    def runs(
        self, problem: Problem, learner: Learner, prompts: Tokens, n: int, stream: Stream, batch_size: int
    ) -> tuple[Samples, Tensor]:
        """The picked particle of `n` runs of every prompt, those of a prompt side by side, and log Ẑ of each run [P·n].

        About `batch_size` particles are held at once; how many changes nothing. The rows carry no log_q: that of a
        particle along its path is not the density of what is picked.
        """
        twist, at_once = self.of(problem, learner), max(1, batch_size // self.particles)

        def run(numbers: Tensor) -> tuple[Samples, Tensor]:
            index = (numbers // n).to(prompts.device)
            found = smc(
                problem.target, twist, prompts.select(index), self.settings, max_new_tokens=problem.width,
                stream=stream.child("smc"), groups=numbers,
            )  # fmt: skip
            return _as_answers(pick(found, numbers, stream.child("pick")), prompts, index), found.log_z.double()

        def part(begin: int, end: int) -> list[tuple[Samples, Tensor]]:
            return [run(numbers) for numbers in torch.arange(begin, end).split(at_once)]

        found = ranks.in_shares(n * len(prompts), part)
        picked = [replace(samples, prompts=prompts) for samples, _ in found]
        return cat_samples(picked), torch.cat([log_z for _, log_z in found])

    def measured(self, problem: Problem, learner: Learner, ruler: Ruler) -> tuple[Measurement, Samples]:
        samples, log_z = self.runs(problem, learner, ruler.prompts, ruler.n, ruler.stream, ruler.batch_size)
        assert samples.reward is not None
        reward, count = samples.reward.double(), len(ruler.prompts)
        at_most = reward / problem.beta - log_z
        if count > 1:
            reward, at_most = (per_prompt(x, samples.prompt_index, count) for x in (reward, at_most))
        return ruler.measurement(ruler.verdicts(samples) | ruler.bounded(reward, at_most)), samples


def pick(found: Particles, numbers: Tensor, own: Stream) -> Samples:
    """One particle of every run, drawn by weight; numbers [runs]: what names a run's random number."""
    samples, runs = found.samples, len(found.log_z)
    assert samples.log_w is not None
    k = len(samples) // runs
    share = samples.log_w.double().reshape(runs, k).softmax(1).cumsum(1)
    luck = own.uniform(numbers, 1).to(share.device) * share[:, -1:]
    slot = torch.searchsorted(share, luck.contiguous(), right=True)[:, 0].clamp_max(k - 1)
    return samples.select(slot + torch.arange(runs, device=slot.device) * k)


def _as_answers(picked: Samples, prompts: Tokens, index: Tensor) -> Samples:
    """Row i answers prompt index[i] of `prompts`."""
    return Samples(
        prompts, index, picked.tokens, picked.mask, finished=picked.finished, log_ref=picked.log_ref,
        reward=picked.reward,
    )  # fmt: skip


NAMES: dict[str, str] = {
    "smc": "one particle of K by weight, the reference proposing",
    "smc-ctl": "one particle of K by weight, with CTL's twist",
}
METHODS: dict[str, Method] = {"smc": SMCDecoding(), "smc-ctl": SMCDecoding(twist=CTL())}

"""Where a twist's training draws come from: the experience of every twist objective.

A *scene* gives each step its prompts, and exact draws of pi* for them where there are any (`samplers.scenes`). Several
processes (`samplers.shared`) draw the population of a prompt each, and share out all other rows one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tiltlm import ranks
from tiltlm.models.base import LanguageModel, Twist
from tiltlm.samplers.ancestral import draw
from tiltlm.samplers.guided import Guided
from tiltlm.samplers.scenes import Infilling, Scene
from tiltlm.samplers.shared import draw_shared, of_rows, scored_shared, smc_shared
from tiltlm.samplers.smc import IMPORTANCE, SMC, Particles, smc
from tiltlm.samples import Samples, Tokens, cat_samples
from tiltlm.seeds import Stream
from tiltlm.target import Target
from tiltlm.twists.learned import Scaled
from tiltlm.twists.objective import Draws, Need
from tiltlm.twists.soft_q import mean_backups


@dataclass(frozen=True)
class TwistDraws:
    """The experience of a twist objective: draws with the live twist, scored, and whatever else it `needs`.

    All rows are max_new_tokens wide: a loss is the mean over T tokens, however soon a batch happens to end.

    particles  rows per prompt, of every kind
    positives  what stands for pi* in the losses that want it: "particles", the proposal's rows by their weights;
               "exact", the scene's; "csmc", conditional SMC around one exact draw per prompt
    drawn_by   who draws the proposal's rows: "q" the twist-induced proposal; "reference"; "mixed" half of each,
               weighed by the mixture; "resampled" q's rows resampled by their weights; "exact" the scene's exact
               draws
    csmc_threshold  when conditional SMC resamples
    tempered   power of the twist while drawing (1: the twist-induced proposal)
    induced    give log_q under the twist-induced proposal, whoever drew (soft Q's goals); log_w stays the drawer's
    backups    add E_ref[log psi] along the rows (soft Q's mean backups)
    prefixes   add phi of a fresh rollout behind every prefix of the positives (FUDGE)
    """

    target: Target
    twist: Twist
    scene: Scene
    max_new_tokens: int
    stream: Stream
    needs: tuple[Need, ...]
    particles: int = 100
    positives: Literal["particles", "exact", "csmc"] = "particles"
    drawn_by: Literal["q", "reference", "mixed", "resampled", "exact"] = "q"
    csmc_threshold: float = 0.5
    tempered: float = 1.0
    induced: bool = False
    backups: bool = False
    prefixes: bool = False

    def __post_init__(self) -> None:
        if self.drawn_by == "mixed" and self.particles % 2:
            raise ValueError(f"mixed draws are half q's, half the reference's: not of {self.particles} particles")
        if self.prefixes and self.positives == "particles":
            raise ValueError('prefixes are those of positives: set positives to "exact" or "csmc"')
        exact = self.positives != "particles" or self.drawn_by == "exact"
        if exact and isinstance(self.scene, Infilling) and self.target.beta != 1:
            raise ValueError(f"infilling's draws are exact at beta 1 alone; this target's is {self.target.beta}")

    def batch(self, step: int) -> Draws:
        """The draws of a step, made without gradients."""
        stream = self.stream.child(step)
        prompts, exact = ranks.from_first(lambda: self.scene(stream.child("scene")))
        exact = None if exact is None else replace(exact, prompts=prompts)
        if exact is None and (self.positives != "particles" or self.drawn_by == "exact"):
            raise ValueError("these settings want exact draws of pi*, but the scene supplies none")
        proposal = self._proposal(prompts, exact, stream.child("q")) if "proposal" in self.needs else None
        positives = self._positives(prompts, exact, stream.child("csmc"))
        reference = self._reference(prompts, stream.child("reference")) if "reference" in self.needs else None
        proposal, positives, reference = (
            None if x is None else replace(widened(x, self.max_new_tokens), prompts=prompts)
            for x in (proposal, positives, reference)
        )
        prefixes = None
        if self.prefixes and positives is not None:
            prefixes = rollouts_behind(self.target, positives, self.max_new_tokens, stream.child("prefixes"))
        backups = self._backups(proposal), self._backups(positives)
        return Draws(len(prompts), self.target.beta, proposal, positives, reference, prefixes, *backups)

    def _backups(self, samples: Samples | None) -> Tensor | None:
        if samples is None or not self.backups:
            return None
        return of_rows(samples, partial(mean_backups, self.target.reference, self.twist))

    def _proposal(self, prompts: Tokens, exact: Samples | None, stream: Stream) -> Samples:
        if self.drawn_by == "exact":
            assert exact is not None
            return self._along(exact)
        drawn = self._drawn(prompts, stream)
        induced = self.drawn_by in ("q", "resampled") and self.tempered == 1
        return self._along(drawn) if self.induced and not induced else drawn

    def _drawn(self, prompts: Tokens, stream: Stream) -> Samples:
        """Rows with the log_q of who drew them, and log_w (none where they are resampled)."""
        if self.drawn_by == "reference":
            return self._particles(prompts, stream, self.target.reference).samples
        q = self._particles(prompts, stream, self._tempered())
        if self.drawn_by == "resampled":
            return q.resampled(self.particles, stream.child("resampled"))
        return self._mixed(q.samples, stream.child("mixed")) if self.drawn_by == "mixed" else q.samples

    def _particles(self, prompts: Tokens, stream: Stream, proposal: LanguageModel | None) -> Particles:
        return self._population(prompts, replace(IMPORTANCE, particles=self.particles), stream, proposal=proposal)

    def _population(self, prompts: Tokens, settings: SMC, stream: Stream, **how: Any) -> Particles:
        found = smc_shared(
            self.target, self.twist, prompts, settings, max_new_tokens=self.max_new_tokens, stream=stream,
            batch_size=len(prompts) * self.particles, **how,
        )  # fmt: skip
        return replace(found, samples=replace(found.samples, prompts=prompts))

    def _tempered(self) -> LanguageModel | None:
        """The proposal, if it is not the twist-induced one."""
        if self.tempered == 1:
            return None
        return Guided(self.target.reference, Scaled(self.twist, self.tempered))

    def _along(self, samples: Samples) -> Samples:
        def scored(some: Samples) -> Samples:
            return along(self.target.reference, self.twist, self.target.scored(some), self.max_new_tokens)

        return scored_shared(samples, scored)

    def _mixed(self, q: Samples, stream: Stream) -> Samples:
        """The first half of q's rows of every prompt, and as many of the reference."""
        half = torch.arange(len(q), device=q.device) % self.particles < self.particles // 2
        p = self._particles(q.prompts, stream, self.target.reference).samples.select(~half)
        proposal = Guided(self.target.reference, Scaled(self.twist, self.tempered))
        with torch.no_grad():
            p = p.with_(log_q=of_rows(p, proposal.log_prob))
        return weighed_as_mixture(cat_samples([q.select(half), p]), self.target.beta)

    def _positives(self, prompts: Tokens, exact: Samples | None, stream: Stream) -> Samples | None:
        if self.positives == "particles":
            return None
        assert exact is not None
        if self.positives == "exact":
            return self._along(exact) if self.induced else scored_shared(exact, self.target.scored)
        if len(exact) != len(prompts):
            raise ValueError(f"conditional SMC pins one exact draw per prompt; the scene supplies {len(exact)}")
        settings = SMC(self.particles, threshold=self.csmc_threshold)
        return self._population(prompts, settings, stream, pinned=exact).samples

    def _reference(self, prompts: Tokens, stream: Stream) -> Samples:
        def scored(drawn: Samples) -> Samples:
            return self.target.scored(drawn.with_(log_ref=drawn.log_q))

        reference, width = self.target.reference, self.max_new_tokens
        return draw_shared(reference, prompts, scored, n=self.particles, max_new_tokens=width, stream=stream)


def widened(samples: Samples, width: int) -> Samples:
    """`samples` [N, T] with padding up to `width` columns."""
    if samples.tokens.shape[1] == width:
        return samples
    more = (0, width - samples.tokens.shape[1])
    flat = {name: x for name, x in samples.optional().items() if x.ndim == 1}
    wide = {name: torch.nn.functional.pad(x, more) for name, x in samples.optional().items() if x.ndim == 2}
    tokens, mask = torch.nn.functional.pad(samples.tokens, more), torch.nn.functional.pad(samples.mask, more)
    return Samples(samples.prompts, samples.prompt_index, tokens, mask, **flat, **wide)


def along(reference: LanguageModel, twist: Twist, samples: Samples, max_new_tokens: int) -> Samples:
    """`samples` with log_ref, log_psi and the twist-induced log_q of every token, whoever drew them.

    One pass: conditional SMC with a single particle has nothing to draw. log_w stays: it tells what a row weighs as
    a draw of its own drawer, which log_q no longer is.
    """
    free = Target(reference, lambda some: torch.zeros(len(some), device=some.device), 1.0)
    prompts, index = samples.row_prompts, torch.arange(len(samples), device=samples.device)
    pinned = Samples(prompts, index, samples.tokens, samples.mask)
    alone = SMC(1, threshold=0)
    walked = smc(
        free, twist, prompts, alone, max_new_tokens=max_new_tokens, stream=Stream(0), pinned=pinned
    ).samples
    width = samples.tokens.shape[1]
    found = {name: getattr(walked, name) for name in ("log_ref", "log_psi", "log_q")}
    wide = {name: torch.nn.functional.pad(x, (0, width - x.shape[1])) for name, x in found.items()}
    return samples.with_(**wide)


def weighed_as_mixture(samples: Samples, beta: float) -> Samples:
    """Rows drawn half by q and half by the reference, weighed as draws of their mixture: log_q and log_w of it."""
    assert samples.log_q is not None and samples.log_ref is not None and samples.reward is not None
    parts = torch.stack([samples.log_q, samples.log_ref]).double().cumsum(2)
    mixture = parts.logsumexp(0) - math.log(2)
    log_q = torch.where(samples.mask, mixture.diff(dim=1, prepend=torch.zeros_like(mixture[:, :1])), 0.0)
    log_w = samples.log_ref.double().sum(1) + samples.reward / beta - mixture[:, -1]
    return samples.with_(log_q=log_q, log_w=log_w)


def rollouts_behind(target: Target, samples: Samples, max_new_tokens: int, stream: Stream) -> Tensor:
    """log phi of a fresh reference rollout behind every prefix of every row, [N, T]; its own where it is whole."""
    lengths = samples.mask.sum(1)

    def part(begin: int, end: int) -> list[Tensor]:
        own = samples.select(slice(begin, end))
        whole, columns = target.log_potential(target.scored(own)).double(), []
        for t in range(1, samples.tokens.shape[1] + 1):
            going_on = (lengths > t) & (t < max_new_tokens)
            rows, numbers = going_on[begin:end].nonzero()[:, 0], (going_on.cumsum(0) - 1)[begin:end]
            column = whole.clone()
            if len(rows):
                ended = _finished(target, own.select(rows), t, max_new_tokens, stream.child(t), numbers[rows])
                column[rows] = ended.double()
            columns.append(column)
        return [torch.where(own.mask, torch.stack(columns, 1), 0.0)]

    return torch.cat(ranks.in_shares(len(samples), part))


def _finished(target: Target, samples: Samples, t: int, width: int, stream: Stream, numbers: Tensor) -> Tensor:
    """log phi of the first t tokens of every row with a fresh ending by the reference, [N]; numbers: the rows' own among
    all that are ended there."""
    head = Tokens.full(samples.tokens[:, :t])
    begun = samples.row_prompts.followed_by(head)
    tail = draw(target.reference, begun, max_new_tokens=width - t, stream=stream, rows=numbers.cpu())
    whole = head.followed_by(tail.completions)
    return target.log_potential(Samples(samples.prompts, samples.prompt_index, whole.ids, whole.mask))

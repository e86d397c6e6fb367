"""The particles of sequential Monte Carlo while they grow: weigh, resample, draw, until all have ended.

The mathematics stands in `smc.py`; here is how it is done step by step, with rows that end leaving early.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiltlm.models.base import LanguageModel, State, Twist, is_end
from tiltlm.samplers.inverse_cdf import Cdf
from tiltlm.samplers.particles import SMC, Particles, Trace
from tiltlm.samplers.resampling import CONDITIONAL, ancestors, conditional_ancestors, effective_sample_size
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.target import Target


class Population:
    """The particles while they grow. N = G·K rows; only living rows stand in the decoding states."""

    def __init__(
        self,
        target: Target,
        twist: Twist | None,
        prompts: Tokens,
        settings: SMC,
        width: int,
        stream: Stream,
        proposal: LanguageModel | None,
        pinned: Samples | None,
        groups: Tensor | None,
    ) -> None:
        self.target, self.settings, self.width, self.stream = target, settings, width, stream
        self.prompts, self.pinned = prompts, _checked(pinned, prompts, width, target.reference.eos_ids, settings)
        self.eos_ids, k, g = target.reference.eos_ids, settings.particles, len(prompts)
        self.index = torch.arange(g, device=prompts.device).repeat_interleave(k)
        self.groups = torch.arange(g) if groups is None else groups.cpu()
        self.reference = target.reference.start(prompts, width)
        self.twist = None if twist is None else twist.start(prompts, width)
        self.proposal: State | None = None
        if proposal is not None and proposal is not target.reference:
            self.proposal = proposal.start(prompts, width)
        self.induced = proposal is None and twist is not None
        if k > 1:
            self._select_states(self.index)
        numbers = (self.groups[:, None] * k + torch.arange(k)).flatten()
        self.uniform = stream.uniform(numbers, width).to(prompts.device)
        self._empty(g * k, prompts.device)

    def _empty(self, n: int, device: torch.device) -> None:
        self.tokens = torch.zeros(n, self.width, dtype=torch.int64, device=device)
        self.mask = torch.zeros(n, self.width, dtype=torch.bool, device=device)
        self.log_q, self.log_ref, self.log_psi = (
            torch.zeros(n, self.width, dtype=torch.float64, device=device) for _ in range(3)
        )
        self.log_w, self.psi_before, self.reward = (
            torch.zeros(n, dtype=torch.float64, device=device) for _ in "123"
        )
        self.ended = torch.zeros(n, dtype=torch.bool, device=device)
        self.alive = torch.arange(n, device=device)  # the rows that stand in the states, in their order there
        self.log_z = torch.zeros(n // self.settings.particles, dtype=torch.float64, device=device)
        self.steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    # ---- one step -------------------------------------------------------------------------------------------

    def step(self, t: int) -> bool:
        """Weigh, resample and draw the t-th token (from 0); returns whether anyone is still growing."""
        early = self.induced and self.settings.resample_first
        if not early:
            self.resample(t)
            if len(self.alive) == 0:
                return False
        ref_logits = self.reference.logits()
        psi = None if self.twist is None else self.twist.log_psi(None)
        of_ref = _whole(Cdf.of(ref_logits), t)
        ref_norm = of_ref.log_norm
        if self.induced:
            assert psi is not None
            cdf = Cdf.of(ref_logits + psi)
            log_n = self._finite(cdf.log_norm - ref_norm, t)
            self._weigh(self.alive, log_n - self.psi_before[self.alive])
            rows = self.resample(t) if early else None
            drawn_from, q_norm = cdf, cdf.log_norm
        else:
            drawn_from = of_ref if self.proposal is None else Cdf.of(self.proposal.logits())
            rows = None
            q_norm = drawn_from.log_norm
        if len(self.alive) == 0:
            return False
        at = torch.arange(len(self.alive), device=self.alive.device) if rows is None else rows
        tokens = self._pin(t, drawn_from.draw(self.uniform[self.alive, t], rows))
        log_q = (drawn_from.logits[at, tokens].double() - q_norm[at]).nan_to_num(nan=0.0)  # dead rows draw nothing
        log_ref = ref_logits[at, tokens].double() - ref_norm[at]
        log_psi = torch.zeros_like(log_ref) if psi is None else psi[at, tokens].double()
        if not self.induced:
            self._weigh(self.alive, log_ref + log_psi - self.psi_before[self.alive] - log_q)
        self._write(t, tokens, log_q, log_ref, log_psi)
        return self._go_on(t, tokens)

    def _pin(self, t: int, tokens: Tensor) -> Tensor:
        """`tokens` with those of pinned rows put in place."""
        if self.pinned is None:
            return tokens
        first = self.alive % self.settings.particles == 0
        own = self.pinned.tokens[self.alive // self.settings.particles, t]
        return torch.where(first, own, tokens)

    def _write(self, t: int, tokens: Tensor, log_q: Tensor, log_ref: Tensor, log_psi: Tensor) -> None:
        rows = self.alive
        self.tokens[rows, t], self.mask[rows, t] = tokens, True
        self.log_q[rows, t], self.log_ref[rows, t], self.log_psi[rows, t] = log_q, log_ref, log_psi
        self.psi_before[rows] = log_psi

    def _go_on(self, t: int, tokens: Tensor) -> bool:
        """Let rows that ended take their final weight and leave; the others grow by their token."""
        over = is_end(tokens, self.eos_ids)
        ended = bool(over.any())
        if ended:
            self._final(self.alive[over], t)
            self.ended[self.alive[over]] = True
            self.alive, tokens = self.alive[~over], tokens[~over]
        if t + 1 == self.width or len(self.alive) == 0:
            return False
        if ended:
            self._select_states((~over).nonzero()[:, 0])
        self._append(tokens)
        return True

    def _append(self, tokens: Tensor) -> None:
        for state in (self.reference, self.twist, self.proposal):
            if state is not None:
                state.append(tokens)

    def _select_states(self, index: Tensor) -> None:
        for state in (self.reference, self.twist, self.proposal):
            if state is not None:
                state.select(index)

    # ---- weights --------------------------------------------------------------------------------------------

    def resample(self, t: int) -> Tensor | None:
        """Resample the groups that need it, before the t-th token is drawn; record the step.

        Returns the places in the states, before resampling, of the rows that live now; None if nothing moved.
        """
        g, k = len(self.log_z), self.settings.particles
        log_w = self.log_w.reshape(g, k)
        self._check(log_w, t)
        ess = effective_sample_size(log_w)
        growing = torch.zeros(g, dtype=torch.bool, device=log_w.device)
        growing[self.alive // k] = True
        least = self.settings.threshold * k if t > 0 else 0.0
        now = (ess <= least) & growing
        slots = torch.arange(k, device=log_w.device).expand(g, k)
        mean = log_w.logsumexp(1) - _log(k)
        self.steps.append((ess, now, self.log_z + mean, slots))
        if not bool(now.any()):
            return None
        found = torch.where(now[:, None], self._ancestors(log_w, t), slots)
        self.steps[-1] = (*self.steps[-1][:3], found)
        self.log_z = torch.where(now, self.log_z + mean, self.log_z)
        self.log_w = torch.where(now[:, None], 0.0, log_w).flatten()
        return self._move((found + torch.arange(g, device=found.device)[:, None] * k).flatten())

    def _ancestors(self, log_w: Tensor, t: int) -> Tensor:
        k = self.settings.particles
        columns = [t * 2 * k + i for i in range(2 * k)]
        uniform = self.stream.child("resample").uniform(self.groups, columns).to(log_w.device)
        if self.pinned is not None:
            return conditional_ancestors(log_w, uniform, self.settings.scheme)
        return ancestors(log_w, uniform[:, :k], self.settings.scheme)

    def _move(self, parent: Tensor) -> Tensor:
        """Every row becomes a copy of row `parent`; returns the living rows' places in the states before."""
        place = torch.full_like(self.index, -1)
        place[self.alive] = torch.arange(len(self.alive), device=place.device)
        for name in ("tokens", "mask", "log_q", "log_ref", "log_psi", "psi_before", "reward", "ended"):
            setattr(self, name, getattr(self, name)[parent])
        source = place[parent]
        self.alive = (source >= 0).nonzero()[:, 0]
        moved = source[self.alive]
        self._select_states(moved)
        return moved

    def _final(self, rows: Tensor, t: int) -> None:
        """The final weights of `rows`: the twist's last word replaced by the true potential."""
        if len(rows) == 0:
            return
        samples = Samples(self.prompts, self.index[rows], self.tokens[rows, : t + 1], self.mask[rows, : t + 1])
        reward = self.target.reward(samples).to(self.log_w)
        self.reward[rows] = reward
        self._weigh(rows, reward / self.target.beta - self.psi_before[rows])

    def _weigh(self, rows: Tensor, log_factor: Tensor) -> None:
        """Multiply weights; one that is zero stays zero, whatever comes after an impossible prefix."""
        log_w = self.log_w[rows]
        self.log_w[rows] = torch.where(log_w == -torch.inf, log_w, log_w + log_factor)

    def _check(self, log_w: Tensor, t: int) -> None:
        if bool(log_w.isnan().any()):
            row = int(log_w.isnan().flatten().nonzero()[0])
            raise FloatingPointError(f"step {t}: the weight of {self._name(row)} is NaN; check reward and twist")
        if bool((log_w == -torch.inf).all(1).any()):
            group = int((log_w == -torch.inf).all(1).nonzero()[0])
            raise FloatingPointError(
                f"step {t}: every particle of prompt {int(self.groups[group])} has weight zero; use more particles, a "
                "better twist, or a reward with a floor (rewards of −inf end here)"
            )

    def _name(self, row: int) -> str:
        """A row as users know it, however prompts are batched."""
        k = self.settings.particles
        return f"particle {row % k} of prompt {int(self.groups[row // k])}"

    def _finite(self, log_n: Tensor, t: int) -> Tensor:
        if bool(log_n.isnan().any() or (log_n == torch.inf).any()):
            row = int((log_n.isnan() | (log_n == torch.inf)).nonzero()[0])
            raise FloatingPointError(
                f"step {t}: the normaliser of {self._name(int(self.alive[row]))} is {log_n[row]}"
            )
        return log_n

    def finish(self) -> Particles:
        """Final weights of those still growing, and everything that was recorded."""
        width = int(self.mask.any(0).sum())
        self._final((~self.ended).nonzero()[:, 0], width - 1)
        g, k = len(self.log_z), self.settings.particles
        log_w = self.log_w.reshape(g, k)
        self._check(log_w, width)
        log_z = self.log_z + log_w.logsumexp(1) - _log(k)
        ancestry = torch.stack([step[3] for step in self.steps])
        last = (effective_sample_size(log_w), log_z > torch.inf, log_z)
        ess, resampled, running = (torch.stack([*(step[i] for step in self.steps), last[i]]) for i in range(3))
        trace = Trace(ess, resampled, running, ancestry)
        finished = self.ended if self.eos_ids else torch.ones_like(self.ended)
        samples = Samples(
            self.prompts,
            self.index,
            self.tokens[:, :width],
            self.mask[:, :width],
            finished=finished,
            log_q=self.log_q[:, :width],
            log_ref=self.log_ref[:, :width],
            log_psi=self.log_psi[:, :width],
            reward=self.reward,
            log_w=(log_w + self.log_z[:, None]).flatten(),
        )
        return Particles(samples, log_z, trace)


def _log(k: int) -> float:
    return float(torch.tensor(float(k), dtype=torch.float64).log())


def _whole(cdf: Cdf, t: int) -> Cdf:
    """`cdf`, the reference's, if no row of it holds NaN; else an error that names step and row."""
    bad = cdf.log_norm.isnan()
    if bool(bad.any()):
        raise FloatingPointError(f"step {t}: the reference's logits hold NaN (row {int(bad.nonzero()[0])})")
    return cdf


def _checked(
    pinned: Samples | None, prompts: Tokens, width: int, eos_ids: tuple[int, ...], settings: SMC
) -> Samples | None:
    """Pinned rows must be whole completions, one per prompt, in order."""
    if pinned is None:
        return None
    if settings.threshold > 0 and settings.scheme not in CONDITIONAL:
        raise ValueError(f"conditional SMC needs {' or '.join(CONDITIONAL)} resampling; got {settings.scheme!r}")
    same = len(pinned) == len(prompts) and torch.equal(pinned.row_prompts.ids, prompts.ids)
    if not same:
        raise ValueError(
            f"conditional SMC pins one exact draw per prompt, in the prompts' order; got {len(pinned)} draws for "
            f"{len(prompts)} prompts (or other prompts)"
        )
    lengths = pinned.mask.sum(1)
    last = pinned.tokens.gather(1, (lengths - 1)[:, None])[:, 0]
    cut = (lengths < width) & ~is_end(last, eos_ids)
    if bool(cut.any()) or pinned.tokens.shape[1] > width:
        raise ValueError(f"pinned draws must be {width} tokens long or end with an end token")
    wide = width - pinned.tokens.shape[1]
    return Samples(
        pinned.prompts,
        pinned.prompt_index,
        torch.nn.functional.pad(pinned.tokens, (0, wide)),
        torch.nn.functional.pad(pinned.mask, (0, wide)),
    )

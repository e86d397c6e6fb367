"""The answer sheet: log Z, pi*, psi*, V*, both KLs and E[r] by enumeration of a small world.

Everything is computed over the list of *all* completions of every prompt, for any language model whose list is
short enough (a table; a small vocabulary and a few tokens). Rows are laid out prompt by prompt: row p·S + s is
completion s of prompt p, and results come as [P, S].

    log Z(x) = logsumexp_y [log pi_ref(y|x) + r/beta]
    log psi*_t(y_≤t) = logsumexp over completions y' that begin with y_≤t of [log pi_ref(y') + r(y')/beta]
                       − logsumexp over the same of log pi_ref(y')                   (= (Q* after t tokens)/beta)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.models.base import LanguageModel, is_end
from tiltlm.samples import Samples, Tokens
from tiltlm.target import Target

LIMIT = 5_000_000
"""Completions (prompts × list) beyond which enumeration is refused."""


def all_completions(vocab_size: int, horizon: int, eos_ids: Sequence[int] = ()) -> Tokens:
    """Every completion of `horizon` tokens, or that ends sooner at one of `eos_ids`; Tokens [S, horizon].

    A completion is cut off at `horizon` if it has not ended, as a sampler with that limit would.
    """
    if vocab_size**horizon > LIMIT:
        raise ValueError(
            f"{vocab_size}^{horizon} completions are more than can be listed ({LIMIT}): sample instead"
        )
    ids = torch.cartesian_prod(*[torch.arange(vocab_size)] * horizon).reshape(-1, horizon)
    if not eos_ids:
        return Tokens.full(ids)
    ends = is_end(ids, eos_ids)
    mask = ends.cumsum(1) - ends.long() == 0  # up to and including the first end
    unique = torch.unique(torch.where(mask, ids, vocab_size), dim=0)
    mask = unique < vocab_size
    return Tokens(torch.where(mask, unique, 0), mask)


def every_pair(prompts: Tokens, completions: Tokens) -> Samples:
    """Every prompt with every completion, prompt by prompt."""
    n, s = len(prompts), len(completions)
    if n * s > LIMIT:
        raise ValueError(
            f"{n} prompts × {s} completions = {n * s} rows; enumeration stops at {LIMIT}: sample instead"
        )
    index = torch.arange(n, device=prompts.device).repeat_interleave(s)
    each = completions.to(prompts.device)
    return Samples(prompts, index, each.ids.repeat(n, 1), each.mask.repeat(n, 1))


@torch.no_grad()
def log_density(model: LanguageModel, samples: Samples, batch_size: int = 8192) -> Tensor:
    """log q(y|x) of every row, [N], in batches."""
    starts = range(0, len(samples), batch_size)
    parts = [model.log_prob(samples.select(slice(b, b + batch_size))).sum(1) for b in starts]
    return torch.cat(parts)


@dataclass(frozen=True)
class Solution:
    """The whole answer. samples [P·S rows], log_ref and log_pi_star and reward [P, S], log_z [P]; nats."""

    samples: Samples
    log_ref: Tensor
    reward: Tensor
    log_pi_star: Tensor
    log_z: Tensor
    beta: float

    def at(self, beta: float) -> Solution:
        """The same of the target at another temperature."""
        return _solution(self.samples, self.log_ref, self.reward, beta)

    def density(self, model: LanguageModel) -> Tensor:
        """log q of every completion, [P, S]."""
        return log_density(model, self.samples).reshape(self.log_ref.shape)

    def kl_to_target(self, log_q: Tensor) -> Tensor:
        """KL(q‖pi*) per prompt, [P]."""
        return kl(log_q, self.log_pi_star)

    def kl_from_target(self, log_q: Tensor) -> Tensor:
        """KL(pi*‖q) per prompt, [P]."""
        return kl(self.log_pi_star, log_q)

    def objective(self, log_q: Tensor) -> Tensor:
        """J(q) = E_q[r] − beta·KL(q‖pi_ref) per prompt, [P], in units of reward."""
        return (log_q.exp() * self.reward).sum(1) - self.beta * kl(log_q, self.log_ref)

    def v_star(self) -> Tensor:
        """V*(x) = beta·log Z(x), [P]: the objective's maximum."""
        return self.beta * self.log_z

    def log_psi_star(self) -> Tensor:
        """log psi*_t after every token of every row, [P·S, T]; 0 at padding."""
        tokens, mask = self.samples.tokens, self.samples.mask
        log_ref = self.log_ref.reshape(-1)
        tilted = log_ref + self.reward.reshape(-1) / self.beta
        rows = torch.cat([self.samples.prompt_index[:, None], torch.where(mask, tokens, -1)], 1)
        columns = []
        for t in range(tokens.shape[1]):
            _, group = torch.unique(rows[:, : t + 2], dim=0, return_inverse=True)
            columns.append(_group_logsumexp(tilted, group) - _group_logsumexp(log_ref, group))
        return torch.where(mask, torch.stack(columns, 1), 0.0)


def _group_logsumexp(x: Tensor, group: Tensor) -> Tensor:
    """logsumexp of x within groups, handed back to every member."""
    top = x.new_full((int(group.max()) + 1,), -torch.inf).scatter_reduce(0, group, x, "amax")
    top = top.clamp_min(torch.finfo(x.dtype).min)
    total = torch.zeros_like(top).scatter_add(0, group, (x - top[group]).exp())
    return (total.log() + top)[group]


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ p (log p − log q) over the last dimension, with 0·log 0 = 0; nats."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)


@torch.no_grad()
def solve(target: Target, prompts: Tokens, horizon: int) -> Solution:
    """Enumerate the target's world: completions of up to `horizon` tokens of every prompt."""
    reference = target.reference
    samples = every_pair(prompts, all_completions(reference.vocab_size, horizon, reference.eos_ids))
    log_ref = log_density(reference, samples).reshape(len(prompts), -1)
    reward = target.reward(samples).to(log_ref).reshape(log_ref.shape)
    return _solution(samples, log_ref, reward, target.beta)


def _solution(samples: Samples, log_ref: Tensor, reward: Tensor, beta: float) -> Solution:
    tilted = log_ref + reward / beta
    log_z = tilted.logsumexp(1)
    return Solution(samples, log_ref, reward, tilted - log_z[:, None], log_z, beta)


@torch.no_grad()
def log_next_tokens(
    model: LanguageModel,
    prompt: Tokens,
    ahead: int,
    *,
    batch_size: int = 8192,
    on_step: Callable[[int, int, dict[str, float]], None] = lambda step, limit, metrics: None,
) -> Tensor:
    """log p(the token after `ahead` free ones is v | prompt), every prefix summed over; nats, float64 [V].

    For infilling with a gap of `ahead` tokens and one token c behind it, entry c is log Z(c). Enumerates V^ahead
    prefixes, `batch_size` at once; raises ValueError where they are too many.
    """
    v = model.vocab_size
    if len(prompt) != 1 or v**ahead > LIMIT:
        raise ValueError(
            f"one prompt and at most {LIMIT} prefixes; got {len(prompt)} and {v}^{ahead}: sample instead"
        )
    state = model.start(prompt, ahead)
    total = torch.full((v,), -torch.inf, dtype=torch.float64, device=prompt.device)
    if ahead == 0:
        return state.log_next()[0].double()
    codes = torch.arange(v**ahead, device=prompt.device)
    heads = max(1, batch_size // v) * v if ahead > 1 else v**ahead
    for begin in range(0, len(codes), heads):
        part = codes[begin : begin + heads]
        log_p, log_next = _along_codes(model, prompt, part, ahead)
        total = torch.logaddexp(total, (log_p[:, None] + log_next).logsumexp(0))
        on_step(min(begin + heads, len(codes)), len(codes), {})
    return total


def _along_codes(model: LanguageModel, prompt: Tokens, codes: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
    """log p of the prefixes with these numbers (base V), [n], and what may come next, [n, V]; float64."""
    v = model.vocab_size
    state = model.start(prompt, ahead)
    tree = codes.new_zeros(1)  # distinct prefixes so far
    log_p = torch.zeros(1, dtype=torch.float64, device=codes.device)
    for t in range(ahead):
        now = torch.unique(codes // v ** (ahead - 1 - t))
        parent = torch.searchsorted(tree, now // v)
        log_next = state.log_next().double()
        log_p = log_p[parent] + log_next[parent, now % v]
        state.select(parent)
        state.append(now % v)
        tree = now
    return log_p, state.log_next().double()

"""Ancestral sampling: y_t ~ q(· | x, y_<t), one token after the other, from any language model.

`draw` knows nothing of temperatures or top-k: `Warped` is itself a language model whose next-token
distribution is another's, warped, so the log-probabilities that come back are those of what was drawn from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltlm.models.base import LanguageModel, State, is_end
from tiltlm.samplers.inverse_cdf import draw_tokens
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream


@torch.no_grad()
def draw(
    model: LanguageModel,
    prompts: Tokens,
    *,
    n: int = 1,
    max_new_tokens: int,
    stream: Stream,
    rows: Tensor | None = None,
) -> Samples:
    """Draw `n` completions of every prompt, row r answering prompt r // n.

    Each distinct prompt is prefilled once. Row r uses uniforms number `rows[r]` of `stream` (default r), so a
    row's tokens depend neither on batch size nor on its batch mates. Rows that drew one of `model.eos_ids` leave
    the batch. Returns Samples with log_q [N, T] (what was really drawn from) and finished [N].
    """
    if n < 1:
        raise ValueError(f"draw needs n >= 1 completions per prompt; got {n}")
    copies = torch.arange(len(prompts)).repeat_interleave(n).to(prompts.device)
    state = model.start(prompts, max_new_tokens)
    if n > 1:
        state.select(copies)
    uniform = stream.uniform(torch.arange(len(copies)) if rows is None else rows, max_new_tokens).to(
        prompts.device
    )
    record = _Record.empty(len(copies), max_new_tokens, prompts.device)
    for t in range(max_new_tokens):
        tokens, log_q = draw_tokens(state.logits(), uniform[record.alive, t])
        going_on = record.write(t, tokens, log_q, model.eos_ids)
        if len(going_on) == 0 or t + 1 == max_new_tokens:
            break
        if len(going_on) < len(tokens):
            state.select(going_on)
        state.append(tokens[going_on] if len(going_on) < len(tokens) else tokens)
    return record.samples(prompts, copies, fixed_length=not model.eos_ids)


@dataclass
class _Record:
    """What has been drawn so far, and the rows still alive (their numbers, int64)."""

    tokens: Tensor
    mask: Tensor
    log_q: Tensor
    finished: Tensor
    alive: Tensor

    @staticmethod
    def empty(n: int, width: int, device: torch.device) -> _Record:
        return _Record(
            torch.zeros(n, width, dtype=torch.int64, device=device),
            torch.zeros(n, width, dtype=torch.bool, device=device),
            torch.zeros(n, width, device=device),
            torch.zeros(n, dtype=torch.bool, device=device),
            torch.arange(n, device=device),
        )

    def write(self, t: int, tokens: Tensor, log_q: Tensor, eos_ids: tuple[int, ...]) -> Tensor:
        """Store step t of the living rows; returns which of them (places in the state) go on."""
        self.log_q = self.log_q.to(log_q.dtype)
        self.tokens[self.alive, t], self.mask[self.alive, t], self.log_q[self.alive, t] = tokens, True, log_q
        if not eos_ids:
            return torch.arange(len(tokens), device=tokens.device)
        ended = is_end(tokens, eos_ids)
        self.finished[self.alive[ended]] = True
        going_on = _closed_up(ended)
        self.alive = self.alive[going_on]
        return going_on

    def samples(self, prompts: Tokens, index: Tensor, fixed_length: bool) -> Samples:
        width = int(self.mask.any(0).sum())
        finished = torch.ones_like(self.finished) if fixed_length else self.finished
        tokens, mask, log_q = self.tokens[:, :width], self.mask[:, :width], self.log_q[:, :width]
        return Samples(prompts, index, tokens, mask, finished=finished, log_q=log_q)


def _closed_up(ended: Tensor) -> Tensor:
    """Places of the rows that go on, the first ones where they are and those at the end in the gaps between them: a state
    then copies few rows or none."""
    going_on = (~ended).nonzero()[:, 0]
    n = len(going_on)
    places = torch.arange(n, device=ended.device)
    places[ended[:n]] = going_on[going_on >= n]
    return places


@dataclass(frozen=True)
class Warp:
    """How a next-token distribution is bent before drawing: temperature, then top-k, then top-p.

    temperature > 0 divides the logits; top_k keeps the k likeliest tokens (0: all); top_p keeps the smallest
    set of likeliest tokens whose probability reaches p (1: all). Of tokens that tie at the edge of top_k,
    any may be kept, but k in all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive; got {self.temperature} (for greedy take top_k=1)")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]; got {self.top_p}")

    def __call__(self, logits: Tensor) -> Tensor:
        """Warped logits [N, V]; tokens that were cut are −inf."""
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[1]:
            top = logits.topk(self.top_k, -1)
            logits = torch.full_like(logits, -torch.inf).scatter(1, top.indices, top.values)
        if self.top_p < 1:
            ordered, order = logits.sort(-1, descending=True)
            p = ordered.float().softmax(-1)
            ordered = ordered.masked_fill(p.cumsum(-1) - p >= self.top_p, -torch.inf)
            logits = torch.empty_like(logits).scatter(1, order, ordered)
        return logits


class Warped(LanguageModel):
    """The language model whose next-token distribution is `warp` of `model`'s."""

    def __init__(self, model: LanguageModel, warp: Warp) -> None:
        super().__init__()
        self.model, self.warp = model, warp
        self.vocab_size, self.eos_ids = model.vocab_size, model.eos_ids

    def start(self, prompts: Tokens, capacity: int) -> State:
        return _WarpedState(self.model.start(prompts, capacity), self.warp)


class _WarpedState(State):
    def __init__(self, state: State, warp: Warp) -> None:
        self.state, self.warp = state, warp

    def logits(self) -> Tensor:
        return self.warp(self.state.logits())

    def append(self, tokens: Tensor) -> None:
        self.state.append(tokens)

    def select(self, index: Tensor) -> None:
        self.state.select(index)


def draw_in_batches(
    model: LanguageModel,
    prompts: Tokens,
    *,
    n: int = 1,
    max_new_tokens: int,
    stream: Stream,
    batch_size: int,
    some: range | None = None,
) -> Samples:
    """`draw` over many prompts, at most `batch_size` rows at once; the same result for every batch size.

    some: the numbers of the rows that are wanted, one after the other (default: all n · len(prompts)).
    """
    from tiltlm.samples import cat_samples

    parts, wanted = [], range(n * len(prompts)) if some is None else some
    for first, count, begin, size in _batches(wanted, n, batch_size):
        part = prompts.select(slice(first, first + count))
        rows = (torch.arange(first, first + count)[:, None] * n + torch.arange(begin, begin + size)).flatten()
        parts.append(draw(model, part, n=size, max_new_tokens=max_new_tokens, stream=stream, rows=rows))
    joined = cat_samples(parts)
    index = torch.arange(wanted.start, wanted.stop, device=prompts.device) // n
    return replace(joined, prompts=prompts, prompt_index=index)


def _batches(rows: range, n: int, batch_size: int) -> Iterator[tuple[int, int, int, int]]:
    """(first prompt, prompts, first draw, draws) of every batch: several whole prompts, or a part of one's draws."""
    row = rows.start
    while row < rows.stop:
        prompt, begin = divmod(row, n)
        whole = min(batch_size, rows.stop - row) // n
        if begin == 0 and whole:
            yield prompt, whole, 0, n
            row += whole * n
        else:
            size = min(batch_size, n - begin, rows.stop - row)
            yield prompt, 1, begin, size
            row += size

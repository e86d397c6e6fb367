"""The protocols every model speaks: `LanguageModel` with its decoding `State`, and `Values` with theirs.

A language model here is anything with next-token distributions: a Hugging Face network, a table, a reference
guided by a twist, a model warped by top-p. Its *state* stands behind a batch of prefixes and is how samplers
talk to it; because a guided model has a state too, everything that draws has a density.

    state = model.start(prompts, capacity)   prefill once; `capacity` = tokens that may be appended
    state.logits()                           [N, V], log p(next | prefix) up to a constant per row
    state.append(tokens)                     every row grows by one token
    state.select(index)                      rows reordered, repeated or dropped (resampling, prompt -> K copies)

Values attach numbers to prefixes (a success logit, a histogram of returns). Their state adds

    state.peek(candidates [N, K])            [N, K, A], values of prefix + candidate, in one forward pass
    state.peek(None)                         [N, V, A], of every token of the vocabulary
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Protocol

import torch
from torch import Tensor, nn

from tiltlm.samples import Samples, Tokens


class State(ABC):
    """A batch of N prefixes a language model stands behind."""

    @abstractmethod
    def logits(self) -> Tensor:
        """Log-probabilities of the next token up to a constant per row, [N, V]; −inf means impossible."""

    @abstractmethod
    def append(self, tokens: Tensor) -> None:
        """Extend row n by `tokens[n]`; int64 [N]."""

    @abstractmethod
    def select(self, index: Tensor) -> None:
        """Keep the rows at `index` (int64), in its order; a row may be named many times or not at all."""

    def log_next(self) -> Tensor:
        """Log-probabilities of the next token in nats, [N, V], float32 or wider.

        Behind a prefix that cannot happen every token is impossible: a row of −inf stays one.
        """
        logits = self.logits()
        log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        return log_p.masked_fill((logits == -torch.inf).all(-1, keepdim=True), -torch.inf)


def is_end(tokens: Tensor, eos_ids: Collection[int]) -> Tensor:
    """Which of `tokens` end a completion; bool, of their shape."""
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    for eos_id in eos_ids:
        ended |= tokens == eos_id
    return ended


def without_end(row: list[int], eos_ids: Collection[int]) -> list[int]:
    """The ids of a completion without the end token that it may end in: those that are text."""
    return row[:-1] if row and row[-1] in eos_ids else row


class LanguageModel(nn.Module, ABC):
    """A distribution over completions of a prompt.

    vocab_size  V
    eos_ids     the tokens any of which ends a completion, the one to write first; empty if completions have a length
                the caller sets
    """

    vocab_size: int
    eos_ids: tuple[int, ...]

    @abstractmethod
    def start(self, prompts: Tokens, capacity: int) -> State:
        """A state behind `prompts`, ready to grow by up to `capacity` tokens."""

    def log_prob(self, samples: Samples) -> Tensor:
        """Log-probability of every completion token given what stands before it; nats, [N, T], 0 at padding.

        This default walks the state along the given tokens; models that can score in parallel override it.
        """
        state = self.start(samples.row_prompts, samples.tokens.shape[1])
        columns = []
        for t in range(samples.tokens.shape[1]):
            token = samples.tokens[:, t]
            columns.append(state.log_next().gather(1, token[:, None])[:, 0])
            state.append(token)
        if not columns:
            return torch.zeros(samples.tokens.shape, device=samples.device)
        log_p = torch.stack(columns, 1)
        return torch.where(samples.mask, log_p, torch.zeros_like(log_p))

    def next_logits(self, samples: Samples) -> Callable[[slice], Tensor] | None:
        """Next-token logits in front of every real token, up to a constant each, all from one forward pass.

        A function from a part of the tokens, numbered as in `samples.places()`, to [m, V]; None from models that can
        only walk along the tokens (this default).
        """
        return None

    @property
    def device(self) -> torch.device:
        """Where the model's parameters live (the CPU if it has none)."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))


class ValueState(Protocol):
    """A batch of N prefixes a value model stands behind."""

    def peek(self, candidates: Tensor | None) -> Tensor:
        """Values of prefix n followed by candidates[n, k]; int64 [N, K] -> [N, K, A]. The state stays put.

        None: every token of the vocabulary, [N, V, A].
        """

    def append(self, tokens: Tensor) -> None:
        """Extend row n by `tokens[n]`."""

    def select(self, index: Tensor) -> None:
        """Keep the rows at `index`."""


class Values(nn.Module, ABC):
    """A scorer of prefixes with A numbers each (A = 1: one logit or scalar; A > 1: logits of a histogram)."""

    @abstractmethod
    def start(self, prompts: Tokens, capacity: int) -> ValueState:
        """A state behind `prompts`, ready to grow by up to `capacity` tokens."""

    @abstractmethod
    def values(self, samples: Samples) -> Tensor:
        """Values of every completion prefix that ends in token t, [N, T, A], 0 at padding."""

    def tilted_log_prob(self, reference: LanguageModel, samples: Samples) -> Tensor:
        """log q of every completion token, q(s|prefix) ∝ reference(s|prefix)·exp(values(prefix, s)); A = 1.

        nats, [N, T], 0 at padding, with gradient in the values. This default walks along the tokens.
        """
        prompts, width = samples.row_prompts, samples.tokens.shape[1]
        state, own = reference.start(prompts, width), self.start(prompts, width)
        columns = []
        for t in range(width):
            with torch.no_grad():
                logits = state.logits()
            log_q = torch.log_softmax(logits + own.peek(None)[..., 0], -1)
            columns.append(log_q.gather(1, samples.tokens[:, t : t + 1])[:, 0])
            for walker in (state, own):
                walker.append(samples.tokens[:, t])
        return torch.where(samples.mask, torch.stack(columns, 1), 0.0)


class TwistState(Protocol):
    """A batch of N prefixes a twist stands behind."""

    def log_psi(self, candidates: Tensor | None) -> Tensor:
        """log psi(prefix n followed by candidates[n, k]); int64 [N, K] -> [N, K], nats.

        None: every token of the vocabulary, [N, V]. Guided decoding needs it only up to a constant per row;
        sequential Monte Carlo carries it from step to step, where a constant costs variance and nothing else.
        """

    def append(self, tokens: Tensor) -> None:
        """Extend row n by `tokens[n]`."""

    def select(self, index: Tensor) -> None:
        """Keep the rows at `index`."""


class Twist(Protocol):
    """log psi over prefixes: how much more (or less) likely pi* makes a prefix than the reference does."""

    def start(self, prompts: Tokens, capacity: int) -> TwistState:
        """A state behind `prompts`, ready to grow by up to `capacity` tokens."""

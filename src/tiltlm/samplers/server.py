"""A model behind an OpenAI-compatible server, as a drawer: `Samples` with the ids that it drew and their log q.

One request a row, so that every row has a seed of its own (a hash of its stream and number) and can be asked for again by
itself. A request that failed is sent once more as it was, under the same request id and with the same seed; rows that were
answered are not asked for again. Nothing bends the distribution: temperature and top-p are 1, and what a server may have
as defaults (top-k, min-p, penalties, ends of its own) is switched off. Its log-probabilities must be those of the plain
model (vLLM: `--logprobs-mode raw_logprobs`, the default, or processed_logprobs).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM
from tiltlm.models.teacherless import Teacherless
from tiltlm.rewards.masking import mask
from tiltlm.rewards.posting import Posting
from tiltlm.samplers.serving import MISMATCH, TOKEN, Serving
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream

PLAIN = {"temperature": 1.0, "top_p": 1.0, "n": 1, "stream": False}
UNBENT = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
WITH_IDS = {"logprobs": 1, "return_token_ids": True, "add_special_tokens": False, "ignore_eos": True}
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""What `transformers serve` is told in a field of its own; it is greedy otherwise."""


IDS = (
    "log q is that of the very tokens that were drawn: take a server that returns them (vLLM), or texts alone (draw.text), "
    "tokenised again here and without log q"
)


@dataclass(frozen=True)
class Row:
    """A completion: ids, the log-probability of each (None: not known), and whether it ended by itself."""

    ids: list[int]
    log_q: list[float] | None
    finished: bool


@dataclass(frozen=True)
class Server:
    """The server that `how` describes. It must serve the model whose `eos_ids` and `vocab_size` these are; `tokenizer` is
    asked for texts alone."""

    how: Serving
    eos_ids: tuple[int, ...]
    vocab_size: int
    tokenizer: Any = None

    @staticmethod
    def of(how: Serving, model: LanguageModel, tokenizer: Any = None) -> Server:
        """A server that draws in the place of `model`. Raises ValueError where none can."""
        if not isinstance(model, CausalLM) or isinstance(model, Teacherless):
            raise ValueError(
                f"a server (draw.url) draws from a plain language model, and this is a {type(model).__name__}: "
                "leave it out, and this process draws"
            )
        if model.temperature != 1:
            raise ValueError(
                f"the model is read at temperature {model.temperature:g}, and what a server answers are log-probabilities "
                "at 1: leave draw.url out, and this process draws"
            )
        if how.text and tokenizer is None:
            raise ValueError(
                "texts of a server (draw.text) are tokenised again here, and the model has no tokenizer"
            )
        return Server(how, model.eos_ids, model.vocab_size, tokenizer)

    @cached_property
    def posting(self) -> Posting:
        """How it is asked for completions."""
        return Posting(
            self.how.url.rstrip("/") + "/completions", os.environ.get(TOKEN, ""), TOKEN, self.how.tries,
            timeout=self.how.timeout, most_bytes=1 << 26,
        )  # fmt: skip

    @cached_property
    def name(self) -> str:
        """The served model's name: as it is called (the server has the last word: some list other models than they have
        loaded), or the only one there is. Raises ValueError where there are several, or none."""
        if self.how.model:
            return self.how.model
        names = self.listed()
        if len(names) == 1:
            return names[0]
        raise ValueError(
            f"{mask(self.how.url)} names more or less than one model: it has {', '.join(names) or 'none'}; name one of "
            "them (draw.model)"
        )

    def listed(self) -> list[str]:
        """The names of the models that the server says it has. Raises ValueError where it says none of the kind."""
        listing = replace(self.posting, url=self.how.url.rstrip("/") + "/models", method="GET")
        with listing.client() as client:
            answer = listing.ask(client, None)
        found = answer.get("data") if isinstance(answer, dict) else None
        return [str(each.get("id")) for each in found or () if isinstance(each, dict)]

    def __call__(
        self, prompts: Tokens, *, n: int = 1, max_new_tokens: int, stream: Stream, rows: Tensor | None = None
    ) -> Samples:
        """`n` completions of every prompt, row r answering prompt r // n, as `ancestral.draw` has them.

        Returns Samples with finished [N] and log_q [N, T], which texts alone do not have. Raises ValueError where the
        server does not answer, or answers something else than one row of the model in question.
        """
        if n < 1:
            raise ValueError(f"draw needs n >= 1 completions per prompt; got {n}")
        asked = [ids for ids in prompts.lists() for _ in range(n)]
        numbers = range(len(asked)) if rows is None else rows.tolist()
        seeds = [stream.child("server", number).key for number in numbers]
        with self.asking() as (client, pool):
            found = list(pool.map(lambda ids, seed: self._row(client, ids, max_new_tokens, seed), asked, seeds))
        return self._samples(prompts, n, found)

    @contextmanager
    def asking(self) -> Iterator[tuple[Any, ThreadPoolExecutor]]:
        """Connections and threads; after a mistake no further row is asked for."""
        _ = self.name  # looked up once, before the threads
        pool = ThreadPoolExecutor(self.how.concurrent)
        try:
            with self.posting.client() as client:
                yield client, pool
        finally:
            pool.shutdown(cancel_futures=True)

    def question(self, ids: list[int], max_new_tokens: int, seed: int) -> dict[str, Any]:
        """The body of a request for one row."""
        own = {"model": self.name, "max_tokens": max_new_tokens, "seed": seed >> 1, **PLAIN}
        if self.how.text:
            sampled = json.dumps({**SAMPLED, "eos_token_id": list(self.eos_ids) or None})
            return {**own, "prompt": said(self.tokenizer, ids), "generation_config": sampled}
        ends = {"stop_token_ids": list(self.eos_ids), "request_id": f"tiltlm-{seed:016x}"}
        return {**own, "prompt": ids, **UNBENT, **WITH_IDS, **ends}

    def _row(self, client: Any, ids: list[int], max_new_tokens: int, seed: int) -> Row:
        try:
            answer = self.posting.ask(client, self.question(ids, max_new_tokens, seed))
        except ValueError as error:
            if "answered 422" in str(error) and not self.how.text:
                raise ValueError(f"{error}: it knows no such fields, and returns no token ids. {IDS}") from None
            if "answered 404" in str(error) and self.how.model:
                known = ", ".join(self.listed()) or "none"
                raise ValueError(f"{error}; models that it has: {known}; name one of them (draw.model)") from None
            raise
        try:
            (choice,) = answer["choices"]
            return (
                self.of_text(choice, max_new_tokens) if self.how.text else self.of_ids(choice, ids, max_new_tokens)
            )
        except (LookupError, TypeError, ValueError) as error:
            said_so = (
                str(error) if isinstance(error, Refused) else f"no completion: {self.posting.cleaned(str(answer))}"
            )
            raise ValueError(f"{self.posting.shown} answered {said_so[:400]}") from None

    def of_ids(self, choice: dict[str, Any], prompt: list[int], max_new_tokens: int) -> Row:
        """A choice with token ids as a row. Raises Refused, which says what is not as it must be."""
        ids, log_q = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(ids, list) or not isinstance(log_q, list):
            without = "token ids" if not isinstance(ids, list) else "their log-probabilities"
            raise Refused(f"without {without}. {IDS}")
        if len(log_q) != len(ids) or not ids or not all(type(x) in (int, float) and x <= 1e-3 for x in log_q):
            raise Refused(f"{len(ids)} tokens with log-probabilities that are not theirs: {log_q[:8]}")
        if bad := [i for i in ids if type(i) is not int or not 0 <= i < self.vocab_size]:
            raise Refused(
                f"token {bad[0]}, which is outside the vocabulary (0 to {self.vocab_size - 1}): is it the same model?"
            )
        read = choice.get("prompt_token_ids")
        if read is not None and read != prompt:
            raise Refused(f"a prompt of {len(read)} tokens that is not the one asked for, of {len(prompt)}")
        ended = ids[-1] in self.eos_ids
        if choice.get("finish_reason") == "stop" and not ended:
            raise Refused(f"a completion that ended in token {ids[-1]}, and ends are {list(self.eos_ids)}")
        if len(ids) > max_new_tokens or (len(ids) < max_new_tokens and not ended):
            raise Refused(
                f"{len(ids)} tokens behind a prompt of {len(prompt)} where {max_new_tokens} were asked for, and no end: "
                "serve it with a longer context (vLLM: --max-model-len)"
            )
        return Row(ids, [float(x) for x in log_q], ended or not self.eos_ids)

    def of_text(self, choice: dict[str, Any], max_new_tokens: int) -> Row:
        """A choice of text as a row: tokenised again, with the primary end behind it where it ended by itself."""
        text, ended = choice["text"], choice.get("finish_reason") == "stop"
        if not isinstance(text, str):
            raise Refused(f"{type(text).__name__} where a text belongs")
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids += list(self.eos_ids[:1]) if ended or not ids else []
        return Row(ids[:max_new_tokens], None, (ended and len(ids) <= max_new_tokens) or not self.eos_ids)

    def _samples(self, prompts: Tokens, n: int, found: list[Row]) -> Samples:
        done = Tokens.of([row.ids for row in found], prompts.device)
        log_q = torch.zeros(done.ids.shape, device=prompts.device)
        if not self.how.text:
            values = [x for row in found for x in row.log_q or ()]
            log_q[done.mask] = torch.tensor(values, device=prompts.device)
        return Samples(
            prompts, torch.arange(len(prompts), device=prompts.device).repeat_interleave(n), done.ids, done.mask,
            finished=torch.tensor([row.finished for row in found], device=prompts.device),
            log_q=None if self.how.text else log_q,
        )  # fmt: skip


class Refused(ValueError):
    """An answer that is no row of the model in question; the message says why."""


def said(tokenizer: Any, ids: list[int]) -> str:
    """The text that a tokenizer makes these ids of, if there is one; else their own."""
    texts = [tokenizer.decode(part) for part in (ids, ids[1:])]
    return str(next((text for text in texts if tokenizer(text)["input_ids"] == ids), texts[0]))


def said_of(gap: float, who: str) -> str:
    """A sentence on how far a server's log-probabilities are from a model's here, in nats a token."""
    if gap <= MISMATCH:
        return f"{who}: the server's log q and log p here differ by {gap:.2g} nats a token"
    return (
        f"[yellow]{who}: the server's log q and log p here differ by {gap:.3f} nats a token[/]: does it serve this very "
        "model, in this precision?"
    )


def mismatch(log_p: Tensor, samples: Samples) -> Tensor:
    """Mean |log p − log q| over the tokens of each row, nats [N]; log_p [N, T]: what is said here of what was drawn."""
    if samples.log_q is None:
        raise ValueError("texts alone have no log q to compare with: draw with token ids (no draw.text)")
    gap = torch.where(samples.mask, (log_p - samples.log_q.to(log_p)).abs(), 0.0)
    return gap.sum(1) / samples.mask.sum(1)

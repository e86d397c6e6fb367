"""Rows that a server draws, step by step: a server that draws for a policy in training gets its weights, and is watched.

Every `every` steps the policy is written to a folder that both can read, and the server is told to load it (`send`). So a
row may come from weights that are up to every − 1 steps old: its log q is that of those weights, and methods that weigh by
p/q (`truncate`) correct for it. After an interruption the weights are sent at once, whatever the step. Of several processes
the first one sends and asks.

How far p and q are apart is measured at every step, in any method: the metric `mismatch`, mean |log p − log q| a token,
p the policy here at the moment of drawing.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltlm import parts, ranks
from tiltlm.experience import Around
from tiltlm.feeds.settings import Feed
from tiltlm.method import Learner
from tiltlm.models.weights import is_divided
from tiltlm.problem import Problem
from tiltlm.samplers.reloading import reload
from tiltlm.samplers.server import Server, mismatch
from tiltlm.samplers.serving import MISMATCH, Drawer, Serving
from tiltlm.samplers.shared import Scored, draw_batches_shared
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.sharded import at_rest

Send = Callable[[Path], None]
"""Tells a server to take the weights in a folder."""


def drawer_of(problem: Problem, learner: Learner, feed: Feed, live: bool) -> Drawer | None:
    """The server that draws a feed's rows, following the policy where these are its own; None: they are drawn here."""
    if not feed.draw.url:
        return None
    model: Any = learner.policy if live else problem.reference
    server = Server.of(feed.draw, model, problem.tokenizer)
    return Following(server, model, Path(feed.draw.weights), partial(reload, server)) if live else server


def of_reference(
    problem: Problem, how: Serving, prompts: Tokens, n: int, own: Stream, batch_size: int,
    scored: Scored = lambda samples: samples,
) -> Samples:  # fmt: skip
    """`scored` of `n` draws of the reference for every prompt: by the server that `how` names, which the first process
    asks, or here, `batch_size` rows at once."""
    if how.url:
        server = Server.of(how, problem.reference, problem.tokenizer)
        return ranks.from_first(lambda: scored(server(prompts, n=n, max_new_tokens=problem.width, stream=own)))
    return draw_batches_shared(
        how.of(problem.reference),
        prompts,
        scored,
        n=n,
        max_new_tokens=problem.width,
        stream=own,
        batch_size=batch_size,
    )


@dataclass
class Following:
    """The drawer `server`, made to follow `policy` by way of `folder`."""

    server: Server
    policy: Any
    folder: Path
    send: Send
    gap: float = field(default=0.0, init=False)
    sent: int | None = field(default=None, init=False)
    age: int = field(default=0, init=False)

    def follow(self, step: int) -> None:
        """Send the policy's weights if they are due at this step."""
        every = self.server.how.every
        if self.sent is None or self.sent // every != step // every:
            self._write()
            self.sent = step
        self.age = step - self.sent

    def _write(self) -> None:
        """Write the policy to the folder, whole or not there, and say so to the server."""
        here, aside = self.folder.absolute() / "weights", self.folder.absolute() / ".weights.tmp"
        divided = is_divided(self.policy)

        def clear() -> None:
            for old in (aside, here):
                shutil.rmtree(old, ignore_errors=True)
            aside.mkdir(parents=True)

        def save() -> None:
            with parts.saving(aside, self.policy) if divided else nullcontext():
                self.policy.save(aside)
            shutil.rmtree(aside / parts.FOLDER, ignore_errors=True)
            aside.rename(here)
            self.send(here)

        with at_rest(self.policy):
            ranks.from_first(clear)
            if divided:
                parts.write(aside, self.policy)
            ranks.from_first(save)

    def __call__(
        self, prompts: Tokens, *, n: int = 1, max_new_tokens: int, stream: Stream, rows: Tensor | None = None
    ) -> Samples:
        drawn = self.server(prompts, n=n, max_new_tokens=max_new_tokens, stream=stream, rows=rows)
        with torch.no_grad():
            self.gap = float(mismatch(self.policy.log_prob(drawn), drawn).mean())
        if self.gap > MISMATCH:
            warnings.warn(
                f"what the server draws with and what is trained differ by {self.gap:.3f} nats a token (metric `mismatch`; "
                f"{self.age} steps old): serve the same weights in the same precision, send them more often (draw.every), "
                "or set truncate (2, say) where the method has it",
                stacklevel=2,
            )
        return drawn


@dataclass(frozen=True)
class Followed(Around):
    """Another experience's batches, whose drawer is given the policy's weights in time; `mismatch` and `age` are logged."""

    drawer: Following

    def batch(self, step: int, again: int = 0) -> Any:
        self.drawer.follow(step)
        experience: Any = self.experience
        batch = experience.batch(step, again)
        self.drawer.gap = ranks.from_first(lambda: self.drawer.gap)  # the one that asks the server
        return batch

    def numbers(self) -> dict[str, float]:
        return {**super().numbers(), "mismatch": self.drawer.gap, "age": float(self.drawer.age)}

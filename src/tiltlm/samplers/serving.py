"""Who draws: a server or this process, in which precision, and what a drawer is.

A server speaks the OpenAI completions protocol. One that returns token ids and their log-probabilities (vLLM's
`return_token_ids`) draws as a model in this process does; of any other, texts alone can be taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from tiltlm.models.base import LanguageModel
from tiltlm.models.narrow import Narrow
from tiltlm.models.precision import Precision
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.settings import ADDED, SPEED, at_least_one

TOKEN = "TILTLM_DRAW_TOKEN"
"""The environment variable whose value is sent to a server as a bearer token."""


MISMATCH = 0.05
"""Nats a token between what drew and what is trained, above which something is wrong."""


class Drawer(Protocol):
    """What draws completions: `ancestral.draw` with its model, or a server."""

    def __call__(
        self, prompts: Tokens, *, n: int = 1, max_new_tokens: int, stream: Stream, rows: Tensor | None = None
    ) -> Samples:
        """`n` completions of every prompt, row r answering prompt r // n; rows: the rows' own numbers in `stream`."""


@dataclass(frozen=True)
class Serving:
    """Who draws: an OpenAI-compatible server, or this process."""

    url: str = ""
    """The part of its address in front of /completions: http://localhost:8000/v1 (empty: this process draws)."""

    model: str = ""
    """What the server calls the model (default: the only one that it has)."""

    text: bool = False
    """Take texts from a server that returns no token ids: tokenised again here, marked so, and without log q."""

    every: int = 1
    """Live draws: steps between one update of the server's weights and the next; up to every − 1 steps old."""

    weights: str = field(default="", metadata=SPEED)
    """Live draws: a folder that the server can read too, for the policy's weights on their way to it."""

    concurrent: int = field(default=32, metadata=SPEED)
    """Requests under way at once."""

    tries: int = field(default=5, metadata=SPEED)
    """Requests for a row, the first included, before the draw fails."""

    timeout: float = field(default=600.0, metadata=SPEED)
    """Seconds that a request may take."""

    precision: Precision = field(default="float32", metadata=ADDED)
    """Of the matrix products of a model that this process draws from; log q is that of what drew."""

    def __post_init__(self) -> None:
        at_least_one(self, "every", "concurrent", "tries")
        if not self.timeout > 0:
            raise ValueError(f"timeout is in seconds, more than 0; got {self.timeout}")
        if not self.url and (self.model or self.text or self.every > 1 or self.weights):
            raise ValueError(f"the settings of a server that draws want its url too (draw.url); got {self}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"draw.precision is float32 or bfloat16; got {self.precision!r}")
        if self.url and self.precision != "float32":
            raise ValueError("a server has its own precision: leave draw.precision out, or draw.url")

    @property
    def exact(self) -> bool:
        """Whether log q of what it draws is the log-probability that the model has in float32."""
        return not self.url and self.precision == "float32"

    @property
    def still(self) -> Serving:
        """This, of draws that follow no policy step by step: how often it is followed does not matter."""
        return replace(self, every=1)

    def of(self, model: LanguageModel) -> LanguageModel:
        """What this process draws from in the model's place. Raises ValueError where that cannot be had."""
        return Narrow(model) if self.precision == "bfloat16" else model


HERE = Serving()
"""No server: this process draws."""

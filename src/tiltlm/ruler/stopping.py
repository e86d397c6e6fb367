"""Draw until log Z is known to a wished-for width: allowed, because a certificate holds for all numbers of draws at once.

After every batch the certificate (`certificate.py`, `betting.py`) of all draws so far is looked at, and drawing stops
where it is narrow enough, or at the limit. An *estimate's* interval must not be used so: stopping when it happens to be
narrow, one stops when the spread happens to look small, and it covers too rarely. So it is the certificate's width that
is meant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tiltlm.models.base import Twist
from tiltlm.ruler.bounds import Bounds, bound_repeats
from tiltlm.ruler.certificate import certified
from tiltlm.ruler.importance import of_weights
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.target import Target

OnWidth = Callable[[int, int, dict[str, float]], None]
"""Called after every batch with (runs or draws so far, their limit, {"width": …})."""


def bounds_to_width(
    target: Target,
    twist: Twist | None,
    prompt: Tokens,
    exact: Samples,
    *,
    width: float,
    k: int,
    batch: int,
    limit: int,
    max_new_tokens: int,
    stream: Stream,
    batch_size: int = 2000,
    on_width: OnWidth = lambda runs, limit, metrics: None,
) -> Bounds:
    """Bounds of log Z for one prompt, `batch` repeats at a time, until their certificate is at most `width` nats wide.

    Stops at `limit` repeats or when the exact draws, one for each, are used up. Returns all repeats.
    """
    parts: list[Bounds] = []
    most, done = min(limit, len(exact)), 0
    while done < most:
        size = min(batch, most - done)
        own = stream if done == 0 else stream.child("more", done)
        pins = exact.select(slice(done, done + size))
        parts.append(
            bound_repeats(
                target, twist, prompt, pins, ks=(k,), repeats=size, max_new_tokens=max_new_tokens, stream=own,
                batch_size=batch_size,
            )
        )  # fmt: skip
        done += size
        values = joined(parts).values
        low, high = certified(values[k, "twist", "smc-ess", "lower"], values[k, "twist", "smc-ess", "upper"])
        on_width(done, most, {"width": high - low})
        if high - low <= width:
            break
    return joined(parts)


def joined(parts: list[Bounds]) -> Bounds:
    """The repeats of all parts."""
    return Bounds({key: torch.cat([part.values[key] for part in parts]) for key in parts[0].values})


def weights_to_width(
    more: Callable[[int], Tensor],
    *,
    width: float,
    limit: int,
    log_w_max: float,
    on_width: OnWidth = lambda draws, limit, metrics: None,
) -> Tensor:
    """Log-weights of draws of the reference, until betting's certificate of log Z is at most `width` nats wide.

    more: the log-weights of the next batch, given how many were drawn so far. The certificate is looked at whenever the
    draws have grown by a quarter: it takes longer than the draws do.
    """
    log_w, looked = more(0), 0
    while True:
        if len(log_w) >= 1.25 * looked or len(log_w) >= limit:
            looked = len(log_w)
            low, high = of_weights(log_w, "draws", log_w_max).certificate or (0.0, 0.0)
            on_width(looked, limit, {"width": high - low})
            if high - low <= width or looked >= limit:
                return log_w
        log_w = torch.cat([log_w, more(len(log_w))])

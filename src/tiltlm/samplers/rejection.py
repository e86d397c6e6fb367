"""Rejection: exact draws of pi*, one by one, for any beta, where the reward is bounded above.

Draw y ~ pi_ref and keep it with probability exp((r(x, y) − r_max)/beta). What is kept follows pi* exactly; on
average one of exp(r_max/beta)/Z(x) draws is. How many that is, a pilot says first, and hopeless cases are refused.

Draw m of prompt p depends on the stream, on p's `number` and m alone, so batches change nothing and an interrupted
search goes on where it stopped (`Search` is all there is to store). Prompts searched under one stream need numbers of
their own: two like prompts of one number get the same draws.

How many of *all* tries were kept, `Search.accepted` of `Search.tries`, is an estimate of Z·exp(−r_max/beta) that costs
nothing (`LogZ.of_acceptance`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tiltlm.samplers.ancestral import draw, draw_in_batches
from tiltlm.samplers.exact_draws import marked
from tiltlm.samples import Samples, Tokens, cat_samples
from tiltlm.seeds import Stream
from tiltlm.target import Target
from tiltlm.tensors import load_tensors, save_tensors

PILOT = 1000
"""Draws per prompt that estimate the acceptance rate before the search begins."""

ADVICE = (
    "A larger beta, fewer draws or a shorter completion helps; without exact draws the ruler gives the objective and "
    "one-sided bounds"
)

OnTry = Callable[[int, int, dict[str, float]], None]
"""Called with (kept so far, wanted, {"tries": …}) after every batch."""


@dataclass(frozen=True)
class Outlook:
    """What a pilot of `tries` draws says: log E[exp((r − r_max)/beta)], the log of the acceptance rate, with its
    error.

    accepted: how many of the pilot's draws would have been kept, in expectation.
    """

    log_rate: float
    log_rate_stderr: float
    tries: int

    @property
    def expected_tries(self) -> float:
        """Draws of the reference per exact draw."""
        return math.exp(-self.log_rate) if self.log_rate > -700 else math.inf

    @property
    def highest_rate(self) -> float:
        """The most that the acceptance rate may be, at 95%: what the pilot never saw may be 3 in `tries`."""
        return min(1.0, math.exp(self.log_rate) * (1 + 1.96 * self.log_rate_stderr) + 3 / self.tries)

    def __str__(self) -> str:
        rate, log_rate = math.exp(self.log_rate), f"log {self.log_rate:.3f} ± {self.log_rate_stderr:.3f}"
        return (
            f"acceptance rate {rate:.3g} ({log_rate}, from {self.tries} draws): about {self.expected_tries:,.0f} "
            "draws of the reference per exact draw of pi*"
        )


@torch.no_grad()
def outlook(
    target: Target,
    prompt: Tokens,
    *,
    max_new_tokens: int,
    stream: Stream,
    r_max: float = 0.0,
    pilot: int = PILOT,
    batch_size: int = 1000,
) -> Outlook:
    """Estimate the acceptance rate for one prompt from `pilot` draws of the reference."""
    own = stream.child("rejection", "pilot")
    drawn = draw_in_batches(
        target.reference, prompt, n=pilot, max_new_tokens=max_new_tokens, stream=own, batch_size=batch_size
    )
    log_accept = _log_accept(target.reward(drawn), target.beta, r_max)
    log_rate = float(log_accept.logsumexp(0) - math.log(pilot))
    p = (log_accept - log_rate).exp()
    return Outlook(log_rate, float(p.std() / math.sqrt(pilot)), pilot)


def _log_accept(reward: Tensor, beta: float, r_max: float) -> Tensor:
    """(r − r_max)/beta, float64 [N]; raises ValueError if a reward exceeds the bound."""
    over = reward.double() - r_max
    if bool((over > 1e-5 * max(1.0, abs(r_max))).any()):
        most = reward.max().item()
        raise ValueError(
            f"rejection needs a bound on the reward: r_max is {r_max}, but a draw has r = {most:.6g}; state a higher one "
            "(r_max; of a task --task.r-max)"
        )
    return over.clamp_max(0) / beta


@dataclass(frozen=True)
class Search:
    """A search for exact draws of one prompt: what was kept of the first `tries` draws."""

    kept: Samples | None
    tries: int

    @property
    def accepted(self) -> int:
        """How many of the tries were kept."""
        return 0 if self.kept is None else len(self.kept)

    def save(self, path: Path) -> None:
        """Write to `path` (safetensors), aside first."""
        aside = path.with_name(f".{path.name}.tmp")
        if self.kept is None:
            save_tensors({"tries": torch.tensor(self.tries)}, aside)
        else:
            self.kept.save(aside)
            save_tensors({**load_tensors(aside), "tries": torch.tensor(self.tries)}, aside)
        aside.rename(path)

    @staticmethod
    def load(path: Path) -> Search:
        """Read what `save` wrote; an empty search where there is no such file."""
        if not path.is_file():
            return Search(None, 0)
        tensors = load_tensors(path)
        tries = int(tensors.pop("tries"))
        if not tensors:
            return Search(None, tries)
        prompts = Tokens(tensors.pop("prompts.ids"), tensors.pop("prompts.mask"))
        columns = {name: x for name, x in tensors.items() if not name.startswith("conditions.")}
        return Search(Samples(prompts, **columns), tries)


@torch.no_grad()
def reject(
    target: Target,
    prompt: Tokens,
    *,
    n: int,
    max_new_tokens: int,
    stream: Stream,
    r_max: float = 0.0,
    batch_size: int = 1000,
    max_tries: float = 1e7,
    pilot: bool = True,
    path: Path | None = None,
    number: int = 0,
    on_try: OnTry = lambda kept, wanted, notes: None,
    tell: Callable[[str], None] = lambda text: None,
) -> Samples:
    """`n` exact draws of pi* for one prompt: Samples with reward and log_ref, marked with the target's beta.

    As `search`, which says what the settings are; it also knows how many tries that took.
    """
    found = search(
        target, prompt, n=n, max_new_tokens=max_new_tokens, stream=stream, r_max=r_max, batch_size=batch_size,
        max_tries=max_tries, pilot=pilot, path=path, number=number, on_try=on_try, tell=tell,
    )  # fmt: skip
    assert found.kept is not None
    return found.kept.select(slice(0, n))


@torch.no_grad()
def search(
    target: Target,
    prompt: Tokens,
    *,
    n: int,
    max_new_tokens: int,
    stream: Stream,
    r_max: float = 0.0,
    batch_size: int = 1000,
    max_tries: float = 1e7,
    pilot: bool = True,
    path: Path | None = None,
    number: int = 0,
    on_try: OnTry = lambda kept, wanted, notes: None,
    tell: Callable[[str], None] = lambda text: None,
) -> Search:
    """Search until `n` draws at least are kept, in whole batches.

    r_max: an upper bound of the reward. pilot: look ahead before the search (a small one may do without). path:
    where the search is kept, and taken up again. number: the prompt's own, among those searched under this stream.
    tell: gets the outlook as a sentence. Raises ValueError if the outlook is more than `max_tries` draws in all, or a
    reward exceeds r_max.
    """
    if len(prompt) != 1:
        raise ValueError(f"rejection searches for one prompt at a time; got {len(prompt)}")
    found = Search(None, 0) if path is None else Search.load(path)
    if found.kept is not None:  # rows may be joined where they share one prompts object
        found = Search(replace(found.kept.to(prompt.device), prompts=prompt), found.tries)
    names = ("rejection", number) if number else ("rejection",)
    if found.accepted < n and pilot:
        _look_ahead(target, prompt, n, max_new_tokens, stream, r_max, max_tries, batch_size, tell)
    while found.accepted < n:
        if found.tries >= max_tries:
            raise ValueError(
                f"{found.accepted} of {n} exact draws after {found.tries:,} draws of the reference, which is the limit; "
                + ADVICE
            )
        rows = torch.arange(found.tries, found.tries + batch_size)
        some = draw(
            target.reference,
            prompt,
            n=batch_size,
            max_new_tokens=max_new_tokens,
            stream=stream.child(*names),
            rows=rows,
        )
        reward = target.reward(some)
        some = marked(some.with_(reward=reward, log_ref=some.log_q, log_q=None), target.beta)
        luck = stream.child(*names, "accept").uniform(rows, 1)[:, 0].to(some.device)
        good = (luck.log() < _log_accept(reward, target.beta, r_max)).nonzero()[:, 0]
        kept = some.select(good) if found.kept is None else cat_samples([found.kept, some.select(good)])
        found = Search(kept, found.tries + batch_size)
        if path is not None:
            found.save(path)
        on_try(min(found.accepted, n), n, {"tries": float(found.tries)})
    return found


def _look_ahead(
    target: Target, prompt: Tokens, n: int, width: int, stream: Stream, r_max: float, max_tries: float, batch_size: int,
    tell: Callable[[str], None],
) -> None:  # fmt: skip
    """Say what the search will cost. A longer pilot wherever a short one cannot tell rare from hopeless."""
    for pilot in (PILOT, 10 * PILOT, 100 * PILOT):
        found = outlook(
            target, prompt, max_new_tokens=width, stream=stream, r_max=r_max, pilot=pilot, batch_size=batch_size
        )
        if n * found.expected_tries <= max_tries or n / found.highest_rate > max_tries:
            break
    tell(f"{n} exact draws wanted; {found}")
    if n / found.highest_rate > max_tries:
        raise ValueError(
            f"{n} exact draws would take more than {n / found.highest_rate:.3g} draws of the reference (limit "
            f"{max_tries:.3g}): {found}. {ADVICE}"
        )

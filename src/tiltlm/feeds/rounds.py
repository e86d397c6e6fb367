"""From the graded answers of a round to what a method learns from.

    answers   the right ones
    pairs     right over wrong, of the same prompt
    groups    all answers to a prompt, with their rewards
    judged    every answer, good or bad

Expected first ascent step at the reference, by a prompt's success rate p and K draws (tests/laws/test_weightings.py): SFT
K ∇p, weighed by prompts ((1 − (1 − p)^K) / p) ∇p; DPO (beta/2) K (K − 1) ∇p, weighed by prompts
(beta/2) ((1 − p^K − (1 − p)^K) / (p (1 − p))) ∇p.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltlm.feeds.settings import Rounds
from tiltlm.groups import Groups
from tiltlm.problem import Fed
from tiltlm.samples import Pairs, Samples, Tokens, cat_tokens
from tiltlm.seeds import Stream

BUILT: tuple[Fed, ...] = ("answers", "pairs", "groups", "judged")
"""What can be built of graded answers."""


@dataclass(frozen=True)
class Shares:
    """How many prompts were always answered right, sometimes, never; and how many (right, wrong) pairs there are."""

    right: int
    mixed: int
    wrong: int
    pairs: int

    @staticmethod
    def of(right: Tensor, prompt_index: Tensor) -> Shares:
        """right: bool [N]."""
        counts = [(sum(own), len(own)) for own in _by_prompt(right.tolist(), prompt_index.tolist()).values()]
        always = sum(r == n for r, n in counts)
        never = sum(r == 0 for r, _ in counts)
        return Shares(always, len(counts) - always - never, never, sum(r * (n - r) for r, n in counts))


def rates(right: Tensor, prompt_index: Tensor, prompts: int) -> Tensor:
    """Which part of each prompt's answers is right, float64 [prompts]; NaN where it has none. right: bool [N]."""
    answers = torch.bincount(prompt_index, minlength=prompts).double()
    return torch.bincount(prompt_index, right.double(), minlength=prompts) / answers


def disagreement(right: Tensor, prompt_index: Tensor, prompts: int) -> float:
    """2 E[p(1 − p)]: on which share of the prompts one of two draws is right and the other not, without bias; 0 where no
    prompt has two. right: bool [N]."""
    n = torch.bincount(prompt_index, minlength=prompts).double()
    c = torch.bincount(prompt_index, right.double(), minlength=prompts)
    each = (2 * c * (n - c) / (n * (n - 1)))[n > 1]
    return float(each.mean()) if len(each) else 0.0


def built(
    graded: Sequence[Samples], fed: Fed, how: Rounds, right: float, stream: Stream, also: Sequence[Samples] = ()
) -> Samples | Pairs | Groups:
    """What a method that is `fed` so learns from; weights of rows, where they differ, are in `log_w` (a pair's in its
    chosen side's), of mean 1 over all rows.

    graded: the answers of each round that counts, with rewards, those of a prompt in the order in which they were drawn;
    right: the reward from which one counts as right. also: further right answers, for methods that imitate. stream: which
    pairs are taken, where not all. Empty where there is nothing to learn from.
    """
    if fed == "answers":
        kept = [_imitated(each, _good(each, right), how) for each in graded]
        kept += [_imitated(each, torch.ones(len(each), dtype=torch.bool), how) for each in also if len(each)]
        found = kept[0] if len(kept) == 1 else joined(kept)
        return _weighed(_once(found) if how.unique else found, how)
    every = graded[0] if len(graded) == 1 else joined(graded)
    good = _good(every, right)
    if fed == "pairs":
        chosen, rejected = _pairs(every, good, how, stream)
        return Pairs(_weighed(every.select(chosen.to(every.device)), how), every.select(rejected.to(every.device)))
    if fed == "groups":
        return _groups(every)
    if fed == "judged":
        return every.with_(reward=good.float().to(every.device))
    raise ValueError(f"a round builds {', '.join(BUILT)}; got {fed}")


def _good(graded: Samples, right: float) -> Tensor:
    """Which rows are right, on the CPU."""
    assert graded.reward is not None
    return (graded.reward >= right).cpu()


def joined(parts: Sequence[Samples]) -> Samples:
    """The rows of all parts, prompts of the same ids being one and the same; rewards and `finished` stay where all have
    them, log-probabilities are left out."""
    places: dict[tuple[int, ...], int] = {}
    index = []
    for part in parts:
        own = [places.setdefault(tuple(ids), len(places)) for ids in part.prompts.lists()]
        index.append(torch.tensor(own, dtype=torch.int64)[part.prompt_index.cpu()])
    done, device = cat_tokens([part.completions for part in parts]), parts[0].device
    kept = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("reward", "finished")
        if all(getattr(part, name) is not None for part in parts)
    }
    return Samples(Tokens.of(list(places), device), torch.cat(index).to(device), done.ids, done.mask, **kept)


def _by_prompt(values: Iterable[Any], index: Iterable[int]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = defaultdict(list)
    for value, k in zip(values, index, strict=True):
        found[k].append(value)
    return found


def _imitated(graded: Samples, good: Tensor, how: Rounds) -> Samples:
    """The rows of a round that are learnt by heart: right ones, so many of a prompt, each once where that is asked for."""
    found = graded.select(good.nonzero()[:, 0].to(graded.device))
    found = _once(found) if how.unique else found
    if not how.cap:
        return found
    rows = _by_prompt(range(len(found)), found.prompt_index.tolist())
    kept = sorted(row for own in rows.values() for row in own[: how.cap])
    return found.select(torch.tensor(kept, dtype=torch.int64, device=found.device))


def _once(rows: Samples) -> Samples:
    """The first of those that are the same answer to the same prompt."""
    keys = zip(rows.prompt_index.tolist(), map(tuple, rows.completions.lists()), strict=True)
    first: dict[Any, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    return rows.select(torch.tensor(list(first.values()), dtype=torch.int64, device=rows.device))


def _pairs(graded: Samples, good: Tensor, how: Rounds, stream: Stream) -> tuple[Tensor, Tensor]:
    usable = torch.ones_like(good)
    if how.cut_off == "drop" and graded.finished is not None:
        usable = good | graded.finished.cpu()
    chosen, rejected = [], []
    for k, rows in _by_prompt(usable.nonzero()[:, 0].tolist(), graded.prompt_index.cpu()[usable].tolist()).items():
        right, wrong = [r for r in rows if good[r]], [r for r in rows if not good[r]]
        every = [(c, r) for c in right for r in wrong]
        if how.pairs and len(every) > how.pairs:
            order = stream.child("pairs", k).permutation(len(every)).tolist()
            every = [every[i] for i in sorted(order[: how.pairs])]
        chosen += [c for c, _ in every]
        rejected += [r for _, r in every]
    return torch.tensor(chosen, dtype=torch.int64), torch.tensor(rejected, dtype=torch.int64)


def _groups(graded: Samples) -> Groups:
    """All answers to a prompt; as many of each as the prompt of the fewest has."""
    rows = _by_prompt(range(len(graded)), graded.prompt_index.tolist())
    size = min((len(own) for own in rows.values()), default=0)
    if size < 2:
        raise ValueError(
            f"groups have two answers to a prompt or more; the fewest here are {size}: --feed.rounds.n 2"
        )
    index = torch.tensor([row for own in rows.values() for row in own[:size]], dtype=torch.int64)
    return Groups(graded.select(index.to(graded.device)), size)


def _weighed(rows: Samples, how: Rounds) -> Samples:
    """With log_w so that every prompt counts alike, where that is asked for; exp(log_w) has the mean 1."""
    if how.weigh == "rows" or not len(rows):
        return rows
    each = torch.bincount(rows.prompt_index, minlength=len(rows.prompts))[rows.prompt_index].double()
    return rows.with_(log_w=(-each.log() - (1 / each).mean().log()).float())

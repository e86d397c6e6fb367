"""`LearningJudge`: scores with a discriminator that it trains again and again on a trickle of gold verdicts.

D2PO (Singhal et al. 2024, arXiv:2405.01511, algorithm 1), request by request:

    1. score the rows with the current r_phi; their pairs enter the window
    2. select pairs, as many as the window's quota allows, and buy gold's verdict on them; a tie is charged, not learnt
    3. the quota is used up, or the window is full: train r_phi on what was bought, with `replay` earlier verdicts
    4. the window is full: begin the next one

The scores that are answered are those of step 1. A verdict overrides their order, in the label itself: no score is changed.

Of several processes (`ranks`) each is asked the same and goes through the same steps: rows to score and updates are shared
out, and the first one alone asks gold, and writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tiltlm import ranks
from tiltlm.jsonl import read_json, write_whole
from tiltlm.judges.base import Gold, GoldOfRows, Labelled, Row
from tiltlm.judges.calls import Call, Calls
from tiltlm.judges.discriminator import Discriminator, Scores
from tiltlm.judges.ledger import Ledger, Purchases, Rewards
from tiltlm.judges.rows import Pair, Preference, check_rows
from tiltlm.judges.selection import ALLOTTED, Window, bought, closes, reopened, seen, selected
from tiltlm.judges.settings import Judging
from tiltlm.seeds import Stream

GoldOfPairs = Callable[[Sequence[Pair]], list[Rewards]]


@dataclass
class Standing:
    """Everything that changes from request to request, beside the networks."""

    ledger: Ledger
    calls: int = 0
    version: int = 0
    window: Window = Window()
    open: list[Pair] = field(default_factory=list)
    """The window's pairs, where any of them may be bought at its end."""

    pending: list[Preference] = field(default_factory=list)
    learnt: list[Preference] = field(default_factory=list)
    """Earlier verdicts, for replay."""


class LearningJudge:
    """The judge of an online method, in this process.

    discriminator: None where callers bring scores. gold: rows' gold reward, for requests that bring none. folder: where
    what was bought and answered is written down (`purchases.jsonl`, `calls.jsonl`); it outlives interruptions, and a new
    run wants a new one.
    """

    def __init__(
        self, discriminator: Discriminator | None, gold: Gold | None, settings: Judging, stream: Stream, folder: Path
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.discriminator, self.gold, self.settings, self.stream = discriminator, gold, settings, stream
        self.purchases, self.calls = ranks.from_first(
            lambda: (Purchases(folder / "purchases.jsonl"), Calls(folder / "calls.jsonl"))
        )
        self.now = Standing(Ledger(settings.budget))
        self.broken = ""
        """Why it can learn no more: half a training is in the weights, and half a request in the ledger."""

    # ---- the judge's interface -----------------------------------------------------------------------------------------

    def label(
        self, request: str, prompts: Sequence[Row], completions: Sequence[Row], gold: GoldOfRows | None = None,
        scores: Sequence[float] | None = None,
    ) -> Labelled:  # fmt: skip
        check_rows(prompts, completions, scores)
        return self._once(Call("label", request, prompts, completions, scores), gold)

    def warm(
        self, request: str, prompts: Sequence[Row], completions: Sequence[Row], gold: GoldOfRows | None = None
    ) -> None:
        check_rows(prompts, completions)
        self._once(Call("warm", request, prompts, completions), gold)

    def score(self, prompts: Sequence[Row], completions: Sequence[Row]) -> list[float]:
        return self._scored(prompts, completions, None).mean

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self.discriminator is not None:
            self.discriminator.save(folder / "discriminator")
        if ranks.is_first():
            write_whole(folder / "judge.json", json.dumps(asdict(self.now)))

    def restore(self, folder: Path) -> None:
        self.now, self.broken = standing(read_json(folder / "judge.json"), folder), ""
        if self.discriminator is not None:
            self.discriminator.restore(folder / "discriminator")

    def catch_up(self) -> None:
        """Take in again the requests that were answered after the checkpoint that this judge has gone back to.

        Raises ValueError where one is answered otherwise now: what was learnt then cannot be had again.
        """
        for call, answer in self.calls.after(self.now.calls):
            if repr(self._answer(call, None)) != repr(answer):
                raise ValueError(
                    f"request {call.request!r} is not answered now as it was: {self.calls.path} was written with other "
                    "settings, another gold reward, or on another machine; begin in a new folder"
                )

    # ---- one request ---------------------------------------------------------------------------------------------------

    def _once(self, call: Call, gold: GoldOfRows | None) -> Labelled:
        """The answer to a request: the one it got before, or a new one."""
        self.calls.cut(self.now.calls)
        known = self.calls.find(call)
        if known is None:
            known = self._answer(call, gold)
            self.calls.record(call, known)
        return known

    def _answer(self, call: Call, gold: GoldOfRows | None) -> Labelled:
        if self.broken:
            raise FloatingPointError(
                f"this judge's training failed before: {self.broken}; begin in a new folder with a lower lr, or, where "
                "memory was short, start it again"
            )
        return self._warmed(call, gold) if call.kind == "warm" else self._labelled(call, gold)

    def _labelled(self, call: Call, gold: GoldOfRows | None) -> Labelled:
        now, how = self.now, self.settings
        version = now.version
        scores = self._scored(call.prompts, call.completions, call.scores)
        pairs = pairs_of(call, scores)
        pool = how.allocation == "pool"
        window = seen(now.window, how, len(call.completions))
        among = [*now.open, *pairs] if pool else pairs
        wanted = now.ledger.within(max(0, ALLOTTED[how.allocation](window, how)))
        chosen = selected(how.select, among, wanted, self.stream.child("select", now.calls))
        verdicts = self._buy([among[k] for k in chosen], self._gold_of(call.request, gold))
        now.window, now.open = bought(window, how, len(verdicts)), among if pool else []
        self._learn()
        if closes(now.window, how):
            now.window, now.open = reopened(now.window, how), []
        now.calls += 1
        preferred = [math.nan] * len(pairs)
        if not pool:
            for k, verdict in zip(chosen, verdicts, strict=True):
                preferred[k] = verdict
        return Labelled(scores.mean, preferred, version, now.ledger.counts())

    def _warmed(self, call: Call, gold: GoldOfRows | None) -> Labelled:
        now, nothing = self.now, [0.0] * len(call.completions)
        version, pairs = now.version, pairs_of(call, Scores(nothing, [nothing]))
        self._buy(pairs[: now.ledger.within(len(pairs))], self._gold_of(call.request, gold))
        self._train(self.settings.warm_epochs)
        now.calls += 1
        return Labelled([], [], version, now.ledger.counts())

    def _scored(self, prompts: Sequence[Row], completions: Sequence[Row], given: Sequence[float] | None) -> Scores:
        if given is not None:
            return Scores(list(given), [list(given)])
        if self.discriminator is None:
            raise ValueError("this judge has no network of its own: give it the rows' scores")
        return self.discriminator.score(prompts, completions)

    # ---- buying --------------------------------------------------------------------------------------------------------

    def _buy(self, pairs: Sequence[Pair], gold: GoldOfPairs) -> list[float]:
        """Gold's verdicts on the pairs (NaN: a tie), from the journal where they were bought before."""
        new = [pair for pair in pairs if self.purchases.find(pair.key) is None]
        if new:
            self._pay(new, gold)
        verdicts = []
        for pair in pairs:
            first, second = self.purchases.find(pair.key) or (math.nan, math.nan)
            verdicts.append(math.nan if first == second else float(first > second))
            self._enter(pair, verdicts[-1])
        return verdicts

    def _pay(self, pairs: Sequence[Pair], gold: GoldOfPairs) -> None:
        """Ask gold, and write down what it says before it is used."""
        budget = self.settings.budget
        if budget and len(self.purchases) + len(pairs) > budget:
            raise ValueError(
                f"{len(self.purchases)} of {budget} verdicts are paid for, in {self.purchases.path}, and this run would "
                f"buy {len(pairs)} others: it is not the run that bought those; begin in a new folder, or raise the budget"
            )
        rewards = ranks.from_first(lambda: gold(pairs))
        bad = [k for k, two in enumerate(rewards) if not all(map(math.isfinite, two))]
        if bad or len(rewards) != len(pairs):
            raise ValueError(
                f"gold must give every row a finite reward; of {pairs[bad[0]].first!r:.60} and "
                f"{pairs[bad[0]].second!r:.60} it says {rewards[bad[0]]}"
                if bad
                else f"gold gave {len(rewards)} pairs of rewards for {len(pairs)} pairs"
            )
        self.purchases.record([pair.key for pair in pairs], rewards)

    def _enter(self, pair: Pair, verdict: float) -> None:
        if math.isnan(verdict):
            self.now.ledger.tied += 1
            return
        self.now.ledger.pending += 1
        if self.discriminator is not None:
            self.now.pending.append(pair.preference(verdict))

    def _gold_of(self, request: str, of_rows: GoldOfRows | None) -> GoldOfPairs:
        """Gold as a function of pairs. Those of earlier requests are known by their rows alone."""

        def judged(pairs: Sequence[Pair]) -> list[Rewards]:
            if of_rows is not None and all(pair.request == request for pair in pairs):
                found = of_rows([row for pair in pairs for row in (2 * pair.number, 2 * pair.number + 1)])
            elif self.gold is not None:
                prompts = [pair.prompt for pair in pairs for _ in range(2)]
                found = self.gold(prompts, [row for pair in pairs for row in (pair.first, pair.second)])
            else:
                raise ValueError("this judge has no gold reward of rows: name one, or give it with the request")
            return list(zip(found[::2], found[1::2], strict=True))

        return judged

    # ---- learning ------------------------------------------------------------------------------------------------------

    def _learn(self) -> None:
        """Train, if this is the moment: all that the window may buy is bought, or it is full."""
        now, how = self.now, self.settings
        if now.window.bought >= how.relabels or now.ledger.exhausted or closes(now.window, how):
            self._train(how.epochs)

    def _train(self, epochs: int) -> None:
        now, how = self.now, self.settings
        if not epochs:
            now.pending = []  # labels alone: pending in the ledger, never learnt from
        if not now.pending or self.discriminator is None:
            return
        order = self.stream.child("replay", now.version).permutation(len(now.learnt)).tolist()
        old = [now.learnt[k] for k in order[: how.replay]]
        try:
            self.discriminator.train([*now.pending, *old], epochs, self.stream.child("train", now.version))
        except Exception as error:  # whatever it was: the same judge must not go on from here
            self.broken = f"{type(error).__name__}: {error}"
            raise
        now.ledger.trained += len(now.pending)
        now.ledger.pending -= len(now.pending)
        now.learnt += now.pending if how.replay else []
        now.pending, now.version = [], now.version + 1


def pairs_of(call: Call, scores: Scores) -> list[Pair]:
    """The pairs of a request, with the judge's gap and the variance of its members' gaps."""
    found = []
    for k in range(len(call.completions) // 2):
        a, b = 2 * k, 2 * k + 1
        gaps = [member[a] - member[b] for member in scores.members]
        middle = sum(gaps) / len(gaps)
        spread = sum((gap - middle) ** 2 for gap in gaps) / len(gaps)
        rows = call.prompts[a], call.completions[a], call.completions[b]
        found.append(Pair(call.request, k, *rows, scores.mean[a] - scores.mean[b], spread))
    return found


def standing(found: Any, folder: Path) -> Standing:
    """What `LearningJudge.save` wrote. Raises ValueError for anything else."""
    try:
        pending, learnt = ([Preference(*each) for each in found[name]] for name in ("pending", "learnt"))
        open_pairs = [Pair(*each) for each in found["open"]]
        return Standing(
            Ledger(**found["ledger"]), found["calls"], found["version"], Window(**found["window"]), open_pairs,
            pending, learnt,
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not what a judge wrote ({type(error).__name__}: {error})") from None

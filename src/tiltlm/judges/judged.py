"""Rows that a judge scores in the place of the reward: what online methods with a judge are fed.

The judge sees texts (or token ids) two by two; the rows of a pair lie side by side and answer one prompt. Where it bought
the gold verdict on a pair, that overrides its own scores: of a pair as a verdict on it, of larger groups and of single rows
by giving the two their scores the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltlm.experience import Keeps
from tiltlm.groups import Groups
from tiltlm.judges.base import GoldOfRows, Judge
from tiltlm.models.base import without_end
from tiltlm.samplers.shared import of_rows
from tiltlm.samples import Samples
from tiltlm.target import Reward

LEDGER = ("bought", "trained", "tied", "pending")

ENOUGH, MOSTLY = 50, 0.9
"""From so many verdicts on it is worth saying that so large a part of them are ties."""

Rows = tuple[list[Any], list[Any]]
"""Prompts and completions: texts, or lists of token ids."""


def as_rows(samples: Samples, tokenizer: Any, eos_ids: Sequence[int]) -> Rows:
    """Every row's prompt and completion, texts without special tokens, or ids where there is no tokenizer; without what
    ended a completion."""
    asked = samples.row_prompts.lists()
    done = [list(without_end(row, eos_ids)) for row in samples.completions.lists()]
    if tokenizer is None:
        return asked, done
    decode = tokenizer.batch_decode
    return decode(asked, skip_special_tokens=True), decode(done, skip_special_tokens=True)


@dataclass
class JudgedBy:
    """Another experience's batches (Samples or Groups, with log_q and log_ref), scored by a judge.

    reward: the gold reward of samples, of which the judge buys some verdicts. rows: samples -> what the judge reads. own:
    samples -> scores, where the judge has none of its own (None: it has). begin: () -> rows of the reference that are all
    bought before the first step (None: none). monitor: look at the gold reward of every row, for the log; not charged.
    tell: what is called with a line for people.
    """

    experience: Any
    judge: Judge
    reward: Reward
    rows: Callable[[Samples], Rows]
    own: Callable[[Samples], Tensor] | None = None
    begin: Callable[[], Samples] | None = None
    monitor: bool = False
    tell: Callable[[str], None] = lambda text: None
    _looked: bool = field(default=False, init=False)
    _begun: bool = field(default=False, init=False)
    _numbers: dict[str, float] = field(default_factory=dict, init=False)

    def batch(self, step: int, again: int = 0) -> Any:
        self._warm()
        batch = self.experience.batch(step, again) if again else self.experience.batch(step)
        request = f"step-{step}-{again}" if again else f"step-{step}"
        return self._judged(batch, request)

    def _warm(self) -> None:
        if not self._begun and self.begin is not None:
            first = self.begin()
            self.judge.warm("warm", *self.rows(first), self._gold(first))
        self._begun = True

    def _judged(self, batch: Any, request: str) -> Any:
        samples = batch.samples if isinstance(batch, Groups) else batch
        silver = None if self.own is None else self.own(samples).tolist()
        prompts, completions = self.rows(samples)
        found = self.judge.label(request, prompts, completions, self._gold(samples), silver)
        scores = torch.tensor(found.scores, dtype=torch.float32, device=samples.device)
        preferred = torch.tensor(found.preferred, dtype=torch.float32, device=samples.device)
        self._numbers = {f"labels_{name}": float(found.ledger[name]) for name in LEDGER}
        self._numbers["judge_version"] = float(found.version)
        self._look_for_ties(found.ledger)
        if self.monitor:
            self._numbers |= self._looked_at(samples, scores)
        if isinstance(batch, Groups) and batch.size == 2:
            return Groups(samples.with_(reward=scores), 2, preferred)
        judged = samples.with_(reward=in_order(scores, preferred))
        return Groups(judged, batch.size) if isinstance(batch, Groups) else judged

    def _look_for_ties(self, ledger: dict[str, int]) -> None:
        """Say, once, if nearly all of the first verdicts are ties."""
        bought, tied = ledger["bought"], ledger["tied"]
        if self._looked or bought < ENOUGH:
            return
        self._looked = True
        if tied >= MOSTLY * bought:
            self.tell(
                f"{tied} of the first {bought} gold verdicts are ties, which cost as much and teach nothing: take a reward "
                "with more levels, or other pairs (--feed.judge.select random or variance)"
            )

    def _gold(self, samples: Samples) -> GoldOfRows:
        def gold(rows: list[int]) -> list[float]:
            return [float(r) for r in self.reward(samples.select(torch.tensor(rows, device=samples.device)))]

        return gold

    def _looked_at(self, samples: Samples, scores: Tensor) -> dict[str, float]:
        """How often the judge puts a pair in gold's order (its own ties count half; of gold's ties none), and mean gold."""
        gold = of_rows(samples, self.reward).double()
        gaps = [x.double().reshape(-1, 2).diff(dim=1)[:, 0].sign() for x in (gold, scores)]
        told = gaps[0] != 0
        right = (gaps[0] == gaps[1]).double() + 0.5 * (gaps[1] == 0)
        accuracy = {"judge_accuracy": float(right[told].mean())} if bool(told.any()) else {}
        return accuracy | {"gold_reward": float(gold.mean()), "gold_looked_at": float(len(gold))}

    def numbers(self) -> dict[str, float]:
        inner = self.experience.numbers() if isinstance(self.experience, Keeps) else {}
        return inner | self._numbers

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.judge.save(folder)

    def restore(self, folder: Path) -> None:
        self.judge.restore(folder)
        self._begun = True


def in_order(scores: Tensor, preferred: Tensor) -> Tensor:
    """`scores` [2n] of pairs side by side, those of a pair exchanged where a verdict [n] says otherwise."""
    two = scores.reshape(-1, 2)
    wrong = ((preferred == 1) & (two[:, 0] < two[:, 1])) | ((preferred == 0) & (two[:, 0] > two[:, 1]))
    return torch.where(wrong[:, None], two.flip(1), two).flatten()

"""From finished data, reference and reward model to the problem that methods and the ruler are handed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tiltlm.data.encoded import Encoded
from tiltlm.data.encoding import Encoder
from tiltlm.models.causal import CausalLM
from tiltlm.problem import SPLITS, Check, Facts, Fed, Problem, Split, as_rows
from tiltlm.rewards.bradley_terry import ahead
from tiltlm.rewards.by_name import TextReward
from tiltlm.run import Run, digests
from tiltlm.samples import Samples
from tiltlm.seeds import stream
from tiltlm.stages.base import reading
from tiltlm.stages.data import (
    Dataset,
    Row,
    Rows,
    answer_of,
    are_verdicts,
    encoded,
    owned_by,
    rows_of,
    wanted_answer,
)
from tiltlm.stages.reading import EncodedReward, Reader, Reading
from tiltlm.stages.reporting import estimate
from tiltlm.target import Reward, Target
from tiltlm.train import best_checkpoint


class Asked(Protocol):
    """What is read of a task of preference data (`tasks.pairs.Pairs`)."""

    @property
    def dataset(self) -> Dataset: ...
    @property
    def reader(self) -> Reader: ...
    @property
    def reward(self) -> str: ...
    @property
    def beta(self) -> float: ...
    @property
    def beta_pi(self) -> float: ...
    @property
    def plain(self) -> bool: ...

    def facts(self) -> Facts: ...
    def start(self, runs: Mapping[str, Run[Any]]) -> str | Path: ...


SHOWN = ("prompt", "chosen", "rejected", "completion", "label")
"""What the report page shows of the data, beside what a policy said."""


@dataclass(frozen=True)
class Sources:
    """The task's finished runs as what a problem is made of."""

    task: Asked
    runs: Mapping[str, Run[Any]]

    @cached_property
    def read(self) -> Reading:
        return reading(self.task, self.runs)

    @property
    def encoder(self) -> Encoder:
        return self.read.encoder

    @cached_property
    def encoded(self) -> dict[Split, Encoded]:
        """The data's rows of every split, as ids."""
        return {split: encoded(self.runs["data"], split, self.encoder) for split in SPLITS}

    @cached_property
    def tests(self) -> Rows:
        """The rows of the test split."""
        return rows_of(self.runs["data"], "test")

    def load(self, name: Any = None) -> CausalLM:
        """The model called `name` (default: the reference) at the target's temperature, frozen."""
        return self.read.load(self.task.start(self.runs) if name is None else name)

    def begin(self) -> CausalLM:
        """A fresh copy of the reference to train."""
        return self.load().requires_grad_(True)

    @cached_property
    def reference_name(self) -> str:
        """What tells the reference from others: its weights and its temperature."""
        start = str(self.task.start(self.runs))
        return f"{digests([start]).get(start, start)}-{self.task.reader.temperature:g}".replace("/", "_")

    # ---- the reward -------------------------------------------------------------------------------------------------

    @cached_property
    def reward(self) -> EncodedReward | None:
        """r(x, y), of samples or of texts; None of a task without one."""
        task = self.task
        if task.plain:
            return None
        name = task.reward or f"reward-model:{best_checkpoint(self.runs['reward-model'].folder)}"
        about = self.columns_by_prompt() if task.dataset.keep else None
        return EncodedReward(TextReward(name, self.read.tokenizer, str(self.read.device), about), self.encoder)

    def columns_by_prompt(self) -> Callable[[str], Row]:
        """A prompt, as the models see it -> the kept columns of its row: r(x, y) is a function of prompt and completion.

        Raises ValueError where rows of one prompt disagree.
        """
        found: dict[str, Row] = {}
        for row in (row for split in SPLITS for row in self.encoded[split].rows):
            prompt = self.encoder.prompt_text(self.encoder.prompt(row["prompt"]))
            own = {name: row[name] for name in self.task.dataset.keep}
            if found.setdefault(prompt, own) != own:
                raise ValueError(
                    f"rows of one prompt differ in the columns {', '.join(own)}: a reward depends on prompt and completion "
                    f"alone; the prompt is {prompt[-60:]!r}"
                )
        return found.__getitem__

    # ---- checks -----------------------------------------------------------------------------------------------------

    def checks(self) -> dict[str, Check]:
        """Wins against the data's responses, length, how often a completion ended by itself; the terms of a sum."""
        if self.reward is None:
            return {}
        theirs: dict[int, Tensor] = {}

        def wins(samples: Samples) -> Tensor:
            count = len(samples.prompts)
            if count not in theirs:
                theirs[count] = self.of_data(self.tests[:count])
            assert samples.reward is not None
            return ahead(samples.reward - theirs[count].to(samples.device)[samples.prompt_index])

        return {"win_rate": wins, "length": length, "finished": finished, **self.reward.terms()}

    def of_data(self, rows: Rows, column: str = "") -> Tensor:
        """What the data's responses are worth, [n]: those of a column, or those that are imitated."""
        assert self.reward is not None
        responses = [row[column] if column else answer_of(row) for row in rows]
        return torch.tensor(self.reward.of_texts([row["prompt"] for row in rows], responses))

    def counts(self) -> dict[str, Tensor]:
        """Wins are counted where the data's answer is a wanted one."""
        good = torch.tensor([bool(row.get("label", True)) for row in self.tests])
        return {} if bool(good.all()) else {"win_rate": good}

    # ---- what the data holds ------------------------------------------------------------------------------------------

    def own(self) -> dict[Fed, Callable[[Split], Any]]:
        """Every kind of rows that the data holds."""
        makers: dict[Fed, Callable[[Split], Any]] = {
            "answers": self.answers,
            "pairs": lambda split: self.encoded[split].pairs(),
            "groups": lambda split: self.encoded[split].groups(),
            "judged": lambda split: self.encoded[split].judged(),
        }
        holds = owned_by(tuple(next(iter(self.encoded["train"].rows))))
        return {kind: make for kind, make in makers.items() if kind in holds}

    def answers(self, split: Split) -> Samples:
        """The wanted responses."""
        return self.encoded[split].answers(wanted_answer)

    # ---- for people -----------------------------------------------------------------------------------------------------

    def readable(self, samples: Samples) -> Iterator[Row]:
        """Rows of prompt, completion and numbers, the texts as the reward sees them."""
        rows = as_rows(samples, None, self.encoder.ends)
        for row, prompt, text in zip(rows, *self.encoder.texts(samples), strict=True):
            yield row | {"prompt": prompt, "completion": text}

    def beside(self, samples: Samples) -> list[Row]:
        """A line per answer to a test prompt: what the data holds, and what was said."""
        assert samples.reward is not None
        found = []
        for k, ids, r in zip(
            samples.prompt_index.tolist(), samples.completions.lists(), samples.reward.tolist(), strict=True
        ):
            row = self.tests[k]
            kept = {name: row[name] for name in SHOWN if name in row}
            found.append(kept | {"generated": self.encoder.text(ids), "reward": round(r, 4)})
        return found


def problem(task: Asked, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
    """The problem of finished runs."""
    s, own = Sources(task, runs), stream(seed, "preferences")
    reward: Reward = s.reward if s.reward is not None else no_reward
    prompts = {split: s.encoded[split].prompts().to(s.read.device) for split in SPLITS}
    held = s.own()
    return Problem(
        Target(s.load(), reward, task.beta), prompts, task.reader.new_tokens, own,
        replace(task.facts(), owns=frozenset(held)), s.read.tokenizer, s.encoder, held, checks=s.checks(),
        load=s.load, begin=s.begin, readable=s.readable, test_stream=own.child("test"),
        reference_name=s.reference_name, beta_pi=task.beta_pi, counts=s.counts(), beside=s.beside,
    )  # fmt: skip


def no_reward(samples: Samples) -> Tensor:
    """The reward of a task without one."""
    raise ValueError("this is the reference alone: it has no reward")


def length(samples: Samples) -> Tensor:
    """Tokens of every completion, its end included."""
    return samples.mask.sum(1).double()


def finished(samples: Samples) -> Tensor:
    """Whether every completion ended by itself."""
    return samples.finished.double() if samples.finished is not None else samples.mask[:, 0]


def worth(run: Run[Any], problem: Problem) -> Rows:
    """Report rows: what the data's responses to the measured prompts are worth."""
    s = Sources(run.recipe.task, run.inputs)
    rows = s.tests[: run.recipe.ruler.prompts or None]
    return [
        estimate(run.recipe, f"{name} responses", "reward", s.of_data(some, column), "reward")
        for name, column, some in responses_of(rows)
    ]


def responses_of(rows: Rows) -> Iterator[tuple[str, str, Rows]]:
    """(name, column, rows) of every kind of response the data has: those of verdicts are wanted or unwanted."""
    if are_verdicts(rows):
        for name, good in (("wanted", True), ("unwanted", False)):
            some = [row for row in rows if row["label"] is good]
            if some:
                yield name, "completion", some
        return
    for column in ("chosen", "rejected", "completion"):
        if column in rows[0]:
            yield column, column, rows

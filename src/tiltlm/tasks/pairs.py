"""Preference data: pairs of responses, groups with rewards, verdicts on single answers, or examples alone.

The reference is a base model fine-tuned on the data's wanted responses (or a model of your own); the reward is a reward
model that learns from the data (or any reward by name):

    pi*(y|x) ∝ pi_ref(y|x) · exp( r(x, y) / beta )

Data of verdicts (prompt, completion, label): fine-tuning imitates the wanted ones, the reward model is a classifier of
wanted against unwanted, KTO learns from both as they are; methods on pairs or groups learn from the reference's own draws,
labelled by that reward. Wins are counted against wanted answers only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import tyro

from tiltlm.fit import Fit
from tiltlm.objective import positive
from tiltlm.problem import Facts, Problem
from tiltlm.rewards.by_name import files_of, most_of, text_function
from tiltlm.run import Recipe, Run
from tiltlm.stages.base import Base as TrainBase
from tiltlm.stages.base import begun, reading
from tiltlm.stages.data import Data, Dataset, owned_by
from tiltlm.stages.reading import Reader
from tiltlm.stages.reference import FIT as OWN_FIT
from tiltlm.stages.reporting import Row
from tiltlm.stages.reward_model import Judge, TrainJudge
from tiltlm.stages.sft import Sft, SftSettings, model_in
from tiltlm.stages.task import Task


@dataclass(frozen=True)
class Pairs(Task):
    """Preference alignment, on data of your own or dialogues of the project's making."""

    dataset: Annotated[Dataset, tyro.conf.arg(name="")] = Dataset()
    reader: Annotated[Reader, tyro.conf.arg(name="")] = Reader()
    reward: str = ""
    """reward-model:MODEL, classifier:MODEL:LABEL, log-odds:MODEL:LABEL, FILE.py:FUNCTION (f(prompts, completions,
    **columns), columns as `keep` names them), an https:// endpoint, or a sum: 'a.py:f + 0.5*classifier:MODEL:LABEL';
    empty: the reward model that the stage `reward-model` trains."""

    beta: float = 0.25
    """The target's temperature: divides the reward."""

    beta_pi: float = 0.5
    """Temperature of the log-ratios at which the gap within groups is measured, where a method has none of its own."""

    r_max: float | None = None
    """An upper bound of the reward, for exact draws (default: the reward's own, where it has one)."""

    base: Fit = replace(OWN_FIT, steps=500)
    """How the project's own model is trained, where none is named."""

    sft: SftSettings = SftSettings()
    judge: Judge = Judge()
    plain: tyro.conf.Suppress[bool] = False
    """The reference alone, without a reward: what its draws depend on."""

    name: tyro.conf.Suppress[str] = "pairs"

    shows = ("dataset.data", "dataset.test_data", "reader.model", "reader.start", "reward", "beta", "reader.new_tokens",
             "reader.device")  # fmt: skip

    def __post_init__(self) -> None:
        positive(beta=self.beta, beta_pi=self.beta_pi)

    # ---- what is known --------------------------------------------------------------------------------------------

    def columns(self) -> tuple[str, ...]:
        """The columns, where they can be told before the data is read: finished runs are looked at wherever that is now."""
        try:
            return self.dataset.columns_of(self.reader.named)
        except (ValueError, OSError):  # `check` says what is wrong
            return ()

    def facts(self) -> Facts:
        most = None if self.plain else self.bound()
        return Facts(
            self.beta, "several", owned_by(self.columns()), most, held_out=True, source="stored", bound_at="--task.r-max",
            temperature=self.reader.temperature,
        )  # fmt: skip

    def bound(self) -> float | None:
        """No reward is larger; None where that is not known."""
        if self.r_max is not None or not self.reward:
            return self.r_max
        most = most_of(self.reward)
        return most if math.isfinite(most) else None

    def check(self) -> None:
        self.dataset.check()
        self.reader.check()
        self.dataset.columns_of(self.reader.named)
        if self.reward and not self.plain:
            kept = ", ".join(self.dataset.keep) or "none"
            text_function(self.reward).check_columns(
                self.dataset.keep, f"of the data's further columns {kept} is kept: name it, --task.keep"
            )

    def files(self) -> list[str]:
        tests = list(self.dataset.test_data)
        models = [self.reader.model, self.reader.start, self.judge.body]
        return [*self.dataset.sources, *tests, *models, *files_of(self.reward)]

    # ---- what must be built ---------------------------------------------------------------------------------------

    def only(self, *groups: str) -> Self:
        """This task with these settings alone, the others at their defaults: what a stage of its own depends on."""
        return type(self)(**{each: getattr(self, each) for each in ("name", *groups)})

    def untilted(self) -> Self:
        sft = () if self.reader.start else ("sft",)
        return replace(self.only("dataset", "reader", "base", *sft), plain=True)

    def unrewarded(self) -> Self:
        return replace(self, plain=True)

    def needs(self, seed: int) -> dict[str, Recipe]:
        found = begun(self, seed)
        if not self.reader.start:
            found["sft"] = Sft(self, seed).counted()
        if not (self.reward or self.plain):
            found["reward-model"] = TrainJudge(self, seed).counted()
        return found

    def stages(self, seed: int) -> dict[str, Recipe]:
        own = (Data(self, seed), TrainBase(self, seed), Sft(self, seed), TrainJudge(self, seed))
        return {each.stage: each for each in own}

    # ---- the problem ----------------------------------------------------------------------------------------------

    def problem(self, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
        from tiltlm.tasks.pairs_problem import problem

        return problem(self, runs, seed)

    def start(self, runs: Mapping[str, Run[Any]]) -> str | Path:
        """The folder or hub name of the reference."""
        return reading(self, runs).model if self.reader.start else model_in(runs["sft"])

    def speech(self, runs: Mapping[str, Run[Any]]) -> tuple[Any, int | None, int | None]:
        return reading(self, runs).tokenizer, self.reader.new_tokens, self.reader.room

    def report_rows(self, run: Run[Any], problem: Problem) -> list[Row]:
        """What the data's own responses are worth, beside the measured reference."""
        from tiltlm.tasks.pairs_problem import worth

        return worth(run, problem) if run.recipe.called == "reference" else []

    def doubts(self, runs: Mapping[str, Run[Any]]) -> list[str]:
        """What is to be said of a reward model that knows no more than a coin or the length rule."""
        if "reward-model" not in runs:
            return []
        from tiltlm.ruler.judge import doubt
        from tiltlm.ruler.table import read_report

        folder = runs["reward-model"].folder
        text = doubt(read_report(folder / "report.json"))
        return [] if text is None else [f"{text} ({folder})"]

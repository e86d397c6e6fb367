"""The twists' training, a stage for each objective, and the value that Q# and CD share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from tiltlm.experience import Generated
from tiltlm.models.base import LanguageModel, Twist
from tiltlm.models.heads import ValueHead
from tiltlm.recipes.fitting import Fit, fit
from tiltlm.recipes.twisted_lab import Lab
from tiltlm.recipes.twisted_settings import (
    Learn,
    LearnCTL,
    LearnFudge,
    LearnSoftQ,
    LearnValue,
    shared_out,
)
from tiltlm.recipes.twisted_settings import Twist as Net
from tiltlm.recipes.twisted_stages import Exact
from tiltlm.run import Recipe, Run
from tiltlm.samplers.guided import Guided
from tiltlm.samplers.scenes import Infilling, OnePrompt, Pool, Scene, Supply
from tiltlm.samples import Samples
from tiltlm.train import checkpoints
from tiltlm.twists.ctl import CTL
from tiltlm.twists.dpg import DPGObjective
from tiltlm.twists.draws import TwistDraws
from tiltlm.twists.fudge import FudgeLearning
from tiltlm.twists.learned import LearnedTwist
from tiltlm.twists.mixture import Mixture
from tiltlm.twists.objective import TwistObjective
from tiltlm.twists.sixo import SIXO
from tiltlm.twists.soft_q import SoftQ
from tiltlm.twists.value import ValueLearning


@dataclass(frozen=True)
class TwistStage(Exact):
    """A twist, trained. Subclasses say by which objective, from which draws."""

    net: Net = Net()
    squashed: ClassVar[bool] = False

    def inputs(self) -> dict[str, Recipe]:
        if self.learn().supply == "fresh":
            return super().inputs()
        own = replace(self.exact, purpose="training", stored="")  # not those that it is measured on
        return super().inputs() | {"training": replace(self.up(Exact), exact=own)}

    def check(self) -> None:
        super().check()
        if self.is_infill() and self.learn().supply == "stored":
            raise ValueError(
                "infill: every step draws fresh conditions with an exact draw each; leave supply at fresh"
            )
        if not self.is_infill() and self.learn().wants_exact and self.stage.endswith("-twist"):
            self.goal.bound()

    def fits(self) -> list[Fit]:
        return [self.learn().fit]

    def is_infill(self) -> bool:
        return self.goal.reward == "infill"

    def learn(self) -> Learn:
        raise NotImplementedError

    def twist_objective(self, reference: LanguageModel) -> TwistObjective:
        raise NotImplementedError

    def extras(self) -> dict[str, Any]:
        """Further settings of the draws."""
        return {}

    def build(self, run: Run[Any]) -> None:
        lab, how = self.lab(run), self.learn()
        values = lab.fresh_twist(self.net)
        objective: Any = self.twist_objective(lab.reference)
        if how.dpg:
            objective = Mixture(objective, DPGObjective(lab.reference), 1 - how.dpg)
        draws = TwistDraws(
            lab.target,
            LearnedTwist(values, self.squashed),
            self.scene(run, lab, how),
            lab.width,
            lab.stream.child(self.stage, "draws"),
            objective.needs if how.positives == "particles" else objective.needs_beside_positives,
            how.particles,
            how.positives,
            how.drawn_by,
            tempered=how.tempered,
            **self.extras(),
        )
        fit(run, values, objective, draws, how.fit, device=lab.device, stream=lab.stream, keep=how.keep)

    def scene(self, run: Run[Any], lab: Lab, how: Learn) -> Scene:
        """Prompts and, where they are wanted, exact draws of every step."""
        if lab.conditioned:
            return Infilling(lab.reference, lab.prompt, lab.width, self.goal.condition_tokens, how.conditions)
        return OnePrompt(lab.prompt, self.supply(run, lab, how) if how.wants_exact else None)

    def supply(self, run: Run[Any], lab: Lab, how: Learn) -> Supply:
        n = 1 if how.positives == "csmc" else how.particles
        if how.supply == "stored":
            return Pool(Samples.load(run.inputs["training"].folder / "exact.safetensors").to(lab.device), n)
        return lab.fresh_exact(n, self.exact.batch_size)

    def twist_of(self, run: Run[Any], folder: Path | None = None) -> Twist:
        """The trained twist, from the last checkpoint or the one in `folder`."""
        values = ValueHead.load(folder or checkpoints(run.folder)[-1], device=self.lab(run).device)
        return LearnedTwist(values.requires_grad_(False), self.squashed)

    def decoder(self, run: Run[Any], folder: Path | None = None) -> LanguageModel:
        return Guided(self.lab(run).reference, self.twist_of(run, folder))


@dataclass(frozen=True)
class CTLTwist(TwistStage):
    """Train by contrastive twist learning."""

    ctl: LearnCTL = LearnCTL()
    stage: ClassVar[str] = "ctl-twist"

    def learn(self) -> Learn:
        return self.ctl

    def twist_objective(self, reference: LanguageModel) -> TwistObjective:
        return CTL(self.ctl.contrast)


@dataclass(frozen=True)
class RLTwist(TwistStage):
    """Train by soft Q learning."""

    rl: LearnSoftQ = LearnSoftQ()
    stage: ClassVar[str] = "rl-twist"

    def learn(self) -> Learn:
        return self.rl

    def check(self) -> None:
        super().check()
        SoftQ(self.rl.target, self.rl.multi_step)

    def twist_objective(self, reference: LanguageModel) -> TwistObjective:
        return SoftQ(self.rl.target, self.rl.multi_step)

    def extras(self) -> dict[str, Any]:
        return {"induced": True, "backups": self.rl.target == "mean"}


@dataclass(frozen=True)
class SIXOTwist(TwistStage):
    """Train by density-ratio estimation."""

    sixo: Learn = Learn()
    stage: ClassVar[str] = "sixo-twist"

    def learn(self) -> Learn:
        return self.sixo

    def twist_objective(self, reference: LanguageModel) -> TwistObjective:
        return SIXO()


@dataclass(frozen=True)
class FudgeTwist(TwistStage):
    """Train by classification of reference draws."""

    fudge: LearnFudge = LearnFudge()
    stage: ClassVar[str] = "fudge-twist"
    squashed: ClassVar[bool] = True

    def learn(self) -> Learn:
        return self.fudge

    def twist_objective(self, reference: LanguageModel) -> TwistObjective:
        return FudgeLearning()

    def extras(self) -> dict[str, Any]:
        return {"prefixes": self.fudge.prefixes}


@dataclass(frozen=True)
class DPGTwist(TwistStage):
    """Train by distributional policy gradient."""

    dpg: Learn = Learn()
    stage: ClassVar[str] = "dpg-twist"

    def learn(self) -> Learn:
        return self.dpg

    def twist_objective(self, reference: LanguageModel) -> TwistObjective:
        return DPGObjective(reference)


@dataclass(frozen=True)
class Value(Exact):
    """Learn the law of the reward under the reference: one value for Q# and CD, at every beta."""

    net: Net = Net()
    value: LearnValue = LearnValue()
    stage: ClassVar[str] = "value"

    def check(self) -> None:
        super().check()
        ValueLearning(self.value.atoms)
        if self.goal.reward == "infill":
            shared_out(self.value.fit.batch_size, self.value.conditions, "value")

    def fits(self) -> list[Fit]:
        return [self.value.fit]

    def build(self, run: Run[Any]) -> None:
        lab, s = self.lab(run), self.value
        learning = ValueLearning(s.atoms)
        values = lab.fresh_value(self.net, learning.width)
        experience = Generated(lambda own: self.rollouts(lab, own), lab.stream.child(self.stage, "draws"))
        fit(run, values, learning, experience, s.fit, device=lab.device, stream=lab.stream)

    def rollouts(self, lab: Lab, own: Any) -> Samples:
        """Fresh draws of the reference, scored."""
        return lab.rollouts(self.value.fit.batch_size, self.value.conditions, own)

"""The twisted-SMC stages that every method needs: reference, classifier, exact draws, log Z; and the twists'
training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from tiltlm.exact import log_next_tokens
from tiltlm.experience import Generated
from tiltlm.models.base import LanguageModel, Twist
from tiltlm.models.heads import ValueHead
from tiltlm.progress import note, steps
from tiltlm.recipes.fitting import fit
from tiltlm.recipes.twisted_lab import Lab
from tiltlm.recipes.twisted_settings import (
    ClassifierSettings,
    ExactSettings,
    Goal,
    Language,
    Learn,
    LearnCTL,
    LearnFudge,
    LearnSoftQ,
    LearnValue,
    LogZSettings,
)
from tiltlm.recipes.twisted_settings import Twist as Net
from tiltlm.recipes.twisted_text import train_classifier, train_reference
from tiltlm.ruler.bounds import bound_repeats, log_z_of
from tiltlm.ruler.log_z import LogZ
from tiltlm.run import Recipe, Run
from tiltlm.samplers.guided import Guided
from tiltlm.samplers.rejection import reject
from tiltlm.samplers.smc import SMC, smc
from tiltlm.samples import Samples
from tiltlm.train import checkpoints
from tiltlm.twists.ctl import CTL
from tiltlm.twists.dpg import DPG
from tiltlm.twists.draws import Infilling, OnePrompt, Pool, Scene, Supply, TwistDraws
from tiltlm.twists.fudge import FudgeLearning
from tiltlm.twists.learned import LearnedTwist
from tiltlm.twists.mixture import Mixture
from tiltlm.twists.objective import TwistObjective
from tiltlm.twists.sixo import SIXO
from tiltlm.twists.soft_q import SoftQ
from tiltlm.twists.value import ValueLearning


@dataclass(frozen=True)
class Reference(Recipe):
    """A small stories model of the project's own making (only where no model is named)."""

    language: Language = Language()
    stage: ClassVar[str] = "reference"

    def build(self, run: Run[Any]) -> None:
        if self.language.model:
            raise ValueError(f"the reference is {self.language.model}: there is nothing to train")
        train_reference(run, self.language, self.seed)

    def model_of(self, run: Run[Any]) -> str | Path:
        """Folder or hub name of the reference."""
        if self.language.model:
            return self.language.model
        return checkpoints(run.inputs.get("reference", run).folder)[-1]

    def needed(self) -> dict[str, Recipe]:
        """The stage `reference`, where the model is the project's own."""
        return {} if self.language.model else {"reference": self.up(Reference)}


@dataclass(frozen=True)
class Classifier(Reference):
    """Train a text classifier on labelled text; its class probabilities are a reward."""

    classify: ClassifierSettings = ClassifierSettings()
    stage: ClassVar[str] = "classifier"

    def inputs(self) -> dict[str, Recipe]:
        return {} if self.classify.body else self.needed()

    def check(self) -> None:
        missing = [name for name in self.classify.data if not Path(name).is_file()]
        if missing:
            raise FileNotFoundError(f"--classify.data {missing[0]}: no such file")

    def build(self, run: Run[Any]) -> None:
        body = self.classify.body or self.model_of(run)
        train_classifier(run, self.classify, body, self.language.device, self.seed, self.family)


@dataclass(frozen=True)
class Scored(Classifier):
    """What all stages with a target share."""

    goal: Goal = Goal()

    def inputs(self) -> dict[str, Recipe]:
        return self.needed() | self.judge()

    def judge(self) -> dict[str, Recipe]:
        """The stage `classifier`, where the goal wants one and names none."""
        own = self.goal.reward == "classifier" and not self.goal.classifier
        return {"classifier": self.up(Classifier)} if own else {}

    def lab(self, run: Run[Any]) -> Lab:
        classifier: str | Path = self.goal.classifier
        if "classifier" in run.inputs:
            classifier = checkpoints(run.inputs["classifier"].folder)[-1]
        return Lab(self.language, self.goal, self.seed, self.model_of(run), classifier)

    def speech(self, run: Run[Any]) -> tuple[Any, int | None]:
        return self.lab(run).tokenizer, self.language.new_tokens


@dataclass(frozen=True)
class Exact(Scored):
    """Exact draws of pi*: by rejection, or by construction for infilling."""

    exact: ExactSettings = ExactSettings()
    stage: ClassVar[str] = "exact"

    def build(self, run: Run[Any]) -> None:
        lab = self.lab(run)
        if self.exact.stored:
            samples = Samples.load(self.exact.stored)
        elif lab.conditioned:
            samples = lab.conditions(self.exact.n, "exact")[1]
        else:
            samples = self.search(run, lab)
        samples.save(run.folder / "exact.safetensors")
        run.write_jsonl("samples.jsonl", list(lab.readable(samples.select(slice(0, 200)))))

    def search(self, run: Run[Any], lab: Lab) -> Samples:
        s, path = self.exact, run.folder / "search.safetensors"
        with steps(self.name) as on_try:
            return reject(
                lab.target,
                lab.prompt,
                n=s.n,
                max_new_tokens=lab.width,
                stream=lab.stream.child("exact"),
                r_max=self.goal.r_max,
                batch_size=s.batch_size,
                max_tries=s.max_tries,
                path=path,
                on_try=on_try,
                tell=note,
            )

    def exact_of(self, run: Run[Any]) -> Samples:
        """The stored exact draws: of the stage `exact` among the inputs."""
        return Samples.load(run.inputs["exact"].folder / "exact.safetensors")


@dataclass(frozen=True)
class TwistStage(Exact):
    """A twist, trained. Subclasses say by which objective, from which draws."""

    net: Net = Net()
    squashed: ClassVar[bool] = False

    def inputs(self) -> dict[str, Recipe]:
        stored = self.learn().supply == "stored" and not self.is_infill()
        return super().inputs() | ({"exact": self.up(Exact)} if stored else {})

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
            objective = Mixture(objective, DPG(lab.reference), 1 - how.dpg)
        draws = TwistDraws(
            lab.target,
            LearnedTwist(values, self.squashed),
            self.scene(run, lab, how),
            lab.width,
            lab.stream.child(self.stage, "draws"),
            objective.needs,
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
        wanted = how.positives != "particles" or how.drawn_by == "exact"
        return OnePrompt(lab.prompt, self.supply(run, lab, how) if wanted else None)

    def supply(self, run: Run[Any], lab: Lab, how: Learn) -> Supply:
        n = 1 if how.positives == "csmc" else how.particles
        if how.supply == "stored":
            return Pool(self.exact_of(run), n)

        def fresh(own: Any) -> Samples:
            return reject(
                lab.target,
                lab.prompt,
                n=n,
                max_new_tokens=lab.width,
                stream=own,
                r_max=self.goal.r_max,
                batch_size=self.exact.batch_size,
                pilot=False,
            )

        return fresh

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
        return DPG(reference)


@dataclass(frozen=True)
class Value(Exact):
    """Learn the law of the reward under the reference: one value for Q# and CD, at every beta."""

    net: Net = Net()
    value: LearnValue = LearnValue()
    stage: ClassVar[str] = "value"

    def build(self, run: Run[Any]) -> None:
        lab, s = self.lab(run), self.value
        learning = ValueLearning(s.atoms)
        values = lab.fresh_value(self.net, learning.width)
        experience = Generated(lambda own: self.rollouts(lab, own), lab.stream.child(self.stage, "draws"))
        fit(run, values, learning, experience, s.fit, device=lab.device, stream=lab.stream)

    def rollouts(self, lab: Lab, own: Any) -> Samples:
        """Fresh draws of the reference, scored."""
        return lab.rollouts(self.value.fit.batch_size, self.value.conditions, own)

    def values_of(self, run: Run[Any]) -> ValueHead:
        """The trained value."""
        folder = checkpoints(run.inputs.get("value", run).folder)[-1]
        return ValueHead.load(folder, device=self.lab(run).device).requires_grad_(False)


@dataclass(frozen=True)
class CommonLogZ(CTLTwist):
    """The one log Z that every method of a comparison is held to; if by bounds, then with CTL's twist."""

    log_z: LogZSettings = LogZSettings()
    stage: ClassVar[str] = "log-z"

    def inputs(self) -> dict[str, Recipe]:
        needed = Scored.inputs(self) | {"exact": self.up(Exact)}
        return needed | ({"twist": self.up(CTLTwist)} if self.log_z.by == "bounds" else {})

    def build(self, run: Run[Any]) -> None:
        how = {"reference": self.by_reference, "enumeration": self.by_enumeration, "bounds": self.by_bounds}
        how[self.log_z.by](run, self.lab(run))

    def by_reference(self, run: Run[Any], lab: Lab) -> None:
        if lab.conditioned:
            raise ValueError(
                "infill: every condition has a log Z of its own; take --log-z.by bounds or enumeration"
            )
        parts, s = [], self.log_z
        with steps(self.name) as on_step:
            for k in range(0, s.draws, s.batch_size):
                own = lab.stream.child("log-z", k)
                settings = SMC(min(s.batch_size, s.draws - k), threshold=0)
                parts.append(smc(lab.target, None, lab.prompt, settings, max_new_tokens=lab.width, stream=own))
                on_step(min(k + s.batch_size, s.draws), s.draws, {})
        log_w = torch.cat([part.samples.log_w for part in parts if part.samples.log_w is not None])
        run.write_json("log_z.json", LogZ.of_importance(log_w, "draws of the reference").to_json())

    def by_enumeration(self, run: Run[Any], lab: Lab) -> None:
        if not (lab.conditioned and self.goal.condition_tokens == 1 and self.goal.beta == 1):
            raise ValueError("enumeration sums over the gap: infill with one token to follow, at beta 1")
        with steps(self.name) as on_step:
            log_p = log_next_tokens(lab.reference, lab.prompt, lab.width, on_step=on_step)
        save_file({"log_z": log_p.double().contiguous()}, str(run.folder / "log_z_of_token.safetensors"))
        expected = float((log_p.exp() * log_p).sum())
        run.write_json("log_z.json", LogZ.exact(expected).to_json())

    def by_bounds(self, run: Run[Any], lab: Lab) -> None:
        s, exact = self.log_z, self.exact_of(run).to(lab.device)
        twist: Any = run.inputs["twist"].recipe.twist_of(run.inputs["twist"])
        prompts, repeats = lab.prompt, s.repeats
        if lab.conditioned:  # every condition has the one exact draw that it was split off
            exact = lab.first(exact, s.conditions)
            prompts, repeats = exact.prompts, 1
        with steps(self.name) as on_step:
            bounds = bound_repeats(
                lab.target,
                twist,
                prompts,
                exact,
                ks=s.particles,
                repeats=repeats,
                max_new_tokens=lab.width,
                stream=lab.stream.child("log-z"),
                batch_size=s.batch_size,
                on_step=on_step,
            )
        run.write_json("bounds.json", bounds.rows())
        run.write_json("log_z.json", log_z_of(bounds).to_json())

    def show(self, run: Run[Any]) -> None:
        print(LogZ.from_json(json.loads((run.folder / "log_z.json").read_text())))

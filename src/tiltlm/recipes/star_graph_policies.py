"""The star-graph policies: a copy of the reference is trained by DPO, RPO or REINFORCE, then measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tiltlm.data.star_graph_pairs import read_pairs
from tiltlm.experience import Live, Offline, referenced_pairs
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import copy_of
from tiltlm.objective import Objective
from tiltlm.policies.dpo import DPO as DPOLoss
from tiltlm.policies.reinforce import Reinforce as ReinforceLoss
from tiltlm.policies.rpo import RPO as RPOLoss
from tiltlm.recipes.fitting import Fit, fit
from tiltlm.recipes.star_graph_settings import (
    POLICY_FIT,
    Goal,
    ReinforceSettings,
    Test,
)
from tiltlm.recipes.star_graph_stages import Base, Rollouts
from tiltlm.rewards.exact_answer import ExactAnswer
from tiltlm.ruler.measure import Measurement
from tiltlm.run import Recipe, Run
from tiltlm.samples import Pairs
from tiltlm.train import checkpoints


@dataclass(frozen=True)
class PairPolicy(Rollouts):
    """A policy that learns from the rollouts' pairs: a copy of the reference, trained."""

    def objective(self) -> Objective:
        raise NotImplementedError

    def settings(self) -> Fit:
        raise NotImplementedError

    def inputs(self) -> dict[str, Recipe]:
        return {"base": self.up(Base), "rollouts": self.up(Rollouts)}

    def build(self, run: Run[Any]) -> None:
        lab, reference = self.lab(), self.reference(run)
        pairs: Pairs = read_pairs(run.inputs["rollouts"].folder / "pairs.jsonl").pairs.to(lab.device)
        pairs = referenced_pairs(pairs, reference, self.rollouts.batch_size)
        experience = Offline(pairs, self.settings().batch_size, lab.stream.child(self.stage, "data"))
        fit(
            run,
            copy_of(reference),
            self.objective(),
            experience,
            self.settings(),
            device=lab.device,
            stream=lab.stream,
        )

    def decoder(self, run: Run[Any]) -> LanguageModel:
        """The trained policy."""
        return self.lab().load(checkpoints(run.folder)[-1])


@dataclass(frozen=True)
class DPOPolicy(PairPolicy):
    """Train by DPO on the pairs."""

    dpo: DPOLoss = DPOLoss()
    dpo_fit: Fit = POLICY_FIT
    stage: ClassVar[str] = "dpo-policy"

    def objective(self) -> Objective:
        return self.dpo

    def settings(self) -> Fit:
        return self.dpo_fit


@dataclass(frozen=True)
class RPOPolicy(PairPolicy):
    """Train by DPO + alpha · NLL on the pairs."""

    rpo: RPOLoss = RPOLoss()
    rpo_fit: Fit = POLICY_FIT
    stage: ClassVar[str] = "rpo-policy"

    def objective(self) -> Objective:
        return self.rpo

    def settings(self) -> Fit:
        return self.rpo_fit


@dataclass(frozen=True)
class ReinforcePolicy(Base):
    """Train by REINFORCE on own samples, at temperature 1 (the original's top_k=1 never explores)."""

    reinforce: ReinforceSettings = ReinforceSettings()
    reinforce_fit: Fit = POLICY_FIT
    stage: ClassVar[str] = "reinforce-policy"

    def inputs(self) -> dict[str, Recipe]:
        return {"base": self.up(Base)}

    def build(self, run: Run[Any]) -> None:
        lab, reference, s = self.lab(), self.reference(run), self.reinforce
        policy = copy_of(reference)
        prompts, key = lab.prompts("posttrain")
        experience = Live(
            policy,
            ExactAnswer(key.answers, wrong=s.wrong),
            prompts,
            self.reinforce_fit.batch_size,
            lab.width,
            lab.stream.child(self.stage, "data"),
            n=s.n,
            reference=reference if s.beta > 0 else None,
        )
        fit(
            run,
            policy,
            ReinforceLoss(s.baseline, s.beta),
            experience,
            self.reinforce_fit,
            device=lab.device,
            stream=lab.stream,
        )

    def decoder(self, run: Run[Any]) -> LanguageModel:
        """The trained policy."""
        return self.lab().load(checkpoints(run.folder)[-1])


@dataclass(frozen=True)
class Measured(Base):
    """A trained policy against the target. Measuring is a run of its own: another beta trains nothing again."""

    target: Goal = Goal()
    test: Test = Test()
    trained: ClassVar[type[Base]] = Base

    def inputs(self) -> dict[str, Recipe]:
        return {"base": self.up(Base), "policy": self.up(self.trained)}

    def decoder(self, run: Run[Any]) -> LanguageModel:
        """The trained policy."""
        return self.lab().load(checkpoints(run.inputs["policy"].folder)[-1])

    def build(self, run: Run[Any]) -> None:
        lab, policy = self.lab(), self.decoder(run)
        measured, samples = lab.ruler(self.reference(run), self.target.beta, self.test).measure(policy)
        measured = Measurement(dict(measured.values) | lab.forced(policy, self.test))
        lab.keep(run, measured, samples)
        run.write_json("report.json", measured.rows(self.name, self.stage, self.seed))


@dataclass(frozen=True)
class DPO(Measured, DPOPolicy):
    """DPO on the pairs, measured."""

    stage: ClassVar[str] = "dpo"
    trained: ClassVar[type[Base]] = DPOPolicy


@dataclass(frozen=True)
class RPO(Measured, RPOPolicy):
    """DPO + alpha · NLL on the pairs, measured."""

    stage: ClassVar[str] = "rpo"
    trained: ClassVar[type[Base]] = RPOPolicy


@dataclass(frozen=True)
class Reinforce(Measured, ReinforcePolicy):
    """REINFORCE, measured."""

    stage: ClassVar[str] = "reinforce"
    trained: ClassVar[type[Base]] = ReinforcePolicy

"""The twisted-SMC methods that are not twists' objectives, and every method measured against one target."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file
from torch import Tensor

from tiltlm.experience import Generated, Live
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.objective import Objective
from tiltlm.policies.dpo import DPO as DPOLoss
from tiltlm.policies.ppo import PPO as PPOLoss
from tiltlm.policies.ppo import ActorCritic, LiveActor
from tiltlm.policies.reinforce import Reinforce as ReinforceLoss
from tiltlm.policies.rpo import RPO as RPOLoss
from tiltlm.recipes.fitting import fit
from tiltlm.recipes.twisted_lab import Lab, preferences
from tiltlm.recipes.twisted_settings import LearnPolicy, LearnPPO, Test
from tiltlm.recipes.twisted_settings import Twist as Net
from tiltlm.recipes.twisted_stages import (
    CommonLogZ,
    CTLTwist,
    DPGTwist,
    Exact,
    FudgeTwist,
    RLTwist,
    Scored,
    SIXOTwist,
    Value,
)
from tiltlm.ruler.log_z import LogZ
from tiltlm.run import Recipe, Run
from tiltlm.samplers.guided import Guided
from tiltlm.samples import Samples, conditions_of
from tiltlm.seeds import Stream
from tiltlm.train import checkpoints, step_of
from tiltlm.twists.cd import CD as CDRule
from tiltlm.twists.draws import infilling
from tiltlm.twists.learned import LearnedTwist, TiltedPolicy
from tiltlm.twists.q_sharp import QSharp as QSharpRule
from tiltlm.twists.value import Rule, ValueTwist


@dataclass(frozen=True)
class PPOPolicy(Exact):
    """Train by PPO: the twist's network as the policy's head, or the whole model."""

    net: Net = Net()
    ppo: LearnPPO = LearnPPO()
    stage: ClassVar[str] = "ppo-policy"

    def __post_init__(self) -> None:
        if self.goal.reward == "infill" and self.ppo.policy == "full":
            raise ValueError(
                "a plain language model does not see what must follow: infill wants --ppo.policy head"
            )

    def build(self, run: Run[Any]) -> None:
        lab, s = self.lab(run), self.ppo
        policy, decoder = self.fresh_policy(lab)
        critic = lab.head_on(
            copy_of(lab.reference).requires_grad_(True), replace(self.net, body="copy"), per_token=False
        )
        n, conditions = s.fit.batch_size, s.conditions if lab.conditioned else 1
        own = lab.stream.child(self.stage, "draws")
        live = LiveActor(decoder, critic, lab.target, self.prompts(lab), n // conditions, lab.width, own)
        both = ActorCritic(policy, critic)
        fit(
            run,
            both,
            PPOLoss(self.goal.beta),
            live,
            s.fit,
            device=lab.device,
            stream=lab.stream,
            passes=s.passes,
            keep=s.keep,
        )

    def fresh_policy(self, lab: Lab) -> tuple[Any, LanguageModel]:
        """What is trained, and what draws with the same parameters."""
        if self.ppo.policy == "full":
            model = copy_of(lab.reference).requires_grad_(True)
            return model, model
        tilted = TiltedPolicy(lab.reference, lab.fresh_twist(self.net))
        return tilted, tilted.decoder()

    def prompts(self, lab: Lab) -> Callable[[Stream], Any]:
        if not lab.conditioned:
            return lambda own: lab.prompt
        count, follow = self.ppo.conditions, self.goal.condition_tokens
        return lambda own: infilling(lab.reference, lab.prompt, count, lab.width, follow, own)[0]

    def decoder(self, run: Run[Any], folder: Path | None = None) -> LanguageModel:
        lab, folder = self.lab(run), folder or checkpoints(run.folder)[-1]
        if self.ppo.policy == "full":
            return lab.load(folder)
        values = ValueHead.load(folder, device=lab.device).requires_grad_(False)
        return Guided(lab.reference, LearnedTwist(values))


@dataclass(frozen=True)
class PlainPolicy(Scored):
    """A copy of the reference, trained as a policy; it sees no conditions."""

    def objective(self) -> Objective:
        raise NotImplementedError

    def settings(self) -> LearnPolicy:
        raise NotImplementedError

    def refuse_conditions(self) -> None:
        if self.goal.reward == "infill":
            raise ValueError(
                f"{self.stage}: a plain language model does not see what must follow; take a twist or ppo"
            )

    def experience(self, lab: Lab, policy: CausalLM) -> Any:
        n, own = self.settings().fit.batch_size, lab.stream.child(self.stage, "draws")
        return Generated(lambda s: preferences(lab.reference, lab.target, lab.prompt, n, lab.width, s), own)

    def build(self, run: Run[Any]) -> None:
        self.refuse_conditions()
        lab, how = self.lab(run), self.settings().fit
        policy = copy_of(lab.reference).requires_grad_(True)
        experience = self.experience(lab, policy)
        fit(run, policy, self.objective(), experience, how, device=lab.device, stream=lab.stream)

    def decoder(self, run: Run[Any], folder: Path | None = None) -> LanguageModel:
        return self.lab(run).load(folder or checkpoints(run.folder)[-1])


@dataclass(frozen=True)
class ReinforcePolicy(PlainPolicy):
    """REINFORCE with leave-one-out baseline and a pull of the target's beta."""

    reinforce: LearnPolicy = LearnPolicy()
    stage: ClassVar[str] = "reinforce-policy"

    def objective(self) -> Objective:
        return ReinforceLoss("leave_one_out", self.goal.beta)

    def settings(self) -> LearnPolicy:
        return self.reinforce

    def experience(self, lab: Lab, policy: CausalLM) -> Any:
        return Live(
            policy,
            lab.target.reward,
            lab.prompt,
            1,
            lab.width,
            lab.stream.child(self.stage, "draws"),
            n=self.reinforce.fit.batch_size,
            reference=lab.reference,
        )


@dataclass(frozen=True)
class DPOPolicy(PlainPolicy):
    """DPO on pairs of reference draws, the winner by a Bradley-Terry coin of the reward."""

    dpo: LearnPolicy = LearnPolicy()
    stage: ClassVar[str] = "dpo-policy"

    def objective(self) -> Objective:
        return DPOLoss(self.goal.beta)

    def settings(self) -> LearnPolicy:
        return self.dpo


@dataclass(frozen=True)
class RPOPolicy(PlainPolicy):
    """DPO plus the likelihood of the winner, on the same pairs."""

    rpo: LearnPolicy = LearnPolicy()
    stage: ClassVar[str] = "rpo-policy"

    def objective(self) -> Objective:
        return RPOLoss(self.goal.beta)

    def settings(self) -> LearnPolicy:
        return self.rpo


@dataclass(frozen=True)
class Measured(CommonLogZ):
    """A method against the target: both KLs, with the common log Z and exact draws. Trains nothing."""

    test: Test = Test()
    trained: ClassVar[type[Scored]] = Scored

    def inputs(self) -> dict[str, Recipe]:
        shared = Scored.inputs(self) | {"exact": self.up(Exact), "log_z": self.up(CommonLogZ)}
        return shared | {"trained": self.up(self.trained)}

    def decoder(self, run: Run[Any], folder: Path | None = None) -> LanguageModel:
        kept = run.inputs["trained"]
        return kept.recipe.decoder(kept, folder)

    def log_z_of(self, run: Run[Any], exact: Samples) -> LogZ | Tensor:
        """The common log Z; exact per condition where it was enumerated."""
        folder = run.inputs["log_z"].folder
        if (folder / "log_z_of_token.safetensors").is_file():
            table = load_file(str(folder / "log_z_of_token.safetensors"))["log_z"]
            return table[conditions_of(exact.prompts).ids[:, 0].cpu()]
        return LogZ.from_json(json.loads((folder / "log_z.json").read_text()))

    def build(self, run: Run[Any]) -> None:
        lab, exact = self.lab(run), self.exact_of(run)
        log_z = self.log_z_of(run, exact)
        if isinstance(log_z, Tensor):
            log_z = log_z[: self.test.conditions].to(lab.device)
        ruler = lab.ruler(self.test, exact, log_z)
        measured, samples = ruler.measure(self.decoder(run))
        measured.save(run.folder / "measurement.safetensors")
        best = samples.select(samples.log_w.argsort(descending=True)) if samples.log_w is not None else samples
        run.write_jsonl("samples.jsonl", list(lab.readable(best.select(slice(0, 300)))))
        run.write_json("report.json", measured.rows(self.name, self.stage, self.seed))
        self.curve(run, ruler)

    def show(self, run: Run[Any]) -> None:
        Recipe.show(self, run)

    def curve(self, run: Run[Any], ruler: Any) -> None:
        """The distances at every kept checkpoint but the last: curve.json."""
        kept, rows = run.inputs.get("trained"), []
        for folder in checkpoints(kept.folder) if kept is not None else []:
            found = ruler.measure(self.decoder(run, folder))[0].estimates()
            for name in ("kl_to_target", "kl_from_target"):
                if name in found:
                    e = found[name]
                    head = {"method": self.stage, "step": step_of(folder), "metric": name, "seed": self.seed}
                    rows.append({**head, "value": e.value, "stderr": e.stderr})
        if len({row["step"] for row in rows}) > 1:
            run.write_json("curve.json", rows)


@dataclass(frozen=True)
class CTL(Measured):
    """CTL's twist, measured."""

    stage: ClassVar[str] = "ctl"
    trained: ClassVar[type[Scored]] = CTLTwist


@dataclass(frozen=True)
class RL(Measured, RLTwist):
    """Soft Q's twist, measured."""

    stage: ClassVar[str] = "rl"
    trained: ClassVar[type[Scored]] = RLTwist


@dataclass(frozen=True)
class SIXO(Measured, SIXOTwist):
    """SIXO's twist, measured."""

    stage: ClassVar[str] = "sixo"
    trained: ClassVar[type[Scored]] = SIXOTwist


@dataclass(frozen=True)
class Fudge(Measured, FudgeTwist):
    """FUDGE's twist, measured."""

    stage: ClassVar[str] = "fudge"
    trained: ClassVar[type[Scored]] = FudgeTwist


@dataclass(frozen=True)
class DPG(Measured, DPGTwist):
    """DPG's twist, measured."""

    stage: ClassVar[str] = "dpg"
    trained: ClassVar[type[Scored]] = DPGTwist


@dataclass(frozen=True)
class PPO(Measured, PPOPolicy):
    """PPO's policy, measured."""

    stage: ClassVar[str] = "ppo"
    trained: ClassVar[type[Scored]] = PPOPolicy


@dataclass(frozen=True)
class QSharp(Measured, Value):
    """Decode with log E[exp(r/beta)] of the learned law, measured."""

    stage: ClassVar[str] = "q-sharp"
    trained: ClassVar[type[Scored]] = Value

    def rule(self) -> Rule:
        return QSharpRule(self.goal.beta)

    def decoder(self, run: Run[Any], folder: Path | None = None) -> LanguageModel:
        kept = run.inputs["trained"]
        values = ValueHead.load(folder or checkpoints(kept.folder)[-1], device=self.lab(run).device)
        twist = ValueTwist(values.requires_grad_(False), self.rule(), self.value.atoms)
        return Guided(self.lab(run).reference, twist)


@dataclass(frozen=True)
class CD(QSharp):
    """Decode with E[r]/beta of the same law, measured."""

    stage: ClassVar[str] = "cd"

    def rule(self) -> Rule:
        return CDRule(self.goal.beta)


@dataclass(frozen=True)
class Reinforce(Measured, ReinforcePolicy):
    """REINFORCE's policy, measured."""

    stage: ClassVar[str] = "reinforce"
    trained: ClassVar[type[Scored]] = ReinforcePolicy


@dataclass(frozen=True)
class DPO(Measured, DPOPolicy):
    """DPO's policy, measured."""

    stage: ClassVar[str] = "dpo"
    trained: ClassVar[type[Scored]] = DPOPolicy


@dataclass(frozen=True)
class RPO(Measured, RPOPolicy):
    """RPO's policy, measured."""

    stage: ClassVar[str] = "rpo"
    trained: ClassVar[type[Scored]] = RPOPolicy


@dataclass(frozen=True)
class Untrained(Measured):
    """The reference itself, measured: where every method starts."""

    stage: ClassVar[str] = "untrained"

    def inputs(self) -> dict[str, Recipe]:
        return {name: value for name, value in super().inputs().items() if name != "trained"}

    def decoder(self, run: Run[Any], folder: Path | None = None) -> LanguageModel:
        return self.lab(run).reference


MEASURED: dict[str, type[Measured]] = {
    kind.stage: kind for kind in (Untrained, CTL, RL, SIXO, Fudge, DPG, PPO, QSharp, CD, Reinforce, DPO, RPO)
}

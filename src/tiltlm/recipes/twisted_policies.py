"""The policies' training on a twisted-SMC target: PPO, SFT on exact draws, REINFORCE, DPO and RPO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from tiltlm.experience import Generated, Live
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM
from tiltlm.models.heads import ValueHead
from tiltlm.objective import Objective
from tiltlm.policies.dpo import DPO as DPOLoss
from tiltlm.policies.ppo import PPO as PPOLoss
from tiltlm.policies.ppo import ActorCritic, LiveActor
from tiltlm.policies.reinforce import Reinforce as ReinforceLoss
from tiltlm.policies.rpo import RPO as RPOLoss
from tiltlm.policies.sft import SFT as SFTLoss
from tiltlm.recipes.fitting import Fit, fit
from tiltlm.recipes.twisted_lab import Lab, preferences
from tiltlm.recipes.twisted_settings import LearnPolicy, LearnPPO, shared_out
from tiltlm.recipes.twisted_settings import Twist as Net
from tiltlm.recipes.twisted_stages import Exact, Scored
from tiltlm.run import Run
from tiltlm.samplers.guided import Guided
from tiltlm.samplers.scenes import infilling
from tiltlm.seeds import Stream
from tiltlm.train import checkpoints
from tiltlm.twists.learned import LearnedTwist, TiltedPolicy


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

    def check(self) -> None:
        super().check()
        if self.goal.reward == "infill":
            shared_out(self.ppo.fit.batch_size, self.ppo.conditions, "ppo")

    def fits(self) -> list[Fit]:
        return [self.ppo.fit]

    def build(self, run: Run[Any]) -> None:
        lab, s = self.lab(run), self.ppo
        policy, decoder = self.fresh_policy(lab)
        critic = lab.head_on(lab.copy(), replace(self.net, body="copy"), per_token=False)
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
            model = lab.copy()
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

    def check(self) -> None:
        super().check()
        if self.goal.reward == "infill" and self.stage.endswith("-policy"):  # not where a comparison inherits this
            raise ValueError(
                f"{self.stage}: a plain language model does not see what must follow; take a twist or ppo"
            )

    def fits(self) -> list[Fit]:
        return [self.settings().fit]

    def experience(self, lab: Lab, policy: CausalLM) -> Any:
        n, own = self.settings().fit.batch_size, lab.stream.child(self.stage, "draws")
        return Generated(lambda s: preferences(lab.reference, lab.target, lab.prompt, n, lab.width, s), own)

    def build(self, run: Run[Any]) -> None:
        lab, how = self.lab(run), self.settings().fit
        policy = lab.copy()
        experience = self.experience(lab, policy)
        fit(run, policy, self.objective(), experience, how, device=lab.device, stream=lab.stream)

    def decoder(self, run: Run[Any], folder: Path | None = None) -> LanguageModel:
        return self.lab(run).load(folder or checkpoints(run.folder)[-1])


@dataclass(frozen=True)
class SFTPolicy(PlainPolicy):
    """Maximum likelihood of exact draws of pi*, fresh at every step."""

    sft: LearnPolicy = LearnPolicy()
    stage: ClassVar[str] = "sft-policy"

    def objective(self) -> Objective:
        return SFTLoss()

    def settings(self) -> LearnPolicy:
        return self.sft

    def check(self) -> None:
        super().check()
        if self.stage == SFTPolicy.stage:
            self.goal.bound()

    def experience(self, lab: Lab, policy: CausalLM) -> Any:
        own = lab.stream.child(self.stage, "draws")
        return Generated(lab.fresh_exact(self.sft.fit.batch_size, 1000), own)


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

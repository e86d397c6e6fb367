"""Every method measured against one target, with the comparison's one log Z."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tiltlm.jsonl import read_json
from tiltlm.models.base import LanguageModel
from tiltlm.models.heads import ValueHead
from tiltlm.recipes.twisted_log_z import CommonLogZ
from tiltlm.recipes.twisted_policies import DPOPolicy, PPOPolicy, ReinforcePolicy, RPOPolicy, SFTPolicy
from tiltlm.recipes.twisted_settings import LearnCTL, Test
from tiltlm.recipes.twisted_settings import Twist as Net
from tiltlm.recipes.twisted_stages import Exact, Scored
from tiltlm.recipes.twisted_twists import CTLTwist, DPGTwist, FudgeTwist, RLTwist, SIXOTwist, Value
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.measure import Ruler
from tiltlm.run import Recipe, Run
from tiltlm.samplers.guided import Guided
from tiltlm.samples import Samples, conditions_of
from tiltlm.tensors import load_tensors
from tiltlm.train import checkpoints, step_of
from tiltlm.twists.cd import CD as CDRule
from tiltlm.twists.q_sharp import QSharp as QSharpRule
from tiltlm.twists.value import Rule, ValueTwist


@dataclass(frozen=True)
class Measured(CommonLogZ):
    """A method against the target: both KLs, with the common log Z and exact draws. Trains nothing."""

    test: Test = Test()
    trained: ClassVar[type[Scored]] = Scored

    def inputs(self) -> dict[str, Recipe]:
        shared = Scored.inputs(self) | {"trained": self.up(self.trained)}
        return shared | ({"exact": self.up(Exact), "log_z": self.common_log_z()} if self.test.absolute else {})

    def common_log_z(self) -> CommonLogZ:
        """The one log Z; CTL's settings matter to it only where its twist does."""
        found = self.up(CommonLogZ)
        return found if self.log_z.by == "bounds" else replace(found, ctl=LearnCTL(), net=Net())

    def decoder(self, run: Run[Any], folder: Path | None = None) -> LanguageModel:
        kept = run.inputs["trained"]
        return kept.recipe.decoder(kept, folder)

    def log_z_of(self, run: Run[Any], exact: Samples) -> LogZ | Tensor:
        """The common log Z; exact per condition where it was enumerated."""
        folder = run.inputs["log_z"].folder
        if (folder / "log_z_of_token.safetensors").is_file():
            table = load_tensors(folder / "log_z_of_token.safetensors")["log_z"]
            return table[conditions_of(exact.prompts).ids[:, 0].cpu()]
        return LogZ.from_json(read_json(folder / "log_z.json"))

    def build(self, run: Run[Any]) -> None:
        ruler = self.ruler(run)
        measured, samples = ruler.measure(self.decoder(run))
        measured.save(run.folder / "measurement.safetensors")
        best = samples.select(samples.log_w.argsort(descending=True)) if samples.log_w is not None else samples
        run.write_jsonl("samples.jsonl", list(self.lab(run).readable(best.select(slice(0, 300)))))
        run.write_json("report.json", measured.rows(self.name, self.stage, self.seed))
        self.curve(run, ruler)

    def ruler(self, run: Run[Any]) -> Ruler:
        """The comparison's ruler."""
        lab = self.lab(run)
        if not self.test.absolute:
            return lab.ruler(self.test, None, None)
        exact = self.exact_of(run)
        log_z = self.log_z_of(run, exact)
        if isinstance(log_z, Tensor):
            log_z = log_z[: self.test.conditions].to(lab.device)
        return lab.ruler(self.test, exact, log_z)

    def show(self, run: Run[Any]) -> None:
        Recipe.show(self, run)
        if "log_z" in run.inputs:
            print(LogZ.from_json(read_json(run.inputs["log_z"].folder / "log_z.json")))

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
class SFT(Measured, SFTPolicy):
    """SFT's policy, measured."""

    stage: ClassVar[str] = "sft"
    trained: ClassVar[type[Scored]] = SFTPolicy


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
    kind.stage: kind for kind in (Untrained, CTL, RL, SIXO, Fudge, DPG, PPO, QSharp, CD, SFT, Reinforce, DPO, RPO)
}

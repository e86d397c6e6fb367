"""Alignment: every method on the same groups or pairs, from one place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from tiltlm.experience import Experience, Offline, Subsets
from tiltlm.groups import Groups, all_pairs, as_groups, best_and_worst
from tiltlm.jsonl import read_rows
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM
from tiltlm.objective import Objective
from tiltlm.policies.apo import APO
from tiltlm.policies.cdpo import CDPO
from tiltlm.policies.dpo import DPO
from tiltlm.policies.dpo_rw import DpoRw
from tiltlm.policies.exo_pref import ExoPref
from tiltlm.policies.exo_rw import ExoRw, group_log_ratios, group_metrics
from tiltlm.policies.hinge import Hinge
from tiltlm.policies.ipo import IPO
from tiltlm.policies.kto import KTO, JudgedAnswers
from tiltlm.policies.orpo import ORPO
from tiltlm.policies.robust_dpo import RobustDPO
from tiltlm.policies.rpo import RPO
from tiltlm.policies.simpo import SimPO
from tiltlm.progress import note
from tiltlm.recipes.fitting import fit
from tiltlm.recipes.preferences_lab import (
    EncodedReward,
    Lab,
    first_of,
    judged,
    pairs_with_log_ref,
    with_log_ref,
)
from tiltlm.recipes.preferences_settings import Align
from tiltlm.recipes.preferences_stages import Label
from tiltlm.recipes.preferences_verdicts import are_verdicts, balance, judged_answers
from tiltlm.ruler.kl import kl_along_in_batches
from tiltlm.run import Recipe, Run, digests
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samples import Pairs, Tokens
from tiltlm.train import best_checkpoint


@dataclass(frozen=True)
class Aligned(Label):
    """A policy aligned with the target by one method, from the reference's labelled completions or the data's own."""

    align: Align = Align()
    learns_from: ClassVar[tuple[str, ...]] = ("chosen", "completions")
    """Columns of which the data has one, where the policy learns from the data itself."""

    def inputs(self) -> dict[str, Recipe]:
        shared = self.needed() | self.sft_needed() | self.judge_needed()
        return shared | ({"label": self.up(Label)} if self.align.source == "labelled" else {})

    def check(self) -> None:
        super().check()
        if self.align.source == "labelled" and self.align.size > self.draws.n:
            raise ValueError(
                f"groups of {self.align.size} (align.size) want as many completions of a prompt; {self.draws.n} are drawn: "
                f"--draws.n {self.align.size}"
            )
        found = self.columns()
        if self.align.source == "data" and found and not set(found) & set(self.learns_from):
            raise ValueError(self.wants_more() if "label" in found else
                             f"align.source data wants pairs or groups; the data has {', '.join(found)}")  # fmt: skip

    def wants_more(self) -> str:
        """Why verdicts are not enough, and what is."""
        others = ", ".join(name for name, kind in POLICIES.items() if "label" in kind.learns_from)
        return (
            f"{self.name} wants pairs or groups, and the data holds verdicts on single answers (prompt, completion, "
            f"label): {others} learns from those; or take --align.source labelled: the reference's own draws, labelled "
            "by a reward that learns from the verdicts"
        )

    def objective(self) -> Objective:
        """The method, with its settings."""
        raise NotImplementedError

    def decoder(self, run: Run[Any]) -> LanguageModel:
        return self.policy_at(run, best_checkpoint(run.folder))

    def policy_at(self, run: Run[Any], checkpoint: Path) -> CausalLM:
        """The policy that a checkpoint of this run holds."""
        return self.lab(run).restored(self.start(run), checkpoint)

    def build(self, run: Run[Any]) -> None:
        lab = self.lab(run)
        policy, reference = lab.policy_and_reference(self.start(run))
        data = self.learnt_from(run, lab, reference, "train")
        if not len(data):
            raise ValueError(
                "nothing to learn from: every group is tied, the reward does not tell completions apart"
            )
        how, own = self.align.train.fit(len(data)), lab.stream.child(self.stage)
        note(f"{self.name}: {len(data)} rows, {how.pace.steps} steps of {how.batch_size}; the target's beta_r·beta_pi = "
             f"{self.goal.beta_r:g}·{self.goal.beta_pi:g} = {self.goal.beta:g}")  # fmt: skip
        experience = self.experience(Offline(data, how.batch_size, own.child("data")), lab, policy, reference)
        measure = Watched(self, run, lab, policy, reference)
        fit(
            run, policy, self.objective(), experience, how, device=lab.device, stream=lab.stream,
            watch=how.watch(measure, best="objective", higher=True),
        )  # fmt: skip

    def learnt_from(self, run: Run[Any], lab: Lab, reference: LanguageModel, split: str) -> Any:
        """What the objective is fed with, referenced."""
        return self.groups(run, lab, reference, split)

    def experience(self, rows: Offline, lab: Lab, policy: CausalLM, reference: LanguageModel) -> Experience:
        raise NotImplementedError

    def groups(self, run: Run[Any], lab: Lab, reference: LanguageModel, split: str) -> Groups:
        """Labelled groups of a split, with the reference's log-probabilities."""
        if self.align.source == "labelled":
            found = lab.encoder.groups(
                list(read_rows(run.inputs["label"].folder / f"{split}.jsonl", ("rewards",)))
            )
        else:
            found = self.own_groups(lab, self.rows_of(run, split))
        samples = with_log_ref(found.samples, reference, *self.cache(run), self.precision(split))
        return Groups(samples, found.size).to(lab.device)

    def size_of(self, groups: Groups) -> int:
        """How many completions of a group meet: `align.size`, and no more than the data's own groups have."""
        return min(self.align.size, groups.size) if self.align.source == "data" else self.align.size

    def precision(self, split: str) -> str:
        """What a split is scored in: the precision of training for what is trained on; measuring is in float32."""
        return self.align.train.precision if split == "train" else "float32"

    def own_groups(self, lab: Lab, rows: list[dict[str, Any]]) -> Groups:
        """The data's own groups, or its pairs as groups with rewards 1 and 0."""
        if "completions" in rows[0]:
            return lab.encoder.groups(rows)
        if are_verdicts(rows):
            raise ValueError(self.wants_more())
        if "chosen" not in rows[0]:
            raise ValueError(f"align.source data wants pairs or groups; the data has {', '.join(rows[0])}")
        return as_groups(lab.encoder.pairs(rows))

    def cache(self, run: Run[Any]) -> tuple[str, Path]:
        """What tells the reference from others, and where its log-probabilities are kept: beside it, if it is a run's."""
        start = str(self.start(run))
        name = f"{digests([start]).get(start, start)}-{self.base.temperature:g}".replace("/", "_")
        return name, run.inputs.get("sft", run).folder / "log_ref"


@dataclass(frozen=True)
class OnGroups(Aligned):
    """A method that sees `align.size` completions of a prompt together, drawn anew at every step."""

    def experience(self, rows: Offline, lab: Lab, policy: CausalLM, reference: LanguageModel) -> Experience:
        return Subsets(rows, self.size_of(rows.data), lab.stream.child(self.stage, "subsets"))


@dataclass(frozen=True)
class OnPairs(Aligned):
    """A method that sees a better and a worse completion."""

    def learnt_from(self, run: Run[Any], lab: Lab, reference: LanguageModel, split: str) -> Any:
        return self.pairs(run, lab, reference, split)

    def pairs(self, run: Run[Any], lab: Lab, reference: LanguageModel, split: str) -> Pairs:
        """Pairs of a split, with the reference's log-probabilities; ties are left out, and counted."""
        if self.align.source == "data" and "chosen" in (rows := self.rows_of(run, split))[0]:
            pairs = lab.encoder.pairs(rows)
            return pairs_with_log_ref(pairs, reference, *self.cache(run), self.precision(split)).to(lab.device)
        whole = self.groups(run, lab, reference, split).to("cpu")
        groups = first_of(whole, self.size_of(whole))
        pairs, ties = (all_pairs if self.align.pairing == "all" else best_and_worst)(groups)
        if ties:
            note(f"{self.name}: {ties} ties left out of the {split} split")
        return pairs.to(lab.device)

    def experience(self, rows: Offline, lab: Lab, policy: CausalLM, reference: LanguageModel) -> Experience:
        return rows


@dataclass(frozen=True)
class Watched:
    """What is measured on held-out data while a policy trains.

    valid_loss, and what the method reports while it trains (margins, how often the chosen answer is ahead): on validation
    data of its own kind. valid_gap: KL(q‖p) over the validation groups, 0 at pi*; valid_ranking: how often the policy's
    favourite of a group is the reward's. reward, kl_to_reference, objective: E[r], KL(policy‖reference) and
    J = E[r] − beta·KL over answers to the validation prompts, always drawn with the same random numbers.
    """

    recipe: Aligned
    run: Run[Any]
    lab: Lab
    policy: CausalLM
    reference: LanguageModel

    def __call__(self) -> dict[str, float]:
        return self.on_objective() | self.on_groups() | self.on_draws()

    @cached_property
    def parts(self) -> list[Groups]:
        """The validation groups, some at a time."""
        recipe = self.recipe
        if recipe.align.source == "data" and are_verdicts(recipe.rows_of(self.run, "valid")):
            return []  # single answers: there is nothing to compare within
        groups = recipe.groups(self.run, self.lab, self.reference, "valid")
        return [groups.select(slice(k, k + 32)) for k in range(0, len(groups), 32)]

    @cached_property
    def prompts(self) -> Tokens:
        rows = self.recipe.rows_of(self.run, "valid")[: self.recipe.align.watched]
        return self.lab.encoder.prompts([row["prompt"] for row in rows]).to(self.lab.device)

    @cached_property
    def reward(self) -> EncodedReward:
        return self.recipe.judge_of(self.run, self.lab)

    @cached_property
    def held_out(self) -> Experience | None:
        """The method's own batches of validation data, always the same; None where there is nothing to tell apart."""
        data = self.recipe.learnt_from(self.run, self.lab, self.reference, "valid")
        rows = Offline(data, len(data), self.lab.stream.child("held out"))
        return self.recipe.experience(rows, self.lab, self.policy, self.reference) if len(data) else None

    def on_objective(self) -> dict[str, float]:
        """The method's loss and metrics on validation data."""
        if self.held_out is None:
            return {}
        objective = self.recipe.objective()
        batch = objective.prepare(self.held_out.batch(0))
        parts = [batch.select(slice(k, k + 32)) for k in range(0, len(batch), 32)]
        found = [objective.loss(self.policy, part) for part in parts]
        loss = sum(float(each.loss.sum()) for each in found) / float(objective.weight(batch).sum())
        means = {name: torch.cat([each.metrics[name] for each in found]).nanmean() for name in found[0].metrics}
        return {"valid_loss": loss} | {f"valid_{name}": float(x) for name, x in means.items() if not x.isnan()}

    def on_groups(self) -> dict[str, float]:
        betas = self.recipe.goal.beta_r, self.recipe.goal.beta_pi
        found = [group_metrics(group_log_ratios(self.policy, part), part.reward, *betas) for part in self.parts]
        n = sum(len(part) for part in self.parts)
        if not n:
            return {}
        return {f"valid_{name}": sum(float(each[name].sum()) for each in found) / n for name in found[0]}

    def on_draws(self) -> dict[str, float]:
        samples = draw_in_batches(
            self.policy, self.prompts, max_new_tokens=self.recipe.base.new_tokens,
            stream=self.lab.stream.child("watch"), batch_size=64,
        )  # fmt: skip
        reward = float(self.reward(samples).mean())
        kl = float(kl_along_in_batches(self.policy, self.reference, samples, 64).mean())
        terms = {name: float(term(samples).mean()) for name, term in self.reward.terms().items()}
        return {"reward": reward, "kl_to_reference": kl, "objective": reward - self.recipe.goal.beta * kl} | terms


# ---- the methods --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExoRwPolicy(OnGroups):
    """EXO on rewards: reverse KL within groups."""

    stage: ClassVar[str] = "exo-rw-policy"

    def objective(self) -> Objective:
        return ExoRw(self.goal.beta_r, self.goal.beta_pi)


@dataclass(frozen=True)
class DpoRwPolicy(OnGroups):
    """DPO on rewards: forward KL within groups."""

    stage: ClassVar[str] = "dpo-rw-policy"

    def objective(self) -> Objective:
        return DpoRw(self.goal.beta_r, self.goal.beta_pi)


@dataclass(frozen=True)
class ExoPrefPolicy(OnPairs):
    """EXO on pairs."""

    exo_pref: ExoPref = ExoPref()
    stage: ClassVar[str] = "exo-pref-policy"

    def objective(self) -> Objective:
        return self.exo_pref


@dataclass(frozen=True)
class DpoPrefPolicy(OnPairs):
    """DPO on pairs."""

    dpo_pref: DPO = DPO(beta=0.5)
    stage: ClassVar[str] = "dpo-pref-policy"

    def objective(self) -> Objective:
        return self.dpo_pref


@dataclass(frozen=True)
class CDPOPolicy(OnPairs):
    """DPO with smoothed labels."""

    cdpo: CDPO = CDPO(beta=0.5)
    stage: ClassVar[str] = "cdpo-policy"

    def objective(self) -> Objective:
        return self.cdpo


@dataclass(frozen=True)
class RobustDPOPolicy(OnPairs):
    """DPO for labels of which a share is wrong."""

    robust_dpo: RobustDPO = RobustDPO(beta=0.5)
    stage: ClassVar[str] = "robust-dpo-policy"

    def objective(self) -> Objective:
        return self.robust_dpo


@dataclass(frozen=True)
class IPOPolicy(OnPairs):
    """IPO."""

    ipo: IPO = IPO()
    stage: ClassVar[str] = "ipo-policy"

    def objective(self) -> Objective:
        return self.ipo


@dataclass(frozen=True)
class HingePolicy(OnPairs):
    """The hinge loss (SLiC, normalised)."""

    hinge: Hinge = Hinge(beta=0.5)
    stage: ClassVar[str] = "hinge-policy"

    def objective(self) -> Objective:
        return self.hinge


@dataclass(frozen=True)
class APOPolicy(OnPairs):
    """Anchored preference optimisation."""

    apo: APO = APO(beta=0.5)
    stage: ClassVar[str] = "apo-policy"

    def objective(self) -> Objective:
        return self.apo


@dataclass(frozen=True)
class RPOPolicy(OnPairs):
    """DPO plus the likelihood of the winner, per token."""

    rpo: RPO = RPO(beta=0.5, normalise="mean")
    stage: ClassVar[str] = "rpo-policy"

    def objective(self) -> Objective:
        return self.rpo


@dataclass(frozen=True)
class SimPOPolicy(OnPairs):
    """SimPO, which knows no reference."""

    simpo: SimPO = SimPO()
    stage: ClassVar[str] = "simpo-policy"

    def objective(self) -> Objective:
        return self.simpo


@dataclass(frozen=True)
class ORPOPolicy(OnPairs):
    """ORPO, which knows no reference."""

    orpo: ORPO = ORPO()
    stage: ClassVar[str] = "orpo-policy"

    def objective(self) -> Objective:
        return self.orpo


@dataclass(frozen=True)
class KTOPolicy(OnPairs):
    """KTO: answers judged one by one; of pairs, the winners are good and the losers bad."""

    kto: KTO = KTO(beta=0.5)
    stage: ClassVar[str] = "kto-policy"
    learns_from: ClassVar[tuple[str, ...]] = ("chosen", "completions", "label")

    def objective(self) -> Objective:
        return self.kto

    def learnt_from(self, run: Run[Any], lab: Lab, reference: LanguageModel, split: str) -> Any:
        rows = self.rows_of(run, split)
        if not (self.align.source == "data" and are_verdicts(rows)):
            return judged(self.pairs(run, lab, reference, split))
        if split == "train":
            note(f"{self.name}: {balance(rows, self.kto.w_good, self.kto.w_bad)}")
        samples = judged_answers(lab.encoder, rows)
        return with_log_ref(samples, reference, *self.cache(run), self.precision(split)).to(lab.device)

    def experience(self, rows: Offline, lab: Lab, policy: CausalLM, reference: LanguageModel) -> Experience:
        return JudgedAnswers(rows, policy, reference)


POLICIES: dict[str, type[Aligned]] = {
    kind.stage.removesuffix("-policy"): kind
    for kind in (
        ExoRwPolicy, DpoRwPolicy, ExoPrefPolicy, DpoPrefPolicy, CDPOPolicy, RobustDPOPolicy, IPOPolicy, HingePolicy,
        APOPolicy, RPOPolicy, SimPOPolicy, ORPOPolicy, KTOPolicy,
    )
}  # fmt: skip
"""Every method's training stage, by the method's name."""

"""Star graphs (Q#, arXiv:2502.20548, §3.1): pre-train, roll out, guide by value, or train a policy.

A recipe extends what it depends on: `Base` has the settings of pre-training, `Rollouts(Base)` adds those of
drawing, and so on, so that one flag (`--world.degree 5`) means the same everywhere. `tiltlm run` builds what
is missing on the way.

Families: `star-graph` is the *walker*, a controlled variant for a laptop CPU whose base model walks a uniformly
random arm (it is not the paper's base, which learns a short cut). `star-graph-g25`, `-g55`, `-g38` carry the
paper's settings and want a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from tiltlm.engine import Optim
from tiltlm.experience import Live, Offline, referenced_pairs
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.objective import Objective
from tiltlm.policies.dpo import DPO as DPOLoss
from tiltlm.policies.reinforce import Baseline
from tiltlm.policies.reinforce import Reinforce as ReinforceLoss
from tiltlm.policies.rpo import RPO as RPOLoss
from tiltlm.policies.sft import SFT
from tiltlm.recipes.star_graph_lab import Fit, Lab, Network, Test, World, fit
from tiltlm.rewards.exact_answer import ExactAnswer
from tiltlm.ruler.measure import Measurement
from tiltlm.run import Recipe, Run
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samplers.guided import Guided
from tiltlm.samples import Pairs, Samples
from tiltlm.tasks.star_graph_pairs import collect_pairs, read_pairs, write_pairs
from tiltlm.train import Pace, checkpoints
from tiltlm.twists.cd import CD as CDRule
from tiltlm.twists.fudge import Fudge as FudgeRule
from tiltlm.twists.q_sharp import QSharp as QSharpRule
from tiltlm.twists.value import Rule, ValueLearning, ValueTwist

FAMILIES: dict[str, str] = {
    "star-graph": "the walker on G(2,3): a small model from scratch, minutes on a laptop",
    "star-graph-g25": "G(2,5), N=50, GPT-2 small, the paper's settings (wants a GPU)",
    "star-graph-g55": "G(5,5), N=50, GPT-2 small, the paper's settings (wants a GPU)",
    "star-graph-g38": "G(3,8), N=50, GPT-2 medium, the paper's settings (wants a GPU)",
}

STAGES: dict[str, str] = {
    "base": "pre-train the reference on paths",
    "rollouts": "draw labelled completions and chosen/rejected pairs from the base",
    "classifier": "learn the reward-to-go at every prefix: one value for Q#, CD and FUDGE",
    "q-sharp": "decode with log E[exp(r/beta)]: ends at pi*",
    "cd": "decode with E[r]/beta: below pi* by Jensen",
    "fudge": "decode with log P(success): the limit beta -> 0",
    "reinforce": "policy gradient on own samples, no pull to the reference",
    "dpo": "direct preference optimisation on right/wrong pairs",
    "rpo": "DPO plus the likelihood of the right answer",
    "evaluate": "every method against one target: a table and a picture",
}


@dataclass(frozen=True)
class RolloutSettings:
    """n: labelled draws per prompt. max_tries: draws until the first wrong one, per prompt, for the pairs."""

    n: int = 2
    max_tries: int = 1000
    batch_size: int = 1024


@dataclass(frozen=True)
class ValueSettings:
    """How the value model is trained and on what.

    data: labelled `rollouts`, or the paper's `pairs` (half right by construction: not calibrated; `calibrate`
    adds the logit of the reference's success rate back when decoding). start: the body's first weights, the
    `reference` or the `pretrained` network it came from. head: V-type reads a token, Q-type scores all at once.
    """

    data: Literal["rollouts", "pairs"] = "rollouts"
    start: Literal["reference", "pretrained"] = "reference"
    head: Literal["v", "q"] = "v"
    mlp_layers: int = 0
    lm_weight: float = 1.0
    calibrate: bool = False
    fit: Fit = field(
        default_factory=lambda: Fit(
            Optim(lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01),
            Pace(steps=2500, warmup=30, until=0.05, watch=("value_loss/2",)),
        )
    )


@dataclass(frozen=True)
class Goal:
    """The target's temperature: pi* ∝ pi_ref · exp(r / beta), r = 1 for the right path, else 0."""

    beta: float = 0.1
    also: tuple[float, ...] = (0.3, 1.0)
    """Further temperatures at which value-guided decoders are measured; one value model serves all."""

    def __post_init__(self) -> None:
        if not all(beta > 0 for beta in (self.beta, *self.also)):
            raise ValueError(f"beta must be positive: it divides the reward; got {self.beta} and also {self.also}")


@dataclass(frozen=True)
class Guide:
    """Guided decoding: the reference's top-k tokens at this temperature are scored by the value."""

    top_k: int = 4
    temperature: float = 1.0


POLICY_FIT = Fit(Optim(lr=3e-4, betas=(0.9, 0.98), weight_decay=0.01), Pace(steps=400, warmup=40))


@dataclass(frozen=True)
class Base(Recipe):
    """Pre-train the reference on paths of star graphs."""

    world: World = field(default_factory=World)
    network: Network = field(default_factory=Network)
    base: Fit = field(
        default_factory=lambda: Fit(
            Optim(lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01),
            Pace(steps=4000, warmup=30, until=0.05, watch=("nll/3",)),
        )
    )
    stage: ClassVar[str] = "base"

    def lab(self) -> Lab:
        return Lab(self.world, self.network, self.seed)

    def build(self, run: Run[Any]) -> None:
        lab = self.lab()
        fit(
            run,
            lab,
            lab.fresh_network(),
            SFT(watch_positions=True),
            lab.pretraining(self.base.batch_size),
            self.base,
        )

    def reference(self, run: Run[Any]) -> CausalLM:
        """The pre-trained model: the base among the inputs, or this run's own."""
        return self.lab().load(checkpoints(run.inputs.get("base", run).folder)[-1])

    def decoder(self, run: Run[Any]) -> LanguageModel:
        """What `tiltlm sample RUN` draws from."""
        return self.reference(run)


@dataclass(frozen=True)
class Rollouts(Base):
    """Draw from the reference: labelled completions, and pairs of the right path with the first wrong draw."""

    rollouts: RolloutSettings = field(default_factory=RolloutSettings)
    stage: ClassVar[str] = "rollouts"

    def inputs(self) -> dict[str, Recipe]:
        return {"base": self.up(Base)}

    def build(self, run: Run[Any]) -> None:
        lab, reference, s = self.lab(), self.reference(run), self.rollouts
        prompts, key = lab.prompts("posttrain")
        stream = lab.stream.child("rollouts")
        pairs = collect_pairs(
            reference,
            prompts,
            key.answers,
            stream=stream.child("pairs"),
            max_tries=s.max_tries,
            batch_size=s.batch_size,
        )
        write_pairs(run.folder / "pairs.jsonl", pairs, overwrite=True)
        if s.n > 0:
            drawn = draw_in_batches(
                reference,
                prompts,
                n=s.n,
                max_new_tokens=lab.width,
                stream=stream.child("labelled"),
                batch_size=s.batch_size,
            )
            drawn.with_(reward=ExactAnswer(key.answers)(drawn)).save(run.folder / "rollouts.safetensors")


@dataclass(frozen=True)
class Classifier(Rollouts):
    """Learn the law of the reward-to-go under the reference at every prefix."""

    value: ValueSettings = field(default_factory=ValueSettings)
    stage: ClassVar[str] = "classifier"

    def inputs(self) -> dict[str, Recipe]:
        return {"base": self.up(Base), "rollouts": self.up(Rollouts)}

    def build(self, run: Run[Any]) -> None:
        lab, s = self.lab(), self.value
        body = copy_of(self.reference(run)) if s.start == "reference" else lab.fresh_network()
        value = ValueHead(body, per_token=s.head == "q", mlp_layers=s.mlp_layers)
        experience = Offline(self.labelled(run).to(lab.device), s.fit.batch_size, lab.stream.child("value-data"))
        fit(run, lab, value, ValueLearning(lm_weight=s.lm_weight, watch_positions=True), experience, s.fit)

    def labelled(self, run: Run[Any]) -> Samples:
        """The data the value learns from, every row with its reward."""
        folder = run.inputs["rollouts"].folder
        if self.value.data == "rollouts":
            return Samples.load(folder / "rollouts.safetensors")
        both = read_pairs(folder / "pairs.jsonl").pairs.both()
        return both.with_(reward=torch.tensor([1.0, 0.0]).repeat_interleave(len(both) // 2))


@dataclass(frozen=True)
class QSharp(Classifier):
    """Decode with log psi = log E[exp(r/beta) | prefix]."""

    target: Goal = field(default_factory=Goal)
    guide: Guide = field(default_factory=Guide)
    test: Test = field(default_factory=Test)
    stage: ClassVar[str] = "q-sharp"

    def inputs(self) -> dict[str, Recipe]:
        return {"base": self.up(Base), "rollouts": self.up(Rollouts), "classifier": self.up(Classifier)}

    def rule(self, beta: float) -> Rule:
        return QSharpRule(beta)

    def decoder(self, run: Run[Any], beta: float | None = None) -> LanguageModel:
        """The guided language model at `beta` (default: the target's)."""
        value = ValueHead.load(checkpoints(run.inputs["classifier"].folder)[-1], device=self.network.device)
        log_odds = self.lab().base_log_odds(self.reference(run)) if self.value.calibrate else 0.0
        twist = ValueTwist(value, self.rule(beta or self.target.beta), log_odds=log_odds)
        return Guided(self.reference(run), twist, top_k=self.guide.top_k, temperature=self.guide.temperature)

    def build(self, run: Run[Any]) -> None:
        lab, reference = self.lab(), self.reference(run)
        rows: list[dict[str, Any]] = []
        for beta in (self.target.beta, *self.betas()):
            ruler = lab.ruler(reference, beta, self.test)
            measured, samples = ruler.measure(self.decoder(run, beta))
            label = self.stage if beta == self.target.beta else f"{self.stage} (beta {beta:g})"
            rows += measured.rows(self.name, label, self.seed)
            if beta == self.target.beta:
                lab.keep(run, measured, samples)
        run.write_json("report.json", rows)

    def betas(self) -> tuple[float, ...]:
        """The further temperatures this decoder is measured at."""
        return self.target.also


@dataclass(frozen=True)
class CD(QSharp):
    """Decode with log psi = E[r | prefix] / beta."""

    stage: ClassVar[str] = "cd"

    def rule(self, beta: float) -> Rule:
        return CDRule(beta)


@dataclass(frozen=True)
class Fudge(QSharp):
    """Decode with log psi = log P(success | prefix)."""

    stage: ClassVar[str] = "fudge"

    def rule(self, beta: float) -> Rule:
        return FudgeRule()

    def betas(self) -> tuple[float, ...]:
        return ()


@dataclass(frozen=True)
class Policy(Rollouts):
    """What the policy methods share: a copy of the reference is trained, then measured."""

    target: Goal = field(default_factory=Goal)
    test: Test = field(default_factory=Test)

    def inputs(self) -> dict[str, Recipe]:
        return {"base": self.up(Base), "rollouts": self.up(Rollouts)}

    def decoder(self, run: Run[Any]) -> LanguageModel:
        """The trained policy."""
        return self.lab().load(checkpoints(run.folder)[-1])

    def measured(self, run: Run[Any]) -> None:
        lab = self.lab()
        ruler = lab.ruler(self.reference(run), self.target.beta, self.test)
        policy = self.decoder(run)
        measured, samples = ruler.measure(policy)
        measured = Measurement(dict(measured.values) | lab.forced(policy, self.test))
        lab.keep(run, measured, samples)
        run.write_json("report.json", measured.rows(self.name, self.stage, self.seed))


@dataclass(frozen=True)
class PairPolicy(Policy):
    """A policy method that learns from the rollouts' pairs."""

    def objective(self) -> Objective:
        raise NotImplementedError

    def settings(self) -> Fit:
        raise NotImplementedError

    def build(self, run: Run[Any]) -> None:
        lab, reference = self.lab(), self.reference(run)
        pairs: Pairs = read_pairs(run.inputs["rollouts"].folder / "pairs.jsonl").pairs.to(lab.device)
        pairs = referenced_pairs(pairs, reference, self.rollouts.batch_size)
        experience = Offline(pairs, self.settings().batch_size, lab.stream.child(self.stage, "data"))
        fit(run, lab, copy_of(reference), self.objective(), experience, self.settings())
        self.measured(run)


@dataclass(frozen=True)
class DPO(PairPolicy):
    """DPO on the pairs."""

    dpo: DPOLoss = field(default_factory=DPOLoss)
    dpo_fit: Fit = POLICY_FIT
    stage: ClassVar[str] = "dpo"

    def objective(self) -> Objective:
        return self.dpo

    def settings(self) -> Fit:
        return self.dpo_fit


@dataclass(frozen=True)
class RPO(PairPolicy):
    """DPO + alpha · NLL on the pairs."""

    rpo: RPOLoss = field(default_factory=RPOLoss)
    rpo_fit: Fit = POLICY_FIT
    stage: ClassVar[str] = "rpo"

    def objective(self) -> Objective:
        return self.rpo

    def settings(self) -> Fit:
        return self.rpo_fit


@dataclass(frozen=True)
class ReinforceSettings:
    """baseline and beta: see policies/reinforce.py. n: samples per prompt. wrong: the reward of a wrong path."""

    baseline: Baseline = "batch_mean"
    beta: float = 0.0
    n: int = 1
    wrong: float = 0.0


@dataclass(frozen=True)
class Reinforce(Policy):
    """REINFORCE on the policy's own samples, at temperature 1 (the original's top_k=1 never explores)."""

    reinforce: ReinforceSettings = field(default_factory=ReinforceSettings)
    reinforce_fit: Fit = POLICY_FIT
    stage: ClassVar[str] = "reinforce"

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
            lab.stream.child("reinforce", "data"),
            n=s.n,
            reference=reference if s.beta > 0 else None,
        )
        fit(run, lab, policy, ReinforceLoss(s.baseline, s.beta), experience, self.reinforce_fit)
        self.measured(run)


METHODS: dict[str, type[QSharp] | type[Policy]] = {
    kind.stage: kind for kind in (QSharp, CD, Fudge, Reinforce, DPO, RPO)
}


@dataclass(frozen=True)
class Evaluate(QSharp, DPO, RPO, Reinforce):
    """Every method against the same target, with the reference and the exact optimum: one table, one picture."""

    methods: tuple[str, ...] = ("reinforce", "dpo", "rpo", "cd", "fudge", "q-sharp")
    stage: ClassVar[str] = "evaluate"

    def __post_init__(self) -> None:
        unknown = set(self.methods) - set(METHODS)
        if unknown:
            raise ValueError(f"unknown methods {sorted(unknown)}; there are {', '.join(METHODS)}")

    def inputs(self) -> dict[str, Recipe]:
        needed: dict[str, Recipe] = {name: self.up(METHODS[name]) for name in self.methods}
        return {"base": self.up(Base), **needed}

    def build(self, run: Run[Any]) -> None:
        from tiltlm.recipes.star_graph_report import write_report

        parts = {name: run.inputs[name] for name in self.methods}
        write_report(run, self.lab(), self.reference(run), self.target.beta, self.test, parts)


KINDS: dict[str, type[Base]] = {
    kind.stage: kind for kind in (Base, Rollouts, Classifier, QSharp, CD, Fudge, Reinforce, DPO, RPO, Evaluate)
}


def paper(kind: type[Base], family: str, world: World, network: str) -> Base:
    """A stage with the paper's settings (Appendix C, and the original README where the paper is silent)."""
    adam = Optim(weight_decay=0.1)
    steps = 200_000 // 256
    policy = Fit(replace(adam, lr=1e-4), Pace(steps=10 * steps, warmup=steps), batch_size=256)
    settings: dict[str, Any] = {
        "family": family,
        "seed": 1337,
        "world": world,
        "network": Network(name=network, tokenizer=network),
        "base": Fit(replace(adam, lr=2.5e-4), Pace(steps=30 * steps, warmup=234), batch_size=256),
        "rollouts": RolloutSettings(n=0),
        "value": ValueSettings(data="pairs", start="pretrained", lm_weight=0.0, fit=policy),
        "target": Goal(beta=0.1, also=()),
        "guide": Guide(top_k=10),
        "test": Test(graphs=20_000),
        "dpo_fit": policy,
        "rpo_fit": policy,
        "reinforce_fit": replace(policy, optim=replace(adam, lr=1e-5)),
    }
    return kind(**{name: value for name, value in settings.items() if name in kind.__dataclass_fields__})


def _papers_world(degree: int, path_length: int) -> World:
    return World(degree, path_length, 50, pretrain=200_000, posttrain=200_000, test=20_000, imitate="goal")


def recipe(name: str) -> Recipe:
    """The recipe called `family/stage`."""
    family, stage = name.split("/")
    kind = KINDS[stage]
    if family == "star-graph":
        return kind(family=family)
    presets = {
        "star-graph-g25": (_papers_world(2, 5), "gpt2"),
        "star-graph-g55": (_papers_world(5, 5), "gpt2"),
        "star-graph-g38": (_papers_world(3, 8), "gpt2-medium"),
    }
    return paper(kind, family, *presets[family])

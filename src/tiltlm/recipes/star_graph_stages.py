"""The star-graph stages up to value-guided decoding: graphs, base, rollouts, classifier, decoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tiltlm.experience import Offline
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.policies.sft import SFT
from tiltlm.recipes.star_graph_lab import Lab, fit
from tiltlm.recipes.star_graph_settings import (
    BASE_FIT,
    Fit,
    Goal,
    Guide,
    Network,
    RolloutSettings,
    Test,
    ValueSettings,
    World,
)
from tiltlm.rewards.exact_answer import ExactAnswer
from tiltlm.run import Recipe, Run
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samplers.guided import Guided
from tiltlm.samples import Samples
from tiltlm.tasks.star_graph import SIZES, generate_files
from tiltlm.tasks.star_graph_pairs import collect_pairs, read_pairs, write_pairs
from tiltlm.train import checkpoints
from tiltlm.twists.cd import CD as CDRule
from tiltlm.twists.fudge import Fudge as FudgeRule
from tiltlm.twists.q_sharp import QSharp as QSharpRule
from tiltlm.twists.value import Rule, ValueLearning, ValueTwist


@dataclass(frozen=True)
class Graphs(Recipe):
    """Write the world's graphs as text files of the original's format; `--world.folder` reads them."""

    world: World = World(pretrain=200_000, posttrain=200_000, test=20_000)
    stage: ClassVar[str] = "graphs"

    def build(self, run: Run[Any]) -> None:
        sizes = {split: n for split in SIZES if (n := vars(self.world)[split]) > 0}
        generate_files(run.folder, self.world.graph, seed=self.seed, sizes=sizes, overwrite=True)


@dataclass(frozen=True)
class Base(Recipe):
    """Pre-train the reference on paths of star graphs."""

    world: World = World()
    network: Network = Network()
    base: Fit = BASE_FIT
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

    rollouts: RolloutSettings = RolloutSettings()
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

    value: ValueSettings = ValueSettings()
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

    target: Goal = Goal()
    guide: Guide = Guide()
    test: Test = Test()
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

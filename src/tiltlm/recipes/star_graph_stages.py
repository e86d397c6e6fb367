"""The star-graph stages up to value-guided decoding: graphs, base, rollouts, classifier, decoders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from tiltlm.data.star_graph import file_name, write_lines
from tiltlm.data.star_graph_pairs import collect_pairs, read_pairs, write_pairs
from tiltlm.experience import Offline
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.policies.sft import SFT
from tiltlm.progress import note
from tiltlm.recipes.fitting import Fit, fit
from tiltlm.recipes.star_graph_lab import Lab
from tiltlm.recipes.star_graph_settings import (
    BASE_FIT,
    Goal,
    Guide,
    Network,
    RolloutSettings,
    Test,
    ValueSettings,
    World,
)
from tiltlm.rewards.exact_answer import ExactAnswer
from tiltlm.ruler.measure import Measurement
from tiltlm.run import OldRecipe, Recipe, Run
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samplers.guided import Guided
from tiltlm.samples import Samples
from tiltlm.train import checkpoints, keep_as_it_is
from tiltlm.twists.cd import CD as CDRule
from tiltlm.twists.fudge import Fudge as FudgeRule
from tiltlm.twists.q_sharp import QSharp as QSharpRule
from tiltlm.twists.value import Rule, ValueLearning, ValueTwist


@dataclass(frozen=True)
class Graphs(OldRecipe):
    """Write the world's graphs as text files of the original's format; `--world.folder` reads them back."""

    world: World = World(pretrain=200_000, posttrain=200_000, test=20_000)
    stage: ClassVar[str] = "graphs"

    def build(self, run: Run[Any]) -> None:
        for split, graphs in Lab(self.world, Network(), self.seed).all_graphs().items():
            write_lines(run.folder / file_name(self.world.graph, split, len(graphs)), graphs, overwrite=True)


@dataclass(frozen=True)
class Base(OldRecipe):
    """Pre-train the reference on paths of star graphs."""

    world: World = World()
    network: Network = Network()
    base: Fit = BASE_FIT
    pretrained: str = ""
    """Take this trained model (a folder or hub name) as the reference, and train none."""

    stage: ClassVar[str] = "base"

    def lab(self) -> Lab:
        return Lab(self.world, self.network, self.seed)

    def build(self, run: Run[Any]) -> None:
        lab = self.lab()
        if self.pretrained:
            keep_as_it_is(lab.load(self.pretrained), run.folder)
            return
        objective, experience = SFT(watch_positions=True), lab.pretraining(self.base.batch_size)
        fit(run, lab.fresh_network(), objective, experience, self.base, device=lab.device, stream=lab.stream)

    def reference(self, run: Run[Any]) -> CausalLM:
        """The pre-trained model: the base among the inputs, or this run's own."""
        return self.lab().load(checkpoints(run.inputs.get("base", run).folder)[-1])

    def decoder(self, run: Run[Any]) -> LanguageModel:
        return self.reference(run)

    def speech(self, run: Run[Any]) -> tuple[Any, int | None]:
        lab = self.lab()
        return lab.tokenizer.hf, lab.width


@dataclass(frozen=True)
class Rollouts(Base):
    """Draw from the reference: labelled completions, and pairs of the right path with the first wrong draw."""

    rollouts: RolloutSettings = RolloutSettings()
    stage: ClassVar[str] = "rollouts"

    def inputs(self) -> dict[str, Recipe]:
        return {"base": self.up(Base)}

    def check(self) -> None:
        if self.rollouts.pairs and not Path(self.rollouts.pairs).is_file():
            raise FileNotFoundError(f"--rollouts.pairs {self.rollouts.pairs}: no such file")

    def build(self, run: Run[Any]) -> None:
        lab, reference, s = self.lab(), self.reference(run), self.rollouts
        prompts, key = lab.prompts("posttrain")
        stream, b = lab.stream.child("rollouts"), s.batch_size
        if s.pairs:
            pairs = read_pairs(s.pairs)
            note(f"{len(pairs)} pairs from {s.pairs} ({pairs.filtered} left out: not as long as the answer)")
        else:
            own = stream.child("pairs")
            pairs = collect_pairs(reference, prompts, key.answers, stream=own, max_tries=s.max_tries, batch_size=b)
        write_pairs(run.folder / "pairs.jsonl", pairs, overwrite=True)
        if s.n > 0:
            own, width = stream.child("labelled"), lab.width
            drawn = draw_in_batches(reference, prompts, n=s.n, max_new_tokens=width, stream=own, batch_size=b)
            drawn.with_(reward=ExactAnswer(key.answers)(drawn)).save(run.folder / "rollouts.safetensors")


@dataclass(frozen=True)
class Classifier(Rollouts):
    """Learn the law of the reward-to-go under the reference at every prefix."""

    value: ValueSettings = ValueSettings()
    stage: ClassVar[str] = "classifier"

    def __post_init__(self) -> None:
        if self.value.data == "rollouts" and self.rollouts.n < 1:
            raise ValueError("--value.data rollouts needs labelled draws: set --rollouts.n to 1 or more")
        if self.world.teacherless and self.value.lm_weight > 0:
            raise ValueError("a teacherless reference reads no answers: set --value.lm-weight 0")

    def inputs(self) -> dict[str, Recipe]:
        return {"base": self.up(Base), "rollouts": self.up(Rollouts)}

    def build(self, run: Run[Any]) -> None:
        lab, s = self.lab(), self.value
        body = copy_of(self.reference(run)) if s.start == "reference" else lab.fresh_network()
        value = ValueHead(body, per_token=s.head == "q", mlp_layers=s.mlp_layers)
        experience = Offline(self.labelled(run).to(lab.device), s.fit.batch_size, lab.stream.child("value-data"))
        fit(
            run,
            value,
            ValueLearning(lm_weight=s.lm_weight, watch_positions=True),
            experience,
            s.fit,
            device=lab.device,
            stream=lab.stream,
        )
        measured = Measurement(lab.value_report(value, self.reference(run), Test()))
        run.write_json("report.json", measured.rows(self.name, self.stage, self.seed))

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guide.calibrate and self.value.data != "pairs":
            raise ValueError("calibrate puts right what *pairs* leave out; a value learned on rollouts needs none")

    def inputs(self) -> dict[str, Recipe]:
        return {"base": self.up(Base), "rollouts": self.up(Rollouts), "classifier": self.up(Classifier)}

    def rule(self, beta: float) -> Rule:
        return QSharpRule(beta)

    def decoder(self, run: Run[Any], beta: float | None = None) -> LanguageModel:
        """The guided language model at `beta` (default: the target's)."""
        value = ValueHead.load(checkpoints(run.inputs["classifier"].folder)[-1], device=self.lab().device)
        log_odds = self.lab().base_log_odds(self.reference(run)) if self.guide.calibrate else 0.0
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
        return tuple(beta for beta in self.guide.also if beta != self.target.beta)


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

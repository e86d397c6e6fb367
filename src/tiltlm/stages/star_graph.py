"""The star graph's own stages: graphs as text files, the pre-trained base, and its labelled draws and pairs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from tiltlm.data.star_graph import file_name, write_lines
from tiltlm.data.star_graph_pairs import collect_pairs, read_pairs, write_pairs
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM
from tiltlm.policies.sft import SFT
from tiltlm.progress import note
from tiltlm.rewards.exact_answer import ExactAnswer
from tiltlm.run import Recipe, Run
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samples import Tokens
from tiltlm.settings import SPEED
from tiltlm.stages.star_graph_bench import Bench
from tiltlm.stages.task import OfTask
from tiltlm.stages.training import train
from tiltlm.train import checkpoints, keep_as_it_is


@dataclass(frozen=True)
class RolloutSettings:
    """What is drawn from the reference."""

    n: int = 2
    """Labelled completions per graph (0: none, only pairs)."""

    pairs: str = ""
    """Take the pairs from this .jsonl file, in the original's format, instead of drawing them."""

    max_tries: int = 1000
    """Draws per graph until the first wrong one, for the pairs."""

    batch_size: int = field(default=1024, metadata=SPEED)
    """Rows at once."""

    def __post_init__(self) -> None:
        if self.n < 0 or self.max_tries < 1 or self.batch_size < 1:
            raise ValueError(f"max_tries and batch_size are 1 or more, n not negative; got {self}")


@dataclass(frozen=True)
class _Stage(OfTask):
    """task: a `tasks.star_graph.StarGraph`; what is no concern of a stage is set aside in its key (`counted`)."""

    task: Any
    seed: int = 0

    def bench(self) -> Bench:
        found: Bench = self.task.bench(self.seed)
        return found

    def inputs(self) -> dict[str, Recipe]:
        return {}

    def speech(self, run: Run[Any]) -> tuple[Any, int | None]:
        bench = self.bench()
        return bench.tokenizer.hf, bench.width

    def room(self, run: Run[Any]) -> int | None:
        return None


@dataclass(frozen=True)
class WriteGraphs(_Stage):
    """Write the world's graphs as text files of the original's format; `--task.world.folder` reads them back."""

    stage: ClassVar[str] = "graphs"
    computes: ClassVar[bool] = False

    def counted(self) -> WriteGraphs:
        return replace(self, task=self.task.graphs_alone())

    def build(self, run: Run[Any]) -> None:
        for split, graphs in self.bench().all_graphs().items():
            write_lines(run.folder / file_name(self.task.world.graph, split, len(graphs)), graphs, overwrite=True)


@dataclass(frozen=True)
class Base(_Stage):
    """Pre-train the reference on paths of star graphs."""

    stage: ClassVar[str] = "base"
    together: ClassVar[bool] = True

    def counted(self) -> Base:
        return replace(self, task=self.task.base_alone())

    def check(self) -> None:
        super().check()
        if self.task.base.evaluations:
            raise ValueError(f"{self.name} measures nothing while it trains: set --task.base.evaluations to 0")

    def build(self, run: Run[Any]) -> None:
        bench, how = self.bench(), self.task.base
        if self.task.pretrained:
            keep_as_it_is(bench.load(self.task.pretrained), run.folder)
            return
        objective, experience = SFT(watch_positions=True), bench.pretraining(how.batch_size)
        train(run, bench.fresh_network(), objective, experience, how, bench.device, bench.stream)

    def reference(self, run: Run[Any]) -> CausalLM:
        """The pre-trained model, frozen."""
        return self.bench().load(checkpoints(run.folder)[-1]).requires_grad_(False)

    def decoder(self, run: Run[Any]) -> LanguageModel:
        return self.reference(run)


@dataclass(frozen=True)
class Rollouts(_Stage):
    """Draw from the reference: labelled completions, and pairs of the right path with the first wrong draw."""

    stage: ClassVar[str] = "rollouts"

    def counted(self) -> Rollouts:
        return replace(self, task=self.task.rollouts_alone())

    def inputs(self) -> dict[str, Recipe]:
        return {"base": Base(self.task.base_alone(), self.seed)}

    def build(self, run: Run[Any]) -> None:
        bench, s, base = self.bench(), self.task.rollouts, run.inputs["base"]
        reference = base.recipe.reference(base)
        prompts = bench.prompts(bench.graphs("posttrain"))
        stream, b, answers = bench.stream.child("rollouts"), s.batch_size, prompts.conditions
        if s.pairs:
            pairs = read_pairs(s.pairs)
            note(f"{len(pairs)} pairs from {s.pairs} ({pairs.filtered} left out: not as long as the answer)")
        else:
            own, asked = stream.child("pairs"), Tokens(prompts.ids, prompts.mask)
            pairs = collect_pairs(reference, asked, answers, stream=own, max_tries=s.max_tries, batch_size=b)
        write_pairs(run.folder / "pairs.jsonl", pairs, overwrite=True)
        if s.n > 0:
            own = stream.child("labelled")
            drawn = draw_in_batches(
                reference, prompts, n=s.n, max_new_tokens=bench.width, stream=own, batch_size=b
            )
            drawn.with_(reward=ExactAnswer(answers)(drawn)).save(run.folder / "rollouts.safetensors")

    def decoder(self, run: Run[Any]) -> LanguageModel:
        base = run.inputs["base"]
        found: LanguageModel = base.recipe.reference(base)
        return found

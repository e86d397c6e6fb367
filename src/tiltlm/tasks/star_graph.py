"""Star graphs (Q#, arXiv:2502.20548, §3.1): find the arm that ends in the goal; r = 1 for the right path, else 0.

With one right answer a prompt, log Z(x) = log(1 + p(e^{1/beta} − 1)), p = pi_ref(answer | x): everything that a policy is
measured by is exact but its draws. Prompts carry their answers as conditions, which the reward reads and no network sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
import tyro

from tiltlm.data.star_graph_pairs import read_pairs
from tiltlm.data.star_graph_world import World
from tiltlm.experience import referenced_pairs
from tiltlm.fit import Fit
from tiltlm.models.causal import CausalLM
from tiltlm.objective import positive
from tiltlm.problem import Facts, Fed, Problem, Split
from tiltlm.rewards.exact_answer import ExactAnswer
from tiltlm.run import Recipe, Run
from tiltlm.samples import Conditioned, Pairs, Samples, conditions_of
from tiltlm.settings import SPEED
from tiltlm.stages.star_graph import Base, Rollouts, RolloutSettings, WriteGraphs
from tiltlm.stages.star_graph_bench import Bench, Network
from tiltlm.stages.task import Task
from tiltlm.target import Target
from tiltlm.tasks.star_graph_checks import Answers, log_odds, readable, results

WALKER = Fit(
    lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01, steps=4000, warmup=30, until=0.05, watch=("nll/3",), batch_size=64
)  # fmt: skip
"""Pre-training of the walker: until the third token, which only looking up can tell, is known."""


@dataclass(frozen=True)
class StarGraph(Task):
    """Paths in star graphs; the reference is pre-trained here."""

    world: World = World()
    network: Network = Network()
    base: Fit = WALKER
    """How the reference is pre-trained."""

    pretrained: str = ""
    """Take this trained model (a folder or hub name) as the reference, and train none."""

    rollouts: RolloutSettings = RolloutSettings()
    values: Literal["rollouts", "pairs"] = "rollouts"
    """What values learn from: labelled rollouts, or the paper's pairs (half right by construction, so not calibrated)."""

    beta: float = 0.1
    """pi* ∝ pi_ref · exp(r / beta): smaller leans harder on the reward."""

    device: str = field(default="cpu", metadata=SPEED)
    """cpu, cuda, cuda:N, mps, or auto: the first of cuda, mps and cpu that is there."""

    name: tyro.conf.Suppress[str] = "star-graph"
    shows = ("world.degree", "world.path_length", "world.posttrain", "beta", "values", "device")

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        if self.values == "rollouts" and self.rollouts.n < 1:
            raise ValueError(
                "values learn from rollouts, and these need labelled draws: set --task.rollouts.n to 1 or more, or "
                "--task.values pairs"
            )

    # ---- what is known, what must be built --------------------------------------------------------------------------

    def facts(self) -> Facts:
        return Facts(
            self.beta, "several", frozenset({"pairs", "values", "answers"}), r_max=1.0, atoms=(0.0, 1.0), log_z=True,
            source="own", halved=self.values == "pairs", teacherless=self.world.teacherless, untrained=True,
        )  # fmt: skip

    def bench(self, seed: int) -> Bench:
        return Bench(self.world, self.network, self.device, seed)

    def needs(self, seed: int) -> dict[str, Recipe]:
        return {"base": Base(self.base_alone(), seed), "rollouts": Rollouts(self.rollouts_alone(), seed)}

    def stages(self, seed: int) -> dict[str, Recipe]:
        written = self.graphs_alone()
        if not self.world.pretrain:  # as many as the original's files hold
            world = replace(self.world, pretrain=200_000, posttrain=200_000, test=20_000)
            written = replace(written, world=world)
        return {"graphs": WriteGraphs(written, seed)} | self.needs(seed)

    def graphs_alone(self) -> Self:
        """This task with every setting at its default that the graphs do not depend on."""
        return type(self)(world=self.world, device=self.device, name=self.name)

    def base_alone(self) -> Self:
        """The same for the reference."""
        world = replace(self.world, posttrain=World.posttrain, test=World.test)
        how = WALKER if self.pretrained else self.base
        alone = self.graphs_alone()
        return replace(alone, world=world, network=self.network, base=how, pretrained=self.pretrained)

    def rollouts_alone(self) -> Self:
        """The same for what is drawn from it."""
        world = replace(self.world, test=World.test)
        return replace(self.base_alone(), world=world, rollouts=self.rollouts, values="pairs")

    def untilted(self) -> Self:
        return replace(self.at(1.0), values="pairs")

    def files(self) -> list[str]:
        named = (
            self.network.name,
            self.network.tokenizer,
            self.pretrained,
            self.rollouts.pairs,
            self.world.folder,
        )
        return [name for name in named if name]

    def check(self) -> None:
        self.world.check()
        if self.rollouts.pairs and not Path(self.rollouts.pairs).is_file():
            raise FileNotFoundError(f"--task.rollouts.pairs {self.rollouts.pairs}: no such file")

    def speech(self, runs: Mapping[str, Run[Any]]) -> tuple[Any, int | None, int | None]:
        bench = self.bench(runs["base"].recipe.seed)
        return bench.tokenizer.hf, bench.width, None

    def title(self) -> str:
        return f"star graph G({self.world.degree},{self.world.path_length})"

    def files_of(self, comparison: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
        stem = f"results_deg_{self.world.degree}_path_{self.world.path_length}.json"
        return {stem: results(rows, self.beta)}

    # ---- the problem ------------------------------------------------------------------------------------------------

    def problem(self, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
        bench = self.bench(seed)
        reference: CausalLM = runs["base"].recipe.reference(runs["base"])
        graphs = bench.graphs("test")
        train, test = bench.prompts(bench.graphs("posttrain")), bench.prompts(graphs)
        answers = Answers(bench.tokenizer.key(graphs), bench.width)
        return Problem(
            Target(reference, right_path, self.beta), {"train": train, "test": test}, bench.width, bench.stream,
            self.facts(), bench.tokenizer.hf, own=self.own(runs["rollouts"], reference, train),
            orders={"values": bench.stream.child("value-data")}, log_z=answers.log_z_of(reference),
            checks=answers.checks(), expected_reward=answers.right, further=answers.forced, optimum=answers.optimum,
            load=lambda folder: bench.load(folder).requires_grad_(False), untrained=bench.fresh_network,
            log_odds=lambda: log_odds(reference, train), readable=lambda samples: readable(samples, bench.tokenizer),
            value_report=lambda values: answers.value_report(
                values, reference, test, right_path, bench.stream.child("value-test")
            ),
            test_stream=bench.stream.child("measure"), reference_name=runs["base"].key,
        )  # fmt: skip

    def own(
        self, rollouts: Run[Any], reference: CausalLM, train: Conditioned
    ) -> dict[Fed, Callable[[Split], Pairs | Samples]]:
        """The pairs, what values learn from, and the right paths, of the training graphs."""

        def of_training(make: Callable[[], Pairs | Samples]) -> Callable[[Split], Pairs | Samples]:
            def found(split: Split) -> Pairs | Samples:
                if split != "train":
                    raise ValueError(
                        f"star graphs have rows of their own to train on alone; got the split {split}"
                    )
                return make()

            return found

        def pairs() -> Pairs:
            stored = read_pairs(rollouts.folder / "pairs.jsonl").pairs.to(train.device)
            return referenced_pairs(stored, reference, self.rollouts.batch_size)

        def values() -> Samples:
            if self.values == "rollouts":
                return Samples.load(rollouts.folder / "rollouts.safetensors")
            both = read_pairs(rollouts.folder / "pairs.jsonl").pairs.both()
            return both.with_(reward=torch.tensor([1.0, 0.0]).repeat_interleave(len(both) // 2))

        def answers() -> Samples:
            right = train.conditions
            return Samples(train, torch.arange(len(train), device=train.device), right.ids, right.mask)

        return {"pairs": of_training(pairs), "values": of_training(values), "answers": of_training(answers)}


def right_path(samples: Samples) -> torch.Tensor:
    """r(x, y): 1 where the completion is the answer that its prompt carries, else 0; [N]."""
    return ExactAnswer(conditions_of(samples.prompts))(samples)

"""What alignment ends in: every policy and its checkpoints measured on held-out prompts, side by side, and the frontier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor

from tiltlm.jsonl import read_json
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM
from tiltlm.policies.exo_rw import group_log_ratios, group_metrics
from tiltlm.progress import note
from tiltlm.recipes.preferences_data import answer_of
from tiltlm.recipes.preferences_lab import EncodedReward, Lab
from tiltlm.recipes.preferences_policies import (
    POLICIES,
    Aligned,
    APOPolicy,
    CDPOPolicy,
    DpoPrefPolicy,
    ExoPrefPolicy,
    HingePolicy,
    IPOPolicy,
    KTOPolicy,
    ORPOPolicy,
    RobustDPOPolicy,
    RPOPolicy,
    SimPOPolicy,
)
from tiltlm.recipes.preferences_settings import Test
from tiltlm.recipes.preferences_verdicts import are_verdicts
from tiltlm.rewards.bradley_terry import ahead
from tiltlm.ruler.frontier import frontier_plot
from tiltlm.ruler.judge import doubt
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.ruler.table import read_report, table
from tiltlm.run import Recipe, Run
from tiltlm.samples import Samples
from tiltlm.target import Target
from tiltlm.train import best_checkpoint, checkpoints, step_of

HEADINGS = {
    "reward": "E[r]",
    "kl_to_reference": "KL(q‖ref)",
    "objective": "J",
    "gap": "gap",
    "kl_to_target_at_least": "KL(q‖pi*) ≥",
    "win_rate": "wins",
    "length": "tokens",
    "finished": "finished",
    "updates": "updates",
}
"""Columns of the table. updates: of the checkpoint that was best by J on validation prompts (0: training only made it
worse). gap: KL within held-out groups, 0 at pi*; wins: against the responses of the data."""


SHOWN = ("prompt", "chosen", "rejected", "completion", "label")
"""What the report page shows of the data, beside what a policy said."""


@dataclass(frozen=True)
class Bench:
    """What every policy of a comparison is held against: prompts, their responses in the data, target, groups."""

    recipe: Measured
    run: Run[Any]
    lab: Lab

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows = self.recipe.rows_of(self.run, "test")
        return rows[: self.recipe.test.prompts]

    def ruler(self, reference: CausalLM) -> Ruler:
        recipe, lab = self.recipe, self.lab
        reward, rows = recipe.judge_of(self.run, lab), self.rows
        prompts = lab.encoder.prompts([row["prompt"] for row in rows]).to(lab.device)
        theirs = torch.tensor(self.of_data(reward, rows, [answer_of(row) for row in rows]), device=lab.device)
        checks: dict[str, Callable[[Samples], Tensor]] = {
            "win_rate": lambda samples: ahead(_reward(samples) - theirs[samples.prompt_index]),
            "length": lambda samples: samples.mask.sum(1).double(),
            "finished": lambda samples: (
                samples.finished.double() if samples.finished is not None else samples.mask[:, 0]
            ),
            **reward.terms(),
        }
        return Ruler(
            Target(reference, reward, recipe.goal.beta), prompts, recipe.base.new_tokens, lab.stream.child("test"),
            n=recipe.test.n, batch_size=recipe.test.batch_size, checks=checks,
        )  # fmt: skip

    def fair(self, found: Measurement) -> Measurement:
        """The measurement, wins counted on those prompts only whose response in the data is a wanted one."""
        good = torch.tensor([row.get("label", True) for row in self.rows])
        if bool(good.all()):
            return found
        values = {name: x for name, x in found.values.items() if name != "win_rate"}
        wins = (
            {"win_rate": found.values["win_rate"][good.to(found.values["win_rate"].device)]} if good.any() else {}
        )
        return replace(found, values=values | wins)

    def of_data(self, reward: EncodedReward, rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
        """What responses of the data, whole, are worth behind their prompts as the policies see them."""
        encoder = self.lab.encoder
        asked = [encoder.prompt_text(encoder.prompt(row["prompt"])) for row in rows]
        return reward.reward.of(asked, responses)

    def gap(self, policy: LanguageModel, reference: LanguageModel) -> Tensor:
        """KL(q‖p) of every held-out group, [G]; empty where the data was not labelled."""
        if "label" not in self.run.inputs:
            return torch.zeros(0)
        recipe = self.recipe
        groups = recipe.groups(self.run, self.lab, reference, "test")
        with torch.no_grad():
            parts = [groups.select(slice(k, k + 32)) for k in range(0, len(groups), 32)]
            h = [group_log_ratios(policy, part) for part in parts]
        betas = recipe.goal.beta_r, recipe.goal.beta_pi
        found = [group_metrics(x, part.reward, *betas)["gap"] for x, part in zip(h, parts, strict=True)]
        return torch.cat(found).cpu()


def _reward(samples: Samples) -> Tensor:
    assert samples.reward is not None
    return samples.reward


@dataclass(frozen=True)
class Measured(Aligned):
    """Measure a policy's checkpoints on prompts it has not seen."""

    test: Test = Test()

    def inputs(self) -> dict[str, Recipe]:
        policy: dict[str, Recipe] = {self.method: self.up(POLICIES[self.method])}
        return super().inputs() | policy

    @property
    def method(self) -> str:
        return self.stage

    def policies(self, run: Run[Any]) -> Iterator[tuple[int, bool, CausalLM]]:
        """The checkpoints to measure: (updates, whether it is the best, policy), one in memory at a time, the best last."""
        kept = run.inputs[self.method]
        own, best = kept.recipe, best_checkpoint(kept.folder)
        others = [path for path in checkpoints(kept.folder) if step_of(path) > 0]
        count = min(self.test.checkpoints, len(others)) if self.test.checkpoints > 1 else 0
        on_the_way = [others[round(k * (len(others) - 1) / max(1, count - 1))] for k in range(count)]
        for path in on_the_way:
            yield step_of(path), False, own.policy_at(kept, path)
        yield step_of(best), True, own.policy_at(kept, best)

    def label(self) -> str:
        """The method's name in tables."""
        return f"{self.method} K={self.align.size}" if self.align.source == "labelled" else self.method

    def build(self, run: Run[Any]) -> None:
        lab = self.lab(run)
        reference, bench = lab.load(self.start(run)), Bench(self, run, lab)
        ruler, curve = bench.ruler(reference), []
        for updates, best, policy in self.policies(run):
            found, samples = (ruler if best else replace(ruler, n=1)).measure(policy)
            found = bench.fair(found)
            rows = found.rows(self.name, self.label(), self.seed)
            if best and updates == 0 and self.stage != ReferenceMeasured.stage:
                note(f"[yellow]{self.name}: no update improved J on validation prompts, so the policy measured here is the "
                     "reference itself[/]: lower --align.train.lr, or look at evals.jsonl of the training")  # fmt: skip
            if best:
                rows.append(self.row(self.label(), "updates", updates, unit="updates"))
                gap = bench.gap(policy, reference)
                rows += [self.estimate(self.label(), "gap", gap, "nats")] if len(gap) else []
            else:
                note(f"{self.name}: checkpoint of update {updates}: {found.estimates()['objective']} (J)")
                curve += [row | {"updates": updates} for row in rows]
        found.save(run.folder / "measurement.safetensors")
        samples.save(run.folder / "samples.safetensors")
        run.write_json("curve.json", curve)
        run.write_json("report.json", rows)
        run.write_jsonl("samples.jsonl", self.side_by_side(lab, bench.rows, samples))

    def side_by_side(self, lab: Lab, rows: list[dict[str, Any]], samples: Samples) -> list[dict[str, Any]]:
        """A line per prompt: what the data holds, and what the policy said first."""
        first = samples.select(slice(0, None, self.test.n))
        texts, rewards = [lab.encoder.text(ids) for ids in first.completions.lists()], _reward(first).tolist()
        kept = [{name: row[name] for name in SHOWN if name in row} for row in rows[:200]]
        said = [{"generated": text, "reward": round(r, 4)} for text, r in zip(texts, rewards, strict=True)]
        return [row | more for row, more in zip(kept, said, strict=False)]

    def decoder(self, run: Run[Any]) -> LanguageModel:
        kept = run.inputs[self.method]
        return kept.recipe.decoder(kept)

    def show(self, run: Run[Any]) -> None:
        rows = read_report(run.folder / "report.json")
        Console(width=160, highlight=False).print(table(rows, self.name, HEADINGS))
        say_doubt([run])


@dataclass(frozen=True)
class ReferenceMeasured(Measured):
    """Measure the reference itself, and what the data's responses are worth."""

    stage: ClassVar[str] = "reference"
    learns_from: ClassVar[tuple[str, ...]] = ("prompt",)  # nothing is learnt, whatever the data holds

    def inputs(self) -> dict[str, Recipe]:
        return Aligned.inputs(self)

    def policies(self, run: Run[Any]) -> Iterator[tuple[int, bool, CausalLM]]:
        yield 0, True, self.lab(run).load(self.start(run))

    def decoder(self, run: Run[Any]) -> LanguageModel:
        return self.lab(run).load(self.start(run))

    def label(self) -> str:
        return "reference"

    def build(self, run: Run[Any]) -> None:
        super().build(run)
        lab = self.lab(run)
        bench, rows = Bench(self, run, lab), read_report(run.folder / "report.json")
        reward = self.judge_of(run, lab)
        for name, column, some in responses_of(bench.rows):
            value = torch.tensor(bench.of_data(reward, some, [row[column] for row in some]))
            rows.append(self.estimate(f"{name} responses", "reward", value, "reward"))
        run.write_json("report.json", rows)


def say_doubt(runs: Iterable[Run[Any]]) -> None:
    """Say, once each, which reward models that these runs rest on know no more than a coin or the length rule."""
    judges = {run.inputs["reward-model"].folder for run in runs if "reward-model" in run.inputs}
    for folder in judges:
        text = doubt(read_report(folder / "report.json"))
        if text is not None:
            note(f"[yellow]{text}[/] ({folder})")


def responses_of(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """(name, column, rows) of every kind of response the data has: those of verdicts are wanted or unwanted."""
    if are_verdicts(rows):
        for name, good in (("wanted", True), ("unwanted", False)):
            some = [row for row in rows if row["label"] is good]
            if some:
                yield name, "completion", some
        return
    for column in ("chosen", "rejected", "completion"):
        if column in rows[0]:
            yield column, column, rows


def measured(kind: type[Aligned]) -> type[Measured]:
    """The stage that measures what the training stage `kind` made: all its settings, and how to test."""
    name, stage = f"Measured{kind.__name__}", kind.stage.removesuffix("-policy")
    about = {"stage": stage, "__doc__": f"Measure the policy of {stage}.", "__module__": __name__}
    return dataclass(frozen=True)(type(name, (Measured, kind), about))


MEASURED: dict[str, type[Measured]] = {name: measured(kind) for name, kind in POLICIES.items()}
MEASURED["reference"] = ReferenceMeasured


@dataclass(frozen=True)
class Evaluate(
    Measured, ExoPrefPolicy, DpoPrefPolicy, CDPOPolicy, RobustDPOPolicy, IPOPolicy, HingePolicy, APOPolicy, RPOPolicy,
    SimPOPolicy, ORPOPolicy, KTOPolicy,
):  # fmt: skip
    """Methods side by side against one target: table, frontier over checkpoints, samples."""

    methods: tuple[str, ...] = ("reference", "exo-rw", "dpo-rw", "exo-pref", "dpo-pref", "rpo")
    sizes: tuple[int, ...] = ()
    """Sizes of groups that every method is trained with, one after the other (empty: `align.size` alone)."""

    betas: tuple[float, ...] = ()
    """Temperatures of the target, reached by another beta_r (empty: the goal's alone): a frontier over beta."""

    stage: ClassVar[str] = "evaluate"
    gathers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in MEASURED]
        if unknown:
            raise ValueError(f"there is no method {unknown[0]!r}; there are {', '.join(MEASURED)}")
        if not self.methods:
            raise ValueError(f"name at least one method of {', '.join(MEASURED)}")

    def inputs(self) -> dict[str, Recipe]:
        found: dict[str, Recipe] = {}
        for name in self.methods:
            for size in (self.sizes if name != "reference" else ()) or (self.align.size,):
                for beta in self.betas or (self.goal.beta,):
                    goal = replace(self.goal, beta_r=beta / self.goal.beta_pi) if self.betas else self.goal
                    at = replace(self, align=replace(self.align, size=size), goal=goal)
                    found[f"{name} K={size} beta={beta:g}"] = at.up(MEASURED[name])
        return found

    def called(self, recipe: Measured) -> str:
        """A policy's name in the tables of this comparison."""
        return recipe.label() + (f" (beta {recipe.goal.beta:g})" if len(self.betas) > 1 else "")

    def build(self, run: Run[Any]) -> None:
        rows, curve = self.gathered(run, "report.json"), self.gathered(run, "curve.json")
        rows += self.distances(run)
        run.write_json("report.json", rows)
        run.write_json("curve.json", curve)
        main = [row for row in rows if not row["method"].endswith("responses")]
        betas = ", ".join(f"{beta:g}" for beta in self.betas or (self.goal.beta,))
        title = f"{self.family}, seed {self.seed}, beta {betas} (lines: checkpoints)"
        frontier_plot(main, None, run.folder / "frontier.png", title, ways=curve)

    def gathered(self, run: Run[Any], name: str) -> list[dict[str, Any]]:
        """The rows of all inputs' files called `name`."""
        return [
            row | {"method": row["method"].replace(each.recipe.label(), self.called(each.recipe))}
            for each in run.inputs.values()
            for row in read_json(each.folder / name)
        ]

    def distances(self, run: Run[Any]) -> list[dict[str, Any]]:
        """KL(q‖pi*) at least: a lower bound of log Z from all methods' draws together, less the method's own F.

        The mean of all their weights is an unbiased Z of every prompt, whoever drew; its log is low in expectation. (The
        best method's bound alone would be picked for its luck.)
        """
        kept = {self.called(each.recipe): each for each in run.inputs.values()}
        rows = []
        for beta in {each.recipe.goal.beta for each in kept.values()}:
            folders = {name: each.folder for name, each in kept.items() if each.recipe.goal.beta == beta}
            drawn = [Samples.load(folder / "samples.safetensors").log_w for folder in folders.values()]
            weights = torch.cat([log_w.reshape(-1, self.test.n) for log_w in drawn if log_w is not None], 1)
            lower = weights.logsumexp(1).double() - math.log(weights.shape[1])
            for name, folder in folders.items():
                own = Measurement.load(folder / "measurement.safetensors").values["log_w"]
                row = self.estimate(name, "kl_to_target_at_least", lower - own, "nats")
                rows.append(row | {"high": None})  # how far the truth lies above a lower bound is not known
        return rows

    def decoder(self, run: Run[Any]) -> LanguageModel:
        raise ValueError(f"{run.folder} compares methods and draws nothing itself: name the run of one of them")

    def show(self, run: Run[Any]) -> None:
        rows = read_report(run.folder / "report.json")
        betas = ", ".join(f"{beta / self.goal.beta_pi:g}·{self.goal.beta_pi:g} = {beta:g}" for beta in self.betas)
        one = f"{self.goal.beta_r:g}·{self.goal.beta_pi:g} = {self.goal.beta:g}"
        title = f"{self.family}, seed {self.seed}: beta = beta_r·beta_pi = {betas or one}"
        Console(width=180, highlight=False).print(table(rows, title, HEADINGS))
        print(
            f"± is one standard error over prompts; KL and gap in nats; the picture: {run.folder / 'frontier.png'}"
        )
        say_doubt(run.inputs.values())

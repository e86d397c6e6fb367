"""Stages in front of alignment: SFT, reward model, generation, labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch

from tiltlm.device import device_of
from tiltlm.experience import Offline
from tiltlm.jsonl import read_rows, whole_lines
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM
from tiltlm.models.hub import config_of
from tiltlm.models.reward_model import RewardModel
from tiltlm.objective import Objective
from tiltlm.policies.sft import SFT as SFTLoss
from tiltlm.progress import note, steps
from tiltlm.recipes.fitting import fit
from tiltlm.recipes.preferences_data import SPLITS, BaseStage, Rows, answer_of
from tiltlm.recipes.preferences_lab import EncodedReward, Lab
from tiltlm.recipes.preferences_settings import Draws, Goal, Judge, Train
from tiltlm.recipes.preferences_verdicts import (
    OBJECTIVE,
    are_verdicts,
    scores,
    verdict_data,
    verdict_metrics,
    wanted,
)
from tiltlm.rewards.bradley_terry import BradleyTerry, Comparisons, ahead, comparisons
from tiltlm.rewards.by_name import TextReward, files_of, text_function
from tiltlm.rewards.verdicts import Verdicts
from tiltlm.ruler.judge import AHEAD, AHEAD_OF_COMMONER, COMMONER, MODEL, RULE, doubt
from tiltlm.ruler.table import read_report
from tiltlm.run import Recipe, Run
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.train import best_checkpoint


@dataclass(frozen=True)
class SFT(BaseStage):
    """Supervised fine-tuning on the chosen responses: the reference of everything after it."""

    sft: Train = Train()
    stage: ClassVar[str] = "sft"

    def inputs(self) -> dict[str, Recipe]:
        return self.needed()

    def build(self, run: Run[Any]) -> None:
        lab = self.lab(run)
        train, valid = (
            [row | {"answer": answer_of(row)} for row in wanted(self.rows_of(run, s))] for s in ("train", "valid")
        )
        if not (train and valid):
            raise ValueError("SFT imitates wanted answers, and those to train on or those to validate on have none: every "
                             "label says false (more --data.valid-rows may help)")  # fmt: skip
        data, held = (lab.encoder.answers(rows, "answer").to(lab.device) for rows in (train, valid))
        model, how = lab.trainable(temperature=1.0), self.sft.fit(len(data))
        if self.base.packing:
            model = model.with_packing()
        experience = Offline(data, how.batch_size, lab.stream.child("sft", "data"))

        def measure() -> dict[str, float]:
            return {"nll_per_token": nll_per_token(model, held)}

        watch = how.watch(measure, best="nll_per_token")
        fit(run, model, SFTLoss(), experience, how, device=lab.device, stream=lab.stream, watch=watch)
        if lab.base.lora:
            self.merge(run, lab)
        best = lab.load(self.model_in(run)).at(1.0)
        self.report(run, {"before SFT": lab.load().at(1.0), "after SFT": best}, held)

    def report(self, run: Run[Any], models: dict[str, CausalLM], held: Samples) -> None:
        """The held-out responses' negative log-likelihood under each model, at temperature 1."""
        nll = {name: nll_per_token(model, held) for name, model in models.items()}
        rows = [self.row(name, "nll_per_token", value, None, len(held), "nats") for name, value in nll.items()]
        run.write_json("report.json", rows)

    def merge(self, run: Run[Any], lab: Lab) -> None:
        """The best adapters merged into the base model: a folder like any other, that new adapters can be put on."""
        if (run.folder / "merged").is_dir():
            return
        model = lab.trainable().eval()
        model.restore(best_checkpoint(run.folder))
        assert model.adapters is not None
        aside = run.folder / ".merged.tmp"
        model.model, model.adapters = model.adapters.merge_and_unload(), None
        model.save(aside)
        aside.rename(run.folder / "merged")

    def model_in(self, run: Run[Any]) -> Path:
        """The folder of the best model of an SFT run."""
        merged = run.folder / "merged"
        return merged if merged.is_dir() else best_checkpoint(run.folder)

    def decoder(self, run: Run[Any]) -> LanguageModel:
        return self.lab(run).load(self.model_in(run))


@torch.no_grad()
def nll_per_token(model: CausalLM, held: Samples) -> float:
    """Mean negative log-likelihood of a token of `held`, nats."""
    total = sum(float(model.log_prob(held.select(slice(k, k + 64))).sum()) for k in range(0, len(held), 64))
    return -total / int(held.mask.sum())


@dataclass(frozen=True)
class RewardStage(BaseStage):
    """Train a reward model on the preferences; report it beside the rule that the longer response wins."""

    judge: Judge = Judge()
    stage: ClassVar[str] = "reward-model"

    def check(self) -> None:
        super().check()
        if self.judge.body:
            config_of(self.judge.body)
        found = self.columns()
        if self.stage == RewardStage.stage and found and not {"chosen", "label"} & set(found):
            raise ValueError(
                "a reward model learns from pairs (chosen, rejected) or verdicts (completion, label); the data has "
                + ", ".join(found)
            )

    def inputs(self) -> dict[str, Recipe]:
        return self.needed()

    def build(self, run: Run[Any]) -> None:
        lab, body = self.lab(run), self.judge.body
        model = RewardModel.from_body(body or lab.model, seed=self.seed, most_tokens=self.base.most_tokens).to(
            lab.device
        )
        if are_verdicts(self.rows_of(run, "train")):
            train, valid, test = (self.verdicts(run, model, split) for split in SPLITS)
            self.learn(run, lab, model, OBJECTIVE, train, lambda: verdict_metrics(model, valid))
            run.write_json("report.json", self.verdict_accuracies(run, model.eval(), test))
        else:
            pairs, held, last = (self.comparisons(run, model, split) for split in SPLITS)
            self.learn(run, lab, model, BradleyTerry(self.judge.center), pairs, lambda: judged(model, held))
            run.write_json("report.json", self.accuracies(run, model.eval(), last))

    def learn(self, run: Run[Any], lab: Lab, model: RewardModel, objective: Objective, data: Any,
              measure: Callable[[], dict[str, float]]) -> None:  # fmt: skip
        """Train the model on the data, and leave it at its best."""
        how = self.judge.train.fit(len(data))
        experience = Offline(data, how.batch_size, lab.stream.child("reward-model", "data"))
        watch = how.watch(measure, best="loss")
        fit(run, model, objective, experience, how, device=lab.device, stream=lab.stream, watch=watch)
        model.restore(best_checkpoint(run.folder))

    def verdicts(self, run: Run[Any], model: RewardModel, split: str) -> Verdicts:
        if self.judge.margin or self.judge.center:
            raise ValueError(
                "judge.margin and judge.center are about pairs; the data holds verdicts on single answers"
            )
        return verdict_data(model, self.rows_of(run, split))

    def verdict_accuracies(self, run: Run[Any], model: RewardModel, test: Verdicts) -> Rows:
        """Accuracy on the test split, that of always saying the commoner verdict of the training data, the difference."""
        right = ((scores(model, test) > 0) == test.good).double().cpu()
        train = self.rows_of(run, "train")
        common = (test.good.cpu() == (2 * len(wanted(train)) > len(train))).double()
        return [
            self.estimate(MODEL, "accuracy", right),
            self.estimate(COMMONER, "accuracy", common),
            self.estimate(AHEAD_OF_COMMONER, "accuracy", right - common),
            self.row(MODEL, "loss", verdict_metrics(model, test)["loss"], None, len(test), "nats"),
        ]

    def comparisons(self, run: Run[Any], model: RewardModel, split: str) -> Comparisons:
        rows = self.rows_of(run, split)
        if "chosen" not in rows[0]:
            raise ValueError(
                "a reward model learns from pairs (chosen, rejected) or verdicts (prompt, completion, label); the data has "
                + ", ".join(rows[0])
            )
        margin = [self.judge.margin * float(row.get("margin", 0.0)) for row in rows]
        prompts, chosen, rejected = ([row[name] for row in rows] for name in ("prompt", "chosen", "rejected"))
        return comparisons(model, prompts, chosen, rejected, margin)

    def show(self, run: Run[Any]) -> None:
        super().show(run)
        text = doubt(read_report(run.folder / "report.json")) if self.stage == RewardStage.stage else None
        if text is not None:
            note(f"[yellow]{text}[/]")

    def accuracies(self, run: Run[Any], model: RewardModel, test: Comparisons) -> Rows:
        """Accuracy on the test split, the length rule's, and their difference, pair by pair; 95% intervals."""
        rows = self.rows_of(run, "test")
        right = ahead(gaps(model, test)).double().cpu()
        longer = ahead(torch.tensor([len(row["chosen"]) - len(row["rejected"]) for row in rows]).double())
        return [
            self.estimate(MODEL, "accuracy", right),
            self.estimate(RULE, "accuracy", longer),
            self.estimate(AHEAD, "accuracy", right - longer),
            self.row(MODEL, "loss", judged(model, test)["loss"], None, len(test), "nats"),
        ]


@torch.no_grad()
def gaps(model: RewardModel, data: Comparisons) -> torch.Tensor:
    """r_c − r_r of every pair, [n]."""
    parts = [data.select(slice(k, k + 64)).pairs for k in range(0, len(data), 64)]
    scores = [model.score(pairs.both()).split(len(pairs)) for pairs in parts]
    return torch.cat([chosen - rejected for chosen, rejected in scores])


def judged(model: RewardModel, data: Comparisons) -> dict[str, float]:
    """Loss (without margins) and accuracy on held-out pairs."""
    gap = gaps(model, data).double()
    return {"loss": float(torch.nn.functional.softplus(-gap).mean()), "accuracy": float(ahead(gap).mean())}


@dataclass(frozen=True)
class Generate(SFT):
    """Completions of the reference for every prompt of every split: lines of prompt, completions and their ids."""

    draws: Draws = Draws()
    stage: ClassVar[str] = "generate"

    def inputs(self) -> dict[str, Recipe]:
        return self.needed() | self.sft_needed()

    def sft_needed(self) -> dict[str, Recipe]:
        """The stage `sft`, where no model to start from is named."""
        return {} if self.base.start else {"sft": self.up(SFT)}

    def start(self, run: Run[Any]) -> Path | str:
        """The folder or hub name of the reference."""
        if self.base.start:
            return self.lab(run).model
        kept = run.inputs["sft"]
        return kept.recipe.model_in(kept)

    def build(self, run: Run[Any]) -> None:
        lab = self.lab(run)
        reference = lab.load(self.start(run))
        for split in SPLITS:
            rows = self.rows_of(run, split)
            rows = rows[: self.draws.prompts or None] if split == "train" else rows
            prompts = [row["prompt"] for row in rows]
            own = lab.stream.child("generate", split)
            with steps(f"{self.name} {split}") as on_step:
                append(
                    run.folder / f"{split}.jsonl",
                    self.lines(lab, reference, prompts, own),
                    prompts,
                    self.chunk,
                    on_step,
                )
        shown = islice(read_rows(run.folder / "test.jsonl"), 50)
        run.write_jsonl(
            "samples.jsonl", [{name: row[name] for name in ("prompt", "completions")} for row in shown]
        )

    def decoder(self, run: Run[Any]) -> LanguageModel:
        raise ValueError(f"{run.folder} holds completions and draws nothing itself: name the run of the stage sft")

    @property
    def chunk(self) -> int:
        """Prompts answered at once."""
        return max(1, self.draws.batch_size // self.draws.n)

    def lines(self, lab: Lab, reference: LanguageModel, prompts: list[str], own: Stream) -> Any:
        """(begin, end) -> the lines of those prompts; prompt i's completions follow from its number alone."""

        def make(begin: int, end: int) -> Iterator[dict[str, Any]]:
            ids = [lab.encoder.prompt(text) for text in prompts[begin:end]]
            drawn = draw(
                reference, Tokens.of(ids, lab.device), n=self.draws.n, max_new_tokens=self.base.new_tokens, stream=own,
                rows=torch.arange(begin * self.draws.n, end * self.draws.n),
            )  # fmt: skip
            assert drawn.log_q is not None and drawn.finished is not None
            done, log_q, finished = drawn.completions.lists(), drawn.log_q.sum(1).tolist(), drawn.finished.tolist()
            for k, prompt_ids in enumerate(ids):
                part = slice(k * self.draws.n, (k + 1) * self.draws.n)
                yield {
                    "prompt": lab.encoder.prompt_text(prompt_ids),
                    "completions": [lab.encoder.text(row) for row in done[part]],
                    "prompt_ids": prompt_ids,
                    "completion_ids": done[part],
                    "log_q": log_q[part],
                    "finished": finished[part],
                }

        return make


def append(path: Path, make: Any, all_of: list[Any], chunk: int, on_step: Any) -> None:
    """Write a line for each of `all_of` to `path`, `chunk` at once, going on behind the whole lines there already."""
    done = whole_lines(path)
    with path.open("a", encoding="utf-8") as file:
        for begin in range(done - done % chunk, len(all_of), chunk):
            end = min(begin + chunk, len(all_of))
            if end <= done:
                continue
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make(begin, end)]
            file.writelines(lines[max(0, done - begin) :])
            file.flush()
            on_step(end, len(all_of), {})


@dataclass(frozen=True)
class Label(Generate, RewardStage):
    """The reward of every completion that was generated."""

    goal: Goal = Goal()
    stage: ClassVar[str] = "label"

    def inputs(self) -> dict[str, Recipe]:
        return {"generate": self.up(Generate)} | self.judge_needed()

    def key_given(self, known: Mapping[str, str]) -> str:
        """Labels do not depend on the temperatures: every beta finds the same ones."""
        plain = replace(self, goal=Goal(self.goal.reward))
        return super(Label, plain if self.stage == Label.stage else self).key_given(known)

    def judge_needed(self) -> dict[str, Recipe]:
        """The stage `reward-model`, where no reward is named."""
        return {} if self.goal.reward else {"reward-model": self.up(RewardStage)}

    def files(self) -> list[str]:
        return super().files() + files_of(self.goal.reward)

    def check(self) -> None:
        super().check()
        if self.goal.reward:
            found = text_function(self.goal.reward)
            kept = ", ".join(self.data.keep) or "none"
            found.check_columns(
                self.data.keep, f"of the data's further columns {kept} is kept: name it, --data.keep"
            )

    def judge_of(self, run: Run[Any], lab: Lab) -> EncodedReward:
        """r(x, y), of samples or of texts."""
        name = self.goal.reward or f"reward-model:{best_checkpoint(run.inputs['reward-model'].folder)}"
        about = self.columns_by_prompt(run.inputs.get("generate", run), lab) if self.data.keep else None
        return EncodedReward(
            TextReward(name, lab.tokenizer, str(device_of(self.base.device, "--base.device")), about), lab.encoder
        )

    def columns_by_prompt(self, run: Run[Any], lab: Lab) -> Callable[[str], dict[str, Any]]:
        """A prompt, as the models see it -> the kept columns of its row: r(x, y) is a function of prompt and completion.

        Raises ValueError where rows of one prompt disagree.
        """
        found: dict[str, dict[str, Any]] = {}
        for row in (row for split in SPLITS for row in self.rows_of(run, split)):
            prompt, own = (
                lab.encoder.prompt_text(lab.encoder.prompt(row["prompt"])),
                {n: row[n] for n in self.data.keep},
            )
            if found.setdefault(prompt, own) != own:
                raise ValueError(
                    f"rows of one prompt differ in the columns {', '.join(own)}: a reward depends on prompt and completion "
                    f"alone; the prompt is {prompt[-60:]!r}"
                )
        return found.__getitem__

    def build(self, run: Run[Any]) -> None:
        generated = run.inputs["generate"]
        lab = generated.recipe.lab(generated)
        reward, report = self.judge_of(run, lab).reward, []
        for split in SPLITS:
            rows = list(read_rows(generated.folder / f"{split}.jsonl", ("prompt", "completions")))
            with steps(f"{self.name} {split}") as on_step:
                append(run.folder / f"{split}.jsonl", labels(reward, rows), rows, 256, on_step)
            found = torch.tensor([row["rewards"] for row in read_rows(run.folder / f"{split}.jsonl")]).double()
            tied = int((found == found[:, :1]).all(1).sum())
            if tied:
                note(f"{self.name}: {tied} of {len(found)} groups of the {split} split are tied")
            report += [self.estimate(split, "reward", found.mean(1), "reward"),
                       self.estimate(split, "spread within a group", found.std(1), "reward"),
                       *self.term_rows(split, run.folder / f"{split}.jsonl")]  # fmt: skip
        run.write_json("report.json", report)

    def term_rows(self, split: str, path: Path) -> Rows:
        """A report row for every term of a sum of rewards: its mean over the split, unweighted."""
        said = [row["reward_terms"] for row in read_rows(path) if "reward_terms" in row]
        means = {
            name: torch.tensor([row[name] for row in said]).double().mean(1) for name in (said[0] if said else ())
        }
        return [self.estimate(split, f"reward[{name}]", x, "reward") for name, x in means.items()]

    def decoder(self, run: Run[Any]) -> LanguageModel:
        raise ValueError(f"{run.folder} holds labels and draws nothing itself: name the run of the stage sft")


def labels(reward: TextReward, rows: Rows) -> Any:
    """(begin, end) -> those lines with their `rewards`, and with `reward_terms` where the reward is a sum."""

    def make(begin: int, end: int) -> Iterator[dict[str, Any]]:
        part = rows[begin:end]
        texts = [text for row in part for text in row["completions"]]
        prompts = [row["prompt"] for row in part for _ in row["completions"]]
        found = reward.judged(prompts, texts)
        at = 0
        for row in part:
            own = slice(at, at := at + len(row["completions"]))
            several = {name: values[own] for name, values in found.terms.items()} if reward.function.labels else {}
            yield row | {"rewards": found.total[own]} | ({"reward_terms": several} if several else {})

    return make

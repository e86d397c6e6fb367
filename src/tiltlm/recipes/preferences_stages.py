"""Stages in front of alignment: data, base model, SFT, reward model, generation, labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from tiltlm.experience import Offline
from tiltlm.jsonl import read_rows, whole_lines
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM
from tiltlm.models.reward_model import RewardModel
from tiltlm.policies.sft import SFT as SFTLoss
from tiltlm.progress import steps
from tiltlm.recipes.fitting import device_of, fit
from tiltlm.recipes.own_model import train_own_model
from tiltlm.recipes.preferences_lab import EncodedReward, Lab, columns_of
from tiltlm.recipes.preferences_settings import Base, Data, Draws, Goal, Judge, Train
from tiltlm.rewards.bradley_terry import BradleyTerry, Comparisons, ahead, comparisons
from tiltlm.rewards.by_name import TextReward
from tiltlm.ruler.estimate import Estimate, mean
from tiltlm.run import Recipe, Run, located
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream, stream
from tiltlm.tasks.dialogues import dialogues
from tiltlm.tasks.hh import Dropped, split_dialogues
from tiltlm.tasks.preference_rows import Loaded, read_preferences
from tiltlm.train import best_checkpoint, checkpoints

SPLITS = ("train", "valid", "test")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class DataStage(Recipe):
    """Read preferences or examples, drop what does not fit and say so, divide into train, valid and test."""

    data: Data = Data()
    base: Base = Base()
    stage: ClassVar[str] = "data"

    def files(self) -> list[str]:
        return [*self.data.train, *self.data.test, self.base.model, self.base.start]

    def check(self) -> None:
        for name in (*self.data.train, *self.data.test):
            if Path(name).suffix in (".jsonl", ".json", ".csv", ".parquet", ".gz") and not Path(name).is_file():
                raise FileNotFoundError(f"{name}: no such file (--data.train or --data.test)")
            if name in self.data.train and name in self.data.test and Path(name).is_file():
                raise ValueError(
                    f"{name} is named as training and as test data: leave --data.test out to carve it"
                )

    def build(self, run: Run[Any]) -> None:
        own = stream(self.seed, "preferences", "data")
        loaded = {"train": self.read("train", own)}
        if self.data.test:
            loaded["test"] = self.read("test", own)
        rows = divide(loaded["train"].rows, loaded["test"].rows if self.data.test else None, self.data, own)
        for split in SPLITS:
            run.write_jsonl(f"{split}.jsonl", rows[split])
        run.write_jsonl("samples.jsonl", rows["test"][:200])
        run.write_json(
            "dropped.json", {name: vars(each) | {"rows": len(each.rows)} for name, each in loaded.items()}
        )
        counts = {f"{split} rows": len(rows[split]) for split in SPLITS}
        given = len(loaded["train"].rows) - len(rows["train"]) - len(rows["valid"])
        more = given - (0 if self.data.test else len(rows["test"]))
        counts |= {"left out: more rows of a held-out prompt": more} if more else {}
        if self.data.test:
            seen = {row["prompt"] for row in rows["train"]}
            counts["test prompts that are trained on too"] = sum(row["prompt"] in seen for row in rows["test"])
        counts |= {f"dropped: {why}": n for each in loaded.values() for why, n in each.dropped.items()}
        counts |= {why: n for each in loaded.values() for why, n in each.notes.items()}
        run.write_json("report.json", [self.row("data", name, n) for name, n in counts.items()])

    def row(self, method: str, metric: str, value: float, stderr: float | None = None, n: int = 1, unit: str = "rows",
            **more: Any) -> dict[str, Any]:  # fmt: skip
        """One line of a report."""
        head = {"recipe": self.name, "method": method, "metric": metric, "value": value}
        return {**head, "stderr": stderr, "n": n, "unit": unit, "seed": self.seed, **more}

    def estimate(self, method: str, metric: str, e: Estimate, unit: str = "rate") -> dict[str, Any]:
        """One line of a report, with its 95% interval."""
        low, high = e.interval()
        return self.row(method, metric, e.value, e.stderr, e.n, unit, low=low, high=high)

    def read(self, split: str, own: Stream) -> Loaded:
        """The rows of the training or of the test data."""
        sources = self.data.train if split == "train" else self.data.test
        if not sources:
            return own_dialogues(self.data.limit or self.data.own, own.child("dialogues"))
        tokenizer = Lab(self.base, located(self.base.named), self.seed).tokenizer if self.base.named else None
        limit = self.data.limit or None
        found = read_preferences(sources, self.data.format, split, tokenizer, limit if split == "train" else None)
        if not found.rows:
            raise ValueError(f"{', '.join(sources)}: no row is left ({found.dropped or 'the files are empty'})")
        return found

    def rows_of(self, run: Run[Any], split: str) -> Rows:
        """The rows of a split, from the stage `data`."""
        return list(read_rows(run.inputs.get("data", run).folder / f"{split}.jsonl"))


def own_dialogues(n: int, own: Stream) -> Loaded:
    """Dialogues of the project's own making, through the splitter of the HH data."""
    found = [split_dialogues(row["chosen"], row["rejected"]) for row in dialogues(n, own)]
    whole = [each for each in found if not isinstance(each, Dropped)]
    return Loaded([{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in whole])


def divide(train: Rows, test: Rows | None, how: Data, own: Stream) -> dict[str, Rows]:
    """Rows of each split. valid (and test, where there is none) are carved from train at random, one row a prompt: no
    prompt of theirs is trained on, and every row of theirs is an observation by itself.

    Raises ValueError where nothing would be left to train on.
    """
    together: dict[str, Rows] = {}
    for row in train:
        together.setdefault(row["prompt"], []).append(row)
    order = own.child("split").permutation(len(together)).tolist()
    carved = how.test_rows if test is None else 0
    prompts = list(together.values())
    if len(prompts) <= how.valid_rows + carved:
        raise ValueError(
            f"{len(prompts)} different prompts in the training data cannot spare {how.valid_rows} to validate"
            + (f" and {carved} to test" if carved else "")
            + ": lower --data.valid-rows, --data.test-rows"
        )
    valid, held = order[: how.valid_rows], order[how.valid_rows : how.valid_rows + carved]
    rest = [row for k in order[how.valid_rows + carved :] for row in prompts[k]]
    tested = [prompts[k][0] for k in held] if test is None else test[: how.test_rows or None]
    return {"valid": [prompts[k][0] for k in valid], "test": tested, "train": rest}


def answer_of(row: dict[str, Any]) -> str:
    """What SFT imitates: the chosen response, the completion, or the best of a group."""
    if "completions" in row:
        return str(max(zip(row["rewards"], row["completions"], strict=True))[1])
    return str(row["chosen"] if "chosen" in row else row["completion"])


@dataclass(frozen=True)
class BaseStage(DataStage):
    """Train a small Llama on all texts of the training data (only where no base model is named)."""

    stage: ClassVar[str] = "base"

    def inputs(self) -> dict[str, Recipe]:
        return {"data": self.up(DataStage)}

    def build(self, run: Run[Any]) -> None:
        if self.base.named:
            raise ValueError(f"the base model is {self.base.named}: there is nothing to train")
        rows = self.rows_of(run, "train")
        texts = [row["prompt"] + text for row in rows for text in texts_in(row)]
        own = stream(self.seed, "preferences", "base")
        train_own_model(run, texts, self.base.fit, own, self.base.device, self.base.most_tokens, stop=True)

    def needed(self) -> dict[str, Recipe]:
        """The data, and the stage `base` where no model is named."""
        found: dict[str, Recipe] = {"data": self.up(DataStage)}
        return found if self.base.named else found | {"base": self.up(BaseStage)}

    def lab(self, run: Run[Any]) -> Lab:
        """Everything that starts from the base model."""
        name = self.base.named or str(checkpoints(run.inputs["base"].folder)[-1])
        return Lab(self.base, located(name), self.seed)

    def speech(self, run: Run[Any]) -> tuple[Any, int | None]:
        return self.lab(run).tokenizer, self.base.new_tokens


def texts_in(row: dict[str, Any]) -> list[str]:
    """All responses of a row."""
    return row.get("completions") or [row[name] for name in ("chosen", "rejected", "completion") if name in row]


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
            [row | {"answer": answer_of(row)} for row in self.rows_of(run, s)] for s in ("train", "valid")
        )
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
        model.adapters.merge_and_unload().save_pretrained(str(aside))
        lab.tokenizer.save_pretrained(str(aside))
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

    def inputs(self) -> dict[str, Recipe]:
        return self.needed()

    def build(self, run: Run[Any]) -> None:
        lab, body = self.lab(run), self.judge.body
        model = RewardModel.from_body(
            located(body) if body else lab.model, seed=self.seed, most_tokens=self.base.most_tokens
        ).to(lab.device)
        train, valid, test = (self.comparisons(run, model, split) for split in SPLITS)
        how = self.judge.train.fit(len(train))
        experience = Offline(train, how.batch_size, lab.stream.child("reward-model", "data"))
        watch = how.watch(lambda: judged(model, valid), best="loss")
        objective = BradleyTerry(self.judge.center)
        fit(run, model, objective, experience, how, device=lab.device, stream=lab.stream, watch=watch)
        model.restore(best_checkpoint(run.folder))
        run.write_json("report.json", self.accuracies(run, model.eval(), test))

    def comparisons(self, run: Run[Any], model: RewardModel, split: str) -> Comparisons:
        rows = self.rows_of(run, split)
        if "chosen" not in rows[0]:
            raise ValueError(
                f"a reward model learns from pairs (chosen, rejected); the data has {', '.join(rows[0])}"
            )
        margin = [self.judge.margin * float(row.get("margin", 0.0)) for row in rows]
        prompts, chosen, rejected = columns_of(rows, "prompt", "chosen", "rejected")
        return comparisons(model, prompts, chosen, rejected, margin)

    def accuracies(self, run: Run[Any], model: RewardModel, test: Comparisons) -> Rows:
        """Accuracy on the test split, the length rule's, and their difference, pair by pair; 95% intervals."""
        rows = self.rows_of(run, "test")
        right = ahead(gaps(model, test)).double().cpu()
        longer = ahead(torch.tensor([len(row["chosen"]) - len(row["rejected"]) for row in rows]).double())
        return [
            self.estimate("reward model", "accuracy", mean(right)),
            self.estimate("the longer response wins", "accuracy", mean(longer)),
            self.estimate("reward model − longer wins", "accuracy", mean(right - longer)),
            self.row("reward model", "loss", judged(model, test)["loss"], None, len(test), "nats"),
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
        shown = [json.loads(line) for line in (run.folder / "test.jsonl").read_text().splitlines()[:50]]
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

    def judge_needed(self) -> dict[str, Recipe]:
        """The stage `reward-model`, where no reward is named."""
        return {} if self.goal.reward else {"reward-model": self.up(RewardStage)}

    def files(self) -> list[str]:
        return super().files() + self.goal.reward.split(":")

    def check(self) -> None:
        super().check()
        path = self.goal.reward.rpartition(":")[0]
        if path.endswith(".py") and not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file (--goal.reward)")

    def judge_of(self, run: Run[Any], lab: Lab) -> EncodedReward:
        """r(x, y), of samples or of texts."""
        name = located(self.goal.reward)
        if not name:
            name = f"reward-model:{best_checkpoint(run.inputs['reward-model'].folder)}"
        return EncodedReward(TextReward(name, lab.tokenizer, str(device_of(self.base.device))), lab.encoder)

    def build(self, run: Run[Any]) -> None:
        generated = run.inputs["generate"]
        lab = generated.recipe.lab(generated)
        reward, report = self.judge_of(run, lab).reward, []
        for split in SPLITS:
            rows = list(read_rows(generated.folder / f"{split}.jsonl", ("prompt", "completions")))
            with steps(f"{self.name} {split}") as on_step:
                append(run.folder / f"{split}.jsonl", labels(reward, rows), rows, 256, on_step)
            found = torch.tensor([row["rewards"] for row in read_rows(run.folder / f"{split}.jsonl")]).double()
            report += [self.estimate(split, "reward", mean(found.mean(1)), "reward"),
                       self.estimate(split, "spread within a group", mean(found.std(1)), "reward")]  # fmt: skip
        run.write_json("report.json", report)

    def decoder(self, run: Run[Any]) -> LanguageModel:
        raise ValueError(f"{run.folder} holds labels and draws nothing itself: name the run of the stage sft")


def labels(reward: TextReward, rows: Rows) -> Any:
    """(begin, end) -> those lines with their `rewards`."""

    def make(begin: int, end: int) -> Iterator[dict[str, Any]]:
        part = rows[begin:end]
        texts = [text for row in part for text in row["completions"]]
        prompts = [row["prompt"] for row in part for _ in row["completions"]]
        values = iter(reward.of(prompts, texts))
        for row in part:
            yield row | {"rewards": [next(values) for _ in row["completions"]]}

    return make


__all__ = ["SFT", "SPLITS", "BaseStage", "DataStage", "Generate", "Label", "RewardStage", "answer_of"]

"""The first stages of preference alignment: data, and a base model where none is named."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tiltlm.data.dialogues import dialogues
from tiltlm.data.hh import Dropped, split_dialogues
from tiltlm.data.preference_rows import Loaded, read_preferences
from tiltlm.data.tables import file_of, weighed
from tiltlm.jsonl import read_rows
from tiltlm.models.folders import located
from tiltlm.models.hub import config_of
from tiltlm.progress import note
from tiltlm.recipes.own_model import OWN_TOKENS, train_own_model
from tiltlm.recipes.preferences_lab import Lab
from tiltlm.recipes.preferences_settings import Base, Data
from tiltlm.recipes.preferences_verdicts import are_verdicts, wanted
from tiltlm.ruler.estimate import mean
from tiltlm.ruler.intervals import of_mean
from tiltlm.run import OldRecipe, Recipe, Run
from tiltlm.seeds import Stream, stream
from tiltlm.train import checkpoints

SPLITS = ("train", "valid", "test")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class DataStage(OldRecipe):
    """Read preferences or examples, drop what does not fit and say so, divide into train, valid and test."""

    data: Data = Data()
    base: Base = Base()
    stage: ClassVar[str] = "data"

    def files(self) -> list[str]:
        train = [weighed(name)[0] for name in self.data.train]
        return [*train, *self.data.test, self.base.model, self.base.start]

    def check(self) -> None:
        heavy = [name for name in self.data.test if weighed(name)[1] != 1]
        if heavy:
            raise ValueError(f"{heavy[0]}: test data has no weights, every row of it is one observation")
        train = [weighed(name)[0] for name in self.data.train]
        for name in (*train, *self.data.test):
            if (
                Path(name).suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")
                and not Path(name).is_file()
            ):
                raise FileNotFoundError(f"{name}: no such file (--data.train or --data.test)")
            if name in train and name in self.data.test and Path(name).is_file():
                raise ValueError(
                    f"{name} is named as training and as test data: leave --data.test out to carve it"
                )
        if self.data.keep and not self.data.train:
            raise ValueError(f"dialogues of our own making have no column {self.data.keep[0]!r} (--data.keep)")
        held = config_of(self.base.named).to_dict() if self.base.named else {"max_position_embeddings": OWN_TOKENS}
        limit = held.get("max_position_embeddings") or self.base.most_tokens
        if self.base.most_tokens > limit:
            who = self.base.named or "the project's own model"
            raise ValueError(f"{who} holds {limit} tokens: lower --base.most-tokens, now {self.base.most_tokens}")

    def columns(self) -> tuple[str, ...]:
        """The columns that the rows will have, as the first one of the data tells; none where that is not a file here."""
        if not self.data.train:
            return ("prompt", "chosen", "rejected")
        return tuple(self.first_row() or ())

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
        if are_verdicts(rows["train"]):
            good = len(wanted(rows["train"]))
            counts |= {"wanted answers to train on": good, "unwanted answers": len(rows["train"]) - good}
        if self.data.test:
            seen = {row["prompt"] for row in rows["train"]}
            counts["test prompts that are trained on too"] = sum(row["prompt"] in seen for row in rows["test"])
        counts |= {f"dropped: {why}": n for each in loaded.values() for why, n in each.dropped.items()}
        counts |= {why: n for each in loaded.values() for why, n in each.notes.items()}
        run.write_json("report.json", [self.row("data", name, n) for name, n in counts.items()])
        note(f"{self.name}: {', '.join(f'{n} {name}' for name, n in counts.items())}")

    def row(self, method: str, metric: str, value: float, stderr: float | None = None, n: int = 1, unit: str = "rows",
            **more: Any) -> dict[str, Any]:  # fmt: skip
        """One line of a report."""
        head = {"recipe": self.name, "method": method, "metric": metric, "value": value}
        return {**head, "stderr": stderr, "n": n, "unit": unit, "seed": self.seed, **more}

    def estimate(self, method: str, metric: str, x: Tensor, unit: str = "rate") -> dict[str, Any]:
        """One line of a report: the mean of independent observations x [n], with its 95% interval."""
        e, own = mean(x), of_mean(x, unit == "rate")
        stderr = None if math.isnan(e.stderr) else e.stderr
        return self.row(method, metric, e.value, stderr, e.n, unit, **own.entries())

    def read(self, split: str, own: Stream) -> Loaded:
        """The rows of the training or of the test data."""
        sources = self.data.train if split == "train" else self.data.test
        if not sources:
            return own_dialogues(self.data.limit or self.data.own, own.child("dialogues"))
        found = self.found_in(sources, split, self.data.limit or None if split == "train" else None, own)
        if not found.rows:
            raise ValueError(f"{', '.join(sources)}: no row is left ({found.dropped or 'the files are empty'})")
        return found

    def found_in(self, sources: tuple[str, ...], split: str, limit: int | None, own: Stream) -> Loaded:
        """At most `limit` rows of some sources, read as `data` says."""
        tokenizer = Lab(self.base, self.base.named, self.seed).tokenizer if self.base.named else None
        how = self.data
        return read_preferences(
            sources, how.format, split, tokenizer, limit, keep=how.keep, columns=how.columns, encoding=how.encoding,
            own=own.child("weights"),
        )  # fmt: skip

    def first_row(self) -> dict[str, Any] | None:
        """The first row of training data, looked at before any work; None where it is no file here."""
        if not self.data.train or file_of(weighed(self.data.train[0])[0]) is None:
            return None
        rows = self.found_in(self.data.train[:1], "train", 1, stream(self.seed, "preferences", "data")).rows
        return rows[0] if rows else None

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
    tested = [prompts[k][0] for k in held] if test is None else one_each(test)[: how.test_rows or None]
    return {"valid": [prompts[k][0] for k in valid], "test": tested, "train": rest}


def one_each(rows: Rows) -> Rows:
    """The first row of every prompt: errors are counted over prompts, so no prompt may count twice."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["prompt"], row)
    return list(found.values())


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

    def check(self) -> None:
        super().check()
        if self.base.named and self.stage == BaseStage.stage:
            raise ValueError(f"the base model is {self.base.named}: there is nothing to train")

    def build(self, run: Run[Any]) -> None:
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

    @property
    def prompt_room(self) -> int | None:
        return self.base.most_tokens - self.base.new_tokens


def texts_in(row: dict[str, Any]) -> list[str]:
    """All responses of a row."""
    return row.get("completions") or [row[name] for name in ("chosen", "rejected", "completion") if name in row]

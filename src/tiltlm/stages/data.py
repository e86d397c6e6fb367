"""Preferences on disk: read, dropped where they do not fit, divided into train, valid and test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from tiltlm.data.dialogues import dialogues
from tiltlm.data.encoded import Encoded
from tiltlm.data.encoding import Encoder
from tiltlm.data.formats import format_named
from tiltlm.data.hh import Dropped, split_dialogues
from tiltlm.data.mapping import mapping_of
from tiltlm.data.pool import Pool
from tiltlm.data.preference_rows import Reading, Tally, preference_rows
from tiltlm.data.tables import file_of, weighed
from tiltlm.jsonl import Lines, aside_of, read_rows
from tiltlm.problem import SPLITS, Fed, Split
from tiltlm.progress import note
from tiltlm.run import Recipe, Run
from tiltlm.seeds import Stream, stream
from tiltlm.settings import at_least_one
from tiltlm.stages.reading import tokenizer_in
from tiltlm.stages.reporting import row
from tiltlm.stages.task import OfTask

Row = dict[str, Any]
Rows = list[Row]
FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")


@dataclass(frozen=True)
class Dataset:
    """Where dialogues or preferences come from, and how they are divided."""

    data: tuple[str, ...] = ()
    """Files (jsonl, json, csv, tsv, parquet, .gz), folders or hub names; empty: dialogues of the project's own making. A
    number behind a colon is a weight: `a.jsonl:2 b.parquet:0.5` has every row of a twice, a random half of b's once."""

    test_data: tuple[str, ...] = ()
    """Likewise, without weights; empty: carved from `data`."""

    format: str = "auto"
    """auto (by the columns), hh, tldr, imdb."""

    valid_rows: int = 64
    """Rows carved from `data` that choose checkpoints."""

    test_rows: int = 128
    """Rows carved from `data` where no test data is named; else the most that are used (0: all)."""

    keep: tuple[str, ...] = ()
    """Further columns of the data (an answer, say) that a function of your own takes as reward: (prompt, completion) are
    judged with those of the prompt's row."""

    limit: int = 0
    """Rows of the training data at most (0: all)."""

    own: int = 2000
    """Dialogues made where no data is named."""

    columns: tuple[str, ...] = ()
    """Where columns have other names: `prompt=question chosen=response_j`; dots reach inside, as in
    `chosen=messages.-1.content`."""

    encoding: str = ""
    """What text files are written in: utf-16, latin-1, cp1252, … (empty: their byte order mark, or UTF-8)."""

    def __post_init__(self) -> None:
        mapping_of(self.columns)
        at_least_one(self, "valid_rows", "own")
        if min(self.test_rows, self.limit) < 0:
            raise ValueError(f"test_rows and limit are not negative; got {self.test_rows} and {self.limit}")

    @property
    def sources(self) -> list[str]:
        """The training data's names, without their weights."""
        return [weighed(name)[0] for name in self.data]

    def check(self) -> None:
        """Raise for files that are not there, weights of test data, and data that is to train and test with alike."""
        if not (self.test_data or self.test_rows):
            raise ValueError(
                "nothing to measure on: --task.test-rows 1 or more, or data of its own (--task.test-data)"
            )
        heavy = [name for name in self.test_data if weighed(name)[1] != 1]
        if heavy:
            raise ValueError(f"{heavy[0]}: test data has no weights, every row of it is one observation")
        for name in (*self.sources, *self.test_data):
            if Path(name).suffix in FILES and not Path(name).is_file():
                raise FileNotFoundError(f"{name}: no such file (--task.data or --task.test-data)")
            if name in self.sources and name in self.test_data and Path(name).is_file():
                raise ValueError(
                    f"{name} is named as training and as test data: leave --task.test-data out to carve it"
                )
        if self.keep and not self.data:
            raise ValueError(f"dialogues of our own making have no column {self.keep[0]!r} (--task.keep)")

    def read(self, split: str, model: str, own: Stream, tally: Tally) -> Iterator[Row]:
        """The rows of the training or of the test data. model: whose chat template conversations are written in."""
        sources = self.data if split == "train" else self.test_data
        if not sources:
            return own_dialogues(self.limit or self.own, own.child("dialogues"))
        return self.found_in(sources, split, self.limit or None if split == "train" else None, model, own, tally)

    def found_in(
        self, sources: tuple[str, ...], split: str, limit: int | None, model: str, own: Stream, tally: Tally
    ) -> Iterator[Row]:
        """At most `limit` rows of some sources."""
        tokenizer = tokenizer_in(model) if model else None
        named, make = mapping_of(self.columns), format_named(self.format)
        reading = Reading(make, split, tokenizer, named, self.encoding, keep=self.keep)
        return preference_rows(sources, reading, tally, limit, own.child("weights"))

    def columns_of(self, model: str) -> tuple[str, ...]:
        """The columns that the rows will have, as the first one tells; none where that is not a file here."""
        if not self.data:
            return ("prompt", "chosen", "rejected")
        file = file_of(self.sources[0])
        if file is None:
            return {"hh": ("prompt", "chosen", "rejected"), "imdb": ("prompt", "completion")}.get(self.format, ())
        about = file.stat()
        return _columns(self, model, about.st_size, about.st_mtime_ns)


@cache
def _columns(dataset: Dataset, model: str, size: int, changed: int) -> tuple[str, ...]:
    """The columns of the first row of training data, looked at once as long as its file does not change."""
    rows = dataset.found_in(dataset.data[:1], "train", 1, model, stream(0, "preferences", "data"), Tally())
    return tuple(next(rows, ()))


@dataclass(frozen=True)
class Data(OfTask):
    """Read preferences or examples, drop what does not fit and say so, divide into train, valid and test."""

    task: Any
    seed: int = 0
    stage: ClassVar[str] = "data"
    computes: ClassVar[bool] = False

    def counted(self) -> Data:
        return Data(self.task.only("dataset", "reader"), self.seed)

    def inputs(self) -> dict[str, Recipe]:
        return {}

    def build(self, run: Run[Any]) -> None:
        how, model = self.task.dataset, self.task.reader.named
        own = stream(self.seed, "preferences", "data")
        tallies = {split: Tally() for split in (("train", "test") if how.test_data else ("train",))}
        pools = {split: Pool(run.folder, how.read(split, model, own, tally)) for split, tally in tallies.items()}
        for split, sources in (("train", how.data), ("test", how.test_data)):
            if sources and not len(pools[split]):
                dropped = dict(tallies[split].dropped) or "the files are empty"
                raise ValueError(f"{', '.join(sources)}: no row is left ({dropped})")
        found = divide(pools["train"], pools.get("test"), how, own)
        for split, (pool, rows) in found.items():
            with aside_of(run.folder / f"{split}.jsonl") as file:
                file.writelines(pool.lines(rows))
        pool, rows = found["test"]
        with aside_of(run.folder / "samples.jsonl") as file:
            file.writelines(pool.lines(rows[:200]))
        run.write_json(
            "dropped.json", {name: {"rows": len(pools[name])} | tally.said() for name, tally in tallies.items()}
        )
        counts = counted(tallies, found, bool(how.test_data))
        run.write_json("report.json", [row(self, "data", name, n) for name, n in counts.items()])
        note(f"{self.name}: {', '.join(f'{n} {name}' for name, n in counts.items())}")


Parts = dict[Split, tuple[Pool, list[int]]]
"""The rows of every split: their numbers in a pool."""


def counted(tallies: dict[str, Tally], found: Parts, tested: bool) -> dict[str, int]:
    """How many rows there are of every kind; tested: whether there was test data of its own."""
    pool, train = found["train"]
    counts = {f"{split} rows": len(found[split][1]) for split in SPLITS}
    more = len(pool) - len(train) - len(found["valid"][1]) - (0 if tested else len(found["test"][1]))
    counts |= {"left out: more rows of a held-out prompt": more} if more else {}
    if pool.label(train[0]) is not None:
        good = sum(pool.label(k) is not False for k in train)
        counts |= {"wanted answers to train on": good, "unwanted answers": len(train) - good}
    if tested:
        seen, (tests, rows) = {pool.prompt(k) for k in train}, found["test"]
        digests = list(tests.prompts)
        also = sum(pool.prompts.get(digests[tests.prompt(k)]) in seen for k in rows)
        counts["test prompts that are trained on too"] = also
    counts |= {f"dropped: {why}": n for each in tallies.values() for why, n in each.dropped.items()}
    return counts | {why: n for each in tallies.values() for why, n in each.notes.items()}


def rows_of(run: Run[Any], split: str) -> Rows:
    """The rows of a split of a finished run of the stage `data`."""
    return list(read_rows(run.folder / f"{split}.jsonl"))


def encoded(run: Run[Any], split: str, encoder: Encoder) -> Encoded:
    """The same as token ids; many of them lie in files that all runs of the task share."""
    return Encoded(Lines(run.folder / f"{split}.jsonl"), encoder, run.folder.parents[1] / "encoded")


def own_dialogues(n: int, own: Stream) -> Iterator[Row]:
    """Dialogues of the project's own making, through the splitter of the HH data."""
    for each in dialogues(n, own):
        found = split_dialogues(each["chosen"], each["rejected"])
        if not isinstance(found, Dropped):
            yield {"prompt": found.prompt, "chosen": found.chosen, "rejected": found.rejected}


def divide(train: Pool, test: Pool | None, how: Dataset, own: Stream) -> Parts:
    """Rows of each split. valid (and test, where there is none) are carved from train at random, one row a prompt: no
    prompt of theirs is trained on, and every row of theirs is an observation by itself.

    Raises ValueError where nothing would be left to train on.
    """
    prompts = len(train.prompts)
    order = own.child("split").permutation(prompts).tolist()
    carved = how.test_rows if test is None else 0
    if prompts <= how.valid_rows + carved:
        raise ValueError(
            f"{prompts} different prompts in the training data cannot spare {how.valid_rows} to validate"
            + (f" and {carved} to test" if carved else "")
            + ": lower --task.valid-rows, --task.test-rows"
        )
    valid, held = order[: how.valid_rows], order[how.valid_rows : how.valid_rows + carved]
    rest = [row for k in order[how.valid_rows + carved :] for row in train.of(k)]
    # errors are counted over prompts, so no prompt may count twice: the first row of each
    tested = (train, [train.first(k) for k in held])
    if test is not None:
        tested = (test, [test.first(k) for k in range(len(test.prompts))][: how.test_rows or None])
    return {"valid": (train, [train.first(k) for k in valid]), "test": tested, "train": (train, rest)}


def answer_of(row: Row) -> str:
    """What SFT imitates: the chosen response, the completion, or the best of a group."""
    if "completions" in row:
        return str(max(zip(row["rewards"], row["completions"], strict=True))[1])
    return str(row["chosen"] if "chosen" in row else row["completion"])


def wanted_answer(row: Row) -> str | None:
    """`answer_of` a row, unless a label says that it is not wanted."""
    return answer_of(row) if row.get("label", True) else None


def texts_in(row: Row) -> list[str]:
    """All responses of a row."""
    return row.get("completions") or [row[name] for name in ("chosen", "rejected", "completion") if name in row]


def are_verdicts(rows: Rows) -> bool:
    """Whether rows are verdicts on single answers."""
    return bool(rows) and "label" in rows[0]


def wanted(rows: Rows) -> Rows:
    """The rows whose answer is wanted: all of them, where they are no verdicts."""
    return [each for each in rows if each.get("label", True)]


HELD: dict[str, set[Fed]] = {
    "chosen": {"answers", "pairs"},
    "completions": {"answers", "groups"},
    "label": {"answers", "judged"},
    "completion": {"answers"},
}
"""What data with such a column holds; the first that there is decides."""


def owned_by(columns: tuple[str, ...]) -> frozenset[Fed]:
    """What data with these columns holds; of data that is not here yet, pairs are hoped for."""
    return frozenset(next((held for name, held in HELD.items() if name in columns), HELD["chosen"]))

"""Malformed files into every command that reads files: each ends well, or in one line that says what is wrong.

Every case follows from its seed alone. More of them: TILTLM_FUZZ=5000 pytest tests/test_fuzz.py
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from command import tiltlm
from tiltlm import cli

CASES = int(os.environ.get("TILTLM_FUZZ", "300"))
FIRST = int(os.environ.get("TILTLM_FUZZ_FIRST", "0"))
RUN_CASES = max(CASES // 4, 1)

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "a b", "chosen": " c", "rejected": " d", "margin": 1.5},
    {"chosen": "a b c", "rejected": "a b d"},
    {"prompt": "a", "completions": [" b", " c"], "rewards": [0.5, 1], "finished": [True, False]},
    {"prompt": "a", "completions": [" b", " c"], "scores": [1, 2]},
    {"prompt": "a", "scores_texts": [[1, "ab"], [2, "ac"]]},
    {"prompt": "a", "completion": " b", "label": True, "answer": "b"},
    {"messages": MESSAGES},
    {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": MESSAGES[1:]},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"info": {"subreddit": "s", "title": "t", "post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "b", "output": "c"},
    {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 0},
    {"prompt": [1, 2], "completion_ids": [3], "answer": [3]},
]  # fmt: skip

ODD: list[Any] = [
    None, True, False, 0, -1, 10**400, 1e308, float("nan"), float("inf"), "", " ", "\x00", "\ufeff", "é" * 50, "𝄞", [],
    {}, [[]], [None], [True], {"": None}, [{}], [{"role": None}], [{"role": "user"}], [{"role": 1, "content": []}],
    [[[[]]]], "x" * 5000, ["a", 1], [1, "a", None], "\ud800", {"text": 1}, [{"text": None}] * 2, [10**400], [1e999],
]  # fmt: skip
"""Values that a column does not expect."""

LINES = [
    b"", b"\n\n", b"[", b"{", b"}", b"null", b"1", b'"x"', b"[]", b"{}", b"[{}]", b"[1]", b"\xff\xfe", b"\x00" * 9,
    b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt":' + b"[" * 100_000, b"9" * 5000, b'{"prompt": ' + b"9" * 5000 + b"}",
    b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', b'{"prompt": "\xe9", "completion": "b"}',
    b'{"prompt": NaN, "completion": -Infinity}', b'{"prompt": "a", "prompt": 1}', b"\xef\xbb\xbf{}", b'"' * 999,
    '{"prompt": "a", "completion": "é"}'.encode("utf-16"), '{"prompt": "é", "completion": "b"}'.encode("latin-1"),
    b'prompt,chosen,rejected\n"a,b,c\n', b"prompt,prompt\na,b\n", b"prompt,completion\n" + b"a" * 200_000 + b",b\n",
    b"PAR1" + b"\x00" * 20 + b"PAR1", b"\x1f\x8b\x08\x00", b"prompt;chosen;rejected\na;b;c\n",
    b"a\rb\r\nc\x85d\xe2\x80\xa8e",
]  # fmt: skip
"""Whole contents that are none."""

ENDINGS = [".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet"]


def written(rows: list[dict[str, Any]], ending: str) -> bytes:
    """Rows in the format of a file's ending, as well as they can be."""
    plain = ending.removesuffix(".gz")
    if plain == ".parquet":
        return parquet(rows)
    if plain == ".csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    else:
        text = json.dumps(rows) if plain == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    data = text.encode("utf-8", "surrogatepass")
    return gzip.compress(data, mtime=0) if ending.endswith(".gz") else data


def parquet(rows: list[dict[str, Any]]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    out = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
        return b"PAR1"  # no such table can be
    return out.getvalue()


def spoilt(value: Any, by: random.Random) -> Any:
    """`value` with an odd one somewhere in it."""
    if by.random() < 0.5 or not isinstance(value, (list, dict)) or not value:
        return by.choice(ODD)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = by.choice(keys)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = spoilt(value[key], by)
    return copy


def damaged(data: bytes, by: random.Random) -> bytes:
    """Cut, or with some bytes changed, doubled or left out."""
    if not data:
        return data
    if by.random() < 0.3:
        return data[: by.randrange(len(data))]
    out = bytearray(data)
    for _ in range(by.choice([1, 1, 3, 20])):
        at = by.randrange(len(out) or 1)
        out[at : at + by.choice([0, 1, 4])] = bytes(by.choices(range(256), k=by.choice([0, 1, 4])))
    return bytes(out)


def row_file(by: random.Random) -> tuple[str, bytes]:
    """(name, content) of a malformed file of rows."""
    ending, kind = by.choice(ENDINGS), by.randrange(4)
    if kind == 0:
        return f"in{ending}", by.choice(LINES)
    rows = [dict(by.choice(ROWS))] * by.choice([1, 2, 3])
    if kind in (1, 2):
        at = by.randrange(len(rows))
        row = dict(rows[at])
        for name in by.sample(sorted(row), k=by.randint(1, len(row))):
            row[name] = spoilt(row[name], by)
            if by.random() < 0.1:
                del row[name]
        rows[at] = row
        return f"in{ending}", written(rows, ending)
    data = written(rows, ending)
    encoded = by.choice([None, "utf-16", "latin-1", "utf-8-sig", "utf-32"])
    if encoded and not ending.endswith((".gz", ".parquet")):
        data = data.decode().encode(encoded, "replace")
    return f"in{ending}", damaged(data, by)


def said_well(args: list[str], cwd: Path, what: str) -> None:
    """The command ends with 0 or 2, without any exception but those that `cli` makes one line of."""
    try:
        done = tiltlm(*args, cwd=cwd, check=False)
    except Exception as error:
        pytest.fail(f"{what}: {' '.join(args)}: {type(error).__name__}: {str(error)[:300]}")
    assert done.returncode in (0, 1, 2), f"{what}: {' '.join(args)}: exit status {done.returncode}"
    assert "has no option" not in done.stderr, f"{' '.join(args)} never read its file: {done.stderr}"
    if done.returncode == 2 and done.stderr.startswith("tiltlm: "):
        lines = done.stderr.strip().split("\n")
        assert len(lines) == 1 and len(lines[0]) > 12, f"{what}: {' '.join(args)}: {done.stderr[:600]}"


COMMANDS: list[list[str]] = [
    ["prepare", "IN", "--out", "out.jsonl"],
    ["prepare", "IN", "--out", "out.jsonl", "--as", "pairs"],
    ["prepare", "IN", "--out", "out.jsonl", "--as", "rewards"],
    ["prepare", "IN", "--out", "out.jsonl", "--format", "hh"],
    ["prepare", "IN", "--out", "out.jsonl", "--format", "tldr"],
    ["score", "exact-answer", "IN", "--out", "out.jsonl"],
    ["score", "own.py:length", "IN", "--out", "out.jsonl"],
    ["sample", "model", "--prompts", "IN", "--out", "out.jsonl", "--max-new-tokens", "2"],
    ["run", "pairs/data", "--task.data", "IN", "--task.model="],
    [
        "run",
        "mine/reference",
        "--task.prompts",
        "IN",
        "--task.model",
        "model",
        "--task.reward",
        "own.py:length",
        "--task.new-tokens",
        "2",
        "--ruler.n",
        "2",
        "--log-z.draws",
        "4",
    ],
]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a tiny model and a reward in it."""
    folder = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=16, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    (folder / "own.py").write_text("def length(rows, *more):\n    return [1.0 for _ in rows]\n")
    return folder


@contextlib.contextmanager
def place_for(work: Path, name: str, content: bytes) -> Iterator[None]:
    """The file, and afterwards nothing of what came of it."""
    (work / name).write_bytes(content)
    try:
        yield
    finally:
        for path in work.iterdir():
            if path.name not in ("model", "own.py"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_no_file_of_rows_ends_in_a_traceback(work):
    for seed in range(FIRST, FIRST + CASES):
        by = random.Random(f"rows {seed}")
        name, content = row_file(by)
        args = [name if arg == "IN" else arg for arg in by.choice(COMMANDS)]
        with place_for(work, name, content):
            said_well(args, work, f"seed {seed}, {content[:300]!r}")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2] + command[4:]))
def test_a_folder_in_a_file_s_place_is_said(work, command):
    (work / "in.jsonl").mkdir()
    try:
        said_well([arg.replace("IN", "in.jsonl") for arg in command], work, "a folder")
    finally:
        (work / "in.jsonl").rmdir()


# ---- runs ---------------------------------------------------------------------------------------------------

Spoil = Callable[[bytes, random.Random], bytes]


def json_spoilt(data: bytes, by: random.Random) -> bytes:
    """A .json file with an odd value somewhere."""
    try:
        return json.dumps(spoilt(json.loads(data), by)).encode("utf-8", "surrogatepass")
    except ValueError:
        return damaged(data, by)


SPOILERS: list[Spoil] = [damaged, json_spoilt, json_spoilt, lambda data, by: by.choice(LINES)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with finished runs of stages that train, that measure and that compare."""
    folder = tmp_path_factory.mktemp("fuzzed-runs")
    tiny = ["--task.model=", "--task.stories", "100", "--task.new-tokens", "4", "--exact.n", "10"]
    tiny += ["--task.fit.steps", "4", "--task.fit.warmup", "1", "--log-z.draws", "200"]
    tiny += ["--ruler.n", "20", "--fit.steps", "2", "--feed.particles", "4", "--exact.batch-size", "100"]
    tiltlm("run", "animals/ctl", *tiny, cwd=folder)
    compared = ["run", "animals/evaluate", "--methods", "reference", "ctl", *tiny]
    tiltlm(*compared, cwd=folder)
    tiltlm("run", "tree/solve", cwd=folder)
    (folder / "commands").write_text(json.dumps([["run", "animals/ctl", *tiny], compared]))
    return folder


NAMES = ("config.json", "provenance.json", "report.json", "samples.jsonl", "metrics.jsonl", "log_z.json")
NAMES += ("measurement.safetensors", "samples.safetensors", "exact.safetensors", "evals.jsonl", "trainer.pt")


def test_no_broken_run_folder_ends_in_a_traceback(runs):
    files = sorted(path for path in (runs / "runs").rglob("*") if path.name in NAMES)
    folders = sorted({str(path.parent.relative_to(runs)) for path in files if path.name == "report.json"})
    again = json.loads((runs / "commands").read_text())
    (runs / "p.jsonl").write_text('{"prompt": [1, 2]}\n')
    for seed in range(FIRST, FIRST + RUN_CASES):
        by = random.Random(f"runs {seed}")
        path = by.choice(files)
        before = path.read_bytes()
        path.write_bytes(by.choice(SPOILERS)(before, by))
        undone = path.parent / "DONE"
        commands = [["measure", *folders], ["report", *folders, "--out", "page.html"], *again]
        commands += [["sample", by.choice(folders), "--prompts", "p.jsonl", "--out", "y.jsonl"]]
        try:
            said_well(
                by.choice(commands), runs, f"seed {seed}, {path.relative_to(runs)}: {path.read_bytes()[:200]!r}"
            )
        finally:
            path.write_bytes(before)
            undone.touch() if undone.parent.name.startswith("checkpoint") is False else None
            for left in ("y.jsonl", "y.jsonl.settings.json"):
                (runs / left).unlink(missing_ok=True)


def test_the_fuzzer_itself_would_see_a_traceback(work, monkeypatch):
    def broken(args: list[str]) -> int:
        raise TypeError("'bool' object is not iterable")

    import tiltlm.commands.prepare as module

    monkeypatch.setattr(module, "prepare", broken)
    with pytest.raises(pytest.fail.Exception, match="seed 1"):
        said_well(["prepare", "x.jsonl", "--out", "y.jsonl"], work, "seed 1")
    assert cli.main(["--version"]) == 0

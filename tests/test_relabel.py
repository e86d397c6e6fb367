"""`tiltlm prepare --relabel`: pairs in the order of a reward, with margins; ties counted; any columns, any file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import tiltlm
from tiltlm.data.preference_rows import Tally, read_preferences
from tiltlm.data.relabel import relabelled
from tiltlm.rewards.by_name import text_function

ROWS = [
    {"question": "a data q", "response_j": "sun", "response_k": "data hope"},
    {"question": "b", "response_j": "data, hope, code", "response_k": "data"},
    {"question": "c", "response_j": "moon", "response_k": "star"},
    {"question": "d", "response_j": "safe", "response_k": "happy"},
]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(folder: Path, rows: list[dict]) -> None:
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_pairs_in_the_order_of_a_reward_with_margins(tmp_path):
    written(tmp_path, [row | {"magnitude": 9} for row in ROWS])
    done = tiltlm("prepare", "p.jsonl", "--out", "o.jsonl", "--relabel", "2*bagofwords", cwd=tmp_path)
    found = lines(tmp_path / "o.jsonl")
    assert [(row["chosen"], row["rejected"], row["margin"]) for row in found] == [
        ("data hope", "sun", 4.0), ("data, hope, code", "data", 4.0),
    ]  # fmt: skip
    assert [row["prompt"].strip() for row in found] == ["a data q", "b"]
    report = json.loads((tmp_path / "o.jsonl.report.json").read_text())
    tie = {"rows": 2, "first": "pair 3 of those read"}
    assert report["dropped"] == {"tie (the reward says the same of both)": tie} and report["read"] == 4
    assert report["notes"] == {"turned over by the reward": 1} and report["relabel"] == "2*bagofwords"
    assert "tie (the reward says the same of both)" in done.stdout
    again = read_preferences(tmp_path / "o.jsonl")
    assert again.rows == found and not again.dropped


def test_ties_are_kept_as_they_stood_where_that_is_said(tmp_path):
    written(tmp_path, ROWS)
    tiltlm("prepare", "p.jsonl", "--out", "o.jsonl", "--relabel", "bagofwords", "--keep-ties", cwd=tmp_path)
    found = lines(tmp_path / "o.jsonl")
    assert [row["margin"] for row in found] == [2, 2, 0, 0] and found[2]["chosen"] == "moon"
    report = json.loads((tmp_path / "o.jsonl.report.json").read_text())
    assert report["notes"] == {"turned over by the reward": 1, "tie (the reward says the same of both)": 2}


def test_other_columns_and_files_are_relabelled_too(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected\nx,sun,data\n")
    tiltlm("prepare", "p.csv", "--out", "o.jsonl", "--relabel", "bagofwords", cwd=tmp_path)
    assert lines(tmp_path / "o.jsonl") == [{"prompt": "x", "chosen": "data", "rejected": "sun", "margin": 1.0}]
    group = {"prompt": "x", "completions": ["sun", "data"], "rewards": [1, 0]}
    written(tmp_path, [group])
    tiltlm("prepare", "p.jsonl", "--out", "o.jsonl", "--as", "pairs", "--relabel", "bagofwords", cwd=tmp_path)
    assert lines(tmp_path / "o.jsonl")[0]["chosen"] == "data"
    with pytest.raises(
        ValueError, match="only pairs can be relabelled; these rows give prompt, completions, rewards"
    ):
        list(relabelled([group], text_function("bagofwords"), Tally()))


def test_what_cannot_be_relabelled_by_is_said_before_anything_is_read(tmp_path):
    (tmp_path / "odd.jsonl").write_text("no JSON")
    for more, said in (
        (["--relabel", "bagofword"], "Did you mean bagofwords"),
        (
            ["--relabel", "exact-answer"],
            "takes the column 'answer', and pairs that are labelled anew have no further",
        ),
        (["--keep-ties"], "--keep-ties is about the ties of --relabel"),
    ):
        done = tiltlm("prepare", "odd.jsonl", "--out", "o.jsonl", *more, cwd=tmp_path, check=False)
        assert done.returncode == 2 and said in done.stderr
    written(tmp_path, ROWS[2:])
    done = tiltlm("prepare", "p.jsonl", "--out", "o.jsonl", "--relabel", "bagofwords", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "nothing is left of p.jsonl" in done.stderr and "2 tie" in done.stderr


def test_a_magnitude_is_a_margin_whatever_the_other_columns_are(tmp_path):
    pair = {"chosen": "a", "rejected": "b", "magnitude": 0.5}
    rows = [{"prompt": "x"} | pair, {"instruction": "x", "input": ""} | pair, {"question": "x"} | pair]
    rows += [{"question": "x", "response_j": "a", "response_k": "b", "magnitude": 0.5}]
    for row in rows:
        written(tmp_path, [row])
        (found,) = read_preferences(tmp_path / "p.jsonl").rows
        assert found["margin"] == 0.5 and found["chosen"] == "a"
    written(tmp_path, [rows[0] | {"margin": 2.0}])
    assert read_preferences(tmp_path / "p.jsonl").rows[0]["margin"] == 2.0

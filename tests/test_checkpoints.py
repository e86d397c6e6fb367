"""A training's checkpoints one by one: measured as a table, drawn from and scored as files of questions and responses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import tiltlm
from tiltlm.ruler.table import curve_table

OWN = ["--task.model", "", "--task.stories", "40", "--task.fit.steps", "2", "--task.new-tokens", "5"]
SMALL = [
    "--fit.steps", "4", "--fit.batch-size", "8", "--fit.checkpoints", "2", "--ruler.checkpoints", "2", "--ruler.n", "2",
    "--ruler.prompts", "6"
]  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a finished measurement of words-small/rloo at toy size, prompts in a template."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiltlm("run", "words-small/rloo", *OWN, *SMALL, "--task.template", "Tell: {prompt}", cwd=folder)
    return folder


def test_every_checkpoint_is_in_the_curve_with_standard_errors(work):
    (curve,) = (work / "runs" / "words-small" / "rloo").glob("*/curve.json")
    rows = json.loads(curve.read_text())
    found = {(row["updates"], row["metric"]): row for row in rows}
    assert {updates for updates, _ in found} == {2, 4}
    for updates in (2, 4):
        for metric in ("reward", "kl_to_reference", "objective"):
            assert found[updates, metric]["stderr"] is not None
    shown = curve_table(rows)
    assert shown.row_count == 2 and str(shown.columns[0].header) == "updates"
    done = tiltlm("run", "words-small/rloo", *OWN, *SMALL, "--task.template", "Tell: {prompt}", cwd=work)
    assert "on the way" in done.stdout and "E[r]" in done.stdout


def test_a_checkpoint_s_draws_are_files_of_questions_and_responses_that_score_reads(work):
    (run,) = (work / "runs" / "words-small" / "rloo-policy").iterdir()
    (work / "q.jsonl").write_text("".join(json.dumps({"question": x}) + "\n" for x in ("One day", "Tom had a")))
    options = ("--columns", "question", "response", "--max-new-tokens", "5")
    worded = ("--template", "Tell: {prompt}", *options)
    tiltlm("sample", str(run / "checkpoint-2"), "--prompts", "q.jsonl", "--out", "y.jsonl", *worded, cwd=work)
    rows = lines(work / "y.jsonl")
    assert [row["question"] for row in rows] == ["One day", "Tom had a"] and all("response" in row for row in rows)
    tiltlm("score", "bagofwords:a,day", "y.jsonl", "--out", "s.jsonl", cwd=work)
    assert [row["reward"] for row in lines(work / "s.jsonl")] == [
        len({"a", "day"} & set(row["response"].split())) for row in rows
    ]


def test_a_run_s_draws_are_made_in_its_own_template(work):
    (run,) = (work / "runs" / "words-small" / "rloo-policy").iterdir()
    drawn = {}
    for name, source, options in (
        ("own", str(run), ()),
        ("same", str(run / "checkpoint-4"), ("--template", "Tell: {prompt}", "--max-new-tokens", "5")),
        ("bare", str(run / "checkpoint-4"), ("--max-new-tokens", "5")),
    ):
        tiltlm("sample", source, "--prompts", "stories:2", "--out", f"{name}.jsonl", *options, cwd=work)
        drawn[name] = [
            (row["prompt"], row["completion_ids"], row["log_q"]) for row in lines(work / f"{name}.jsonl")
        ]
    assert drawn["own"] == drawn["same"] and drawn["own"] != drawn["bare"]
    assert drawn["own"][0][0].count("Tell:") == 0

"""Runs side by side: the same results as one after the other, and one failure stops them all."""

from __future__ import annotations

import json
from pathlib import Path

from command import tiltlm


def lines(folder: Path, stage: str) -> dict[str, str]:
    """What the runs of a stage wrote, by seed."""
    found = {}
    for run in (folder / "runs" / "dialogues" / stage).iterdir():
        seed = json.loads((run / "config.json").read_text())["settings"]["seed"]
        assert (run / "DONE").is_file()
        found[str(seed)] = (run / "train.jsonl").read_text()
    return found


def test_runs_side_by_side_are_those_of_one_after_the_other(tmp_path):
    """Two seeds, a process each; the provenance names the user's own command."""
    both = {}
    for name, jobs in (("alone", []), ("together", ["--jobs", "2"])):
        (tmp_path / name).mkdir()
        tiltlm("sweep", "dialogues/data", "--seed", "1,2", *jobs, cwd=tmp_path / name)
        both[name] = lines(tmp_path / name, "data")
    assert both["alone"] == both["together"] and both["alone"]["1"] != both["alone"]["2"]
    (run, *_) = (tmp_path / "together" / "runs" / "dialogues" / "data").iterdir()
    assert json.loads((run / "provenance.json").read_text())["command"].startswith(
        "tiltlm sweep dialogues/data --seed 1,2"
    )


def test_a_run_that_fails_is_named_with_its_reason(tmp_path):
    """A row that does not fit shows only when the stage reads it, in its own process."""
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "chosen": "a"}\n' * 3 + '{"prompt": 1}\n')
    done = tiltlm(
        "run", "pairs/data", "--task.data", "bad.jsonl", "--task.model=", "--jobs", "2", cwd=tmp_path, check=False
    )
    assert done.returncode == 2 and "failed (see above)" in done.stderr and "bad.jsonl:4" in done.stderr
    assert not list(tmp_path.rglob("DONE"))


def test_a_number_of_jobs_is_a_number(tmp_path):
    for wrong in ("0", "x", "-1"):
        done = tiltlm("run", "dialogues/data", f"--jobs={wrong}", cwd=tmp_path, check=False)
        assert done.returncode == 2 and "--jobs wants a " in done.stderr

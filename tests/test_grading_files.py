"""Stored answers graded anew by `tiltlm score grader:NAME`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import tiltlm
from question_world import FirstLetter
from tiltlm.commands import grading
from tiltlm.commands.grading import by_question, told
from tiltlm.questions.generated import Generated, read_generated, write_generated

ROWS = [
    Generated(7, 0, "", "A", correct="A", subject="s", score=0.0, finish_reason="stop"),
    Generated(7, 1, "", "B", correct="A", subject="s", score=0.0, finish_reason="stop"),
    Generated(3, 0, "", "D", correct="D", score=1.0, finish_reason="length"),
    Generated(3, 1, "", "?", correct="D", score=0.0, finish_reason="stop"),
]


@pytest.fixture
def first_letter(monkeypatch) -> None:
    monkeypatch.setattr(grading, "grader", {"first": FirstLetter()}.__getitem__)


@pytest.mark.usefixtures("first_letter")
@pytest.mark.parametrize(("source", "out"), [("a.jsonl", "b.csv"), ("a.csv", "b.jsonl")])
def test_a_file_is_graded_anew_between_both_formats(tmp_path: Path, source: str, out: str):
    """Sample 0 of 7 is right (the file said wrong), the D was cut off (the file said right)."""
    write_generated(tmp_path / source, ROWS)
    done = tiltlm("score", "grader:first", source, "--out", out, cwd=tmp_path)
    rows = read_generated(tmp_path / out).rows
    assert [(row.answer, row.score) for row in rows] == [("A", 1.0), ("B", 0.0), ("D", 0.0), ("", 0.0)]
    assert "4 answers to 2 questions, accuracy 0.2500" in done.stderr.replace("\n", " ")
    assert "2 graded otherwise than before" in done.stderr.replace("\n", " ")


@pytest.mark.usefixtures("first_letter")
def test_lines_of_sample_are_graded_too(tmp_path: Path):
    lines = [
        {"index": 7, "prompt": "1?", "answer": "A", "completion": text, "completion_ids": [7], "finished": done}
        for text, done in (("A", True), ("A", False))
    ]
    (tmp_path / "y.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    tiltlm("score", "grader:first", "y.jsonl", "--out", "z.jsonl", cwd=tmp_path)
    rows = read_generated(tmp_path / "z.jsonl").rows
    assert [(row.sample, row.correct, row.answer, row.score, row.finish_reason) for row in rows] == [
        (0, "A", "A", 1.0, "stop"), (1, "A", "A", 0.0, "length"),
    ]  # fmt: skip


@pytest.mark.usefixtures("first_letter")
def test_what_cannot_be_graded_says_so(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"index": 7, "completion": "A"}\n')
    wrong = tiltlm("score", "grader:first", "a.jsonl", "--out", "b.jsonl", cwd=tmp_path, check=False)
    assert wrong.returncode == 2 and "the right answer to question 7 is missing" in wrong.stderr
    (tmp_path / "e.jsonl").touch()
    wrong = tiltlm("score", "grader:first", "e.jsonl", "--out", "b.jsonl", cwd=tmp_path, check=False)
    assert "there is nothing to grade" in wrong.stderr


def test_accuracy_is_averaged_by_question_first():
    """Question 7: 1 of 3; question 3: 1 of 1. By question 2/3, by row 2/4."""
    rows = [Generated(7, k, "", "", "A", "A", score=float(k == 0)) for k in range(3)]
    rows.append(Generated(3, 0, "", "", "D", "D", score=1.0))
    assert [each.accuracy for each in by_question(rows)] == [pytest.approx(1 / 3), 1.0]
    assert "4 answers to 2 questions, accuracy 0.6667" in told(rows)


def test_the_real_table_by_both_graders(shared_data, tmp_path):
    """The table's own grades come out again by `seed` (39 right); `pick` differs in one."""
    path = str(shared_data / "reasoning" / "star_generated_mmlu.csv")
    for name, says in (("seed", "accuracy 0.7091"), ("pick", "accuracy 0.7273")):
        done = tiltlm("score", f"grader:{name}", path, "--out", f"{name}.jsonl", cwd=tmp_path)
        assert says in done.stderr.replace("\n", " ")
        other = 0 if name == "seed" else 1
        assert f"; {other} graded otherwise than before" in done.stderr.replace("\n", " ")

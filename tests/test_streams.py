"""What reads and writes rows does so some at a time: the same results and errors, and nothing is kept."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from command import tiltlm
from tiltlm.commands import score as scoring
from tiltlm.commands.score import looked_over, score
from tiltlm.data import relabel, tables
from tiltlm.data.formats import format_named
from tiltlm.data.pool import Pool
from tiltlm.data.preference_rows import Reading, Tally, preference_rows, read_preferences
from tiltlm.jsonl import aside_of, whole_lines
from tiltlm.rewards.by_name import text_function

REWARD = """
calls = []
def f(prompts, completions, *, note=None, **columns):
    calls.append(len(completions))
    print(calls[-1], sorted(columns), note)
    return [len(y) for y in completions]
"""


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pair(k: int) -> dict[str, Any]:
    return {"prompt": f"p{k // 2}", "chosen": "a" * (k + 1), "rejected": "b" * (7 - k)}


# ---- score --------------------------------------------------------------------------------------------------


@pytest.fixture
def two(monkeypatch) -> None:
    """Two lines, or pairs, are scored together."""
    monkeypatch.setattr(scoring, "AT_ONCE", 2)
    monkeypatch.setattr(relabel, "AT_ONCE", 2)


def test_a_file_is_scored_two_lines_at_a_time(tmp_path, two, capsys):
    """Columns that one line alone has reach every call, and the mean is that of all lines."""
    (tmp_path / "own.py").write_text(REWARD)
    rows = [{"prompt": "x", "completion": "y" * k} for k in range(4)] + [{"completions": ["a", "bb"], "odd": 1}]
    written(tmp_path / "y.jsonl", rows)
    assert score([f"{tmp_path}/own.py:f", str(tmp_path / "y.jsonl"), "--out", str(tmp_path / "s.jsonl")]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == ["2 ['odd'] None"] * 3
    assert [row.get("reward", row.get("rewards")) for row in lines(tmp_path / "s.jsonl")] == [0, 1, 2, 3, [1, 2]]
    assert "6 completions, mean reward 1.5000" in " ".join(said.err.split())
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"own.py", "y.jsonl", "s.jsonl"}


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({"completion": "a"}, r"y.jsonl:5: column 'answer', which this reward takes, is missing"),
        ({"prompt": "a", "answer": "b"}, r"y.jsonl:5: column 'completion' is missing"),
        ({"completion": "a", "answer": "b"}, None),
    ],
)
def test_the_last_line_is_looked_at_before_the_first_is_scored(tmp_path, two, last, said):
    path = written(tmp_path / "y.jsonl", [{"completion": "a", "answer": "a"}] * 4 + [last])
    if said is None:
        assert looked_over(path, text_function("exact-answer")) == ("answer",)
        return
    with pytest.raises(ValueError, match=said):
        score(["exact-answer", str(path), "--out", str(tmp_path / "s.jsonl")])
    assert not (tmp_path / "s.jsonl").exists()


def test_a_column_that_no_line_has_is_told_from_one_that_some_lack(tmp_path, two):
    path = written(tmp_path / "y.jsonl", [{"completion": "a", "other": 1}] * 3)
    with pytest.raises(ValueError, match="takes the column 'answer', and the lines have other"):
        looked_over(path, text_function("exact-answer"))
    with pytest.raises(ValueError, match="has no lines: there is nothing to score"):
        looked_over(written(tmp_path / "e.jsonl", []), text_function("exact-answer"))
    path = written(tmp_path / "t.jsonl", [{"prompt": "x", "completion": "a"}] * 3 + [{"completion": "a"}])
    with pytest.raises(ValueError, match=r"t.jsonl:4: this reward reads text; 'prompt' is missing"):
        looked_over(path, text_function("bagofwords"))


def test_an_error_on_the_way_leaves_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), aside_of(tmp_path / "x.txt") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# ---- prepare ------------------------------------------------------------------------------------------------


def test_rows_come_as_they_are_read(tmp_path):
    """Three of them are there before the fourth line, which is none, is looked at."""
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(pair(k)) + "\n" for k in range(3)) + "no JSON\n")
    tally = Tally()
    rows = preference_rows(path, Reading(format_named("auto")), tally)
    assert list(islice(rows, 3)) == [pair(k) for k in range(3)]
    with pytest.raises(ValueError, match=r"p.jsonl:4: not JSON"):
        next(rows)
    done = tiltlm("prepare", "p.jsonl", "--out", "o.jsonl", cwd=tmp_path, check=False)
    assert done.returncode == 2 and [each.name for each in tmp_path.iterdir()] == ["p.jsonl"]


def test_weights_take_the_rows_that_they_took_from_a_list(tmp_path):
    path = written(tmp_path / "p.jsonl", [pair(k) for k in range(6)])
    found = read_preferences([f"{path}:2.5"])
    assert found.rows[:12] == [pair(k) for k in range(6)] * 2 and len(found.rows) == 15
    extra = [len(row["chosen"]) for row in found.rows[12:]]
    assert extra == sorted(set(extra)) and found.notes == {"copies by the source's weight": 9}
    few = read_preferences([f"{path}:0.5"])
    assert len(few.rows) == 3 and few.dropped == {"left out by the source's weight": 3}
    assert read_preferences([f"{path}:2"], limit=3).rows == [pair(k) for k in range(3)]


def test_pairs_are_relabelled_some_at_a_time(tmp_path, two):
    (tmp_path / "own.py").write_text(REWARD)
    reward, tally = text_function(f"{tmp_path}/own.py:f"), Tally()
    kept = list(relabel.relabelled((pair(k) for k in range(5)), reward, tally))
    assert [row["margin"] for row in kept] == [6, 4, 2, 2]
    assert tally.notes == {relabel.TURNED: 3} and tally.examples == {relabel.TIE: "pair 4 of those read"}
    ties = list(relabel.relabelled((pair(k) for k in range(5)), reward, tally, keep_ties=True))
    assert [row["margin"] for row in ties] == [6, 4, 2, 0, 2] and tally.notes[relabel.TIE] == 1


# ---- pools and files ----------------------------------------------------------------------------------------


def test_a_pool_gives_back_its_lines_in_any_order(tmp_path):
    rows = [pair(k) | ({"label": k % 3 == 0} if k else {}) for k in range(5)]
    pool = Pool(tmp_path, (row | {"prompt": row["prompt"] + "é"} for row in rows))
    found = [json.loads(line) for line in pool.lines([4, 0, 3])]
    assert [row["chosen"] for row in found] == [rows[k]["chosen"] for k in (4, 0, 3)]
    assert [pool.of(k) for k in range(len(pool.prompts))] == [[0, 1], [2, 3], [4]]
    assert [pool.first(k) for k in range(3)] == [0, 2, 4] and pool.prompt(3) == 1 and len(pool) == 5
    assert [pool.label(k) for k in range(5)] == [None, False, False, True, False]


@pytest.mark.parametrize(
    "text", ["", "a\n", "a\nhalf", "half", "a\n" * 700_000 + "half", "x" * 1_200_000 + "\nhalf"]
)
def test_half_a_line_at_the_end_is_cut_off(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    assert whole_lines(path) == text.count("\n")
    assert path.read_text() == text[: text.rfind("\n") + 1]


ARRAY = """[
 {"prompt": "a",
  "completion": "b"}, {"prompt": "é\\n", "completion": " c"}
,
{"prompt": "", "completion": "d"} ]"""


@pytest.mark.parametrize("part", [1, 2, 3, 7, 30])
def test_an_array_is_read_a_part_at_a_time(tmp_path, monkeypatch, part):
    """The same rows and places, and the same error wherever the file breaks off or a character is wrong."""
    path = tmp_path / "x.json"

    def found(text: str) -> list[Any]:
        path.write_text(text)
        rows: list[Any] = []
        try:
            for placed in tables.rows_of(path):
                rows.append(placed)
        except ValueError as error:
            rows.append(str(error))
        return rows

    texts = [
        ARRAY,
        "[]",
        " [ ]\n",
        "[1]",
        '[{"a": 1} {"b": 2}]',
        '[{"a": 1},\n 2]',
        ARRAY.replace("\n", " ")[:-40] + "!",
    ]
    texts += [ARRAY[:k] for k in range(2, len(ARRAY), 5)] + [ARRAY[:k] + "}" + ARRAY[k:] for k in range(4, 90, 11)]
    whole = [found(text) for text in texts]
    assert [place for place, _ in whole[0]] == [f"{path}:{k}" for k in (2, 3, 5)] and whole[1] == whole[2] == []
    monkeypatch.setattr(tables, "PART", part)
    assert [found(text) for text in texts] == whole

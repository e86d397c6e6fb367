"""Stored answers: STaR's tables, our lines, and how they find their questions again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from question_world import QUESTIONS, FirstLetter, Letters, tokenizer
from tiltlm.questions.generated import Generated, read_generated, write_generated
from tiltlm.questions.grading import Grading
from tiltlm.questions.preload import preloaded
from tiltlm.samples import Tokens

HEADER = "indices,prompted_questions,model_answers,subjects,correct_answers,raw_responses,scores"
ROWS = [
    Generated(7, 0, "1?", "so A", "A", "A", "sums", 1.0, "stop"),
    Generated(7, 1, "1?", 'line\none, "two"', "", "A", "sums", 0.0, "length"),
    Generated(3, 0, "2?", "NA", "NA", "C", "", 0.0, "stop"),
    Generated(3, 1, "2?", "NA", "NA", "C", "", 0.0, "stop"),
]


def table(tmp_path: Path, *lines: str, name: str = "generated.csv") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_our_lines_and_the_old_table_give_back_what_was_written(tmp_path):
    for name in ("a.jsonl", "a.csv"):
        write_generated(tmp_path / name, ROWS)
        stored = read_generated(tmp_path / name)
        assert stored.rows == tuple(ROWS) and stored.said == ()
    assert (tmp_path / "a.csv").read_text().splitlines()[0] == HEADER
    full = replace(ROWS[0], completion_ids=(7, 2), parse_rule="last", settings={"temperature": 1.0})
    write_generated(tmp_path / "b.jsonl", [full])
    assert read_generated(tmp_path / "b.jsonl").rows == (full,)


def test_a_table_with_the_older_name_an_unnamed_and_a_repeated_column(tmp_path):
    path = table(
        tmp_path, ",indices,answers,raw_responses,scores,truth,scores", "0,7,A,A<|eot_id|>,1.0,A,0.0",
        "1,3.0,NA,NA,,C,0.0",
    )  # fmt: skip
    stored = read_generated(path)
    assert stored.rows == (
        Generated(7, 0, "", "A", "A", "A", "", 1.0, "stop"),
        Generated(3, 0, "", "NA", "NA", "C", "", None, "length"),
    )
    assert stored.said == (
        "1 columns without a name left out",
        "1 columns of a name that is there already left out",
    )


def test_a_table_appended_to_itself_is_read_once_and_two_like_samples_stay_two(tmp_path):
    write_generated(tmp_path / "once.csv", ROWS)
    text = (tmp_path / "once.csv").read_text()
    (tmp_path / "twice.csv").write_text(text + text)
    stored = read_generated(tmp_path / "twice.csv")
    assert stored.rows == tuple(ROWS)
    assert stored.said == ("1 repeated headers left out", "4 rows that were there already left out")


def test_rows_appended_after_an_interruption_and_further_samples(tmp_path):
    """7: a b | 7: a b c: the first two are there already, c is the third sample; 3: d | 3: e are two samples."""
    rows = ["7,a", "7,b", "3,d", "7,a", "7,b", "7,c", "3,e"]
    stored = read_generated(table(tmp_path, "indices,raw_responses", *rows))
    assert [(row.index, row.sample, row.response) for row in stored.rows] == [
        (7, 0, "a"), (7, 1, "b"), (3, 0, "d"), (7, 2, "c"), (3, 1, "e"),
    ]  # fmt: skip
    assert "2 rows that were there already left out" in stored.said
    assert {row.finish_reason for row in stored.rows} == {""} and "not known" in stored.said[-1]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["raw_responses,scores", "a,1"], "column 'indices' is missing"),
        (["indices,raw_responses", "x,a"], "csv:2: indices are whole numbers"),
        (["indices,raw_responses,scores", "1,a,two"], "csv:2: scores are from 0 to 1; got 'two'"),
        (["indices,raw_responses", "1,a,2"], "csv:2: 3 fields, but the first line names 2"),
        (["indices,raw_responses", '1,"a'], "csv:2: the row that begins here is not csv"),
        ([], "is empty"),
    ],
)
def test_mistakes_in_a_table_are_named_with_their_place(tmp_path, lines, says):
    path = table(tmp_path, *lines) if lines else tmp_path / "empty.csv"
    path.touch()
    with pytest.raises(ValueError, match=says):
        read_generated(path)


def test_mistakes_in_lines_and_names(tmp_path):
    path = table(tmp_path, '{"index": 1, "completion": "a", "finish_reason": "eos"}', name="a.jsonl")
    with pytest.raises(ValueError, match=r"a.jsonl:1: finish_reason is stop, length or empty; got 'eos'"):
        read_generated(path)
    with pytest.raises(ValueError, match=r"read from \.jsonl"):
        read_generated(tmp_path / "a.pkl")
    with pytest.raises(ValueError, match=r"written as \.jsonl or \.csv"):
        write_generated(tmp_path / "a.txt", [])


def test_lines_of_a_round_hold_several_answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(
        '{"index": 7, "subject": "s", "prompt": "1?", "answer": "A", "completions": ["A", "B"], "rewards": [1.0, 0.0], '
        '"completion_ids": [[7, 2], [8]], "finished": [true, false], "answers": ["A", "B"], "rules": ["letter", "x"]}\n'
    )
    assert read_generated(path).rows == (
        Generated(7, 0, "1?", "A", "A", "A", "s", 1.0, "stop", "letter", (7, 2)),
        Generated(7, 1, "1?", "B", "B", "A", "s", 0.0, "length", "x", (8,)),
    )
    path.write_text('{"index": 7, "completions": ["A", "B"], "rewards": [1.0]}\n')
    with pytest.raises(ValueError, match=r"jsonl:1: completions, rewards hold one entry for each completion"):
        read_generated(path)


def test_a_sample_that_two_lines_hold_counts_once(tmp_path):
    write_generated(tmp_path / "a.jsonl", [*ROWS, replace(ROWS[0], response="other")])
    stored = read_generated(tmp_path / "a.jsonl")
    assert stored.rows == tuple(ROWS) and stored.said == ("1 lines of a sample that is there already left out",)


def test_the_real_table(shared_data, tmp_path):
    stored = read_generated(shared_data / "reasoning" / "star_generated_mmlu.csv")
    assert len(stored.rows) == 55 and stored.said == ()
    assert sum(row.score or 0.0 for row in stored.rows) == 39
    assert [row.index for row in stored.rows[:2]] == [13635, 10159]
    assert "<|eot_id|>" not in stored.rows[0].response and stored.rows[0].response.endswith("Answer: C")
    write_generated(tmp_path / "again.csv", stored.rows)
    assert read_generated(tmp_path / "again.csv").rows == stored.rows


# ---- joined to prompts ------------------------------------------------------------------------------------------


def asked() -> tuple[Tokens, Grading]:
    read = tokenizer()
    ids = [Letters().put(question, read) for question in QUESTIONS]
    grading = Grading.of(list(zip(ids, QUESTIONS, strict=True)), FirstLetter(), read)
    return Tokens.of(ids), grading


def test_rows_find_their_prompt_by_the_question_and_not_by_where_they_stand():
    prompts, grading = asked()
    rows = [
        Generated(5, 0, "4?\n", "D", finish_reason="stop", score=1.0),
        Generated(99, 0, "", "A"),
        Generated(3, 0, "", "123", finish_reason="stop"),
        Generated(7, 1, "", "B", finish_reason="stop", score=1.0),
        Generated(7, 0, "9?", "1A", finish_reason="length", score=0.0),
    ]
    found = preloaded(rows, prompts, QUESTIONS, grading, (2,), 3)
    s = found.samples
    assert s.prompt_index.tolist() == [0, 0, 3] and found.counts.tolist() == [2, 0, 0, 1]
    read = tokenizer()
    assert s.completions.lists() == [
        read.convert_tokens_to_ids(list("1A")),
        [*read.convert_tokens_to_ids(["B"]), 2],
        [*read.convert_tokens_to_ids(["D"]), 2],
    ]
    assert s.finished is not None and s.finished.tolist() == [False, True, True]
    assert s.reward is not None and s.reward.tolist() == [0.0, 0.0, 1.0]  # sample 1 of 7: "B" is not right
    assert (found.unanswered, found.strangers, found.too_long, found.regraded, found.reworded) == (2, 1, 1, 1, 1)
    assert len(found.said()) == 5 and found.said()[0] == "2 of 4 prompts have no stored answer"
    with pytest.raises(ValueError, match="1 to 2 answers each"):
        found.groups()


def test_ids_of_the_file_are_kept_and_equal_numbers_make_groups():
    (prompts, grading), read = asked(), tokenizer()
    rows = [
        Generated(q.index, k, "", read.decode([4, k + 7]), completion_ids=(4, k + 7, 2), finish_reason="stop")
        for q in QUESTIONS[::-1]
        for k in (1, 0)
    ]
    found = preloaded(rows, prompts, QUESTIONS, grading, (2,), 3)
    groups = found.groups()
    assert groups.size == 2 and len(groups) == 4 and found.said() == ()
    assert groups.samples.completions.lists()[:2] == [[4, 7, 2], [4, 8, 2]]
    assert torch.equal(groups.samples.prompt_index, torch.arange(4).repeat_interleave(2))
    assert groups.reward[0].tolist() == [1.0, 0.0]  # question 7: A is right


def test_ids_of_another_models_tokens_are_not_taken_but_the_text_is_read():
    (prompts, grading), read = asked(), tokenizer()
    text = read.decode([4, 7])
    for ids in ((7, 4, 2), (4, 10**6)):
        rows = [Generated(q.index, 0, "", text, completion_ids=ids, finish_reason="stop") for q in QUESTIONS]
        assert preloaded(rows, prompts, QUESTIONS, grading, (2,), 3).samples.completions.lists()[0] == [4, 7, 2]


def test_a_file_of_other_questions_is_refused():
    prompts, grading = asked()
    with pytest.raises(
        ValueError, match="none of the 1 stored answers belongs to one of these 4 questions and has at most 3"
    ):
        preloaded([Generated(99, 0, "", "A")], prompts, QUESTIONS, grading, (2,), 3)

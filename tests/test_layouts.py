"""Files as others post them: layouts told by their columns, columns by other names, encodings, separators, weights."""

from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path

import pytest

from command import tiltlm
from test_preference_data import made, words, write
from tiltlm.data.formats import as_pairs
from tiltlm.data.layouts import LAYOUTS, SPEAKERS
from tiltlm.data.mapping import NAMES, mapped, mapping_of, suggested
from tiltlm.data.preference_rows import read_preferences
from tiltlm.data.tables import rows_of, weighed

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases" / "layouts"
ASKED = "<s><user>{}</s>\n<assistant>"
NICE = "<s><system>{}</s>\n<user>{}</s>\n<assistant>"


def pair(prompt: str, chosen: str, rejected: str, **more: object) -> dict[str, object]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


AS_MESSAGES = {
    "alpaca.json": [{"prompt": ASKED.format("Add\n2 3"), "completion": "5"}],
    "alpaca_pref.json": [pair(ASKED.format("Add\n2 3"), "5", "6")],
    "d2po.jsonl": [pair(ASKED.format("q?"), "a", "b", margin=2.0)],
    "helpsteer2.jsonl": [{"prompt": ASKED.format("p?"), "completions": ["r1", "r2"], "rewards": [4, 1]}],
    "hh_trl_style.jsonl": [pair(ASKED.format("How do I program a robot?"), "What kind?", "No.")],
    "implicit.jsonl": [pair(NICE.format("Be nice", "hi"), "hello", "bye")],
    "kto.jsonl": [
        {"prompt": "hi", "completion": "hello", "label": True},
        {"prompt": "hi", "completion": "go", "label": False},
    ],
    "openai_ft_pref.jsonl": [pair(ASKED.format("q"), "a", "b")],
    "orca_dpo.jsonl": [pair(NICE.format("You are", "q?"), "a", "b")],
    "pku.jsonl": [pair(ASKED.format("p?"), "b", "a")],
    "semi.csv": [pair("a", "b", "c")],
    "sharegpt.json": [{"prompt": ASKED.format("hi"), "completion": "hello there"}],
    "sharegpt_dpo.json": [pair(ASKED.format("hi"), "hello", "go away")],
    "summarize_cmp.jsonl": [pair("TITLE: t\nPOST: text\nTL;DR:", " s2", " s1")],
    "trl_conv.jsonl": [pair(ASKED.format("What is 2+2?"), "4.", "5.")],
    "uf_binarized.jsonl": [pair(ASKED.format("hi"), "hello", "no", margin=5.0)],
    "ultrafeedback_full.jsonl": [{"prompt": ASKED.format("hi"), "completions": ["a", "b"], "rewards": [7.5, 2.0]}],
}
"""What each file of the folder becomes where the tokenizer has a chat template."""

AS_LINES = {
    "alpaca.json": [{"prompt": "Add\n2 3\n", "completion": "5"}],
    "alpaca_pref.json": [pair("Add\n2 3\n", "5", "6")],
    "d2po.jsonl": [pair("q?\n", "a", "b", margin=2.0)],
    "helpsteer2.jsonl": [{"prompt": "p?\n", "completions": ["r1", "r2"], "rewards": [4, 1]}],
    "orca_dpo.jsonl": [pair("You are\nq?\n", "a", "b")],
    "pku.jsonl": [pair("p?\n", "b", "a")],
    "ultrafeedback_full.jsonl": [{"prompt": "hi\n", "completions": ["a", "b"], "rewards": [7.5, 2.0]}],
} | {name: AS_MESSAGES[name] for name in ("kto.jsonl", "semi.csv", "summarize_cmp.jsonl")}
"""What those become that need no template, where there is none."""


@pytest.mark.parametrize("name", AS_MESSAGES)
def test_the_files_that_people_post_are_read_as_they_are(name):
    if not CASES.is_dir():
        pytest.skip("the shared case files (../shared/cases beside the checkout) are not on this machine")
    assert read_preferences(CASES / name, tokenizer=words()).rows == AS_MESSAGES[name]
    if name in AS_LINES:
        assert read_preferences(CASES / name).rows == AS_LINES[name]
    else:
        with pytest.raises(ValueError, match="name the tokenizer whose chat template"):
            read_preferences(CASES / name)


# ---- the same kinds, and their neighbours, made up ----

TALK = [{"from": "system", "value": "Be brief"}, {"from": "human", "value": "1+1"}]


@pytest.mark.parametrize(
    ("row", "lines", "messages"),
    [
        (
            {"instruction": "Name it", "input": "", "output": "Bob"},
            {"prompt": "Name it\n", "completion": "Bob"},
            {"prompt": ASKED.format("Name it"), "completion": "Bob"},
        ),
        (
            {"instruction": "Say", "input": "x", "output": " y", "system": "S"},
            {"prompt": "S\nSay\nx", "completion": " y"},
            {"prompt": NICE.format("S", "Say\nx"), "completion": " y"},
        ),
        (
            {"instruction": "Why?", "context": "It rains.", "response": "Wet."},
            {"prompt": "Why?\nIt rains.\n", "completion": "Wet."},
            {"prompt": ASKED.format("Why?\nIt rains."), "completion": "Wet."},
        ),
        (
            {"question": "2?", "answer": "3", "label": "False"},
            {"prompt": "2?\n", "completion": "3", "label": False},
            {"prompt": ASKED.format("2?"), "completion": "3", "label": False},
        ),
        (
            {"instruction": "Add", "input": "1", "chosen": "1", "rejected": "2", "margin": 3},
            pair("Add\n1\n", "1", "2", margin=3),
            pair(ASKED.format("Add\n1"), "1", "2", margin=3),
        ),
        (
            {"question": "2? ", "response_j": "two", "response_k": "ten"},
            pair("2? ", "two", "ten"),
            pair(ASKED.format("2? "), "two", "ten"),
        ),
        (
            {"system": "", "question": "hm", "chosen": "a", "rejected": "b"},
            pair("hm\n", "a", "b"),
            pair(ASKED.format("hm"), "a", "b"),
        ),
        (
            {"system": "S", "prompt": "hm", "chosen": "a", "rejected": "b"},
            pair("S\nhm\n", "a", "b"),
            pair(NICE.format("S", "hm"), "a", "b"),
        ),
        (
            {"prompt": "p", "response_0": "a", "response_1": "b", "safer_response_id": 0},
            pair("p\n", "a", "b"),
            pair(ASKED.format("p"), "a", "b"),
        ),
        (
            {"instruction": "p", "completions": [{"response": x, "overall_score": n} for x, n in (("a", "1"), ("b", 2))]},
            {"prompt": "p\n", "completions": ["a", "b"], "rewards": [1.0, 2]},
            {"prompt": ASKED.format("p"), "completions": ["a", "b"], "rewards": [1.0, 2]},
        ),
        (
            {"prompt": "p", "chosen": " a", "rejected": " b", "score_chosen": 8, "score_rejected": 3.5},
            pair("p", " a", " b", margin=4.5),
            pair("p", " a", " b", margin=4.5),
        ),
        ({"conversations": [*TALK, {"from": "gpt", "value": "2"}]}, None,
         {"prompt": NICE.format("Be brief", "1+1"), "completion": "2"}),
        ({"conversations": TALK[1:], "system": "Be kind", "chosen": {"from": "gpt", "value": "2"},
          "rejected": [{"from": "gpt", "value": "3"}]}, None, pair(NICE.format("Be kind", "1+1"), "2", "3")),
        ({"messages": [*TALK, {"from": "gpt", "value": "2"}], "label": True}, None,
         {"prompt": NICE.format("Be brief", "1+1"), "completion": "2", "label": True}),
        ({"input": {"messages": [{"role": "user", "content": "q"}]}, "preferred_output": "a",
          "non_preferred_output": "b"}, None, pair(ASKED.format("q"), "a", "b")),
    ],
)  # fmt: skip
def test_turns_are_lines_or_messages(row, lines, messages, tmp_path):
    assert made(tmp_path, row, tokenizer=words()).rows == [messages]
    if lines is not None:
        assert made(tmp_path, row).rows == [lines]


def test_tools_of_a_row_go_along():
    """preferred_output keeps its tools inside the input; the template is given them with the messages."""
    layout = LAYOUTS["input", "preferred_output", "non_preferred_output"]
    asked = {"messages": [{"role": "user", "content": "q"}], "tools": [{"type": "function"}]}
    row = layout({"input": asked, "preferred_output": [], "non_preferred_output": []}, None)
    assert row["tools"] == [{"type": "function"}] and row["prompt"] == asked["messages"]


def test_the_community_s_columns_come_before_those_of_others(tmp_path):
    """prompt, completion, chosen and rejected are what they say, whatever else stands beside them."""
    row = {"prompt": "p", "completion": " c", "instruction": "i", "output": "o", "question": "q", "answer": "a"}
    assert made(tmp_path, row).rows == [{"prompt": "p", "completion": " c"}]
    row = {"prompt": "p", "chosen": " c", "rejected": " r", "conversations": TALK, "question": "q"}
    assert made(tmp_path, row).rows == [pair("p", " c", " r")]


@pytest.mark.parametrize("label", [True, "true", "False", 0, 1.0, "0"])
def test_verdicts_keep_unwanted_answers(label, tmp_path):
    (row,) = made(tmp_path, {"prompt": "p", "completion": " c", "label": label}).rows
    assert row == {"prompt": "p", "completion": " c", "label": label in (True, "true", 1.0)}
    assert isinstance(row["label"], bool)


def test_rated_answers_of_one_prompt_are_a_group_in_the_order_of_the_file(tmp_path):
    """Not side by side in the file; a prompt with one answer makes no group; another rating, another order."""
    scores = [("p", "a", 4, 0), ("q", "b", 1, 5), ("p", "c", 3, 9), ("r", "d", 2, 2), ("q", "e", 2, 1)]
    rows = [{"prompt": p, "response": y, "helpfulness": h, "correctness": c} for p, y, h, c in scores]
    loaded = made(tmp_path, *rows)
    assert loaded.rows == [
        {"prompt": "p\n", "completions": ["a", "c"], "rewards": [4, 3]},
        {"prompt": "q\n", "completions": ["b", "e"], "rewards": [1, 2]},
    ]
    assert loaded.dropped == {"fewer than two completions": 1} and loaded.read == 5
    assert loaded.examples == {"fewer than two completions": f"{tmp_path}/rows.jsonl:4"}
    assert loaded.notes == {"rated answers to one prompt, gathered": 2}
    other = made(tmp_path, *rows, columns=["rating=correctness"])
    assert [row["rewards"] for row in other.rows] == [[0, 9], [5, 1]]
    assert made(tmp_path, *rows, limit=1).rows == loaded.rows[:1]
    pairs = made(tmp_path, *rows, convert=as_pairs).rows
    assert pairs == [pair("p\n", "a", "c", margin=1), pair("q\n", "e", "b", margin=1)]
    plain = [{"prompt": "p", "completion": x, "rating": n} for x, n in ((" a", 1), (" b", 2))]
    assert made(tmp_path, *plain).rows == [{"prompt": "p", "completions": [" a", " b"], "rewards": [1, 2]}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"conversations": [{"from": "dog", "value": "wuff"}]},
            "who speaks, where a turn is from 'dog'? Known: human",
        ),
        ({"conversations": "hi"}, "conversations must be a list of {from, value}"),
        ({"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 2}, "0 or 1; got 2"),
        ({"prompt": "p", "response": "a", "helpfulness": "high"}, "rating must be finite numbers; got 'high'"),
        ({"instruction": "p", "completions": [{"response": "a"}]}, "rewards=completions.*.NAME"),
        ({"input": "q", "preferred_output": "a", "non_preferred_output": "b"}, "an object with the messages"),
        ({"question": 7, "answer": "a"}, "the columns system, question hold text"),
        (
            {"question": "q", "response_j": "a", "response_k": "b", "magnitude": "x"},
            "margin must be finite numbers",
        ),
    ],
)
def test_a_row_of_a_known_layout_that_does_not_fit_is_named(row, said, tmp_path):
    with pytest.raises(ValueError) as caught:
        made(tmp_path, row)
    assert said in str(caught.value) and f"{tmp_path}/rows.jsonl:1: " in str(caught.value)


def test_every_layout_s_columns_can_be_mapped_to_and_every_speaker_has_a_role():
    named = {name for columns in LAYOUTS for name in columns}
    assert named - set(NAMES) <= {"helpfulness", "safer_response_id", "answer"}
    assert set(SPEAKERS.values()) == {"user", "assistant", "system", "developer", "tool", "function"}


# ---- columns by other names ----


def test_columns_are_reached_by_dots_numbers_and_stars():
    row = {
        "q": "why", "a.b": "dotted", "messages": [{"content": "hi"}, {"content": "yes"}],
        "answers": [{"text": "x", "score": 1}, {"text": "y", "score": 2}], "rest": 1,
    }  # fmt: skip
    columns = ["prompt=q", "chosen=messages.-1.content", "completions=answers.*.text", "rewards=answers.*.score"]
    assert mapped(row, mapping_of(columns)) == {
        "a.b": "dotted", "rest": 1, "prompt": "why", "chosen": "yes", "completions": ["x", "y"], "rewards": [1, 2],
    }  # fmt: skip
    assert mapped(row, mapping_of(["rejected=a.b"]))["rejected"] == "dotted"
    swapped = mapped({"chosen": "a", "rejected": "b"}, mapping_of(["chosen=rejected", "rejected=chosen"]))
    assert swapped == {"chosen": "b", "rejected": "a"}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["prompt"], "--columns wants NAME=COLUMN, like prompt=question; got 'prompt'"),
        (["promt=q"], "nothing reads a column 'promt'. Did you mean prompt?"),
        (["prompt=q", "prompt=r"], "names prompt twice"),
        (["prompt=wyh", "chosen=a"], "rows.jsonl:1: column 'wyh' is not there: no 'wyh' (did you mean why?)"),
        (["prompt=why.x", "chosen=a"], "'x' is asked of a value that has no parts (str)"),
        (["prompt=m.2.c", "chosen=a"], "a list of 2 has no '2'"),
        (["prompt=m.-3.c", "chosen=a"], "a list of 2 has no '-3'"),
    ],
)
def test_mappings_that_lead_nowhere_are_named(columns, said, tmp_path):
    with pytest.raises(ValueError) as caught:
        made(tmp_path, {"why": "p", "a": "b", "m": [{"c": 1}, {"c": 2}]}, columns=columns)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("row", "fit"),
    [
        ({"q": "x", "good_answer": "a", "bad_answer": "b"}, "prompt=q chosen=good_answer rejected=bad_answer"),
        ({"Prompt": "x", "Completion": "y"}, "prompt=Prompt completion=Completion"),
        ({"data": {"question": "q", "reply": "a"}}, "prompt=data.question completion=data.reply"),
        ({"user_query": "a", "answer": "b", "thumbs_up": True}, "prompt=user_query completion=answer label=thumbs_up"),
        ({"prompt": "p", "reply": "y", "stars": 4}, "completion=reply rating=stars"),
        ({"prompt": "p", "answers": [" a", " b"], "values": [1, 2]}, "completions=answers rewards=values"),
        ({"instructions": "x", "chosen_text": "y", "rejected_text": "z"},
         "prompt=instructions chosen=chosen_text rejected=rejected_text"),
        ({"my question": "x", "my answer": "y"}, "'prompt=my question' 'completion=my answer'"),
        ({"problem": "p", "chosen": "a", "rejected": "b"}, "prompt=problem"),
    ],
)  # fmt: skip
def test_a_refused_file_offers_the_mapping_that_fits_and_it_does(row, fit, tmp_path):
    """What is offered is pasted as it stands, and the file is read."""
    assert suggested(row) == f"--columns {fit}"
    path = write(tmp_path / "rows.jsonl", row, row)
    done = tiltlm("prepare", str(path), "--out", "out.jsonl", cwd=tmp_path, check=False)
    assert done.returncode == 2 and f"would this fit? --columns {fit} (of a task" in done.stderr
    tiltlm("prepare", str(path), "--out", "out.jsonl", *shlex.split(suggested(row)), cwd=tmp_path)
    assert (tmp_path / "out.jsonl").read_text()


def test_nothing_is_offered_where_nothing_fits(tmp_path):
    assert suggested({"a": 1}) == suggested({}) == suggested({"prompt": "p", "completions": ["a"]}) == ""
    with pytest.raises(ValueError, match=r"say which is which: --columns prompt=… completion=…"):
        made(tmp_path, {"a": 1})


# ---- encodings, separators ----

TEXT = {"prompt": "é", "completion": " ü\u2028"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".jsonl.gz"])
def test_utf_16_and_its_kin_are_known_by_their_first_bytes(encoding, ending, tmp_path):
    row = json.dumps(TEXT, ensure_ascii=False)
    text = {".json": f"[{row}]", ".csv": "prompt\tcompletion\né\t ü\u2028\n"}.get(ending, row + "\n")
    data = text.encode(encoding)
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    assert read_preferences(path).rows == [TEXT]
    assert read_preferences(path, encoding="cp1252" if encoding == "utf-8-sig" else encoding).rows == [TEXT]


def test_an_encoding_that_is_named_is_used_and_a_wrong_one_named_by_its_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"prompt": "x" * 70_000, "completion": " y"}) + "\n"
    data = good.encode() + '{"prompt": "é", "completion": " a"}\n'.encode("cp1252")
    path.write_bytes(data)
    assert read_preferences(path, encoding="latin-1").rows[1]["prompt"] == "é"
    at = data.index(b"\xe9")
    said = rf"a\.jsonl: cannot be read as UTF-8: byte {at} \(line 2\) is not of it .*--encoding cp1252 .*--task\.encoding"
    with pytest.raises(ValueError, match=said):
        read_preferences(path)
    with pytest.raises(ValueError, match=r"there is no encoding 'latin-one'; such are utf-8"):
        read_preferences(path, encoding="latin-one")
    with pytest.raises(ValueError, match=r"cannot be read as ASCII: byte .*--encoding cp1252"):
        read_preferences(path, encoding="ascii")
    path.write_bytes('日本"prompt"\n'.encode("utf-16-le"))  # neither a mark nor an ASCII character to begin with
    with pytest.raises(ValueError, match=r"byte 0 \(line 1\) .*--encoding utf-16 "):
        read_preferences(path)
    path.write_bytes("é".encode("utf-16")[:3])  # half a character
    with pytest.raises(ValueError, match=r"cannot be read as UTF-16: byte 2 \(line 1\)"):
        read_preferences(path)


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_a_csv_s_separator_is_told_by_its_first_line(mark, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f'\nprompt{mark}"cho""sen"{mark}x\na{mark}"b{mark}c;,"{mark}d\n')
    assert list(rows_of(path)) == [(f"{path}:3", {"prompt": "a", 'cho"sen': f"b{mark}c;,", "x": "d"})]


def test_numbers_and_verdicts_of_a_csv_are_text_and_are_read_all_the_same(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt;completion;label\np; a;FALSE\nq; b;true\n")
    assert [row["label"] for row in read_preferences(path).rows] == [False, True]
    path.write_text("question;response_j;response_k;magnitude\np;a;b;-0.5\n")
    assert read_preferences(path).rows == [pair("p\n", "a", "b", margin=-0.5)]
    path.write_text("prompt,response_0,response_1,better_response_id\np,a,b,1\n")
    assert read_preferences(path).rows == [pair("p\n", "b", "a")]


# ---- null ----


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"prompt": None, "chosen": "a", "rejected": "b"}],
            ":1: column 'prompt' is null, read as if it were missing: ",
        ),
        ([{"prompt": "p", "completion": None}], ":1: column 'completion' is null, read as"),
        (
            [{"prompt": None, "completion": None}],
            ":1: columns 'prompt', 'completion' are null, read as if they were missing",
        ),
        ([{"prompt": "p", "completions": [" a", None], "rewards": [1, 2]}], "got null"),
        (
            [pair("p", " a", " b"), {"prompt": "p", "chosen": " a", "rejected": None}],
            ":2: column 'rejected' is null, read as if it were missing: gives prompt, completion, but",
        ),
        (
            [{"prompt": "p", "chosen": " a", "rejected": None}, pair("p", " a", " b")],
            "rows.jsonl:1: column 'rejected' is null, read as if it were missing): read them separately",
        ),
    ],
)
def test_a_null_in_a_text_column_is_said(rows, said, tmp_path):
    with pytest.raises(ValueError) as caught:
        made(tmp_path, *rows)
    assert said in str(caught.value)


# ---- several sources with weights ----


def example(text: str) -> dict[str, str]:
    return {"prompt": text, "completion": f" {text}"}


def test_a_weight_repeats_rows_and_its_fraction_takes_a_random_part(tmp_path):
    """2: each twice; 0.5: half of them, none twice; 2.5: twice, and half once more. The same seed, the same rows."""
    few, many = write(tmp_path / "a.jsonl", *map(example, "ab")), tmp_path / "b.jsonl"
    write(many, *(example(str(k)) for k in range(40)))

    def prompts(*sources: str, **options: object) -> list[str]:
        return [row["prompt"] for row in read_preferences(sources, **options).rows]  # type: ignore[arg-type]

    assert prompts(f"{few}:2", str(many)) == [*"abab", *map(str, range(40))]
    half = prompts(f"{many}:0.5")
    assert len(half) == len(set(half)) == 20 and half == sorted(half, key=int) != [str(k) for k in range(20)]
    assert prompts(f"{many}:0.5") == half
    more = prompts(f"{many}:2.5")
    assert sorted(set(more), key=more.index) == list(map(str, range(40))) and len(more) == 100
    assert {more.count(x) for x in set(more)} == {2, 3}
    assert prompts(f"{few}:3", limit=4) == [*"abab"]
    loaded = read_preferences([f"{few}:2", f"{many}:0.25"])
    assert loaded.notes == {"copies by the source's weight": 2} and loaded.read == 42
    assert loaded.dropped == {"left out by the source's weight": 30}
    assert loaded.examples == {"left out by the source's weight": f"{many}:0.25"}


def test_a_source_with_a_colon_that_is_no_weight_keeps_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl:2").mkdir()
    Path("b.jsonl").write_text("")
    found = {
        "owner/name:helpful": ("owner/name:helpful", 1.0), "owner/name:helpful:2": ("owner/name:helpful", 2.0),
        "owner/name": ("owner/name", 1.0), "owner/name:.5": ("owner/name", 0.5), "a.jsonl:2": ("a.jsonl:2", 1.0),
        "a.jsonl:2:3": ("a.jsonl:2", 3.0), "b.jsonl:1.5": ("b.jsonl", 1.5), "gone.jsonl:2": ("gone.jsonl", 2.0),
    }  # fmt: skip
    assert {name: weighed(name) for name in found} == found
    for wrong in ("b.jsonl:0", "b.jsonl:two", "b.jsonl:-1", "owner/name:0.0"):
        with pytest.raises(ValueError, match="a weight is a number above 0"):
            weighed(wrong)


def test_prepare_takes_columns_encodings_and_weights(tmp_path):
    rows = [{"wen": f"é{k}", "was": f" {k}"} for k in range(6)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "latin-1")
    (tmp_path / "b.csv").write_bytes("wen;was\nz; z\n".encode("utf-16"))
    args = ["a.jsonl:0.5", "b.csv:3", "--encoding", "latin-1", "--columns", "prompt=wen", "completion=was"]
    kept = []
    for seed in ("0", "0", "1"):
        tiltlm("prepare", *args, "--seed", seed, "--out", f"{seed}.jsonl", cwd=tmp_path)
        lines = [json.loads(line) for line in (tmp_path / f"{seed}.jsonl").read_text().splitlines()]
        kept.append([row["prompt"] for row in lines])
    assert kept[0] == kept[1] != kept[2] and [len(set(x)) for x in kept] == [4, 4, 4]
    assert kept[0][3:] == ["z"] * 3 and set(kept[0][:3]) <= {row["wen"] for row in rows}
    report = json.loads((tmp_path / "0.jsonl.report.json").read_text())
    assert (report["read"], report["kept"], report["columns_from"]) == (7, 6, ["prompt=wen", "completion=was"])
    done = tiltlm("prepare", "a.jsonl:2", "--out", "a.jsonl", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "results never replace their input" in done.stderr

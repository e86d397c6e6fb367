"""Preference data in: the laws of the HH splitter, every reader, every format, errors that name file and line."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from command import tiltlm
from tiltlm.data.formats import as_pairs, as_rewards, format_named
from tiltlm.data.hh import Dropped, Pair, split_dialogues
from tiltlm.data.preference_rows import read_preferences
from tiltlm.data.tables import READERS, rows_of

START = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tell\n\nme\n\nAssistant:"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- the splitter ----


def test_a_dialogue_by_hand():
    """The shared turns, one with a blank line in it, are the prompt; blanks before responses and later turns go."""
    left, right = START + "   Well,\n\nno. \n\nHuman: why\n\nAssistant: so", START + "\n\nYes."
    made = split_dialogues(left, right + "\n\nHuman: Thanks")
    assert isinstance(made, Dropped)  # "Assistant:" without its space opens no turn
    made = split_dialogues(left, START + " \n\nYes.\n\nHuman: Thanks")
    assert made == Pair(START, " Well,\n\nno. ", " Yes.", later_turns=3)


def test_humans_become_human_and_an_assistant_does_not_quote_them():
    said = "\n\nHumans: Do Humans: talk\n\nAssistant: "
    made = split_dialogues(said + "Human: a Humans: b", said + "c Human: d")
    assert made == Pair("\n\nHuman: Do Human: talk\n\nAssistant:", " a  b", " c  d")
    mixed = split_dialogues("\n\nHumans: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c")
    assert mixed == Pair("\n\nHuman: a\n\nAssistant:", " b", " c")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (START + " a", START + " a", "identical sides"),
        (START + " a", START + "   a", "identical sides"),
        (START + " a b", START + " a  b ", "sides differ in spaces only"),
        (START + " a", START + "  ", "blank response"),
        (START + " a", START + " \n\n\n", "blank response"),
        (START + " a", START + " a\n\nHuman: b", "one side continues the other"),
        (
            START + " a",
            "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Ask",
            "first difference is not two assistant turns",
        ),
        (START + " a", "\n\nHuman: Hi\n\nHuman: Hi", "first difference is not two assistant turns"),
        ("Human: a\n\nAssistant: b", "Human: a\n\nAssistant: c", "text before the first turn"),
        ("\n\na\n\nAssistant: b", "\n\na\n\nAssistant: c", "text before the first turn"),
        ("\n\nAssistant: b", "\n\nAssistant: c", "no human turn at the start"),
        ("\n\nAssistant: a\n\nAssistant: b", "\n\nAssistant: a\n\nAssistant: c", "no human turn at the start"),
    ],
)
def test_what_makes_no_pair_is_dropped_with_its_reason_whichever_side_it_is(chosen, rejected, reason):
    assert split_dialogues(chosen, rejected) == split_dialogues(rejected, chosen) == Dropped(reason)


@pytest.mark.parametrize(
    ("name", "rows", "pairs", "reasons", "later"),
    [
        ("helpful_base", 1157, 1155, {"identical sides": 1, "blank response": 1}, 4),
        ("harmless_base", 1182, 1181, {"blank response": 1}, 0),
    ],
)
def test_the_laws_of_the_splitter_on_real_dialogues(shared_data, name, rows, pairs, reasons, later):
    """Counts of helpful_base: the specification's, under symmetric rules."""
    path = shared_data / "hh" / f"{name}.jsonl"
    found = [row for _, row in rows_of(path)]
    kept = [pair for row in found if isinstance(pair := split_dialogues(row["chosen"], row["rejected"]), Pair)]
    for row in found:
        there, back = (
            split_dialogues(*(row[k] for k in way)) for way in (("chosen", "rejected"), ("rejected", "chosen"))
        )
        if isinstance(there, Pair):
            assert back == Pair(there.prompt, there.rejected, there.chosen, there.later_turns)
        else:
            assert back == there
    for pair in kept:
        assert pair.prompt.startswith("\n\nHuman: ") and pair.prompt.endswith("\n\nAssistant:")
        assert all(y[0] == " " and not y[1].isspace() for y in (pair.chosen, pair.rejected))
        assert pair.chosen.split() != pair.rejected.split()
    loaded = read_preferences(path)
    assert (len(found), len(kept), loaded.dropped) == (rows, pairs, reasons)
    assert loaded.notes.get("later turns left out", 0) == sum(pair.later_turns > 0 for pair in kept) == later
    assert loaded.rows == read_preferences(path, "hh").rows


# ---- readers ----

ROWS = [
    {"prompt": "a\u2028é", "chosen": ' x, "y"\nz', "rejected": " b"},
    {"prompt": "c", "chosen": " d", "rejected": " e"},
]


def as_csv(path: Path, mark: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=mark)
        writer.writeheader()
        file.write("\n")
        writer.writerows(ROWS)


def as_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS = {
    ".jsonl": (lambda path: path.write_text("\n" + "\n".join(map(json.dumps, ROWS)), encoding="utf-8"), [2, 3]),
    ".json": (lambda path: path.write_text("\n" + json.dumps(ROWS, indent=4), encoding="utf-8"), [3, 8]),
    ".csv": (as_csv, [3, 5]),
    ".tsv": (lambda path: as_csv(path, "\t"), [3, 5]),
    ".parquet": (as_parquet, [1, 2]),
}


@pytest.mark.parametrize("ending", READERS)
def test_every_reader_gives_the_same_rows_with_the_places_where_they_begin(ending, tmp_path):
    plain = tmp_path / f"train{ending.removesuffix('.gz')}"
    writer, lines = WRITERS[plain.suffix]
    writer(plain)
    path = plain
    if ending.endswith(".gz"):
        path = tmp_path / f"train{ending}"
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    assert list(rows_of(path)) == [(f"{path}:{line}", row) for line, row in zip(lines, ROWS, strict=True)]
    assert list(rows_of(tmp_path, "train")) == list(rows_of(path))
    assert read_preferences(path).rows == ROWS


def test_a_json_file_of_lines_and_an_empty_array_are_read(tmp_path):
    path = write(tmp_path / "train.json", *ROWS)
    assert [row for _, row in rows_of(path)] == ROWS
    path.write_text("[ ]")
    assert list(rows_of(path)) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', ":2: not JSON"),
        ("a.json", '[\n{"prompt": "a"},\n{"prompt": \n', ":3: an object was expected here; not JSON in line 4"),
        ("a.json", '[\n{"prompt": "a"}\n\n{"prompt": "b"}]', ":2: neither a comma nor a closing bracket"),
        ("a.json", '[\n{"prompt": "a"},\n7]', ":3: an array of objects was expected; here is a int"),
        ("a.csv", 'prompt,chosen\na,"b\nc"\na\n', ":4: 1 fields, but the first line names 2: prompt, chosen"),
        ("a.csv", 'prompt,chosen\na,b\na,"b\nc\n', ":3: the row that begins here is not csv"),
        ("a.jsonl.gz", "plain", "a.jsonl.gz: cannot be read"),
        ("a.parquet", "plain", "a.parquet: not parquet"),
        ("a.txt", "plain", "a.txt: what is .txt? Known: .jsonl, "),
    ],
)
def test_what_cannot_be_read_is_named_by_file_and_line(name, content, said, tmp_path):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        list(rows_of(path))
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_text_in_another_encoding_is_refused_with_the_file_s_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.jsonl: cannot be read as UTF-8"):
        list(rows_of(path))


def test_a_folder_is_asked_for_its_split(tmp_path):
    write(tmp_path / "test.jsonl", *ROWS)
    with pytest.raises(FileNotFoundError, match=r"no file train\.jsonl .*it has test\.jsonl"):
        list(rows_of(tmp_path))
    assert len(read_preferences(tmp_path, split="test").rows) == 2
    (tmp_path / "test.json").write_text("[]")
    with pytest.raises(ValueError, match=r"test\.jsonl and test\.json: name the file"):
        list(rows_of(tmp_path, "test"))
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: no such file"):
        list(rows_of("gone.jsonl"))


def test_a_hub_data_set_is_loaded_by_name_and_folder(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, **options):
        asked.append((name, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(rows_of("owner/name:helpful-base", "test")) == [
        ("owner/name[test]:1", ROWS[0]), ("owner/name[test]:2", ROWS[1]),
    ]  # fmt: skip
    list(rows_of("owner/name"))
    assert next(rows_of("owner/name[test_prefs]", "test"))[0] == "owner/name[test_prefs]:1"
    assert asked == [
        ("owner/name", {"data_dir": "helpful-base", "split": "test"}),
        ("owner/name", {"data_dir": None, "split": "train"}),
        ("owner/name", {"data_dir": None, "split": "test_prefs"}),
    ]


def test_a_hub_that_has_nothing_or_a_missing_package_is_said(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(name, **options):
        raise FileNotFoundError("Dataset not found")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"'owner/name' is no file or folder here.*'train': Dataset not found"):
        list(rows_of("owner/name"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets.*pip install"):
        list(rows_of("owner/name"))


# ---- formats ----


def made(tmp_path: Path, *rows: object, **options: object):
    return read_preferences(write(tmp_path / "rows.jsonl", *rows), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "becomes"),
    [
        (
            {"prompt": "p", "chosen": " c", "rejected": " r", "id": 1},
            {"prompt": "p", "chosen": " c", "rejected": " r"},
        ),
        (
            {"prompt": "p", "chosen": " c", "rejected": " r", "margin": 0.5},
            {"prompt": "p", "chosen": " c", "rejected": " r", "margin": 0.5},
        ),
        (
            {"chosen": "Q: why?\nA: I am", "rejected": "Q: why?\nA: I ask"},
            {"prompt": "Q: why?\nA: I", "chosen": " am", "rejected": " ask"},
        ),
        (
            {"chosen": "Say it:\nyes", "rejected": "Say it:\nno", "prompt": None},
            {"prompt": "Say it:", "chosen": "\nyes", "rejected": "\nno"},
        ),
        ({"chosen": START + " a", "rejected": START + "  b"}, {"prompt": START, "chosen": " a", "rejected": " b"}),
        ({"prompt": "p", "completion": " c"}, {"prompt": "p", "completion": " c"}),
        ({"prompt": "p", "completion": " c", "label": "pos"}, {"prompt": "p", "completion": " c"}),
        ({"prompt": "p", "chosen": " c", "rejected": None}, {"prompt": "p", "completion": " c"}),
        (
            {"prompt": "p", "completions": [" a", ""], "rewards": [1, 0.5]},
            {"prompt": "p", "completions": [" a", ""], "rewards": [1, 0.5]},
        ),
        (
            {"prompt": "p", "completions": [" a", " b"], "scores": [2, -1]},
            {"prompt": "p", "completions": [" a", " b"], "rewards": [2, -1]},
        ),
        (
            {"prompt": "p", "scores_texts": [[0.5, "p a"], [2, "p b"]]},
            {"prompt": "p", "completions": [" a", " b"], "rewards": [0.5, 2]},
        ),
    ],
)
def test_rows_are_told_by_their_columns(row, becomes, tmp_path):
    assert made(tmp_path, row).rows == [becomes]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": " c", "rejected": " c"}, "identical sides"),
        ({"chosen": "a b", "rejected": "a b"}, "identical sides"),
        ({"prompt": "p", "chosen": " ", "rejected": " c"}, "blank response"),
        ({"prompt": "p", "chosen": " c", "rejected": ""}, "blank response"),
        ({"prompt": "p", "completion": "\n"}, "blank response"),
        ({"prompt": "p", "completion": " ", "label": False}, "blank response"),
        ({"prompt": "p", "completions": [" a"], "rewards": [1]}, "fewer than two completions"),
    ],
)
def test_rows_dropped_by_rule_are_counted_with_the_first_one_s_place(row, reason, tmp_path):
    loaded = made(tmp_path, row, row)
    assert (loaded.rows, loaded.dropped) == ([], {reason: 2})
    assert loaded.examples == {reason: f"{tmp_path}/rows.jsonl:1"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "the columns text are none of those known: prompt, chosen, rejected; "),
        ({"prompt": 3, "completion": " a"}, "prompts and answers are text or lists of {role, content}; got int"),
        ({"prompt": "p", "completions": [" a"]}, "none of those known"),
        ({"prompt": "p", "completions": [" a", " b"], "rewards": [1]}, "2 completions have 1 rewards"),
        (
            {"prompt": "p", "completions": [" a", " b"], "rewards": [1, None]},
            "rewards must be finite numbers; got None",
        ),
        ({"prompt": "p", "completions": [" a", " b"], "rewards": [1, float("nan")]}, "finite numbers; got nan"),
        ({"prompt": "p", "completions": [" a", " b"], "rewards": [1, True]}, "finite numbers; got True"),
        ({"prompt": "p", "completions": " a", "rewards": [1, 2]}, "must be lists; they are str"),
        (
            {"prompt": "p", "chosen": " a", "rejected": " b", "margin": "big"},
            "margin must be finite numbers; got 'big'",
        ),
        ({"chosen": "yes it is", "rejected": "no"}, "do not begin with the same words"),
        ({"chosen": 1, "rejected": "no"}, "column 'chosen' must be text; it is int"),
        ({"prompt": "p", "scores_texts": [[1, "q a"], [2, "q b"]]}, "must begin with the row's prompt"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "an answer by the role 'assistant'"),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]},
            "name the tokenizer",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_file_and_line(row, said, tmp_path):
    good = {"prompt": "p", "completion": " c"}
    with pytest.raises(ValueError) as caught:
        made(tmp_path, good, row)
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl:2: ") and said in str(caught.value)


def test_rows_of_two_shapes_are_not_mixed_but_margins_may_be_missing(tmp_path):
    pair, example = {"prompt": "p", "chosen": " c", "rejected": " r"}, {"prompt": "p", "completion": " c"}
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:2: gives prompt, completion, but rows before it prompt, chosen"
    ):
        made(tmp_path, pair, example)
    assert len(made(tmp_path, pair, pair | {"margin": 1}).rows) == 2


def test_an_unknown_format_suggests_the_nearest_and_a_function_of_one_s_own_is_one(tmp_path):
    with pytest.raises(ValueError, match=r"Did you mean tldr\?"):
        format_named("tldrs")
    with pytest.raises(ValueError, match=r":1: column 'rejected' is missing; this row has prompt, chosen"):
        made(tmp_path, {"prompt": "p", "chosen": "\n\nHuman: a"}, format="hh")
    assert made(tmp_path, {"n": 1}, format=lambda row, tokenizer: Dropped("mine")).dropped == {"mine": 1}


def test_a_limit_stops_reading(tmp_path):
    rows = [{"prompt": "p", "completion": x} for x in ("", " a", " b", " c")]
    loaded = made(tmp_path, *rows, "not even a row", limit=2)
    assert [row["completion"] for row in loaded.rows] == [" a", " b"] and loaded.dropped == {"blank response": 1}


POST = {"subreddit": "cats", "title": "My cat", "post": "It sleeps.\n"}
POST_PROMPT = "SUBREDDIT: r/cats\nTITLE: My cat\nPOST: It sleeps.\n\nTL;DR:"


def test_tldr_by_hand(tmp_path):
    summaries = [{"text": " Cat sleeps. "}, {"text": "\tCats."}]
    rows = [{"info": POST, "summaries": summaries, "choice": choice} for choice in (0, 1, None)]
    rows.append({"info": {"article": "News", "post": None}, "summaries": summaries, "choice": 0})
    loaded = made(tmp_path, *rows, format="tldr")
    assert loaded.rows == [
        {"prompt": POST_PROMPT, "chosen": " Cat sleeps.", "rejected": " Cats."},
        {"prompt": POST_PROMPT, "chosen": " Cats.", "rejected": " Cat sleeps."},
    ]
    assert loaded.dropped == {"tie (no choice)": 1, "a news article instead of a post": 1}
    loaded = made(tmp_path, POST | {"summary": "Asleep. "}, format="tldr")
    assert loaded.rows == [{"prompt": POST_PROMPT, "completion": " Asleep."}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"info": POST, "summaries": [{"text": "a"}], "choice": 0}, "two summaries"),
        ({"info": POST, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2}, "0 or 1; got 2"),
        ({"info": POST, "summaries": [{"text": "a"}, {}], "choice": 0}, "column 'text' is missing"),
        (
            {"title": "a", "post": "b", "summary": "c"},
            "column 'subreddit' is missing; this row has title, post, summary",
        ),
    ],
)
def test_a_tldr_row_that_does_not_fit_is_named(row, said, tmp_path):
    with pytest.raises(ValueError, match=said) as caught:
        made(tmp_path, row, format="tldr")
    assert "rows.jsonl:1: " in str(caught.value)


def words(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of words and blanks with a chat template; with `bos` it puts <s> before every text by itself."""
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = (
        "{{ '<s>' }}{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return made


def test_imdb_by_hand(tmp_path):
    """Ten words are the prompt; the break after the tenth begins the completion; shorter reviews are dropped."""
    text = "1 2 3 4<br />5 6 7 8 9 10<br />11 é \n"
    loaded = made(
        tmp_path,
        {"text": text, "label": "pos"},
        {"text": "1 2 3 4 5 6 7 8 9 10 "},
        {"text": "1"},
        format="imdb",
        tokenizer=words(),
    )
    assert loaded.rows == [{"prompt": "1 2 3 4\n5 6 7 8 9 10", "completion": "\n11 é"}]
    assert loaded.dropped == {"blank response": 2}
    with pytest.raises(ValueError, match=r":1: format imdb counts tokens: name a"):
        made(tmp_path, {"text": text}, format="imdb")


def test_imdb_prompts_of_real_reviews_are_their_first_ten_tokens(shared_data):
    path, gpt2 = shared_data / "sentiment" / "imdb_reviews.csv", shared_data / "tokenizers" / "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(str(gpt2))
    loaded = read_preferences(path, "imdb", tokenizer=tokenizer)
    texts = [row["text"].rstrip().replace("<br />", "\n") for _, row in rows_of(path)]
    assert [row["prompt"] + row["completion"] for row in loaded.rows] == texts and len(texts) == 242
    for row, text in zip(loaded.rows, texts, strict=True):
        ids = tokenizer(text, verbose=False)["input_ids"]
        assert tokenizer(row["prompt"])["input_ids"] == ids[:10]


# ---- messages ----

ASK = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "hi"}]
A, B = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
MORE = [{"role": "user", "content": "ok"}]
ASKED = "<s><system>Be brief</s>\n<user>hi</s>\n<assistant>"


@pytest.mark.parametrize(
    ("row", "prompt", "later"),
    [
        ({"prompt": ASK, "chosen": A, "rejected": B}, ASKED, 0),
        ({"prompt": ASK, "chosen": "yes", "rejected": "no"}, ASKED, 0),
        ({"prompt": "hi", "chosen": A, "rejected": B}, "<s><user>hi</s>\n<assistant>", 0),
        ({"prompt": "hi", "chosen": ASK + A, "rejected": ASK + B}, ASKED, 0),
        ({"chosen": ASK + A + MORE, "rejected": ASK + B}, ASKED, 1),
    ],
)
def test_messages_become_a_pair_through_the_chat_template(row, prompt, later, tmp_path):
    template_adds = "<assistant>"
    tokenizer = words()
    tokenizer.chat_template = tokenizer.chat_template.replace("<{{ m.role }}>", "<{{ m.role }}>")
    loaded = made(tmp_path, row, tokenizer=tokenizer)
    assert loaded.rows == [{"prompt": prompt, "chosen": "yes", "rejected": "no"}] and prompt.endswith(
        template_adds
    )
    assert loaded.notes == ({"later turns left out": 1} if later else {})


def test_messages_become_examples_and_groups_through_the_chat_template(tmp_path):
    tokenizer = words()
    loaded = made(tmp_path, {"messages": ASK + A + MORE + B}, {"messages": ASK + A + MORE}, tokenizer=tokenizer)
    longer = "<s><system>Be brief</s>\n<user>hi</s>\n<assistant>yes</s>\n<user>ok</s>\n<assistant>"
    assert loaded.rows == [{"prompt": longer, "completion": "no"}, {"prompt": ASKED, "completion": "yes"}]
    loaded = made(tmp_path, {"prompt": ASK, "completions": [A, B], "rewards": [0, 1]}, tokenizer=tokenizer)
    assert loaded.rows == [{"prompt": ASKED, "completions": ["yes", "no"], "rewards": [0, 1]}]
    assert made(tmp_path, {"prompt": ASK, "completion": A}, tokenizer=tokenizer).rows[0]["completion"] == "yes"


def test_a_begin_token_that_the_tokenizer_adds_itself_is_not_doubled(tmp_path):
    tokenizer = words(bos=True)
    (row,) = made(tmp_path, {"messages": ASK + A}, tokenizer=tokenizer).rows
    assert row["prompt"] == ASKED.removeprefix("<s>")
    assert tokenizer(row["prompt"])["input_ids"][:1] == [1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": ASK + A, "rejected": ASK + A}, "identical sides"),
        ({"chosen": ASK + A, "rejected": ASK + A + MORE}, "one side continues the other"),
        ({"chosen": ASK + A, "rejected": ASK + MORE}, "first difference is not two assistant turns"),
    ],
)
def test_conversations_that_make_no_pair_are_dropped(row, reason, tmp_path):
    assert made(tmp_path, row, tokenizer=words()).dropped == {reason: 1}


def test_messages_that_cannot_be_written_are_named(tmp_path):
    tokenizer = words()
    row = {"messages": ASK + A}
    with pytest.raises(ValueError, match=r":1: the chat template refuses the messages: no such role"):
        made(tmp_path, {"messages": [{"role": "bad", "content": ""}, *A]}, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r":1: the content of a message by 'user' must be text; it is list"):
        made(tmp_path, {"messages": [{"role": "user", "content": [1]}, *A]}, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r":1: an answer must begin with the role 'assistant'; got 'user'"):
        made(tmp_path, {"prompt": ASK, "completion": MORE}, tokenizer=tokenizer)
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match=r":1: the chat template rewrites the prompt.*'2' is not"):
        made(tmp_path, row, tokenizer=tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r":1: the tokenizer .* has no chat template"):
        made(tmp_path, row, tokenizer=tokenizer)


# ---- conversions, the original's files, the command ----


def test_pairs_as_rewards_and_back_by_hand():
    pair = {"prompt": "p", "chosen": " c", "rejected": " r"}
    group = {"prompt": "p", "completions": [" c", " r"], "rewards": [1, 0]}
    assert as_rewards(pair).row == as_rewards(group).row == group
    assert as_pairs(group).row == pair | {"margin": 1} and as_pairs(pair).row == pair
    three = {"prompt": "p", "completions": [" a", " b", " c"], "rewards": [0.5, -1, 2]}
    assert as_pairs(three).row == {"prompt": "p", "chosen": " c", "rejected": " b", "margin": 3}
    assert as_pairs(three | {"rewards": [1, 1, 1]}) == Dropped("tie (all rewards are equal)")
    for convert in (as_rewards, as_pairs):
        with pytest.raises(ValueError, match="this row gives prompt, completion"):
            convert({"prompt": "p", "completion": " c"})


def test_ties_are_dropped_and_notes_stay_when_converting(tmp_path):
    group = {"prompt": "p", "completions": [" a", " b"], "rewards": [1, 1]}
    loaded = made(tmp_path, group, group | {"rewards": [1, 3]}, convert=as_pairs)
    assert loaded.dropped == {"tie (all rewards are equal)": 1} and loaded.rows[0]["chosen"] == " b"
    rows = {"chosen": START + " a\n\nHuman: b", "rejected": START + " c"}
    loaded = made(tmp_path, rows, format="hh", convert=as_rewards)
    assert loaded.notes == {"later turns left out": 1} and loaded.rows[0]["rewards"] == [1, 0]


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "p", "chosen": " c", "rejected": " r"}] * 2,
        [{"prompt": "p", "completions": [" a", " b"], "rewards": [0.25, -1.5]}] * 2,
        [{"prompt": "p", "completions": [" a", " b"], "rewards": [1, 0]}] * 2,
    ],
)
def test_the_original_s_arrays_come_back_as_they_are(rows, tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(rows, indent=4))
    (tmp_path / "test.json").write_text(json.dumps(rows[:1], indent=4))
    assert read_preferences(tmp_path).rows == rows
    assert read_preferences([tmp_path, tmp_path], split="test").rows == rows


def test_prepare_writes_rows_and_a_report(tmp_path):
    path = write(
        tmp_path / "train.jsonl",
        {"chosen": START + " a", "rejected": START + " a"},
        {"chosen": START + " a\n\nHuman: b", "rejected": START + " c"},
        {"chosen": START + " a", "rejected": START + " a"},
    )
    done = tiltlm("prepare", path.name, "--out", "new/pairs.jsonl", cwd=tmp_path)
    pairs = [{"prompt": START, "chosen": " a", "rejected": " c"}]
    assert [json.loads(line) for line in (tmp_path / "new/pairs.jsonl").read_text().splitlines()] == pairs
    report = json.loads((tmp_path / "new/pairs.jsonl.report.json").read_text())
    assert (report["read"], report["kept"], report["notes"]) == (3, 1, {"later turns left out": 1})
    assert report["dropped"] == {"identical sides": {"rows": 2, "first": "train.jsonl:1"}}
    assert "dropped: identical sides" in done.stdout and "train.jsonl:1" in done.stdout
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["pairs.jsonl", "pairs.jsonl.report.json"]
    tiltlm("prepare", "new/pairs.jsonl", "--as", "rewards", "--out", "groups.jsonl", cwd=tmp_path)
    (group,) = read_preferences(tmp_path / "groups.jsonl").rows
    assert group == {"prompt": START, "completions": [" a", " c"], "rewards": [1, 0]}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["rows.jsonl", "--out", "rows.jsonl"], "results never replace their input"),
        (["rows.jsonl", "--out", "aside/../rows.jsonl"], "results never replace their input"),
        ([".", "--split", "rows", "--out", "rows.jsonl"], "results never replace their input"),
        (["rows.jsonl", "--out", "y.jsonl"], "nothing is left of rows.jsonl to write: 1 identical sides"),
        (["rows.jsonl", "--out", "y.jsonl", "--format", "hhh"], "Did you mean hh?"),
        (["rows.jsonl", "--out", "y.json"], "--out is a .jsonl file"),
        (["rows.jsonl", "--out", "y.jsonl", "--limit", "0"], "--limit must be 1 or more"),
        (["gone.jsonl", "--out", "y.jsonl"], "gone.jsonl: no such file"),
        (["--out", "y.jsonl"], "name at least one"),
        (["rows.jsonl", "--out", "y.jsonl", "--tokenizer", "./none"], "'./none' is no folder or hub name"),
    ],
)
def test_mistakes_end_in_one_line_and_nothing_is_written(args, said, tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "p", "chosen": " c", "rejected": " c"})
    before = path.read_bytes()
    done = tiltlm("prepare", *args, cwd=tmp_path, check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"] and path.read_bytes() == before

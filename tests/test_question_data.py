"""Questions of files and data sets: columns, splits, repeats, and how a question is put to a model."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import pytest

from chat_shapes import SHAPES, speaker
from tiltlm.questions.base import Question
from tiltlm.questions.readers.columns import rows
from tiltlm.questions.readers.letters import lettered
from tiltlm.questions.readers.numbers import solved
from tiltlm.questions.repeats import consistent, say_leaks
from tiltlm.questions.splits import CALLED, Portion, by_name, by_number, by_place, held_out, numbers
from tiltlm.questions.wording import METAS, Asking
from tiltlm.tasks.afrimmlu import AfriMMLU
from tiltlm.tasks.csqa import CSQA
from tiltlm.tasks.gsm8k import GSM8K
from tiltlm.tasks.mgsm import MGSM
from tiltlm.tasks.mmlu import MMLU, SIZE
from tiltlm.tasks.mmmlu import MMMLU


def one(**row) -> Question:
    """The question of a single row."""
    return lettered([("f:2", {name.lower(): value for name, value in row.items()})])[0]


def write(path: Path, *table: list[str]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(table)
    return str(path)


FOUR = {"A": "ant", "B": "bee", "C": "NA", "D": "dog"}

# ---- rows ----


@pytest.mark.parametrize(
    "row",
    [
        FOUR | {"Question": "Which?", "Answer": "C"},
        FOUR | {"question": "Which?", "answer": "NA"},
        FOUR | {"question": "Which?", "answer": "2"},
        {"question": "Which?", "choices": list(FOUR.values()), "answer": 2},
        {"question": "Which?", "choices": "['ant', 'bee', 'NA', 'dog']", "answer": "c"},
        {"question": "Which?", "options": list(FOUR.values()), "label": "(C)"},
        {"stem": "Which?", "choices": {"label": list("ABCD"), "text": list(FOUR.values())}, "answerKey": "C"},
        {"question": {"stem": "Which?", "choices": [{"label": k, "text": x} for k, x in FOUR.items()]}, "answerKey": "C"},
        {"question": "Which?", "choices": {"label": list("1234"), "text": list(FOUR.values())}, "answerKey": "3"},
    ],
)  # fmt: skip
def test_a_row_of_any_usual_shape_is_the_same_question(row):
    found = one(**row)
    assert (found.text, found.choices, found.answer) == ("Which?", tuple(FOUR.values()), "C")


def test_number_subject_and_other_columns_are_kept():
    row = FOUR | {"": "7", "Question": "Q", "Answer": "D", "Subject": "anatomy", "source": "x"}
    found = one(**row)
    assert (found.index, found.subject, found.about) == (7, "anatomy", {"source": "x"})
    assert one(**row | {"Subject": "college_mathematics_test.csv_YO-NG.csv"}).subject == "college_mathematics"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"Question": "Q", "Answer": "A"}, "no column for the options"),
        (FOUR | {"Answer": "A"}, "no column for the question"),
        (FOUR | {"Question": "Q"}, "no column for the answer"),
        (FOUR | {"Question": "", "Answer": "A"}, "the question is empty"),
        (FOUR | {"B": "", "Question": "Q", "Answer": "A"}, "option B is empty"),
        (FOUR | {"Question": "Q", "Answer": "E"}, "the answer 'E' is none of them"),
        (FOUR | {"Question": "Q", "Answer": "4"}, "the answer '4' is none of them"),
        ({"A": "1", "B": "0", "Question": "Q", "Answer": "0"}, "more than one of them"),
        ({"Question": "Q", "choices": "__import__('os').getcwd()", "answer": 0}, "prints no list"),
        ({"Question": "Q", "choices": ["only"], "answer": 0}, "from 2 to 26 options"),
        (FOUR | {"Question": "Q", "Answer": "A", "index": "x"}, "the number of a question"),
    ],
)
def test_a_row_that_is_no_question_is_named(row, what):
    with pytest.raises(ValueError, match=f"^f:2: .*{what}"):
        one(**row)


def test_two_questions_of_one_number_are_refused(tmp_path):
    file = write(
        tmp_path / "q.csv",
        ["index", "Question", "A", "B", "Answer"],
        ["1", "x", "a", "b", "A"],
        ["1", "y", "a", "b", "A"],
    )
    with pytest.raises(ValueError, match=r"q\.csv:3: number 1 stands in .*q\.csv:2 already"):
        lettered(rows(file, "test", "mine"))


def test_repeats_that_contradict_each_other_go_and_are_counted(capsys):
    first, agrees, contradicts = (Question(k, "Q", answer, ("a", "b")) for k, answer in enumerate("AAB"))
    other = Question(3, "Q", "B", ("b", "a"))
    assert consistent([first, agrees, contradicts, other], "mine") == [first, agrees, other]
    assert "1 left out" in capsys.readouterr().err


def test_numbers_behind_the_mark_are_answers(tmp_path):
    lines = [
        {"question": "q", "answer": "so 3*4=<<3*4=12>>12\n#### 1,200"},
        {"question": "q", "answer": "২৫"},
        {"question": "q", "answer": None, "answer_number": -3},
    ]
    found = solved([(f"f:{k}", row) for k, row in enumerate(lines, 1)])
    assert [q.answer for q in found] == ["1200", "25", "-3"] and found[0].about["solution"].startswith("so 3*4")
    with pytest.raises(ValueError, match=r"f:1: the answer is no number: 'many'"):
        solved([("f:1", {"question": "q", "answer": "#### many"})])


# ---- splits ----


def test_the_split_of_mmlu_is_the_originals():
    found = numbers(14042)
    digest = {
        name: hashlib.sha256(",".join(map(str, own)).encode()).hexdigest()[:16] for name, own in found.items()
    }
    assert {name: own[:3] for name, own in found.items()} == {
        "train": [13635, 11067, 991], "valid": [4548, 7714, 7766], "test": [11356, 6080, 7622],
    }  # fmt: skip
    assert {name: len(own) for name, own in found.items()} == {"train": 11233, "valid": 1404, "test": 1405}
    assert digest == {"train": "a47ccfda98335e2a", "valid": "e35a41158bd45c28", "test": "95261af6f72cd34f"}


@pytest.mark.parametrize("n", [6, 15, 25, 250])
def test_every_question_is_in_one_split(n):
    found = numbers(n)
    assert sorted(k for own in found.values() for k in own) == list(range(n)) and all(found.values())
    assert len(found["train"]) == n - -(-n // 5) and len(found["test"]) - len(found["valid"]) in (0, 1)


def question(k: int, **about) -> Question:
    return Question(k, f"Q{k}", "A", ("a", "b"), about=about)


def test_a_question_that_is_lacking_moves_no_other(capsys):
    whole = by_number([question(k) for k in range(20)], 20, "all")
    part = by_number([question(k) for k in range(0, 20, 2)], 20, "half")
    for name, own in whole.items():
        assert part[name] == [q for q in own if q.index % 2 == 0]
    assert "half: 10 of 20 questions are there" in capsys.readouterr().err
    with pytest.raises(ValueError, match="number 20"):
        by_number([question(20)], 20, "all")


def test_rows_without_numbers_are_not_taken_for_others(tmp_path):
    file = write(tmp_path / "q.csv", ["Question", "A", "B", "Answer"], ["x", "a", "b", "A"])
    with pytest.raises(ValueError, match=r"1 rows of 14042, and no column index"):
        MMLU(file=file).parts()


def test_splits_of_a_files_own_are_kept():
    found = [question(0, split="test"), question(1, split="dev"), question(2, split="Train")]
    assert {s: [q.index for q in own] for s, own in by_place(found).items()} == {
        "train": [2],
        "valid": [1],
        "test": [0],
    }
    with pytest.raises(ValueError, match="question 0: a split is one of"):
        by_name([question(0, split="foo")], CALLED)
    with pytest.raises(ValueError, match="no row's column split says valid: mark some, or leave the column out"):
        by_place([found[0], found[2]])


def test_a_tenth_is_held_out_where_there_is_nothing_to_validate_on():
    found = held_out([question(k) for k in range(25)], 25, [question(99)], "mine")
    assert {name: len(own) for name, own in found.items()} == {"train": 22, "valid": 3, "test": 1}
    assert not {q.index for q in found["train"]} & {q.index for q in found["valid"]}


def test_a_portion_takes_the_first_and_leaves_long_ones_out():
    own = [question(1), Question(2, "a long one", "A", ("a", "b")), question(3), question(4)]
    assert [q.index for q in Portion(train=2, longest=5).of(own, "train")] == [1, 3]
    assert Portion().of(own, "valid") == own
    with pytest.raises(ValueError, match="0 \\(all\\) or more"):
        Portion(test=-1)


# ---- how a question is put ----

WHICH = Question(5, "Which, {meta} or not?", "B", ("x, y", "z"))


def test_letters_as_published():
    said = Asking().said(Question(0, "Q?", "A", ("a", "b", "c", "d")))
    assert said == (
        "Answer the following multiple choice question. The last line of your response should be of the following format: "
        "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\nQ?\n\n"
        "A) a\nB) b\nC) c\nD) d"
    )


def test_what_a_question_says_is_no_place_of_the_template():
    asking = Asking("{meta} {question}\n{choices}\n", meta="Look, think, {choices}.")
    assert asking.said(WHICH) == "Look, think, {choices}. Which, {meta} or not?\nA) x, y\nB) z\n"


def test_hints_tell_the_answer_and_nothing_else_changes():
    plain, marked = Asking("short").said(WHICH), Asking("short").said(WHICH, hint=True)
    assert marked == plain.replace("B) z", "B) z (CORRECT)")
    told = Asking("short", hint="answer").said(WHICH, hint=True)
    assert told == plain.replace("not?", "not? (the answer is B)")
    assert Asking().said(Question(0, "1+1?", "2"), hint=True).endswith("1+1? (the answer is 2)")


def test_metas_have_names_and_templates_may_be_files(tmp_path):
    assert METAS["translate"] in Asking(meta="translate").said(WHICH)
    assert " Think" not in Asking(meta="").said(WHICH) and "one of AB.\n" in Asking(meta="").said(WHICH)
    (tmp_path / "t.txt").write_text("Well, {question}\n{choices}\n")
    assert (
        Asking(str(tmp_path / "t.txt")).said(WHICH).startswith("Well, Which")
        and Asking(str(tmp_path / "t.txt")).file
    )
    with pytest.raises(ValueError, match="Did you mean translate"):
        Asking(meta="translte")
    with pytest.raises(ValueError, match=r"\{question\} in it, once"):
        Asking("no place")
    with pytest.raises(ValueError, match=r"no {choices} for them"):
        Asking("{question}").said(WHICH)
    with pytest.raises(ValueError, match="no such file"):
        Asking("gone.txt").said(WHICH)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("shape", [name for name, each in SHAPES.items() if each.system])
def test_a_chats_prompt_has_one_begin_of_text_token(shape, adds_bos):
    tokenizer = speaker(shape, adds_bos)
    ids = Asking().put(WHICH, tokenizer)
    assert tokenizer.bos_token_id is None or ids.count(tokenizer.bos_token_id) == 1
    assert "You are a helpful assistant" in tokenizer.decode(ids) and "Which" in tokenizer.decode(ids)


def test_without_a_template_or_without_a_chat_the_text_is_plain(shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    ids = Asking("short").put(WHICH, tokenizer)
    assert (
        ids
        == Asking("short", chat="none").put(WHICH, tokenizer)
        == tokenizer(Asking("short").said(WHICH))["input_ids"]
    )
    assert ids.count(tokenizer.bos_token_id) == 1 == ids.index(tokenizer.bos_token_id) + 1
    with pytest.raises(ValueError, match=r"question 5: .*does not know Llama 3's headers"):
        Asking(chat="bare").put(WHICH, tokenizer)


def test_llamas_bare_headers_are_the_stored_prompts(shared_data):
    """Word for word the prompts that Llama-3.1-8B-Instruct was asked with, with one begin-of-text token."""
    asked = {q.index: q for q in lettered(rows(str(shared_data / "mmlu" / "mmlu_test.csv"), "test", "mmlu"))}
    with (shared_data / "reasoning" / "star_generated_mmlu.csv").open(newline="") as file:
        stored = {int(row["indices"]): row for row in csv.DictReader(file)}
    both = asked.keys() & stored.keys()
    assert len(both) > 20
    for k in both:
        assert Headers().text(Asking(chat="bare"), asked[k]) == stored[k]["prompted_questions"]
        assert asked[k].answer == stored[k]["truth"]


class Headers:
    """A tokenizer that knows Llama 3's headers, and adds a begin-of-text token of its own where it is let."""

    name_or_path, bos_token_id, chat_template = "headers", 0, None

    def get_vocab(self) -> dict[str, int]:
        return {"<|begin_of_text|>": 0, "<|eot_id|>": 1}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        body = (
            [0, *map(ord, text.removeprefix("<|begin_of_text|>"))]
            if text.startswith("<|begin")
            else [*map(ord, text)]
        )
        return {"input_ids": [0, *body] if add_special_tokens else body}

    def text(self, asking: Asking, asked: Question) -> str:
        first, *rest = asking.put(asked, self)
        assert first == 0 and 0 not in rest
        return "<|begin_of_text|>" + "".join(map(chr, rest))


def test_a_second_begin_of_text_token_is_refused():
    with pytest.raises(ValueError, match=r"question 5: .*two begin-of-text"):
        Asking("<|begin_of_text|>{question} {choices}", chat="none").put(WHICH, Headers())


# ---- the files of the data folder ----


def test_mmlu_and_its_halves(shared_data, capsys):
    parts = MMLU(file=str(shared_data / "mmlu" / "mmlu_test.csv")).parts()
    assert {name: len(own) for name, own in parts.items()} == {"train": 5586, "valid": 715, "test": 742}
    assert "7043 of 14042" in capsys.readouterr().err
    say_leaks(parts, "mmlu")
    assert "mmlu: 9 of 742 questions to test stand word for word" in capsys.readouterr().err
    assert len({q.subject for own in parts.values() for q in own}) == 57
    assert [q.index for q in parts["train"]] == [
        k for k in numbers(SIZE)["train"] if k in {q.index for q in parts["train"]}
    ]


def test_one_number_is_one_question_in_every_language(shared_data):
    file = str(shared_data / "mmlu" / "mmlu_african_languages.csv")
    answers = [
        {q.index: (q.subject, q.answer) for own in AfriMMLU(lang=lang, file=file).parts().values() for q in own}
        for lang in ("en", "zu", "am")
    ]
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 343
    parts = AfriMMLU(lang="zu", file=file).parts()
    assert {name: len(own) for name, own in parts.items()} == {"train": 37, "valid": 11, "test": 295}
    with pytest.raises(ValueError, match="no questions in 'yor'; its column lang has en, af"):
        AfriMMLU(file=file).parts()
    both = [MGSM(lang=lang, file=str(shared_data / "math" / "mgsm.csv")).parts() for lang in ("en", "sw")]
    assert [(q.index, q.answer) for q in both[0]["test"]] == [(q.index, q.answer) for q in both[1]["test"]]


def test_gsm8k_and_commonsense_keep_their_splits(shared_data):
    math, reasoning = shared_data / "math", str(shared_data / "reasoning" / "commonsenseqa_{}.jsonl")
    parts = GSM8K(file=str(math / "gsm8k_train.jsonl"), test_file=str(math / "gsm8k_test.jsonl")).parts()
    assert len(parts["train"]) + len(parts["valid"]) == 2539 and len(parts["test"]) == 663
    assert next(q.answer for q in parts["test"] if q.text.startswith("Josh decides")) == "70000"
    csqa = CSQA(file=reasoning.format("train"), test_file=reasoning.format("dev")).parts()
    assert {name: len(own) for name, own in csqa.items()} == {"train": 1797, "valid": 200, "test": 656}
    assert all(len(q.choices) == 5 for q in csqa["test"]) and {q.answer for q in csqa["test"]} == set("ABCDE")
    every = [q.index for own in csqa.values() for q in own]
    assert len(set(every)) == len(every)


def test_the_hub_is_asked_for_a_configuration_and_a_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*name, **options):
        asked.append((name, options["split"]))
        return datasets.Dataset.from_list([{"question": "Q", "choices": "['a', 'b']", "answer": "B"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    parts = AfriMMLU().parts()
    assert asked == [(("masakhane/afrimmlu", "yor"), split) for split in ("dev", "validation", "test")]
    assert [len(own) for own in parts.values()] == [1, 1, 1] and parts["train"][0].index == 1_000_000
    with pytest.raises(ValueError, match=r"mmmlu YO-NG: openai/MMMLU#YO_NG\[test\] has 1 rows of 14042"):
        MMMLU().parts()


def test_without_file_and_hub_it_is_said_how_to_name_one(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(*name, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"questions of mmlu: .*cais/mmlu.*no network.*--task\.file names"):
        MMLU().parts()


def test_a_users_jsonl_is_read(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps({"question": "Q", "choices": [1, 2], "answer": 1}) + "\n")
    assert lettered(rows(str(file), "train", "mine"))[0].choices == ("1", "2")

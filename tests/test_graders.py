"""Who reads an answer off a completion: the original's grading of letters, ours, and numbers."""

from __future__ import annotations

import csv
import sys
import unicodedata

import pytest

from tiltlm.questions.base import Grade, Question
from tiltlm.questions.graders import catalogue, grader
from tiltlm.questions.graders.seed import ORDER


def letters(answer: str, options: int = 4) -> Question:
    return Question(0, "Which?", answer, ("an option",) * options)


def read(name: str, completion: str, answer: str = "B", finished: bool = True, options: int = 4) -> Grade:
    return grader(name).grade(letters(answer, options), completion, finished)


def test_graders_are_found_by_name():
    assert {"pick", "seed", "number"} <= catalogue().keys()
    with pytest.raises(ValueError, match=r"no grader 'pik'. Did you mean pick\?"):
        grader("pik")


@pytest.mark.parametrize(
    ("completion", "seed", "pick"),
    [
        ("Answer: B", "B", "B"),
        ("Answer: All of the above", "A", ""),
        ("answer: b", "b", "B"),
        ("Answer: (B)", "", "B"),
        ("Answer:\n\nAnswer: C", "A", "C"),
        ("Antwort:\n\nAntwort: C", "A", "C"),
        ("Answer: B\nWait, Answer: C", "B", "C"),
        ("Answer:\u200b B", "", "B"),
        ("**Answer:** $\\boxed{\\text{D}}$", "D", "D"),
        ("Réponse : « B »", "", "B"),
        ("Final answer： Ｂ", "", "B"),
        ("正确答案：B是对的", "B", "B"),
        ("الإجابة: ب", "B", "B"),
        ("الإجابة: بيت", "B", ""),
        ("উত্তর: ব", "B", "B"),
        ("উত্তর: বাংলা", "B", ""),
        ("Answer: a dog", "a", ""),
        ("Answer: b) bee", "b", "B"),
        ("Answer: A common mistake is B", "A", ""),
        ("Answer: C\nAnswer: A common mistake is B", "C", "C"),
        ("Answer: A is right, for a reason", "A", "A"),
        ("Answer: A because of it", "A", "A"),
        ("Answer: A) common mistakes", "A", "A"),
        ("Answer: A Common Mistake", "A", "A"),
        ("Answer: B common mistakes", "B", "B"),
        ("Resposta: A resposta certa", "A", ""),
        ("Resposta: A porque sim", "A", "A"),
        ("Jibu: A kwa sababu", "A", "A"),
        ("答案：A 是对的", "A", "A"),
        ("Answer: d'accord", "d", ""),
        ("Réponse : D’accord", "D", ""),
        ("Answer: 'B'", "", "B"),
        ("Answer: Ádè", "", ""),
        ("MyAnswer: B", "B", ""),
        ("(B)\nbecause", "", "B"),
        (" B", "", "B"),
        ("A) no, it cannot be", "", ""),
        ("A dog.", "", ""),
        ("Answer: E", "", ""),
        ("", "", ""),
    ],
)
def test_what_is_read(completion, seed, pick):
    assert read("seed", completion).answer == seed
    found = read("pick", completion)
    assert found.answer == pick and found.right == (pick == "B") and bool(found.rule) == bool(pick)


def test_five_options_have_five_letters_and_rules_are_told():
    assert read("pick", "Answer: E", "E", options=5) == Grade(True, "E", "Answer")
    assert read("pick", "Idahun: C", "C").rule == "Idahun" and read("pick", "C", "C").rule == "start"
    assert read("pick", "Answer: D", "D", options=0).right


def test_the_original_grades_nothing_that_was_cut_off_and_no_small_letter():
    assert read("seed", "Answer: B").right and not read("seed", "Answer: B", finished=False).right
    assert not read("seed", "answer: b").right
    assert read("pick", "Answer: B", finished=False).right


def test_accented_words_in_both_unicode_forms():
    """Of the original's 41 words 16 have accents: 15 miss decomposed text, and 2 composed text. Ours miss none."""
    accented = [
        word for word, _ in ORDER if unicodedata.normalize("NFD", word) != unicodedata.normalize("NFC", word)
    ]
    missed = {
        (name, form): sum(not read(name, unicodedata.normalize(form, word) + ": B").right for word in accented)
        for name in ("seed", "pick")
        for form in ("NFC", "NFD")
    }
    assert len(ORDER) == 41 and len(accented) == 16
    assert missed == {("seed", "NFC"): 2, ("seed", "NFD"): 15, ("pick", "NFC"): 0, ("pick", "NFD"): 0}


def test_stored_answers_of_a_real_model(shared_data):
    """The original's stored letters and grades, all 55; ours reads one answer otherwise, the one corrected on the way."""
    with (shared_data / "reasoning" / "star_generated_mmlu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    seed, pick, differs = 0, 0, {}
    for row in rows:
        text, end, _ = row["raw_responses"].partition("<|eot_id|>")
        theirs, ours = (read(name, text, row["truth"], finished=bool(end)) for name in ("seed", "pick"))
        assert (theirs.answer, theirs.right) == (row["answers"], float(row["scores"]) == 1)
        seed, pick = seed + theirs.right, pick + ours.right
        if theirs.answer != ours.answer:
            differs[int(row["indices"])] = theirs.answer, ours.answer
    assert (len(rows), seed, pick, differs) == (55, 39, 40, {429: ("B", "A")})


# ---- numbers ----


@pytest.mark.parametrize(
    ("completion", "answer", "rule"),
    [
        ("so it is\n#### 12", "12", "####"),
        ("#### $1,200 dollars", "1200", "####"),
        ("#### 12.", "12", "####"),
        ("#### 12.0", "12", "####"),
        ("#### −3", "-3", "####"),
        ("Thus \\boxed{12}.", "12", "boxed"),
        ("\\boxed{\\frac{1}{2}}", "1/2", "boxed"),
        ("\\boxed{12\\text{ apples}}", "12", "boxed"),
        ("**Answer:** 12", "12", "answer"),
        ("Respuesta: 12", "12", "answer"),
        ("উত্তর: ১২", "12", "answer"),
        ("#### 5\nNo: #### 12", "12", "####"),
        ("#### 3.5/2", "7/4", "####"),
        ("#### 1,000/3", "1000/3", "####"),
        ("\\boxed{12{,}000}", "12000", "boxed"),
        ("\\boxed{1,\\!234\\,567}", "1234567", "boxed"),
        ("#### 3/4 cups", "3/4", "####"),
        ("#### **12** apples", "12", "####"),
        ("#### 12kg - all of it", "12", "####"),
        ("#### Step 3\nso\nAnswer: 42", "42", "answer"),
        ("#### 2x+3 = 11\nThus \\boxed{4}", "4", "boxed"),
    ],
)
def test_numbers_are_right_however_they_are_written(completion, answer, rule):
    found = grader("number").grade(Question(0, "How many?", answer), completion, True)
    assert found.right and found.rule == rule
    assert not grader("number").grade(Question(0, "How many?", "7"), completion, True).right


@pytest.mark.parametrize(
    "completion",
    [
        "12",
        "#### twelve",
        "\\boxed{9^{9^{9^{9}}}}",
        "\\boxed{x+12}",
        "####",
        "#### __import__('os')",
        "#### 12.000.000",
        "#### 12 1/2",
        "#### 12x+3 = 7",
        "#### 12 + 7",
        "#### 12 = 5 + 7",
        "#### 12e3",
        "#### 12:30",
        "#### 12/hour",
        "#### 12/0",
        "#### 12,00",
        "#### 12\\times 3",
        "#### 12x",
        "#### 12/31/2024",
    ],
)
def test_what_is_no_number_is_not_read_and_never_computed(completion):
    assert grader("number").grade(Question(0, "How many?", "12"), completion, True) == Grade(False)


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"pip install 'tiltlm\[questions\]'"):
        grader("number")

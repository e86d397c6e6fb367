"""Protocols: what each makes of a question by hand, that batches change nothing, and exams on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import question_world
from command import tiltlm
from question_world import PIECES, QUESTIONS, FirstLetter, Letters
from tiltlm.commands.models import load_run
from tiltlm.models.causal import CausalLM
from tiltlm.questions.base import Question
from tiltlm.questions.drawn import Drawn, majority
from tiltlm.questions.exam import Exam
from tiltlm.questions.generated import read_generated
from tiltlm.questions.grading import Grading
from tiltlm.questions.outcomes import Outcome, by_subject, constant, fingerprint, histogram, observations
from tiltlm.questions.protocols import protocol
from tiltlm.questions.scored import Scored, _split, right_option
from tiltlm.ruler.measure import Measurement
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Tokens
from tiltlm.seeds import stream


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> CausalLM:
    folder = question_world.written(tmp_path_factory.mktemp("model"))
    made = CausalLM.load(folder, eos_ids=(2,))
    made.tokenizer = question_world.tokenizer()
    return made


def exam_of(model: CausalLM, questions=QUESTIONS) -> Exam:
    ids = [Letters().put(question, model.tokenizer) for question in questions]
    grading = Grading.of(list(zip(ids, questions, strict=True)), FirstLetter(), model.tokenizer)
    return Exam.of(model, Tokens.of(ids), questions, grading, 3, stream(0, "test"))


# ---- completions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "settled"),
    [
        (("A", "B", "B"), "B"),
        (("B", "A", "A", "B"), "B"),
        (("", "", "C"), "C"),
        (("A", "", "", ""), "A"),
        (("", ""), ""),
    ],
)
def test_the_commonest_answer_is_settled_on_of_those_as_common_the_first(answers, settled):
    assert majority(answers) == settled


def line(answer: str, right: bool, finished: bool = True) -> dict:
    verdict = {"answer": answer, "parse_rule": "letter" if answer else "", "score": float(right)}
    return {
        "index": 7,
        "subject": "s",
        "correct_answer": "A",
        "finish_reason": "stop" if finished else "length",
    } | verdict


def test_four_draws_by_hand():
    """A right, B wrong, none, A cut off and so not right: average 1/4; the vote settles on A, which one draw has right."""
    lines = [line("A", True), line("B", False), line("", False), line("A", False, finished=False)]
    (mean,) = Drawn(4).outcomes(lines)
    assert mean == Outcome(7, "s", "A", ("A", "B", "", "A"), 0.25, 0.75, 0.75)
    (vote,) = Drawn(4, vote=True).outcomes(lines)
    assert vote == Outcome(7, "s", "A", ("A",), 1.0, 0.75, 0.75)
    (lost,) = Drawn(2, vote=True).outcomes([line("", False), line("", False)])
    assert lost == Outcome(7, "s", "A", ("",), 0.0, 0.0, 1.0)


def test_greedy_takes_the_likeliest_token_of_a_direct_call(model):
    exam = exam_of(model)
    rows = list(Drawn(1, greedy=True).lines(exam, 0, 4))
    for row, prompt in zip(rows, exam.prompts.lists(), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 3 and ids[-1] != 2:
            ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert row["completion_ids"] == ids[len(prompt) :]
    assert [row["index"] for row in rows] == [7, 3, 12, 5]
    assert {row["settings"]["temperature"] for row in rows} == {0.0}


def test_lines_say_what_was_drawn_and_how_it_ended(model):
    rows = list(Drawn(8).lines(exam_of(model), 0, 4))
    assert [row["sample"] for row in rows] == list(range(8)) * 4
    ended = [row["completion_ids"][-1] == 2 for row in rows]
    assert [row["finish_reason"] == "stop" for row in rows] == ended and 0 < sum(ended) < 32
    for row in rows:
        ids = [i for i in row["completion_ids"] if i != 2]
        assert row["completion"] == "".join(PIECES[i] for i in ids)
        assert row["score"] == float(row["answer"] == row["correct_answer"] and row["finish_reason"] == "stop")
        assert bool(row["parse_rule"]) == (row["answer"] != "")


def test_neither_batches_nor_other_questions_nor_more_draws_change_a_draw(model):
    exam = exam_of(model)
    whole = list(Drawn(4).lines(exam, 0, 4))
    apart = [row for k in range(4) for row in Drawn(4).lines(exam, k, k + 1)]
    assert whole == apart
    fewer = list(Drawn(2).lines(exam_of(model, QUESTIONS[::-1][:2]), 0, 2))
    assert fewer == [row for index in (5, 12) for row in whole if row["index"] == index and row["sample"] < 2]
    own = draw(model, exam.prompts, n=4, max_new_tokens=3, stream=exam.stream)
    assert [
        row["completion_ids"] for row in whole
    ] != own.completions.lists()  # numbered by question, not by place


def test_a_question_that_is_asked_twice_counts_once(model):
    exam = exam_of(model, [*QUESTIONS, QUESTIONS[0]])
    assert [question.index for question in exam.questions] == [7, 3, 12, 5] and len(exam.prompts) == 4


# ---- log-likelihoods --------------------------------------------------------------------------------------------


def direct(model: CausalLM, ids: list[int], continuation: list[int]) -> float:
    """log p of a continuation by one plain call of the network."""
    logits = model.model(torch.tensor([ids + continuation])).logits[0].double().log_softmax(-1).detach()
    return sum(float(logits[len(ids) - 1 + k, token]) for k, token in enumerate(continuation))


def test_letters_are_the_next_token_behind_answer(model):
    exam = exam_of(model)
    rows = list(Scored().lines(exam, 0, 4))
    for row, question, prompt in zip(rows, QUESTIONS, exam.prompts.lists(), strict=True):
        cue = [*prompt, PIECES.index("Answer:")]
        expected = [direct(model, cue, [PIECES.index(f" {c}")]) for c in "ABCD"[: len(question.choices)]]
        assert row["log_p"] == pytest.approx(expected, abs=1e-5)
        assert row["answer"] == "ABCD"[expected.index(max(expected))]
        assert row["score"] == float(row["answer"] == question.answer)
    apart = [row for k in range(4) for row in Scored().lines(exam, k, k + 1)]
    for row, other in zip(rows, apart, strict=True):
        assert other == row | {"log_p": pytest.approx(row["log_p"], abs=1e-5)}


def test_options_are_summed_over_their_tokens_and_may_be_divided_by_characters(model):
    exam = exam_of(model, QUESTIONS[1:2])
    (plain,) = Scored(by_letter=False).lines(exam, 0, 1)
    (scaled,) = Scored(by_letter=False, per_character=True).lines(exam, 0, 1)
    cue = [*exam.prompts.lists()[0], PIECES.index("Answer:")]
    pieces = [[" ", "1"], [" ", "2"], [" ", "1", "1"], [" A"]]
    expected = [direct(model, cue, [PIECES.index(piece) for piece in own]) for own in pieces]
    assert plain["log_p"] == scaled["log_p"] == pytest.approx(expected, abs=1e-5)
    by_character = [expected[0], expected[1], expected[2] / 2, expected[3]]
    assert plain["answer"] == "ABCD"[expected.index(max(expected))]
    assert scaled["answer"] == "ABCD"[by_character.index(max(by_character))]


def test_a_continuation_begins_where_the_tokens_differ():
    class Merging:
        """Reads "Answer: A" as Answ|er: A, and "Answer:" as Answ|er:."""

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": {"Answer:": [1, 2], "Answer: A": [1, 3], "Answer: B": [1, 2, 4]}[text]}

    assert _split(Merging(), "Answer:", "A") == ([1], [3])
    assert _split(Merging(), "Answer:", "B") == ([1, 2], [4])


def test_a_prompt_without_a_last_line_end_gets_one(model):
    """In front of `Answer:`; the tokens are those of the text "\\nAnswer: A"."""
    read = model.tokenizer
    ids = read("1?", add_special_tokens=False)["input_ids"]
    exam = Exam(
        model, Tokens.of([ids]), QUESTIONS[:1], Grading({tuple(ids): QUESTIONS[0]}, FirstLetter(), read), 3,
        stream(0, "x"),
    )  # fmt: skip
    (row,) = Scored().lines(exam, 0, 1)
    cue = [*ids, PIECES.index("\n"), PIECES.index("Answer:")]
    assert row["log_p"][0] == pytest.approx(direct(model, cue, [PIECES.index(" A")]), abs=1e-5)


def test_questions_without_options_are_not_scored(model):
    with pytest.raises(ValueError, match="question 1 has 0 options"):
        list(Scored().lines(exam_of(model, [Question(1, "1?", "2")]), 0, 1))
    assert right_option(Question(1, "1?", "3", ("2", "3"))) == 1
    with pytest.raises(ValueError, match="the answer 'E' is none of its options"):
        right_option(Question(1, "1?", "E", ("2", "3")))


# ---- what is read off outcomes ----------------------------------------------------------------------------------

OUTCOMES = [
    Outcome(7, "b", "A", ("A", "A"), 1.0, 1.0, 0.5),
    Outcome(3, "a", "D", ("A", ""), 0.0, 0.5, 1.0),
    Outcome(12, "b", "D", ("D", "A"), 0.5, 1.0, 1.0),
]


def test_observations_carry_the_protocol_in_their_names():
    found = observations("avg@2", OUTCOMES)
    assert {name: x.tolist() for name, x in found.items()} == {
        "accuracy[avg@2]": [1.0, 0.0, 0.5], "parsed[avg@2]": [1.0, 0.5, 1.0], "finished[avg@2]": [0.5, 1.0, 1.0],
    }  # fmt: skip
    assert list(observations("letters", [Outcome(7, "", "A", ("A",), 1.0)])) == ["accuracy[letters]"]


def test_the_best_constant_answer_the_answers_given_and_subjects():
    """D is right in 2 of 3. Given: A (1 + 1/2 + 1/2)/3, nothing 1/6, D 1/6."""
    best, always = constant(OUTCOMES)
    assert best == "D" and always.tolist() == [0.0, 1.0, 1.0]
    assert histogram(OUTCOMES) == pytest.approx({"A": 2 / 3, "": 1 / 6, "D": 1 / 6})
    assert {name: x.tolist() for name, x in by_subject(OUTCOMES).items()} == {"a": [0.0], "b": [1.0, 0.5]}


def test_the_fingerprint_is_that_of_the_numbers_joined_by_commas():
    import hashlib

    assert fingerprint([13635, 11067]) == hashlib.sha256(b"13635,11067").hexdigest()[:16]


def test_names_of_protocols():
    assert protocol("avg@16") == Drawn(16) and protocol("maj@3") == Drawn(3, vote=True)
    assert protocol("greedy") == Drawn(1, greedy=True)
    assert protocol("options-per-character") == Scored(by_letter=False, per_character=True)
    for name in ("avg@0", "avg", "greedy@2", "maj@-1"):
        with pytest.raises(ValueError, match=f"there is no protocol '{name}'"):
            protocol(name)


# ---- on the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    question_world.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    question_world.written(tmp_path / "model")
    return tmp_path


def run(world: Path, stage: str, *more: str) -> Path:
    done = tiltlm("run", f"letters/{stage}", "--task.model", "model", *more, cwd=world)
    (folder,) = (world / "runs" / "letters" / stage).iterdir()
    assert (folder / "DONE").is_file(), done.stderr
    return folder


def test_an_exam_is_a_stage_and_holds_what_a_comparison_needs(world):
    folder = run(world, "reference@avg@4")
    rows = {row["metric"]: row for row in json.loads((folder / "report.json").read_text())}
    assert set(rows) == {"accuracy[avg@4]", "parsed[avg@4]", "finished[avg@4]", "accuracy[constant]"}
    assert rows["accuracy[constant]"]["value"] == 0.5
    x = Measurement.load(folder / "measurement.safetensors").values["accuracy[avg@4]"]
    lines = [json.loads(text) for text in (folder / "answers.jsonl").read_text().splitlines()]
    assert x.tolist() == [sum(r["score"] for r in lines[k : k + 4]) / 4 for k in range(0, 16, 4)]
    asked = json.loads((folder / "questions.json").read_text())
    assert asked == [[7, "A"], [3, "C"], [12, "A"], [5, "D"]]
    assert fingerprint([7, 3, 12, 5]) == rows["accuracy[avg@4]"]["questions"]
    subjects = json.loads((folder / "subjects.json").read_text())
    assert [(row["subject"], row["n"]) for row in subjects] == [("sums", 2), ("words", 2)]


def test_an_exam_that_was_stopped_between_lines_ends_as_one_that_was_not(world):
    folder = run(world, "reference@avg@4", "--exam.batch-size", "4")
    whole = (folder / "answers.jsonl").read_bytes()
    report = (folder / "report.json").read_text()
    (folder / "DONE").unlink()
    (folder / "answers.jsonl").write_bytes(whole[: whole.index(b"\n", len(whole) // 2) + 40])  # and half a line
    assert run(world, "reference@avg@4", "--exam.batch-size", "8") == folder
    assert (folder / "answers.jsonl").read_bytes() == whole and (folder / "report.json").read_text() == report


def test_runs_and_their_checkpoints_are_measured_by_protocols(world, monkeypatch):
    ruler = ("--ruler.no-absolute", "--ruler.n", "4")
    trained = run(world, "rloo", "--fit.steps", "4", "--fit.batch-size", "8", "--fit.checkpoints", "2", *ruler)
    args = ("--protocol", "greedy", "avg@2", "letters", "--split", "valid", "--subjects")
    done = tiltlm("measure", str(trained), f"{trained}@2", "base=model", *args, "--out", "rows.json", cwd=world)
    rows = json.loads((world / "rows.json").read_text())
    assert {row["method"] for row in rows} == {"rloo", "rloo@2", "base"}
    assert {row["split"] for row in rows} == {"valid"}
    assert [row["metric"] for row in rows if row["metric"].startswith("accuracy[l")] == ["accuracy[letters]"] * 3
    assert "words" in done.stdout and "accuracy [95%]" in done.stdout
    policy = next((world / "runs" / "letters" / "rloo-policy").iterdir())
    before = sorted(path for path in (world / "runs").rglob("DONE"))
    tiltlm("measure", str(policy), "--protocol", "greedy", "--split", "valid", cwd=world)
    assert sorted((world / "runs").rglob("DONE")) == before  # found: it is the same model and the same exam
    exam = next((world / "runs" / "letters" / "rloo@greedy").iterdir())
    tiltlm("measure", str(exam), "--protocol", "greedy", "--split", "valid", "--questions", "2", cwd=world)
    assert (
        len(list((world / "runs" / "letters" / "rloo@greedy").iterdir())) == 3
    )  # the best, step 2, two questions
    started: list[tuple[list[str], int]] = []

    def leave_behind(runs, launch, command):
        started.append(([each.recipe.stage for each in runs], launch.jobs))

    with monkeypatch.context() as patched:
        patched.setattr("tiltlm.commands.measure.build_all", leave_behind)
        left = tiltlm("measure", str(trained), *args, "--questions", "1", "--jobs", "2", cwd=world)
    assert started == [(["rloo@greedy", "rloo@avg@2", "rloo@letters"], 2)] and not left.stdout
    wrong = tiltlm("measure", f"{trained}@3", "--protocol", "greedy", cwd=world, check=False)
    assert wrong.returncode == 2 and "has no checkpoint '3'; there are 2, 4" in wrong.stderr


def test_what_a_round_ended_with_is_measured(world):
    rounds = ("--feed.source", "rounds", "--feed.rounds.count", "2", "--feed.rounds.n", "32")
    ruler = ("--ruler.no-absolute", "--ruler.n", "4")
    trained = run(world, "sft", *rounds, "--fit.steps", "2", "--fit.batch-size", "4", *ruler)
    names = [str(trained), f"{trained}@round0", f"{trained}@round1", f"{trained}@round2", "base=model"]
    tiltlm("measure", *names, "--protocol", "letters", "--out", "rows.json", cwd=world)
    lines = {}
    for path in (world / "runs" / "letters").glob("*@letters/*/answers.jsonl"):
        at = json.loads((path.parent / "config.json").read_text())["settings"]
        lines[at["called"], at["exam"]["at"]] = [
            json.loads(text)["log_p"] for text in path.read_text().splitlines()
        ]
    assert {at for called, at in lines if called == "sft@letters"} == {"", "round0", "round1", "round2"}
    assert lines["sft@letters", "round0"] == lines["model@letters", ""]
    assert lines["sft@letters", "round2"] == lines["sft@letters", ""] != lines["sft@letters", "round1"]
    wrong = tiltlm("measure", f"{trained}@round3", "--protocol", "letters", cwd=world, check=False)
    assert f"{trained} has no 'round3': it has 2 rounds; there are round0, round1, round2" in " ".join(
        wrong.stderr.split()
    )
    wrong = tiltlm("measure", f"{trained}@round2", cwd=world, check=False)
    assert wrong.returncode == 2 and "add --protocol greedy" in wrong.stderr
    before = sorted((world / "runs").rglob("DONE"))
    (second,) = (world / "runs" / "letters" / "sft-round-2").iterdir()
    tiltlm("measure", str(second), "--protocol", "letters", cwd=world)
    assert (
        sorted((world / "runs").rglob("DONE")) == before
    )  # found: the last round is what the whole training ended with
    assert load_run(second).folder == second
    for stage in ("sft-round-1", "answers", "answers-valid", "sft-answers-2"):
        (folder,) = (world / "runs" / "letters" / stage).iterdir()
        assert load_run(folder).recipe.stage == stage
    (first,) = (world / "runs" / "letters" / "sft-round-1").iterdir()
    tiltlm("measure", str(first), "--protocol", "letters", cwd=world)
    (made,) = {*(world / "runs").rglob("DONE")} - {*before}
    log_p = [json.loads(text)["log_p"] for text in (made.parent / "answers.jsonl").read_text().splitlines()]
    assert log_p == lines["sft@letters", "round1"]
    answers = next((world / "runs" / "letters").glob("answers/*/answers.jsonl"))
    assert [row.sample for row in read_generated(answers).rows] == list(range(32)) * 4


def test_what_cannot_be_examined_says_so(world):
    wrong = tiltlm("run", "letters/reference@gredy", cwd=world, check=False)
    assert "there is no protocol 'gredy'. Did you mean greedy?" in wrong.stderr
    wrong = tiltlm("run", "animals/reference@greedy", cwd=world, check=False)
    assert "protocols put questions, and animals has none" in wrong.stderr
    wrong = tiltlm(
        "run", "letters/reference@greedy", "--task.model", "model", "--exam.at", "3", cwd=world, check=False
    )
    assert "nothing is trained, so there is no checkpoint '3'" in wrong.stderr

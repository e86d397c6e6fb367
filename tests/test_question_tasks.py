"""Tasks whose questions are a data set's, with a model too small to know anything."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from command import tiltlm
from tiltlm.commands.options import from_json
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.models.causal import CausalLM
from tiltlm.problem import Problem
from tiltlm.questions.generated import Generated
from tiltlm.questions.preload import preloaded
from tiltlm.questions.splits import numbers
from tiltlm.questions.wording import Asking
from tiltlm.recipes import preset_of, questions, recipe
from tiltlm.run import ensure
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.stages.answers import Answers
from tiltlm.stages.examine import Examine
from tiltlm.stages.measure import RulerSettings
from tiltlm.stages.task import Task
from tiltlm.tasks.data_set import MODEL, OfDataSet
from tiltlm.tasks.mcq import MCQ

TALK = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model's folder, with a chat template whose turns end in a token of their own."""
    from transformers import LlamaConfig

    tokenizer = train_tokenizer(stories(30, stream(0, "test-questions")), 300)
    tokenizer.add_tokens(["<system>", "<user>", "<assistant>", "<end>"], special_tokens=True)
    tokenizer.eos_token, tokenizer.chat_template = "<end>", TALK
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=400, bos_token_id=tokenizer.bos_token_id, eos_token_id=None,
    )  # fmt: skip
    made = CausalLM.from_config(config, seed=0)
    made.tokenizer = tokenizer
    folder = tmp_path_factory.mktemp("model")
    made.save(folder)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Twenty questions whose right option is told by their number; the last contradicts the first."""
    path = tmp_path_factory.mktemp("file") / "my.csv"
    with path.open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow(["", "Question", "A", "B", "Answer", "Subject"])
        table.writerows(
            [100 + k, f"What, then, is {k}?", "odd, NA", "even", "BA"[k % 2], "sums"] for k in range(20)
        )
        table.writerow([120, "What, then, is 0?", "odd, NA", "even", "A", "sums"])
    return path


def task(model: Path, file: Path, **settings) -> MCQ:
    return MCQ(replace(MODEL, model=str(model), new_tokens=3), Asking("short"), file=str(file), **settings)


def built(made: OfDataSet) -> Problem:
    made.check()
    return made.problem({}, 0)


def test_prompts_grades_and_hints_of_ones_own_questions(model, file, capsys):
    made = task(model, file)
    problem = built(made)
    assert "1 left out" in capsys.readouterr().err
    assert problem.facts.r_max == 1 and problem.facts.held_out and problem.grading is not None
    texts = problem.tokenizer.batch_decode(problem.prompts["train"].lists())
    first = numbers(20)["train"][0]
    assert texts[0].endswith(f"<user>What, then, is {first}?\nA) odd, NA\nB) even\nAnswer:<end><assistant>")
    assert {s: len(p) for s, p in problem.prompts.items()} == {"train": 16, "valid": 2, "test": 2}
    asked = problem.grading.questions(problem.prompts["train"])
    assert [q.index for q in asked] == [100 + k for k in numbers(20)["train"]]
    assert problem.hinted is not None
    told = problem.tokenizer.batch_decode(problem.hinted(problem.prompts["train"]).lists())
    assert all(text.count(" (CORRECT)") == 1 for text in told) and told[0].replace(" (CORRECT)", "") == texts[0]


def test_a_completion_is_right_where_its_letter_is(model, file):
    problem = built(task(model, file))
    prompts = problem.prompts["train"]
    asked = problem.grading.questions(prompts)  # type: ignore[union-attr]
    end = problem.reference.eos_ids[0]
    said = [problem.tokenizer(f"\nAnswer: {answer}", add_special_tokens=False)["input_ids"] for answer in "AB"]
    rows = [[*ids, end] for _ in asked for ids in said]
    drawn = Tokens.of(rows)
    index = torch.arange(len(asked)).repeat_interleave(2)
    samples = Samples(prompts, index, drawn.ids, drawn.mask)
    wanted = [float(q.answer == letter) for q in asked for letter in "AB"]
    assert problem.target.reward(samples).tolist() == wanted
    assert problem.checks["parsed"](samples).all()  # type: ignore[operator]


def test_completions_end_where_the_models_files_say(model, file):
    problem = built(task(model, file))
    assert problem.tokenizer.decode(problem.reference.eos_ids) == "<end>" and problem.width == 3


def test_a_question_asked_twice_has_its_own_number_in_every_split(model, tmp_path, capsys):
    """The one to test on and the second one to validate on stand word for word among those to train on."""
    path = tmp_path / "twice.jsonl"
    asked = [
        (1, "Odd?", "train"),
        (2, "Even?", "train"),
        (3, "Odd?", "valid"),
        (4, "Odd?", "test"),
        (5, "No?", "test"),
    ]
    rows = [
        {"index": k, "question": text, "choices": ["a", "b"], "answer": "A", "split": split, "subject": split}
        for k, text, split in asked
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = task(model, path)
    problem = built(made)
    assert (
        "mcq: 1 of 2 questions to test stand word for word among those to train on as well"
        in capsys.readouterr().err
    )
    assert {s: [q.index for q in own] for s, own in problem.questions.items()} == {
        "train": [1, 2], "valid": [3], "test": [4, 5],
    }  # fmt: skip
    measured = replace(recipe("mcq/reference"), task=made, ruler=RulerSettings(n=2, absolute=False))
    folder = ensure(measured, tmp_path).folder
    assert json.loads((folder / "questions.json").read_text()) == [[4, "A"], [5, "A"]]
    exam = ensure(Examine.of(measured, "greedy"), tmp_path).folder
    assert json.loads((exam / "questions.json").read_text()) == [[4, "A"], [5, "A"]]
    answers = ensure(Answers(made, n=1, split="valid", hinted=True, right=1.0), tmp_path).folder
    for name in ("answers.jsonl", "hinted.jsonl"):
        (line,) = [json.loads(text) for text in (answers / name).read_text().splitlines()]
        assert (line["index"], line["subject"]) == (3, "valid")
    stored = [Generated(k, 0, "", "Answer: A") for k in (1, 4, 5)]
    assert problem.grading is not None
    found = preloaded(stored, problem.prompts["test"], problem.questions["test"], problem.grading, (0,), 100)
    assert found.counts.tolist() == [1, 1] and found.strangers == 1


def test_settings_that_make_no_sense_are_named(model, file, tmp_path):
    good = task(model, file)
    for made, what in (
        (replace(good, file=""), "say which questions: --task.file"),
        (replace(good, file="gone.csv"), "gone.csv: no such file.*--task.file names"),
        (replace(good, grading="pik"), "Did you mean pick"),
        (replace(good, beta=0.0), "beta"),
        (replace(good, language=replace(good.language, prompt="Hello")), "not --task.prompt"),
        (replace(good, portion=replace(good.portion, longest=3)), "no question is left to train"),
        (replace(good, asking=Asking("{question}")), "no {choices}"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=what.replace("{", "\\{")):
            made.check()
    with pytest.raises(ValueError, match=r"question \d+ is put in \d+ tokens, and the model holds 397 beside"):
        replace(good, asking=Asking("{question} {choices}" + " so, then" * 200)).problem({}, 0)


def test_prompts_with_hints_must_fit_as_well(model, file):
    """The longest prompt fills the model up to its completion; the mark behind its right option is too much."""
    made = task(model, file)
    longest = max(len(ids) for own in built(made).prompts.values() for ids in own.lists())
    with pytest.raises(
        ValueError, match=rf"question \d+ is put with its hint in \d+ tokens, and the model holds {longest}"
    ):
        replace(made, language=replace(made.language, new_tokens=400 - longest)).problem({}, 0)


def test_every_preset_is_a_value_that_says_what_it_lacks():
    for name in questions.TASKS:
        found = preset_of(name)
        assert found.task.name == name and all(
            cell.why_not(found.task.facts()) is None for cell in found.cells.values()
        )
        value = recipe(f"{name}/reference")
        assert from_json(value, json.loads(json.dumps(asdict(value)))) == value
        assert isinstance(found.task, OfDataSet) and isinstance(found.task, Task)
    mmlu = preset_of("mmlu")
    assert mmlu.task.language.new_tokens == 1024 and mmlu.cells["sft"].net.lora_rank == 16
    assert mmlu.cells["sft"].fit.optim.lr == 2e-4 and mmlu.cells["sft"].fit.betas == (0.9, 0.95)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


def test_the_reference_is_measured_on_a_users_file(model, file, work):
    options = [
        "--task.model",
        str(model),
        "--task.file",
        str(file),
        "--task.template",
        "Well, {question}, {meta}\n{choices}\n",
    ]
    options += [
        "--task.meta",
        "Think, please, of A, B, and so on.",
        "--task.new-tokens",
        "3",
        "--task.chat",
        "none",
    ]
    options += ["--ruler.n", "4", "--log-z.draws", "4"]
    done = tiltlm("run", "mcq/reference", *options, cwd=work)
    folder = work / done.stdout.splitlines()[-1]
    report = {row["metric"]: row for row in json.loads((folder / "report.json").read_text())}
    assert {"accuracy", "parsed", "finished", "reward"} <= report.keys() and 0 <= report["accuracy"]["value"] <= 1
    shown = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert (
        shown["prompt"].startswith("Well, What, then, is ")
        and "Think, please, of A, B, and so on." in shown["prompt"]
    )


def test_real_questions_to_a_real_small_model(shared_data):
    from tiltlm.tasks.mmlu import MMLU

    language = replace(MODEL, model=str(shared_data / "models" / "stories260K"), new_tokens=2)
    made = MMLU(language, Asking("short"), questions.FEW, str(shared_data / "mmlu" / "mmlu_test.csv"))
    problem = built(made)
    assert {s: len(p) for s, p in problem.prompts.items()} == {"train": 400, "valid": 100, "test": 100}
    starts = [row[:2] for row in problem.prompts["train"].lists()]
    assert all(a == problem.tokenizer.bos_token_id != b for a, b in starts)

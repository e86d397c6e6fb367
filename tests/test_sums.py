"""Sums column by column: what is taught, what is asked, what is right, and the model that learns it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiltlm.stages.training as training
from tiltlm.data import sums
from tiltlm.feeds import Feed, Rounds, why_not
from tiltlm.fit import Fit
from tiltlm.models.causal import CausalLM
from tiltlm.policies.sft import SFT
from tiltlm.problem import SPLITS, Problem
from tiltlm.questions.base import Grade, Question
from tiltlm.questions.graders.result import Exact
from tiltlm.recipes import preset_of, recipe, star_mmlu
from tiltlm.ruler.log_z import LogZ
from tiltlm.run import ensure
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.stages.sums import SumsBase, as_samples
from tiltlm.tasks.sums import Sums

# ---- what is taught -------------------------------------------------------------------------------------------------


def test_columns_are_added_from_the_right_with_and_without_carries():
    number = 989_796
    assert sums.question(number, 3) == "989+796=" and sums.answer(number, 3) == "1785"
    assert sums.solution(number, 3, carry=False) == "n,9+6=15,8+9=17,9+7=16;0675#"
    assert sums.solution(number, 3, carry=True) == "c,9+6=15,8+9+1=18,9+7+1=17;1785#"
    assert sums.question(5, 2) == "00+05=" and sums.solution(5, 2, carry=True) == "c,0+5=5,0+0=0;005#"


def test_with_carries_every_result_is_right_without_them_those_that_need_none():
    """All ten thousand questions of two digits; .55 of a column's hundred pairs of digits stay below ten."""
    easy = 0
    for number in range(sums.count(2)):
        with_carries, without = (sums.solution(number, 2, carry) for carry in (True, False))
        right = f";{sum(divmod(number, 100)):03}#"
        assert with_carries.endswith(right)
        assert without.endswith(right) == (not sums.needs_carry(number, 2))
        easy += not sums.needs_carry(number, 2)
    assert easy == 55**2


def test_the_teacher_carries_in_35_percent_of_its_solutions_whatever_the_question():
    taught = sums.lessons(16_000, 3, False, stream(0))
    carried = torch.tensor([text.startswith("c") for _, text in taught], dtype=torch.float64)
    hard = torch.tensor([sums.needs_carry(int(prompt[:3] + prompt[4:7]), 3) for prompt, _ in taught])
    error = math.sqrt(0.35 * 0.65 / 16_000)
    assert abs(float(carried.mean()) - 0.35) < 4 * error
    assert abs(float(carried[hard].mean() - carried[~hard].mean())) < 4 * error / math.sqrt(0.166)
    assert abs(float(hard.double().mean()) - (1 - 0.55**3)) < 4 * math.sqrt(0.166 * 0.834 / 16_000)
    assert taught == sums.lessons(16_000, 3, False, stream(0)) != sums.lessons(16_000, 3, False, stream(1))


def test_with_hints_it_carries_if_and_only_if_it_is_told_the_result():
    told = 0
    for prompt, text in sums.lessons(400, 3, True, stream(0)):
        found = re.fullmatch(r"(\d{3})\+(\d{3})=~(\d{4}|____)~", prompt)
        assert found and text.startswith("n" if found[3] == "____" else "c")
        if found[3] != "____":
            assert int(found[3]) == int(found[1]) + int(found[2]) and text.endswith(f";{found[3]}#")
            told += 1
    assert 0.25 < told / 400 < 0.45


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_one_token_a_character_and_back_again():
    words = sums.tokenizer()
    assert len(words) == 20 and words.eos_token_id == words.pad_token_id == 19
    text = sums.SIGNS
    assert words(text)["input_ids"] == list(range(19)) and words.decode(range(19)) == text
    assert words.batch_decode([[12, 13, 19]], skip_special_tokens=True) == [",;"]
    with pytest.raises(Exception, match="UNK"):
        words("what?")


def test_the_model_has_the_published_size_and_a_folder_of_it_is_complete(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = SumsBase().untrained()
    assert sum(x.numel() for x in model.parameters()) == 346_848
    assert float(model.model.get_input_embeddings().weight.detach().std()) == pytest.approx(0.05, rel=0.05)
    model.save(tmp_path)
    again, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert words("1+2=")["input_ids"] == [1, 10, 2, 11]
    assert again.config.n_positions == 96 and CausalLM.load(tmp_path).eos_ids == (19,)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.model.parameters(), strict=True))


def test_what_is_imitated_is_the_solution_and_its_end():
    rows = as_samples([("1+2=", "n,1+2=3;03#"), ("9+9=", "c,9+9=18;18#")], sums.tokenizer())
    assert rows.prompts.lists() == [[1, 10, 2, 11], [9, 10, 9, 11]]
    assert rows.completions.lists()[0] == [15, 12, 1, 10, 2, 11, 3, 13, 0, 3, 14, 19]
    assert rows.completions.lists()[1][-1] == 19 and rows.prompt_index.tolist() == [0, 1]


# ---- questions ------------------------------------------------------------------------------------------------------


def test_no_question_is_in_two_splits_and_a_seed_has_its_own():
    task = Sums(train=300, valid=50, test=60)
    asked = {split: task.asked(split, 0) for split in SPLITS}
    assert [len(asked[split]) for split in SPLITS] == [300, 50, 60]
    assert len({question.index for own in asked.values() for question in own}) == 410
    assert task.asked("train", 0) == asked["train"] and task.asked("train", 1) != asked["train"]
    assert replace(task, train=10).asked("test", 0) == asked["test"]
    first = asked["test"][0]
    a, b = divmod(first.index, 1000)
    assert first.text == f"{a:03}+{b:03}=" and first.answer == first.hint == f"{a + b:04}"
    assert first.subject == ("carry" if sums.needs_carry(first.index, 3) else "no carry")


def test_hints_stand_in_a_slot_of_the_same_length():
    task, words = Sums(hints=True), sums.tokenizer()
    question = task.question(989_796)
    assert words.decode(task.put(question, words)) == "989+796=~____~"
    assert words.decode(task.put(question, words, hint=True)) == "989+796=~1785~"
    assert words.decode(Sums().put(question, words)) == "989+796="
    with pytest.raises(ValueError, match="no slot for a hint"):
        Sums().put(question, words, hint=True)


@pytest.mark.parametrize(
    ("text", "finished", "grade"),
    [
        ("c,9+6=15,8+9+1=18,9+7+1=17;1785#", True, Grade(True, "1785", "result")),
        ("n,9+6=15,8+9=17,9+7=16;0675#", True, Grade(False, "0675", "result")),
        ("nonsense;1785#", True, Grade(True, "1785", "result")),
        ("c,9+6=15;1785#", False, Grade(False, "1785", "result")),
        ("c,9+6=15;01785#", True, Grade(False, "01785", "result")),
        ("c,9+6=15;1785", True, Grade(False)),
        ("c,9+6=15;1785#1", True, Grade(False)),
        ("c,9+6=15;0675#;1785#", True, Grade(True, "1785", "result")),
        ("c,9+6=15;17;85#", True, Grade(False, "85", "result")),
        ("1785#", True, Grade(False)),
        ("", True, Grade(False)),
    ],
)
def test_right_is_what_ended_with_the_exact_result(text, finished, grade):
    assert Exact().grade(Question(989_796, "989+796=", "1785"), text, finished) == grade


def test_answers_can_be_rationalized_only_where_there_are_hints():
    feed = Feed("rounds", rounds=Rounds(rationalize=True))
    assert why_not(Sums(hints=True).facts(), SFT(), feed) is None
    assert "prompts have no hints" in str(why_not(Sums().facts(), SFT(), feed))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="3 at most; got 4"):
        Sums(digits=4)
    with pytest.raises(ValueError, match="1 digits make 100 questions; train, valid and test want 4000"):
        Sums(digits=1)
    with pytest.raises(ValueError, match="room for 88 tokens"):
        Sums().at_length(89).check()
    Sums().at_length(88).check()
    with pytest.raises(ValueError, match="measures nothing while it trains"):
        SumsBase(fit=Fit(evaluations=1)).check()


# ---- the stage, the problem -----------------------------------------------------------------------------------------

TINY = replace(
    preset_of("sums-small").task.language, stories=64, layers=1,
    fit=Fit(lr=3e-3, steps=6, batch_size=16, checkpoint_every=2),
)  # fmt: skip
SMALL = Sums(TINY, digits=2, hints=True, train=12, valid=6, test=8, width=16, name="sums-small")


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Problem:
    work = tmp_path_factory.mktemp("sums")
    return SMALL.problem({name: ensure(needed, work) for name, needed in SMALL.needs(0).items()}, 0)


def test_an_interrupted_base_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    made, usual = SMALL.base(0), training._both
    whole = ensure(made, tmp_path / "whole").folder

    def broken(show, send):
        def on_step(step, limit, metrics):
            usual(show, send)(step, limit, metrics)
            if step == 5:
                raise KeyboardInterrupt

        return on_step

    with monkeypatch.context() as patch:
        patch.setattr(training, "_both", broken)
        with pytest.raises(KeyboardInterrupt):
            ensure(made, tmp_path / "parts")
    parts = ensure(made, tmp_path / "parts").folder
    assert weights(parts) == weights(whole)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def weights(folder: Path) -> bytes:
    return (folder / "checkpoint-6" / "model.safetensors").read_bytes()


def test_what_does_not_change_the_base_does_not_train_another():
    key = SMALL.base(0).key
    assert replace(SMALL, beta=1.0, train=20, valid=3, test=2).base(0).key == key
    assert SMALL.at_length(30).base(0).key == key
    others = [replace(SMALL, digits=3), replace(SMALL, hints=False), replace(SMALL, width=32)]
    assert key not in {each.base(0).key for each in others} | {SMALL.base(1).key}


def test_the_reward_and_the_checks_of_answers_written_by_hand(problem):
    """A right answer, a wrong one without carries, one that is cut off, one that cannot be read, and an empty one."""
    words, prompts = problem.tokenizer, problem.prompts["test"]
    first = SMALL.asked("test", 0)[0].index
    right, wrong = (f"{sums.solution(first, 2, True)}", f"n;{(sum(divmod(first, 100)) + 1) % 200:03}#")
    texts = [right, wrong, right, "c,1+", ""]
    ids = [words(text)["input_ids"] for text in texts]
    rows = Tokens.of([[*ids[0], 19], [*ids[1], 19], ids[2], [*ids[3], 19], []])
    finished = torch.tensor([True, True, False, True, True])
    samples = Samples(prompts, torch.zeros(5, dtype=torch.int64), rows.ids, rows.mask, finished=finished)
    assert problem.target.reward(samples).tolist() == [1, 0, 0, 0, 0]
    found = {name: check(samples).tolist() for name, check in problem.checks.items()}
    assert found["parsed"] == [True, True, True, False, False]
    assert found["carries"] == [True, False, True, True, False]
    assert found["finished"] == finished.tolist() and found["accuracy"] == [1, 0, 0, 0, 0]
    easy = [question.subject == "no carry" for question in SMALL.asked("test", 0)]
    assert problem.counts["accuracy_without_carries"].tolist() == easy


def test_completions_end_and_prompts_can_be_put_with_a_hint(problem):
    assert problem.reference.eos_ids == (19,) and problem.facts.atoms == (0.0, 1.0) and problem.facts.held_out
    assert [len(problem.prompts[split]) for split in SPLITS] == [12, 6, 8]
    told = problem.tokenizer.batch_decode(problem.hinted(problem.prompts["train"]).lists())
    asked = SMALL.asked("train", 0)
    assert told == [f"{question.text}~{question.answer}~" for question in asked]


# ---- presets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", star_mmlu.TASKS)
def test_every_preset_is_a_value_with_cells_that_make_sense(name):
    found = preset_of(name)
    facts = found.task.facts()
    known = {**found.cells, **found.variants}
    assert found.task.name == name and facts.r_max == 1 and set(found.methods) - set(known) == {"reference"}
    assert all(cell.why_not(facts) is None for cell in known.values())
    assert recipe(f"{name}/base").key == found.task.base(0).key
    assert recipe(f"{name}/evaluate").methods == found.methods


def test_log_z_of_a_success_rate_is_known_well_enough_from_500_draws():
    """Its expectation over all numbers of successes, p = .35 and 1: off by less than 1e-4 nats."""
    n, beta = star_mmlu.LOG_Z.draws, star_mmlu.BETA
    for p in (0.35, 1.0):
        k = torch.arange(n + 1, dtype=torch.float64)
        log_p = torch.distributions.Binomial(n, torch.tensor(p, dtype=torch.float64)).log_prob(k)
        log_w = (torch.arange(n)[None, :] < k[:, None]).double() / beta
        each = LogZ.of_runs(log_w, "draws").each
        expected = float((log_p.exp() * each)[log_p > -40].sum())
        assert abs(expected - math.log1p(p * math.expm1(1 / beta))) < 1e-4

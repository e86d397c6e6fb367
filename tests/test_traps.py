"""What quietly went wrong in other code that learns in rounds, and cannot here (docs/from_the_papers.md has the list)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import question_world
from close import FLOAT32, close
from families import build
from tiltlm.experience import Once
from tiltlm.feeds import Feed, Rounds
from tiltlm.fit import Fit
from tiltlm.jsonl import read_json, read_rows
from tiltlm.nets import Net
from tiltlm.policies.dpo import DPO
from tiltlm.policies.sft import SFT
from tiltlm.run import Run, ensure
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.stages.answer_lines import read
from tiltlm.stages.cells import Cell
from tiltlm.stages.rounds import Round, chain
from tiltlm.train import Course, Pace

FIT = Fit(lr=1e-3, epochs=1.0, batch_size=4)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> question_world.Letters:
    """Four questions to a small network whose answers differ in length."""
    folder = question_world.written(tmp_path_factory.mktemp("model"))
    made = question_world.Letters()
    return replace(made, language=replace(made.language, model=str(folder)))


def rounds(task: Any, method: Any, root: Path, fit: Fit = FIT) -> list[Run[Any]]:
    """Two rounds of 32 draws a question."""
    cell = Cell(method, Feed("rounds", rounds=Rounds(count=2, n=32)), fit, Net())
    return chain(ensure(Round.last_of(task, cell, type(method).__name__.lower(), 0), root))


def told(run: Run[Any]) -> dict[str, dict[str, Any]]:
    return {row["metric"]: row for row in read_json(run.folder / "report.json")}


@torch.no_grad()
def test_what_padding_says_does_not_matter():
    """Whatever ids stand behind a prompt or a completion, an end token's or a letter's, log p is the same."""
    model = build("gpt2")
    prompts, done = Tokens.of([[3, 5, 7], [2]]), Tokens.of([[1, 2], [4, 6, 8]])

    def scored(pad: int) -> torch.Tensor:
        asked = Tokens(prompts.ids.where(prompts.mask, pad), prompts.mask)
        return model.log_prob(Samples(asked, torch.arange(2), done.ids.where(done.mask, pad), done.mask))

    for pad in (1, 9):
        close(scored(pad), scored(0), FLOAT32)


def test_what_is_learnt_are_the_very_tokens_that_were_drawn(task, tmp_path):
    """log p of the stored ids is log q of the draw: not a token more or less in front, and one begin-of-text token."""
    answers = rounds(task, SFT(), tmp_path)[0].inputs["answers"]
    lines = list(read_rows(answers.folder / "answers.jsonl", ("prompt_ids",)))
    log_q = torch.tensor([x for line in lines for x in line["log_q"]])
    policy = task.problem({}, 0).reference
    close(policy.log_prob(read(answers.folder / "answers.jsonl")).sum(1), log_q, FLOAT32)
    assert [line["prompt_ids"].count(policy.tokenizer.bos_token_id) for line in lines] == [1] * 4


def test_held_out_pairs_cost_ln_2_before_anything_is_learnt_whatever_the_precision(task, tmp_path):
    """Policy and reference are both scored in float32: what bfloat16 rounds is no difference between them."""
    for run in rounds(task, DPO(1.0), tmp_path, replace(FIT, lr=1e-30, precision="bfloat16")):
        found = told(run)
        assert found["valid_loss"]["value"] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(found["valid_margin"]["value"]) < 1e-6


def test_the_held_out_loss_is_over_all_tokens_of_the_same_rows_in_every_round(task, tmp_path):
    """Every right answer of the reference counts once, and as many times as it has tokens."""
    first, second = rounds(task, SFT(), tmp_path)
    assert first.inputs["valid"].folder == second.inputs["valid"].folder
    stored = read(first.inputs["valid"].folder / "answers.jsonl")
    right = stored.select(stored.reward == 1)
    assert len(right) % FIT.batch_size and len(set(right.mask.sum(1).tolist())) > 1
    for run in (first, second):
        policy = run.recipe.learnt(run, task.problem({}, 0)).policy
        expected = -policy.log_prob(right).sum() / right.mask.sum()
        found = told(run)["valid_loss"]
        assert found["n"] == len(right) and found["value"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("rows", "sizes"), [(7, [2, 2, 3]), (9, [3, 3, 3]), (2, [2])])
def test_rows_that_come_once_come_all_in_even_batches(rows, sizes):
    once = Once(Tokens.of([[k] for k in range(rows)]), 3, stream(0, "once"))
    found = [once.batch(k).ids.flatten().tolist() for k in range(once.steps)]
    assert [len(own) for own in found] == sizes
    assert sorted(k for own in found for k in own) == list(range(rows))
    with pytest.raises(IndexError, match=f"there is no batch {len(sizes)}"):
        once.batch(len(sizes))


@pytest.mark.parametrize(("rows", "epochs", "steps"), [(40, 1.0, 10), (43, 1.0, 11), (43, 2.0, 22), (3, 1.0, 1)])
def test_there_are_as_many_updates_as_the_passes_say_to_the_nearest(rows, epochs, steps):
    assert replace(FIT, epochs=epochs).of(rows).steps == steps


def test_every_update_is_made_at_a_rate_above_0_and_a_warm_up_may_take_all_of_them():
    """Linearly to 0: the last of ten steps has a tenth of the rate. Warm-up over all steps divides nothing by 0."""
    pace, course = Pace(steps=10, decay="linear", floor=0.0), Course()
    assert pace.factor(9, course) == pytest.approx(0.1)
    assert [Pace(5, 5, "linear", 0.0).factor(k, course) for k in range(5)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1]
    )


def test_every_round_is_validated_the_last_one_too(task, tmp_path):
    found = rounds(task, SFT(), tmp_path)
    assert len(found) == 2 and all("accuracy[greedy]" in told(run) for run in found)

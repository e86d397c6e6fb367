"""Answers that a server draws: of the reference, of another policy, and round by round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from completions import Completions, shaken
from question_world import Letters, install, written
from tiltlm.commands.run import parse
from tiltlm.feeds import Feed, Rounds
from tiltlm.fit import Fit
from tiltlm.jsonl import read_rows
from tiltlm.models.causal import CausalLM
from tiltlm.nets import Net
from tiltlm.policies.sft import SFT
from tiltlm.run import Run, ensure
from tiltlm.samplers.serving import Serving
from tiltlm.stages.answer_lines import of_lines
from tiltlm.stages.answers import Answers
from tiltlm.stages.rounds import Round, chain
from tiltlm.tasks.language import Language
from toy_world import Toy


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("answers") / "base")


@pytest.fixture
def task(base) -> Letters:
    return Letters(language=Language(str(base), new_tokens=8, stop=("</s>",)))


def model(base: Path) -> CausalLM:
    found = CausalLM.load(base, eos_ids=(2,))
    found.tokenizer = AutoTokenizer.from_pretrained(base)
    return found


def lines(run: Run[Any], name: str = "answers.jsonl") -> list[dict[str, Any]]:
    return list(read_rows(run.folder / name))


def log_q_is_of(policy: CausalLM, run: Run[Any]) -> bool:
    rows = lines(run)
    said = torch.tensor([value for row in rows for value in row["log_q"]])
    with torch.no_grad():
        return bool((policy.log_prob(of_lines(rows)).sum(1) - said).abs().max() < 1e-4)


def test_answers_and_those_with_a_hint_come_from_a_server_and_are_graded_here(base, task, tmp_path, capsys):
    """Four questions, twelve answers each, and twelve more of each that has no right one; log q is the reference's."""
    plain = Answers(task, n=12, hinted=True)
    with Completions(model(base)) as at:
        made = replace(plain, draw=Serving(at.url))
        run = ensure(made, tmp_path)
        again = lines(run, "hinted.jsonl")
        assert len(at.asked) == 12 * (4 + len(again)) and 0 < len(again) < 4
    assert "log q and log p here differ by" in capsys.readouterr().err
    assert log_q_is_of(model(base), run)
    rows = lines(run)
    assert [row["index"] for row in rows] == [7, 3, 12, 5] and {len(row["rewards"]) for row in rows} == {12}
    graded = [
        (a == row["answer"] and done)
        for row in rows
        for a, done in zip(row["answers"], row["finished"], strict=True)
    ]
    assert [value for row in rows for value in row["rewards"]] == graded and any(graded)
    assert made.key != plain.key and replace(made, draw=replace(made.draw, concurrent=1)).key == made.key


def test_texts_of_a_server_are_answers_too_and_marked(base, task, tmp_path):
    with Completions(model(base), ids=False, logprobs=False) as at:
        run = ensure(Answers(task, n=2, draw=Serving(at.url, text=True)), tmp_path)
    assert all(row["retokenised"] and "log_q" not in row and len(row["rewards"]) == 2 for row in lines(run))


def test_another_policy_answers_once_the_server_has_its_weights(base, task, tmp_path):
    other = shaken(model(base))
    other.save(tmp_path / "other")
    with Completions(model(base)) as at:
        served = Serving(at.url, weights=str(tmp_path / "way"))
        run = ensure(Answers(task, n=4, policy=str(tmp_path / "other"), draw=served), tmp_path / "runs")
        assert [path for path, _ in at.followed] == ["collective_rpc", "reset_prefix_cache"]
    assert log_q_is_of(other, run) and not log_q_is_of(model(base), run)


def test_every_round_s_answers_are_those_of_the_policy_that_the_server_was_given(base, task, tmp_path):
    """Two rounds of adapters: the reference's weights go there for the first one's answers and for validation, then those
    of the policy, merged."""
    with Completions(model(base)) as at:
        feed = Feed("rounds", rounds=Rounds(count=2, n=12), draw=Serving(at.url, weights=str(tmp_path / "way")))
        made = Round(task, SFT(), feed, Fit(lr=0.05, epochs=8.0, batch_size=4), Net(policy="lora"), 1, "sft")
        last = ensure(made, tmp_path / "runs")
        assert [path for path, _ in at.followed].count("collective_rpc") == 3
    first, second = chain(last)
    policy = first.recipe.learnt(first, task.problem({}, 0)).policy
    assert log_q_is_of(model(base), first.inputs["answers"]) and log_q_is_of(model(base), last.inputs["valid"])
    assert log_q_is_of(policy, second.inputs["answers"]) and not log_q_is_of(model(base), second.inputs["answers"])
    with pytest.raises(ValueError, match=r"--feed\.draw\.weights FOLDER"):
        replace(made, feed=replace(feed, draw=Serving(at.url))).check()


def test_the_stage_takes_the_server_s_options_and_refuses_what_nothing_draws(tmp_path, monkeypatch):
    install(monkeypatch)
    found = parse(["letters/answers-valid", "--draw.url", "http://h/v1", "--draw.concurrent", "4"], "run").recipe
    assert isinstance(found, Answers) and found.draw == Serving("http://h/v1", concurrent=4)
    with pytest.raises(ValueError, match="answers of a file are not drawn"):
        Answers(Toy(), samples="y.jsonl", draw=Serving("http://h/v1"))
    with pytest.raises(ValueError, match="a server draws from a transformer"):
        Answers(Toy(), draw=Serving("http://h/v1")).check()

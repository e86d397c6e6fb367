"""A run exported: a plain model whose law is the policy's, with a card of its numbers; and what goes to the hub."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from close import close
from command import tiltlm
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.models.causal import CausalLM
from tiltlm.recipes import recipe
from tiltlm.ruler.table import cell
from tiltlm.run import Run, ensure
from tiltlm.samplers.ancestral import draw
from tiltlm.seeds import stream
from tiltlm.tasks.language import Language
from tiltlm.tasks.mine import Mine


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny GPT-2, a tokenizer and a reward."""
    folder = tmp_path_factory.mktemp("export")
    tokenizer = train_tokenizer(stories(200, stream(0, "text")), 300)
    size = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16, n_positions=96, bos_token_id=0, eos_token_id=0
    )
    model = CausalLM.from_config(size, seed=0)
    model.tokenizer = tokenizer
    model.save(folder / "base")
    (folder / "r.py").write_text("def f(prompts, completions):\n    return [len(y) for y in completions]\n")
    return folder


def made(place: Path, policy: str) -> Run:
    """A run that trained rloo for two steps and measured it."""
    task = Mine(
        Language(str(place / "base"), prompt="One day", new_tokens=4), reward=f"{place / 'r.py'}:f", name="mine"
    )
    plain = recipe("mine/rloo")
    net, fit = replace(plain.net, policy=policy, lora_rank=2), replace(plain.fit, steps=2, batch_size=8, lr=0.05)
    ruler = replace(plain.ruler, n=16, absolute=False)
    return ensure(replace(plain, task=task, net=net, fit=fit, ruler=ruler), place / "runs", "tiltlm run mine/rloo")


@pytest.mark.parametrize("policy", ["full", "lora"])
def test_an_exported_policy_is_the_policy(place, tmp_path, policy):
    run = made(place, policy)
    done = tiltlm("export", str(run.folder), "--out", str(tmp_path / "out"), cwd=tmp_path)
    assert "a plain model with tokenizer and card" in done.stderr and not list(tmp_path.glob(".*"))
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("One day")["input_ids"]
    how = model.generation_config
    assert (how.do_sample, how.temperature, how.top_k, how.top_p, how.max_new_tokens) == (True, 1.0, 0, 1.0, 4)
    problem, own = run.recipe.problem(run), run.recipe.decoder(run)
    drawn = draw(problem.reference, problem.prompts["test"], n=4, max_new_tokens=4, stream=stream(0))
    with torch.no_grad():
        close(CausalLM(model).log_prob(drawn), own.log_prob(drawn), 1e-5)
        assert (CausalLM(model).log_prob(drawn) - problem.reference.log_prob(drawn)).abs().max() > 1e-3
    card = (tmp_path / "out" / "README.md").read_text()
    rows = {row["metric"]: row for row in json.loads((run.folder / "report.json").read_text())}
    assert f"| E[r] | {cell(rows['reward'])} | reward |" in card and "±" in cell(rows["kl_to_reference"])
    assert f"| KL(q‖ref) | {cell(rows['kl_to_reference'])} | nats |" in card
    assert f"| J(q) = E[r] − beta·KL(q‖ref) | {cell(rows['objective'])} |" in card
    for part in (
        "trained by `rloo` on the task `mine`",
        "beta = 1",
        "    tiltlm run mine/rloo",
        "torch 2",
        "r.py:f",
    ):
        assert part in card, part


def test_a_run_that_trains_alone_has_no_numbers_on_its_card_and_weights_may_be_of_half_size(place, tmp_path):
    run = made(place, "full").inputs["learnt"]
    tiltlm("export", str(run.folder), "--out", "half", "--dtype", "bfloat16", cwd=tmp_path)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "Not measured here." in (tmp_path / "half" / "README.md").read_text()


def test_push_makes_a_private_repository_and_sends_the_folder(place, tmp_path, monkeypatch):
    done = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            done.append(("create", name, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            done.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    run = made(place, "full")
    said = tiltlm("export", str(run.folder), "--out", "out", "--push", "me/policy", cwd=tmp_path).stderr
    assert done[0] == ("create", "me/policy", True, True) and done[1][:2] == ("upload", "me/policy")
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(
        done[1][2]
    )
    assert "huggingface.co/me/policy" in said and "# me/policy" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_exported_is_said_and_nothing_is_written_over(place, tmp_path):
    (tmp_path / "there").mkdir()
    folder = str(made(place, "full").folder)
    for args, words in (
        ((folder, "--out", "there"), "there is there already"),
        ((folder, "--out", "x", "--dtype", "int8"), "weights are of float32"),
        ((folder, "--out", "x", "--push", "policy"), "--push wants owner/name"),
        ((str(place / "base"), "--out", "x"), "is not a run folder"),
    ):
        done = tiltlm("export", *args, cwd=tmp_path, check=False)
        assert done.returncode == 2 and words in done.stderr, done.stderr
    assert not (tmp_path / "x").exists()

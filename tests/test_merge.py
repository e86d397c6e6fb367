"""Adapters merged into their model: of a language model, a reward model and a run; what cannot be merged is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config

from close import close
from command import tiltlm
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.models.causal import CausalLM
from tiltlm.models.reward_model import RewardModel
from tiltlm.recipes import recipe
from tiltlm.run import ensure
from tiltlm.samplers.ancestral import draw
from tiltlm.seeds import stream
from tiltlm.tasks.language import Language
from tiltlm.tasks.mine import Mine

TEXTS = ["One day, Tom went home.", "She saw a big dog in the park"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny GPT-2 with a tokenizer."""
    folder = tmp_path_factory.mktemp("merge") / "base"
    tokenizer = train_tokenizer(stories(200, stream(0, "text")), 300)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16, n_positions=96, bos_token_id=0, eos_token_id=0
    )
    model = CausalLM.from_config(config, seed=torch.Generator().manual_seed(0))
    model.tokenizer = tokenizer
    model.save(folder)
    return folder


def adapted(kind, base: Path, folder: Path, task: str, **options):
    """A model of transformers with real adapters that change it, saved by PEFT."""
    model = kind.from_pretrained(base, **options)
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=16, target_modules=["c_attn"], task_type=task, init_lora_weights=False)
    found = get_peft_model(model, config).eval()
    found.save_pretrained(folder)
    return found


@torch.no_grad()
def test_a_merged_language_model_says_what_the_adapted_one_says(base, tmp_path):
    model = adapted(AutoModelForCausalLM, base, tmp_path / "adapters", "CAUSAL_LM")
    done = tiltlm("merge", "adapters", "--out", "plain", cwd=tmp_path)
    assert (
        "plain model with its tokenizer" in done.stderr
        and not (tmp_path / "plain" / "adapter_config.json").exists()
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    unmerged = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    close(plain(ids).logits, model(ids).logits, 1e-5)
    assert (unmerged - plain(ids).logits).abs().max() > 1e-2
    half = tiltlm("merge", "adapters", "--out", "half", "--dtype", "bfloat16", cwd=tmp_path)
    assert (
        half.returncode == 0 and json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    )


@torch.no_grad()
def test_a_merged_reward_model_keeps_its_head(base, tmp_path):
    model = adapted(
        AutoModelForSequenceClassification, base, tmp_path / "adapters", "SEQ_CLS", num_labels=1, pad_token_id=0
    )
    tiltlm("merge", "adapters", "--out", "plain", cwd=tmp_path)
    found = RewardModel.load(tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(base)
    wanted = [float(model(torch.tensor([tokenizer(text)["input_ids"]])).logits) for text in TEXTS]
    close(found.scores(["", ""], TEXTS), torch.tensor(wanted), 1e-5)


def test_the_policy_of_a_run_is_merged_by_the_runs_folder(base, tmp_path):
    (tmp_path / "r.py").write_text("def f(prompts, completions):\n    return [len(y) for y in completions]\n")
    task = Mine(Language(str(base), prompt="One day", new_tokens=4), reward=f"{tmp_path / 'r.py'}:f", name="mine")
    made = recipe("mine/rloo-policy")
    net, fit = replace(made.net, policy="lora", lora_rank=2), replace(made.fit, steps=2, batch_size=8, lr=0.1)
    run = ensure(replace(made, task=task, net=net, fit=fit), tmp_path / "runs")
    tiltlm("merge", str(run.folder), "--out", str(tmp_path / "plain"), cwd=tmp_path)
    problem = run.recipe.problem(run)
    drawn = draw(problem.reference, problem.prompts["test"], n=4, max_new_tokens=4, stream=stream(0))
    merged = CausalLM.load(tmp_path / "plain", eos_ids=()).requires_grad_(False)
    close(merged.log_prob(drawn), run.recipe.decoder(run).log_prob(drawn), 1e-5)
    assert (merged.log_prob(drawn) - problem.reference.log_prob(drawn)).abs().max() > 1e-3


def test_what_cannot_be_merged_is_said_and_nothing_is_written_over(base, tmp_path):
    adapted(AutoModelForCausalLM, base, tmp_path / "adapters", "CAUSAL_LM")
    (tmp_path / "there").mkdir()
    config = tmp_path / "adapters" / "adapter_config.json"
    wide = GPT2Config(vocab_size=300, n_layer=1, n_head=2, n_embd=32, n_positions=96)
    CausalLM.from_config(wide).save(tmp_path / "wide")
    for args, words in (
        (("adapters", "--out", "there"), "there is there already: choose another --out"),
        (
            (str(base), "--out", "x"),
            "holds no adapters to merge: .*no adapter_config.json and no adapter_model.safetensors",
        ),
        (("nowhere", "--out", "x"), "nowhere is no folder"),
        (("adapters", "--out", "x", "--dtype", "int8"), "--dtype int8: weights are of float32"),
        (("adapters", "--out", "x", "--base", "wide"), "the adapters of adapters do not fit wide"),
        (("adapters", "--out", "x", "--base", "gone/model"), "gone/model"),
    ):
        done = tiltlm("merge", *args, cwd=tmp_path, check=False)
        assert done.returncode == 2, done.stderr
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(done.stderr)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    assert "name it, --base MODEL" in tiltlm("merge", "adapters", "--out", "x", cwd=tmp_path, check=False).stderr
    assert tiltlm("merge", "adapters", "--out", "x", "--base", str(base), cwd=tmp_path).returncode == 0
    assert not list(tmp_path.glob(".*"))

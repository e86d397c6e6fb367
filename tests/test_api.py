"""The library from Python: public names, learning, measuring, comparing, saving."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

import tiltlm as tl
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.exact import log_density, solve
from tiltlm.judges.settings import Judging
from toy import HORIZON, PROMPTS, VOCABULARY, Toy, twos

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    """A folder with a tiny GPT-2 and a tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = train_tokenizer(stories(300, tl.stream(0, "text")))
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = tl.CausalLM.from_config(config, seed=torch.Generator().manual_seed(0))
    model.save(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def toy(one: bool = True, enumerable: bool = False, r_max: float | None = 1.0) -> tl.Problem:
    """Tables over three tokens, r = the share of 2s, as a user states it."""
    reference = tl.TableLM(PROMPTS, VOCABULARY, HORIZON).randomise(torch.Generator().manual_seed(0), 0.7)
    prompts = [[k] for k in range(1 if one else PROMPTS)]
    problem = tl.Problem.of(reference, reward=twos, prompts=prompts, beta=0.5, max_new_tokens=HORIZON, r_max=r_max)
    return Toy(one=one).problem({}, 0) if enumerable else problem


# ---- public names ---------------------------------------------------------------------------------------------


def test_importing_the_library_is_quick_and_imports_nothing_heavy():
    code = "import time, sys; t = time.time(); import tiltlm; print(time.time() - t, 'torch' in sys.modules)"
    seconds, torch_too = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert torch_too == "False" and float(seconds) < 0.1


def test_every_public_name_is_there_and_says_what_it_is():
    assert set(tl.__all__) <= set(dir(tl))
    for name in tl.__all__:
        found = getattr(tl, name)
        assert (found.__doc__ or "").strip(), name
        assert not (found.__doc__ or "").startswith(f"{name}("), f"{name} has no docstring of its own"


def test_what_type_checkers_see_is_what_there_is():
    tree = ast.parse((ROOT / "src" / "tiltlm" / "__init__.py").read_text())
    seen = {
        alias.name: node.module.removeprefix("tiltlm.")
        for block in tree.body if isinstance(block, ast.If)
        for node in block.body if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }  # fmt: skip
    assert seen == tl._PLACES and sorted(tl.__all__) == sorted(seen)


def test_every_method_of_the_catalogue_is_public():
    from tiltlm.methods import method, names

    missing = {type(method(name)).__name__ for name in names()} - set(tl.__all__)
    assert not missing


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(AttributeError, match="Did you mean CTL"):
        _ = tl.CTLL  # type: ignore[attr-defined]


# ---- the whole story --------------------------------------------------------------------------------------------


def test_state_learn_and_measure_in_three_lines(gpt2):
    task = tl.Problem.of(
        gpt2, reward=lambda prompts, completions: [float("a" in y) for y in completions], prompts=["One day"], beta=0.5,
        max_new_tokens=6,
    )  # fmt: skip
    guided = tl.learn(task, tl.CTL(), steps=3, progress=False)
    found = tl.measure(
        task, {"reference": task.reference, "guided": guided, "best of 8": tl.BestOf(8)}, n=120, log_z_draws=400
    )
    assert list(found) == ["reference", "guided", "best of 8"]
    assert found.value("reference", "kl_to_reference") == 0
    assert found.value("best of 8", "reward") > found.value("reference", "reward")
    assert "best of 8" in repr(found) and "KL(q‖pi*)" in repr(found) and "<pre" in found._repr_html_()
    assert {"method", "metric", "value", "stderr", "low", "high"} <= set(found.rows[0])
    texts = guided.texts(["One day", "Tom"], n=2)
    assert len(texts) == 2 and all(len(each) == 2 for each in texts)
    assert len(guided.metrics) == 3 and guided.metrics[0]["loss"] == guided.metrics[0]["loss"]


def test_one_prompt_given_as_several_texts_is_measured_prompt_by_prompt(gpt2):
    task = tl.Problem.of(
        gpt2, reward=lambda prompts, completions: [float(len(y)) for y in completions],
        prompts=["One day", "Tom had a", "She saw"], beta=5.0, max_new_tokens=4,
    )  # fmt: skip
    policy = tl.learn(task, tl.DPO(), steps=2, progress=False)
    found = tl.measure(task, {"dpo": policy, "smc": tl.SMCDecoding(8)}, n=10, log_z_draws=200)
    assert all(len(x) == 3 for x in found["dpo"].values.values())
    assert {"kl_to_target_at_most", "objective_at_least"} <= set(found["smc"].values)


# ---- learning ---------------------------------------------------------------------------------------------------


def test_learning_brings_a_twist_to_pi_star_where_pi_star_is_known():
    task = toy()
    guided = tl.learn(task, tl.CTL(), steps=250, lr=0.05, progress=False)
    world = solve(task.target, task.prompts["test"], HORIZON)
    with torch.no_grad():
        before = world.kl_to_target(world.log_ref)
        after = world.kl_to_target(log_density(guided.model, world.samples).reshape(world.log_ref.shape))
    assert float(after) < 0.1 * float(before)


def test_learning_is_the_same_twice_and_another_seed_is_another_training():
    task = toy()
    a, b, c = (tl.learn(task, tl.SFT(), steps=3, seed=seed, progress=False) for seed in (0, 0, 1))
    assert a.metrics == b.metrics and a.metrics != c.metrics
    torch.manual_seed(5)
    before = torch.get_rng_state()
    tl.learn(task, tl.PPO(), steps=1, progress=False)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["sft", "dpo", "rloo", "exo-rw", "kto", "ppo", "rl", "q-sharp"])
def test_methods_of_every_feed_learn_and_are_measured(name):
    task = Toy().problem({}, 0)
    found = tl.measure(task, tl.learn(task, name, steps=2, progress=False), n=4)
    assert "kl_to_target" in next(iter(found.measured.values())).values


def test_stored_draws_are_made_in_memory():
    task = toy(one=False)
    feed = tl.Feed(source="stored", draws=tl.Draws(n=4), size=4)
    found = tl.learn(task, tl.ExoRw(), steps=2, feed=feed, progress=False)
    assert len(found.metrics) == 2


def test_a_judge_s_ledger_is_told_and_its_folder_goes(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    judge = Judging("reward-model", budget=9, warm=3, window=12, relabels=2)
    fit = tl.Fit(steps=6, batch_size=4, lr=0.03)
    learnt = tl.learn(toy(one=False), "d2po", feed=tl.Feed(judge=judge), fit=fit, progress=False)
    assert (
        learnt.labels["bought"] == 9 == learnt.labels["trained"] + learnt.labels["tied"] + learnt.labels["pending"]
    )
    assert learnt.metrics[0]["labels_bought"] < 9 and not list(tmp_path.glob("tiltlm*"))
    assert tl.learn(toy(one=False), "opo", steps=1, progress=False).labels == {}


def test_what_makes_no_sense_is_refused_with_its_reason():
    unbounded = toy(r_max=None)
    with pytest.raises(ValueError, match=r"SFT: it imitates exact draws of pi\*, and .*r_max"):
        tl.learn(unbounded, tl.SFT())
    with pytest.raises(ValueError, match="has to learn first"):
        tl.measure(unbounded, {"ctl": tl.CTL()})
    with pytest.raises(ValueError, match="Rejection: exact draws"):
        tl.measure(unbounded, {"rejection": tl.Rejection()})
    with pytest.raises(ValueError, match="upper bound of the reward"):
        tl.measure(unbounded, {"reference": unbounded.reference}, exact=10)
    with pytest.raises(ValueError, match="held-out prompts"):
        tl.learn(unbounded, tl.CTL(), fit=tl.Fit(evaluations=2))
    with pytest.raises(ValueError, match="at least one method"):
        tl.measure(unbounded, {})
    with pytest.raises(ValueError, match="no method 'ctll'"):
        tl.learn(unbounded, "ctll")
    with pytest.raises(ValueError, match="got int"):
        tl.measure(unbounded, {"seven": 7})  # type: ignore[dict-item]


# ---- measuring --------------------------------------------------------------------------------------------------


def test_log_z_is_computed_where_it_can_be_and_estimated_elsewhere():
    known, unknown = toy(one=False, enumerable=True), toy(one=False)
    a, b = (tl.measure(p, {"reference": p.reference}, n=50, log_z_draws=4000) for p in (known, unknown))
    truth = solve(unknown.target, unknown.prompts["test"], HORIZON).log_z
    assert "computed" in a.log_z and a["reference"].log_z is None
    found = b["reference"].log_z
    assert found is not None and torch.allclose(found.per_prompt(PROMPTS), truth, atol=0.05)  # type: ignore[arg-type]
    one = tl.measure(toy(), {"reference": toy().reference}, n=50)
    log_z = one["reference"].log_z
    assert log_z is not None and log_z.interval[0] < float(truth[0]) < log_z.interval[1]
    assert "kl_to_target" not in tl.measure(toy(), toy().reference, n=50, log_z="none")["TableLM"].values
    given = tl.measure(toy(), toy().reference, n=50, log_z=truth[:1])
    assert given.value("TableLM", "log_z") == pytest.approx(float(truth[0]))
    with pytest.raises(ValueError, match="'auto', 'none'"):
        tl.measure(toy(), toy().reference, log_z="atuo")  # type: ignore[arg-type]


def test_exact_draws_give_the_other_divergence():
    task = toy()
    found = tl.measure(task, {"reference": task.reference}, n=200, exact=500)
    world = solve(task.target, task.prompts["test"], HORIZON)
    e = found["reference"].estimates()["kl_from_target"]
    assert abs(e.value - float(world.kl_from_target(world.log_ref))) < 4 * e.stderr + 0.05


def test_differences_are_paired_and_adjusted():
    task = toy(one=False)
    table = tl.measure(
        task, {"reference": task.reference, "best": tl.BestOf(4), "smc": tl.SMCDecoding(8)}, n=200, log_z_draws=500
    )
    found = tl.compare(table, control="reference")
    assert {row["second"] for row in found.rows} == {"reference"}
    first = found.rows[0]
    assert first["metric"] == "reward" and first["verdict"] == "higher" and "best − reference" in repr(found)
    assert {row["metric"] for row in tl.compare(table.measured, metrics=["reward"]).rows} == {"reward"}
    with pytest.raises(ValueError, match="Did you mean reference"):
        tl.compare(table, control="referenc")
    with pytest.raises(ValueError, match="two methods or more"):
        tl.compare(tl.measure(task, {"reference": task.reference}, n=2, log_z="none"))


def test_a_table_knows_its_numbers_and_offers_a_frame():
    task = toy()
    found = tl.measure(task, {"reference": task.reference}, n=20, log_z="none")
    with pytest.raises(KeyError, match="Did you mean reference"):
        _ = found["referense"]
    with pytest.raises(KeyError, match="reward"):
        found.value("reference", "rewrd")
    try:
        import pandas  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install pandas"):
            found.frame()
    else:
        assert set(found.frame().metric) == {row["metric"] for row in found.rows}


# ---- saving -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [tl.CTL(), tl.DPO(), tl.QSharp()])
def test_what_was_saved_is_measured_as_it_was(method, gpt2, tmp_path):
    task = tl.Problem.of(
        gpt2, reward=lambda prompts, completions: [float("a" in y) for y in completions], prompts=["One day"], beta=0.5,
        max_new_tokens=4,
    )  # fmt: skip
    learnt = tl.learn(task, method, steps=2, lr=1e-2, progress=False)
    folder = learnt.save(tmp_path / "learnt")
    found = tl.measure(task, {"now": learnt, "then": folder}, n=30, log_z="none")
    assert torch.allclose(
        found["now"].values["kl_to_reference"], found["then"].values["kl_to_reference"], atol=1e-5
    )
    assert type(tl.Learnt.load(task, folder).method) is type(method)
    if isinstance(method, tl.DPO):
        assert tl.CausalLM.load(folder).vocab_size == task.reference.vocab_size


def test_what_trained_nothing_is_not_saved(tmp_path):
    task = toy()
    best = tl.learn(task, tl.BestOf(4))
    assert best.draw(n=3).tokens.shape[0] == 3
    with pytest.raises(ValueError, match="nothing to save"):
        best.save(tmp_path)


def test_a_models_folder_is_measured_too(gpt2, tmp_path):
    task = tl.Problem.of(gpt2, reward=lambda prompts, completions: [0.0] * len(completions), prompts=["One day"], beta=1.0,
                         max_new_tokens=3)  # fmt: skip
    assert tl.measure(task, {"it": gpt2}, n=10, log_z="none").value("it", "kl_to_reference") == pytest.approx(0)
    with pytest.raises(ValueError):
        tl.measure(task, {"none": str(tmp_path / "nowhere")})

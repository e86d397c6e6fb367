"""Names of STaR's runs, by two that its own README has, and of a run of ours."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tiltlm.feeds import Feed
from tiltlm.feeds.settings import Rounds
from tiltlm.fit import Fit
from tiltlm.methods import method
from tiltlm.nets import Net
from tiltlm.recipes import preset_of
from tiltlm.recipes.star_names import StarRun, old_name
from tiltlm.stages.learn import Learn

DPO = StarRun(
    "train_dpo_english", "dpo", "mmlu", 0.9, 10, 1e-5, 0.0, 64, 4, 45, shuffle_dataloader=True, max_epochs=1
)
BASE = "train_dpo_english_beta=0.9_samples=10_ts=dpo_ds=mmlu_lr=1e-05_wd=0.0_lora=64_gaccum=4_warmup=45"


def test_names_of_the_readme():
    assert DPO.name == f"{BASE}_gnorm=1.0_shuff=True_seed=2"
    other = replace(DPO, samples_per_train_question=3, dpo_beta=0.1, lr=5e-6, weight_decay=100)
    assert other.name == (
        "train_dpo_english_beta=0.1_samples=3_ts=dpo_ds=mmlu_lr=5e-06_wd=100_lora=64_gaccum=4_warmup=45_gnorm=1.0_"
        "shuff=True_seed=2"
    )


def test_parts_that_are_there_in_some_runs_alone():
    assert StarRun().name == (
        "train_ts=reinforce_ds=mmlu_YO-NG_lr=0.0002_wd=0.01_lora=16_gaccum=1_warmup=5_gnorm=1.0_shuff=False_seed=2_"
        "resetModel=True"
    )
    perf = StarRun("prompt_perf", meta_prompt_to_preamble="Think dummy.", num_train_questions=1000, max_epochs=1)
    assert perf.name.startswith("prompt_perf_prompt=Think dummy._qs=1000_ts=reinforce_ds=")
    evaluated = replace(DPO, run_type="eval_dpo_english", model_name="runs/val_300")
    assert evaluated.name == "eval_dpo_english_lr=1e-05_wd=0.0_lora=64_beta=0.9_samples=10_name=runs/val_300"


def test_a_training_of_ours():
    dpo = replace(method("dpo"), beta=0.9)
    feed = Feed("rounds", rounds=Rounds(count=1, n=10, start="previous"))
    fit = Fit(1e-5, batch_size=24, micro_batch=6, warmup=45)
    task = preset_of("animals").task
    recipe = Learn(task, dpo, feed, fit, Net("lora", lora_rank=64), called="dpo", seed=2)
    assert old_name(recipe, "train_dpo_english", "mmlu") == f"{BASE}_gnorm=1.0_shuff=True_seed=2"
    with pytest.raises(ValueError, match="this is neither"):
        old_name(replace(recipe, method=method("kto")))

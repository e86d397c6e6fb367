"""Preference alignment from the command line, with networks too small and too short to learn much; and what must hold."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from close import FLOAT32
from command import tiltlm
from tiltlm.commands.compared import incomparable
from tiltlm.commands.models import load_run
from tiltlm.models.causal import CausalLM
from tiltlm.models.folders import located
from tiltlm.policies.exo_rw import ExoRw
from tiltlm.recipes import recipe
from tiltlm.recipes.preferences import FAMILIES, KINDS, STAGES
from tiltlm.recipes.preferences_data import divide
from tiltlm.recipes.preferences_lab import content_of, judged, with_log_ref
from tiltlm.recipes.preferences_policies import POLICIES
from tiltlm.recipes.preferences_report import HEADINGS, MEASURED
from tiltlm.ruler.compare import paired
from tiltlm.ruler.measure import Measurement
from tiltlm.run import Run, find, from_json
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.train import best_checkpoint, checkpoints

DATA = ["--data.own", "120", "--data.valid-rows", "12", "--data.test-rows", "12"]
BASE = [
    "--base.most-tokens",
    "80",
    "--base.new-tokens",
    "6",
    "--base.fit.pace.steps",
    "6",
    "--base.fit.pace.warmup",
    "1",
]
TRAIN = [
    "--sft.batch-size",
    "24",
    "--sft.evaluations",
    "2",
    "--judge.train.batch-size",
    "24",
    "--judge.train.evaluations",
    "2",
]
DRAWS = ["--draws.n", "3", "--draws.prompts", "24"]
ALIGN = ["--align.train.batch-size", "6", "--align.train.epochs", "1", "--align.train.checkpoints", "2"]
ALIGN += ["--align.train.evaluations", "2", "--align.watched", "4"]
TEST = ["--test.prompts", "6", "--test.n", "2", "--test.checkpoints", "2"]
OWN_REWARD = "def count(prompts, completions):\n    return [float(y.count('e')) for y in completions]\n"
FRONT = [*DATA, *BASE, *TRAIN, *DRAWS]
ALL = [*FRONT, *ALIGN, *TEST]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """One folder for the whole file: data, models and labels are made once."""
    return tmp_path_factory.mktemp("preferences")


def run_of(work: Path, stage: str, *args: str) -> Path:
    done = tiltlm("run", f"dialogues-small/{stage}", *args, cwd=work)
    return work / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def compared(work) -> Path:
    """Every method there is, at K = 2."""
    return run_of(work, "evaluate", *ALL, "--methods", *MEASURED)


def rows_of(folder: Path) -> dict[tuple[str, str], dict]:
    return {(row["method"], row["metric"]): row for row in json.loads((folder / "report.json").read_text())}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def folder_of(work: Path, stage: str) -> Path:
    """The only run of a stage."""
    (found,) = (work / "runs" / "dialogues-small" / stage).iterdir()
    return found


# ---- presets ------------------------------------------------------------------------------------------------


def test_every_stage_is_in_the_catalogue_and_every_preset_is_a_value():
    assert set(KINDS) == set(STAGES)
    for family in FAMILIES:
        for stage in STAGES:
            value = recipe(f"{family}/{stage}")
            again = from_json(type(value), json.loads(json.dumps(asdict(value))))
            assert value.name == f"{family}/{stage}" and again == value


def test_the_published_settings_are_those_of_the_scripts():
    """beta, lengths, learning rates, batches and temperature as the paper's scripts have them."""
    hh, tldr, imdb = (recipe(f"{family}/exo-rw-policy") for family in ("hh", "tldr", "imdb"))
    assert [x.goal.beta for x in (hh, tldr)] == [0.25, 0.25] and abs(imdb.goal.beta - 0.01) < 1e-12
    assert [(x.base.most_tokens, x.base.new_tokens) for x in (hh, tldr)] == [(512, 200), (650, 75)]
    assert [x.align.train.batch_size for x in (hh, tldr, imdb)] == [128, 128, 64]
    assert {x.align.train.lr for x in (hh, tldr, imdb)} == {1e-6} and {x.sft.lr for x in (hh, tldr)} == {1e-5}
    assert {x.base.temperature for x in (hh, tldr, imdb)} == {0.8}
    fits = [x.align.train.fit(x.draws.prompts) for x in (hh, tldr, imdb)]
    assert [fit.pace.steps for fit in fits] == [175, 200, 200]  # 700, 800 and 800 micro-steps
    assert {(fit.optim.betas, fit.optim.clip, fit.pace.floor) for fit in fits} == {((0.9, 0.95), 1.0, 0.0)}
    for family, beta in (("hh", 0.5), ("imdb", 0.1), ("hh-small", 0.25)):
        value = recipe(f"{family}/evaluate")
        pairs = [
            value.exo_pref,
            value.dpo_pref,
            value.cdpo,
            value.robust_dpo,
            value.hinge,
            value.apo,
            value.rpo,
            value.kto,
        ]
        assert {each.beta for each in pairs} == {beta, value.goal.beta_pi}


# ---- the comparison -----------------------------------------------------------------------------------------


def test_every_method_is_measured_by_one_ruler(compared):
    rows = rows_of(compared)
    names = [name if name == "reference" else f"{name} K=2" for name in MEASURED]
    for name in names:
        for metric in HEADINGS:
            assert (name, metric) in rows, (name, metric)
        assert 0 <= rows[name, "win_rate"]["value"] <= 1 and rows[name, "gap"]["value"] > 0
        j = rows[name, "reward"]["value"] - 0.5 * rows[name, "kl_to_reference"]["value"]
        assert abs(rows[name, "objective"]["value"] - j) < FLOAT32
    assert rows["reference", "kl_to_reference"]["value"] == 0
    assert {("chosen responses", "reward"), ("rejected responses", "reward")} <= set(rows)
    at_least = [rows[name, "kl_to_target_at_least"]["value"] for name in names]
    assert all(rows[name, "kl_to_target_at_least"]["high"] is None for name in names)
    assert min(at_least) > -FLOAT32  # the best bound on log Z is no smaller than any method's own F
    assert (compared / "frontier.png").stat().st_size > 5000


def test_gap_of_the_reference_by_hand(compared, work):
    """At h = 0 the gap of a group is −log K − mean log p, p = softmax(r/beta_r) of its labels."""
    rewards = torch.tensor([row["rewards"] for row in lines(folder_of(work, "label") / "test.jsonl")]).double()
    by_hand = (-torch.log(torch.tensor(3.0)) - rewards.log_softmax(1).mean(1)).mean().item()
    assert abs(rows_of(compared)["reference", "gap"]["value"] - by_hand) < FLOAT32


def test_samples_stand_side_by_side_and_the_page_shows_them(compared, work):
    (run,) = (work / "runs" / "dialogues-small" / "exo-rw").iterdir()
    shown = lines(run / "samples.jsonl")
    assert len(shown) == 6 and set(shown[0]) == {"prompt", "chosen", "rejected", "generated", "reward"}
    tiltlm("report", str(compared), "--out", "page.html", cwd=work)
    page = (work / "page.html").read_text()
    assert "exo-rw K=2" in page and '"rejected"' in page and '"generated"' in page


def test_checkpoints_on_the_way_are_on_the_frontier(compared):
    curve = json.loads((compared / "curve.json").read_text())
    updates = {(row["method"], row["updates"]) for row in curve}
    ends = {
        name: (4, 8) if name == "kto" else (2, 4) for name in POLICIES
    }  # both sides of 24 pairs are rows of KTO's
    assert updates == {(f"{name} K=2", step) for name in POLICIES for step in ends[name]}
    assert all(row["value"] > 100 * FLOAT32 for row in curve if row["metric"] == "kl_to_reference")


def test_the_reward_model_is_reported_beside_the_length_rule(compared, work):
    rows = rows_of(folder_of(work, "reward-model"))
    model, rule, apart = (
        rows[name, "accuracy"]
        for name in ("reward model", "the longer response wins", "reward model − longer wins")
    )
    assert abs(apart["value"] - (model["value"] - rule["value"])) < 1e-12
    assert model["low"] < model["value"] < model["high"] and model["n"] == 12


def test_a_frontier_over_temperatures_keeps_the_labels(compared, work, tmp_path):
    """Two betas of one target: the labels are those of the comparison, J and the bound are each temperature's own."""
    shutil.copytree(work / "runs", tmp_path / "runs")
    folder = run_of(tmp_path, "evaluate", *ALL, "--methods", "reference", "exo-rw", "--betas", "0.5", "0.1")
    rows = rows_of(folder)
    for beta in (0.5, 0.1):
        for name in (f"reference (beta {beta:g})", f"exo-rw K=2 (beta {beta:g})"):
            j = rows[name, "reward"]["value"] - beta * rows[name, "kl_to_reference"]["value"]
            assert abs(rows[name, "objective"]["value"] - j) < FLOAT32 and (name, "kl_to_target_at_least") in rows
    gaps = [rows[f"reference (beta {beta:g})", "gap"]["value"] for beta in (0.5, 0.1)]
    assert gaps[1] > 2 * gaps[0]
    assert len(list((tmp_path / "runs" / "dialogues-small" / "label").iterdir())) == 1
    win = rows["reference (beta 0.1)", "win_rate"]
    assert win["low"] < win["value"] < win["high"]


def test_a_policy_s_run_can_be_drawn_from(compared, work):
    (run,) = (work / "runs" / "dialogues-small" / "exo-rw-policy").iterdir()
    (work / "p.jsonl").write_text('{"prompt": "\\n\\nHuman: Hello\\n\\nAssistant:"}\n')
    tiltlm("sample", str(run), "--prompts", "p.jsonl", "--out", "y.jsonl", "--n", "2", cwd=work)
    assert len(lines(work / "y.jsonl")) == 2
    tiltlm("score", f"reward-model:{folder_of(work, 'reward-model')}", "y.jsonl", "--out", "s.jsonl", cwd=work)
    assert all("reward" in row for row in lines(work / "s.jsonl"))


def test_a_policy_s_config_states_beta_and_its_evaluations_what_matters(compared, work):
    (run,) = (work / "runs" / "dialogues-small" / "exo-rw-policy").iterdir()
    goal = json.loads((run / "config.json").read_text())["settings"]["goal"]
    assert goal["beta_r"] * goal["beta_pi"] == 0.5
    evals = lines(run / "evals.jsonl")
    assert [row["step"] for row in evals] == [0, 2, 4]
    assert {"objective", "reward", "kl_to_reference", "valid_gap", "valid_ranking", "valid_loss"} <= set(evals[0])
    assert abs(evals[0]["valid_loss"] - evals[0]["valid_gap"]) > 0  # pairs of each group, and the group of three
    (pairs,) = (work / "runs" / "dialogues-small" / "dpo-pref-policy").iterdir()
    start = lines(pairs / "evals.jsonl")[0]
    assert abs(start["valid_loss"] - math.log(2)) < FLOAT32  # the policy is the reference, but for rounding
    for row in evals:
        assert abs(row["objective"] - (row["reward"] - 0.5 * row["kl_to_reference"])) < 1e-9
    assert abs(evals[0]["kl_to_reference"]) < FLOAT32 < 100 * FLOAT32 < evals[2]["kl_to_reference"]
    metrics = lines(run / "metrics.jsonl")
    assert {"loss", "gap", "h", "entropy", "peaked", "ranking"} <= set(metrics[0])
    assert abs(metrics[0]["h"]) < FLOAT32


def test_the_reference_s_log_probabilities_are_computed_once(compared, work):
    """Ten methods and the reference share the labelled train, valid and test splits: three files of groups."""
    cache = folder_of(work, "sft") / "log_ref"
    assert len(list(cache.glob("log_ref-*.safetensors"))) == 3


# ---- resuming -----------------------------------------------------------------------------------------------


def half(path: Path) -> bytes:
    """Cut a file in the middle of a line; returns what it held."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    return whole


@pytest.mark.parametrize("stage", ["generate", "label"])
def test_files_of_lines_go_on_where_they_stopped(compared, work, stage, tmp_path):
    """Cut in mid-line: the completed file is the same, bit by bit."""
    shutil.copytree(work / "runs", tmp_path / "runs")
    (folder,) = (tmp_path / "runs" / "dialogues-small" / stage).iterdir()
    (folder / "DONE").unlink()
    whole = {split: half(folder / f"{split}.jsonl") for split in ("train", "test")}
    run_of(tmp_path, stage, *(FRONT if stage == "label" else [*DATA, *BASE, *TRAIN[:4], *DRAWS]))
    assert {split: (folder / f"{split}.jsonl").read_bytes() for split in whole} == whole


@pytest.mark.parametrize("stage", ["sft", "reward-model", "exo-rw-policy", "kto-policy"])
def test_training_goes_on_where_it_stopped(compared, work, stage, tmp_path, monkeypatch):
    """Stopped after two updates: the same weights, metrics and evaluations in the end."""
    (done,) = (work / "runs" / "dialogues-small" / stage).iterdir()
    shutil.copytree(work / "runs", tmp_path / "runs")
    folder = tmp_path / "runs" / "dialogues-small" / stage / done.name
    shutil.rmtree(folder)
    args = {"sft": [*DATA, *BASE, *TRAIN[:4]], "reward-model": [*DATA, *BASE, *TRAIN[4:]]}.get(
        stage, [*FRONT, *ALIGN]
    )
    from tiltlm.engine import Engine

    calls, update = [], Engine.update

    def interrupted(self, *given, **named):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(self, *given, **named)

    monkeypatch.setattr(Engine, "update", interrupted)
    stopped = tiltlm("run", f"dialogues-small/{stage}", *args, cwd=tmp_path, check=False)
    assert stopped.returncode == 130 and not (folder / "DONE").exists()
    run_of(tmp_path, stage, *args)
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert (folder / name).read_text() == (done / name).read_text()
    for a, b in zip(checkpoints(folder), checkpoints(done), strict=True):
        assert (
            a.name == b.name and (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
        )


# ---- other data, other ways ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(work, compared) -> list[str]:
    """A user's own pairs, and the small base model by name."""
    rows = lines(folder_of(work, "data") / "train.jsonl")[:60]
    (work / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "own.py").write_text(OWN_REWARD)
    base = checkpoints(folder_of(work, "base"))[-1]
    found = [
        "--data.train",
        "mine.jsonl",
        "--data.valid-rows",
        "8",
        "--data.test-rows",
        "8",
        "--base.model",
        str(base),
    ]
    return [*found, "--base.stop", "0", *BASE[:4], *DRAWS, *ALIGN, *TEST, "--align.size", "2"]


def test_a_user_s_own_pairs_without_generation(own, work):
    """align.source data: the pairs themselves, no draws, no labels; a reward of one's own judges the result."""
    (work / "own.py").write_text(
        "def count(prompts, completions):\n    return [float(y.count('e')) for y in completions]\n"
    )
    args = [
        *own,
        "--align.source",
        "data",
        "--goal.reward",
        "own.py:count",
        "--methods",
        "reference",
        "dpo-pref",
        "exo-rw",
    ]
    done = tiltlm("run", "pairs/evaluate", *args, cwd=work)
    rows = rows_of(work / done.stdout.splitlines()[-1])
    assert ("dpo-pref", "reward") in rows and ("exo-rw", "win_rate") in rows and ("exo-rw", "gap") not in rows
    assert not (work / "runs" / "pairs" / "generate").exists()


def test_wins_are_counted_against_the_chosen_responses(own, work):
    """One completion a prompt, rewards by hand: a win is a larger count than the chosen response's, a tie half of one."""
    args = [*own, "--align.source", "data", "--goal.reward", "own.py:count", "--test.n", "1"]
    done = tiltlm("run", "pairs/reference", *args, cwd=work)
    folder = work / done.stdout.splitlines()[-1]
    gaps = [row["generated"].count("e") - row["chosen"].count("e") for row in lines(folder / "samples.jsonl")]
    wins = sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps)
    assert abs(rows_of(folder)["reference", "win_rate"]["value"] - wins) < 1e-9
    assert [row["reward"] for row in lines(folder / "samples.jsonl")] == [
        float(row["generated"].count("e")) for row in lines(folder / "samples.jsonl")
    ]


def test_a_user_s_own_labelled_groups(own, work):
    """{prompt, completions, rewards}: what the original calls hh_rw."""
    columns = ("prompt", "completions", "rewards")
    rows = [{name: row[name] for name in columns} for row in lines(folder_of(work, "label") / "train.jsonl")]
    (work / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [
        *own,
        "--align.source",
        "data",
        "--data.train",
        "groups.jsonl",
        "--data.valid-rows",
        "4",
        "--data.test-rows",
        "4",
    ]
    done = tiltlm("run", "pairs/exo-rw", *args, "--goal.reward", "own.py:count", cwd=work)
    assert ("exo-rw", "objective") in rows_of(work / done.stdout.splitlines()[-1])


def test_lora_all_the_way(own, work):
    """SFT by adapters that are merged, a policy of adapters on top, the reference being the model without them."""
    args = [*own, "--base.lora", "2", "--goal.reward", "own.py:count", "--align.train.lr", "1e-2"]
    done = tiltlm("run", "pairs/exo-rw", *args, "--align.train.evaluations", "0", cwd=work)
    rows = rows_of(work / done.stdout.splitlines()[-1])
    policies = [best_checkpoint(folder) for folder in (work / "runs" / "pairs" / "exo-rw-policy").iterdir()]
    (policy,) = [folder for folder in policies if (folder / "adapter_model.safetensors").is_file()]
    assert load_file(policy / "adapter_model.safetensors") and not (policy / "model.safetensors").exists()
    assert rows["exo-rw K=2", "kl_to_reference"]["value"] > FLOAT32
    sft = [f for f in (work / "runs" / "pairs" / "sft").iterdir() if (f / "merged").is_dir()]
    assert len(sft) == 1 and (sft[0] / "merged" / "model.safetensors").is_file()
    assert located(str(sft[0])) == str(sft[0] / "merged")
    with pytest.raises(ValueError, match="holds adapters alone"):
        CausalLM.load(policy)


def test_a_model_to_start_from_brings_its_tokenizer_and_needs_no_other(compared, work, tmp_path):
    """The SFT run of another recipe by its folder: no base model, no SFT; the reference is that very model."""
    sft, rows = folder_of(work, "sft"), lines(folder_of(work, "data") / "train.jsonl")[:40]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text((work / "own.py").read_text() if (work / "own.py").is_file() else OWN_REWARD)
    args = [
        "--data.train",
        "mine.jsonl",
        "--data.valid-rows",
        "8",
        "--data.test-rows",
        "8",
        "--base.start",
        str(sft),
    ]
    args += [
        "--base.stop",
        "0",
        *BASE[:4],
        "--draws.n",
        "2",
        "--draws.prompts",
        "8",
        "--goal.reward",
        "own.py:count",
    ]
    tiltlm("run", "pairs/label", *args, cwd=tmp_path)
    made = {folder.name for folder in (tmp_path / "runs" / "pairs").iterdir()}
    assert made == {"data", "generate", "label"}
    row = lines(next((tmp_path / "runs" / "pairs" / "generate").iterdir()) / "test.jsonl")[0]
    assert row["prompt"].startswith("\n\nHuman: ") and row["prompt"].endswith("\n\nAssistant:")


def test_bf16_training_starts_at_its_own_reference(own, work, monkeypatch):
    """log_ref is computed in the precision of training: h is exactly 0 at the first step, as in float32."""
    args = [*own, "--goal.reward", "own.py:count", "--align.train.precision", "bfloat16"]
    done = tiltlm("run", "pairs/exo-rw", *args, cwd=work)
    monkeypatch.chdir(work)
    policy = load_run(Path(done.stdout.splitlines()[-1])).inputs["exo-rw"]
    assert abs(lines(policy.folder / "metrics.jsonl")[0]["h"]) < 1e-3
    assert policy.recipe.align.train.precision == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exo-rw", "dpo-rw"])
def test_both_rw_losses_raise_j_and_lower_the_gap(own, work, method):
    """120 updates towards more of the letter e: J rises by four standard errors of the difference, prompt by prompt."""
    more = "--goal.reward own.py:count --goal.beta-r 1 --goal.beta-pi 0.5 --base.temperature 1"
    more += " --draws.n 4 --draws.prompts 36 --align.size 4 --align.train.lr 1e-3 --align.train.epochs 20"
    more += " --align.train.evaluations 0"
    more += " --data.test-rows 16 --test.prompts 16 --test.n 64 --test.checkpoints 1"
    args = [*own, *more.split()]
    done = tiltlm("run", "pairs/evaluate", *args, "--methods", "reference", method, "--sizes", "4", cwd=work)
    run = load_run(work / done.stdout.splitlines()[-1])
    kept = [each.folder / "measurement.safetensors" for each in run.inputs.values()]
    before, after = (Measurement.load(path) for path in kept)
    (gain,) = [d.estimate for d in paired(after, before) if d.metric == "objective"]
    assert gain.value > 4 * gain.stderr > 0
    rows = rows_of(run.folder)
    assert rows[f"{method} K=4", "gap"]["value"] < rows["reference", "gap"]["value"]


# ---- pieces -------------------------------------------------------------------------------------------------


def test_rows_are_divided_without_overlap_and_the_same_way_twice():
    rows = [{"prompt": str(k)} for k in range(40)]
    how = replace(recipe("hh-small/data").data, valid_rows=5, test_rows=7)
    found = divide(rows, None, how, stream(0, "x"))
    assert {name: len(part) for name, part in found.items()} == {"valid": 5, "test": 7, "train": 28}
    assert sorted(int(row["prompt"]) for part in found.values() for row in part) == list(range(40))
    assert divide(rows, None, how, stream(0, "x")) == found != divide(rows, None, how, stream(1, "x"))
    given = divide(rows, [{"prompt": f"t{k % 8}"} for k in range(9)], how, stream(0, "x"))
    assert (len(given["test"]), len(given["train"])) == (7, 35)
    with pytest.raises(
        ValueError, match="12 different prompts in the training data cannot spare 5 to validate and 7 to"
    ):
        divide(rows[:12] * 3, None, how, stream(0, "x"))


def test_no_prompt_of_a_held_out_row_is_trained_on():
    """Three rows a prompt: the held-out splits take one each, and the others are left out of training too."""
    rows = [{"prompt": str(k // 3), "chosen": str(k)} for k in range(90)]
    how = replace(recipe("hh-small/data").data, valid_rows=5, test_rows=7)
    found = divide(rows, None, how, stream(0, "x"))
    asked = {name: [row["prompt"] for row in part] for name, part in found.items()}
    assert len(set(asked["valid"])) == 5 and len(set(asked["test"])) == 7 and len(asked["train"]) == 3 * 18
    assert not set(asked["train"]) & {*asked["valid"], *asked["test"]} and not set(asked["valid"]) & set(
        asked["test"]
    )


def test_answers_are_judged_where_the_pairs_are():
    """Verdicts are made on the pairs' own device."""
    side = Samples(Tokens.of([[5]]), torch.tensor([0]), torch.tensor([[1]]), torch.tensor([[True]]))
    assert judged(Pairs(side, side)).reward.tolist() == [1, 0]
    moved = Pairs(side, side)
    assert judged(moved).reward.device == moved.chosen.device


def test_a_folder_s_content_is_part_of_a_key(tmp_path):
    """A folder of data or of a model: another content, another key; a hub's name stands for itself."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text("a")
    value = replace(recipe("pairs/data"), data=replace(recipe("pairs/data").data, train=(str(tmp_path / "d"),)))
    first = value.key
    assert value.key == first
    (tmp_path / "d" / "train.jsonl").write_text("b")
    assert value.key != first
    model = replace(recipe("pairs/sft"), base=replace(recipe("pairs/sft").base, model=str(tmp_path / "d")))
    second = model.key
    (tmp_path / "d" / "more.bin").write_text("weights")
    assert model.key != second


def test_runs_with_other_reward_models_are_not_compared_by_reward(compared, work):
    """Another seed's data and reward model: its rewards have another zero."""
    one, other = (
        load_run(next((work / "runs" / "dialogues-small" / name).iterdir())) for name in ("exo-rw", "ipo")
    )
    assert not {"reward", "objective"} & incomparable(one, other)
    strange = Run(other.recipe, other.folder, {**other.inputs, "reward-model": Run(None, Path("x/y/z"), {})})
    assert {"reward", "objective", "win_rate"} <= incomparable(one, strange)


def test_cached_log_probabilities_follow_content_not_names(tmp_path):
    """Another token, another reference: another file; the same samples are read back, not computed."""
    from families import build

    done = Tokens.of([[1, 2], [3]])
    samples = Samples(Tokens.of([[5]]), torch.tensor([0, 0]), done.ids, done.mask)
    first = with_log_ref(samples, build("gpt2"), "a", tmp_path).log_ref
    assert torch.equal(with_log_ref(samples, build("gpt2", seed=1), "a", tmp_path).log_ref, first)
    assert not torch.equal(with_log_ref(samples, build("gpt2", seed=1), "b", tmp_path).log_ref, first)
    other = samples.with_(tokens=torch.tensor([[1, 2], [4, 0]]))
    assert content_of(other) != content_of(samples) == content_of(samples.with_(reward=torch.ones(2)))
    assert not torch.equal(with_log_ref(other, build("gpt2"), "a", tmp_path).log_ref, first)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["evaluate", "--methods", "exo"], "there is no method 'exo'"),
        (["exo-rw", "--align.size", "1"], "a group has two completions or more"),
        (["evaluate", "--sizes", "2", "8"], "want as many completions of a prompt; 4 are drawn: --draws.n 8"),
        (["exo-rw", "--goal.beta-r", "0"], "beta_r must be positive"),
        (["data", "--data.train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["data", "--data.train", __file__, "--data.test", __file__], "named as training and as test data"),
        (["label", "--goal.reward", "nowhere.py:f"], "nowhere.py: no such file"),
        (["sft", "--base.new-tokens", "600"], "must leave room for a prompt"),
    ],
)
def test_mistakes_are_said_before_any_work(args, message, tmp_path):
    done = tiltlm("run", f"dialogues-small/{args[0]}", *args[1:], cwd=tmp_path, check=False)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("DONE"))


def test_the_objective_of_a_group_method_states_the_target_once():
    value = recipe("hh-small/exo-rw-policy")
    assert value.objective() == ExoRw(value.goal.beta_r, value.goal.beta_pi)
    assert find(value).folder != find(replace(value, goal=replace(value.goal, beta_r=2.0))).folder

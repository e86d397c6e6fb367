"""Preference alignment from the command line, with networks too small and too short to learn much; and what must hold."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from close import FLOAT32
from command import tiltlm
from tiltlm.commands.compared import incomparable
from tiltlm.commands.models import load_run
from tiltlm.commands.run import parse
from tiltlm.data.pool import Pool
from tiltlm.feeds import judged
from tiltlm.models.causal import CausalLM
from tiltlm.models.folders import located
from tiltlm.policies.exo_rw import ExoRw
from tiltlm.problem import Facts, Problem
from tiltlm.recipes import recipe
from tiltlm.recipes.exo import TASKS, preset
from tiltlm.ruler.compare import paired
from tiltlm.ruler.measure import Measurement
from tiltlm.run import Recipe, Run
from tiltlm.samples import Pairs as PairsOf
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream, stream
from tiltlm.stages.data import Dataset, divide
from tiltlm.stages.draws import Draws, Labels
from tiltlm.stages.log_ref import content_of, referring
from tiltlm.stages.reading import Reader
from tiltlm.target import Target
from tiltlm.tasks.pairs import Pairs
from tiltlm.train import best_checkpoint, checkpoints


def options(text: str) -> list[str]:
    return text.split()


FRONT = options(
    "--task.own 120 --task.valid-rows 12 --task.test-rows 12 --task.most-tokens 80 --task.new-tokens 6 "
    "--task.base.steps 6 --task.base.warmup 1 --task.sft.batch-size 24 --task.sft.evaluations 2 "
    "--task.judge.batch-size 24 --task.judge.evaluations 2"
)
DRAWS = options("--draws.n 3 --draws.prompts 24")
ALIGN = options("--feed.draws.n 3 --feed.draws.prompts 24 --fit.batch-size 6 --fit.epochs 1 --fit.checkpoints 2 "
                "--fit.evaluations 2")  # fmt: skip
TEST = options("--ruler.prompts 6 --ruler.n 2 --ruler.checkpoints 2")
OWN_REWARD = "def count(prompts, completions):\n    return [float(y.count('e')) for y in completions]\n"
ALL = [*FRONT, *ALIGN, *TEST]
POLICIES = options("exo-rw dpo-rw exo-pref dpo cdpo robust-dpo ipo hinge apo rpo simpo orpo kto")
METRICS = options("reward kl_to_reference objective kl_to_target_at_least win_rate length finished")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """One folder for the whole file: data, models and labels are made once."""
    return tmp_path_factory.mktemp("preferences")


def run_of(work: Path, stage: str, *args: str) -> Path:
    done = tiltlm("run", f"dialogues/{stage}", *args, cwd=work)
    return work / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def compared(work) -> Path:
    """Every method there is, at K = 2."""
    return run_of(work, "evaluate", *ALL, "--methods", "reference", *POLICIES)


def rows_of(folder: Path) -> dict[tuple[str, str], dict]:
    return {(row["method"], row["metric"]): row for row in json.loads((folder / "report.json").read_text())}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def folder_of(work: Path, stage: str) -> Path:
    """The only run of a stage."""
    (found,) = (work / "runs" / "dialogues" / stage).iterdir()
    return found


# ---- presets ------------------------------------------------------------------------------------------------


def test_every_task_is_a_value_with_its_name_and_stages():
    for name in TASKS:
        for stage in (
            "data",
            "base",
            "sft-model",
            "reward-model",
            "generate",
            "label",
            "exo-rw-policy",
            "dpo",
            "evaluate",
        ):
            assert recipe(f"{name}/{stage}").name == f"{name}/{stage}"


def test_the_published_settings_are_those_of_the_scripts():
    """beta, lengths, learning rates, batches and temperature as the paper's scripts have them."""
    made = [recipe(f"{name}/exo-rw-policy") for name in ("hh", "tldr", "imdb")]
    tasks, fits, draws = [x.task for x in made], [x.fit for x in made], [x.feed.draws for x in made]
    assert [t.beta for t in tasks[:2]] == [0.25, 0.25] and abs(tasks[2].beta - 0.01) < 1e-12
    assert [(t.reader.most_tokens, t.reader.new_tokens) for t in tasks[:2]] == [(512, 200), (650, 75)]
    assert [f.batch_size for f in fits] == [128, 128, 64]
    assert {f.lr for f in fits} == {1e-6} and {t.sft.fit.lr for t in tasks[:2]} == {1e-5}
    assert {t.reader.temperature for t in tasks} == {0.8}
    counted = [f.of(d.prompts) for f, d in zip(fits, draws, strict=True)]
    assert [f.steps for f in counted] == [175, 200, 200]  # 700, 800 and 800 micro-steps
    assert {(f.betas, f.clip, f.floor) for f in counted} == {((0.9, 0.95), 1.0, 0.0)}
    for name, beta in (("hh", 0.5), ("imdb", 0.1), ("hh-small", 0.25)):
        cells = preset(name).cells
        pairs = options("exo-pref dpo cdpo robust-dpo hinge apo rpo kto")
        assert {cells[each].method.beta for each in pairs} == {beta, cells["exo-rw"].method.beta_pi}


def test_checkpoints_and_evaluations_come_as_often_as_the_epochs_say():
    """Of 512 groups in batches of 16, two epochs: 64 steps, a checkpoint and an evaluation every 16."""
    how = preset("dialogues").cells["exo-rw"].fit.of(512)
    watch = how.watching(dict)
    assert (how.steps, how.keep_every) == (64, 16) and watch is not None and watch.every == 16


# ---- the comparison -----------------------------------------------------------------------------------------


def test_every_method_is_measured_by_one_ruler(compared):
    rows = rows_of(compared)
    names = ["reference", *POLICIES]
    for name in names:
        for metric in METRICS if name == "reference" else [*METRICS, "updates"]:
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
    (run,) = (work / "runs" / "dialogues" / "exo-rw").iterdir()
    shown = lines(run / "samples.jsonl")
    assert len(shown) == 6 and set(shown[0]) == {"prompt", "chosen", "rejected", "generated", "reward"}
    tiltlm("report", str(compared), "--out", "page.html", cwd=work)
    page = (work / "page.html").read_text()
    assert "exo-rw" in page and '"rejected"' in page and '"generated"' in page


def test_checkpoints_on_the_way_are_on_the_frontier(compared):
    curve = json.loads((compared / "curve.json").read_text())
    updates = {(row["method"], row["updates"]) for row in curve}
    ends = {
        name: (4, 8) if name == "kto" else (2, 4) for name in POLICIES
    }  # both sides of 24 pairs are rows of KTO's
    assert {(name, step) for name in POLICIES for step in ends[name]} <= updates
    assert all(
        row["value"] > 100 * FLOAT32 for row in curve if row["metric"] == "kl_to_reference" and row["updates"]
    )


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
    folder = run_of(tmp_path, "evaluate", *ALL, "--methods", "reference", "exo-rw", "--at", "0.5", "0.1")
    rows = rows_of(folder)
    for beta in (0.5, 0.1):
        for name in (f"reference (beta {beta:g})", f"exo-rw (beta {beta:g})"):
            j = rows[name, "reward"]["value"] - beta * rows[name, "kl_to_reference"]["value"]
            assert abs(rows[name, "objective"]["value"] - j) < FLOAT32 and (name, "kl_to_target_at_least") in rows
    gaps = [rows[f"reference (beta {beta:g})", "gap"]["value"] for beta in (0.5, 0.1)]
    assert gaps[1] > 2 * gaps[0]
    assert len(list((tmp_path / "runs" / "dialogues" / "label").iterdir())) == 1
    win = rows["reference (beta 0.1)", "win_rate"]
    assert win["low"] < win["value"] < win["high"]


def test_a_policy_s_run_can_be_drawn_from(compared, work):
    (run,) = (work / "runs" / "dialogues" / "exo-rw-policy").iterdir()
    (work / "p.jsonl").write_text('{"prompt": "\\n\\nHuman: Hello\\n\\nAssistant:"}\n')
    tiltlm("sample", str(run), "--prompts", "p.jsonl", "--out", "y.jsonl", "--n", "2", cwd=work)
    assert len(lines(work / "y.jsonl")) == 2
    tiltlm("score", f"reward-model:{folder_of(work, 'reward-model')}", "y.jsonl", "--out", "s.jsonl", cwd=work)
    assert all("reward" in row for row in lines(work / "s.jsonl"))


def test_a_policy_s_config_states_beta_and_its_evaluations_what_matters(compared, work):
    (run,) = (work / "runs" / "dialogues" / "exo-rw-policy").iterdir()
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert settings["task"]["beta"] == 0.5 and settings["method"]["beta_pi"] == 0.5
    evals = lines(run / "evals.jsonl")
    assert [row["step"] for row in evals] == [0, 2, 4]
    assert {"objective", "reward", "kl_to_reference", "valid_gap", "valid_ranking", "valid_loss"} <= set(evals[0])
    assert abs(evals[0]["valid_loss"] - evals[0]["valid_gap"]) > 0  # pairs of each group, and the group of three
    (pairs,) = (work / "runs" / "dialogues" / "dpo-policy").iterdir()
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
    cache = work / "runs" / "dialogues" / "log_ref"
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
    (folder,) = (tmp_path / "runs" / "dialogues" / stage).iterdir()
    (folder / "DONE").unlink()
    whole = {split: half(folder / f"{split}.jsonl") for split in ("train", "test")}
    run_of(tmp_path, stage, *FRONT, *DRAWS)
    assert {split: (folder / f"{split}.jsonl").read_bytes() for split in whole} == whole


@pytest.mark.parametrize("stage", ["sft-model", "reward-model", "exo-rw-policy", "kto-policy"])
def test_training_goes_on_where_it_stopped(compared, work, stage, tmp_path, monkeypatch):
    """Stopped after two updates: the same weights, metrics and evaluations in the end."""
    (done,) = (work / "runs" / "dialogues" / stage).iterdir()
    shutil.copytree(work / "runs", tmp_path / "runs")
    folder = tmp_path / "runs" / "dialogues" / stage / done.name
    shutil.rmtree(folder)
    args = FRONT if stage in ("sft-model", "reward-model") else [*FRONT, *ALIGN]
    from tiltlm.engine import Engine

    calls, update = [], Engine.update

    def interrupted(self, *given, **named):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(self, *given, **named)

    monkeypatch.setattr(Engine, "update", interrupted)
    stopped = tiltlm("run", f"dialogues/{stage}", *args, cwd=tmp_path, check=False)
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
    found = options(
        "--task.data mine.jsonl --task.valid-rows 8 --task.test-rows 8 --task.stop 0 --task.device cpu"
    )
    sizes = options("--task.most-tokens 80 --task.new-tokens 6")
    return [*found, "--task.model", str(base), *sizes, *FRONT[14:]]


LEARN = [*ALIGN, "--feed.size", "2", *TEST]


def test_a_user_s_own_pairs_without_generation(own, work):
    """The source own: the pairs themselves, no draws, no labels; a reward of one's own judges the result."""
    args = [*own, *LEARN, "--task.reward", "own.py:count", "--feed.source", "own"]
    done = tiltlm("run", "pairs/evaluate", *args, "--methods", "reference", "dpo", "exo-rw", cwd=work)
    rows = rows_of(work / done.stdout.splitlines()[-1])
    assert ("dpo", "reward") in rows and ("exo-rw", "win_rate") in rows and ("exo-rw", "gap") not in rows
    assert not (work / "runs" / "pairs" / "generate").exists()


def test_learning_from_the_data_s_own_rows_alone_builds_no_reward_model(own, work):
    """Unless the best checkpoint is chosen by it on the way, or the policy is measured."""
    args = [*own, *ALIGN, "--feed.source", "own", "--fit.evaluations", "0"]
    done = tiltlm("run", "pairs/dpo-policy", *args, cwd=work)
    assert checkpoints(work / done.stdout.splitlines()[-1])
    assert not (work / "runs" / "pairs" / "reward-model").exists()
    for name, more in (("dpo-policy", ("--fit.evaluations", "2")), ("dpo", ())):
        value = parse([f"pairs/{name}", *args, *more], "run").recipe
        assert "pairs/reward-model" in needed_by(value)


def needed_by(recipe: Recipe) -> set[str]:
    """The names of all that a recipe needs."""
    return {name for each in recipe.inputs().values() for name in {each.name, *needed_by(each)}}


def test_wins_are_counted_against_the_chosen_responses(own, work):
    """One completion a prompt, rewards by hand: a win is a larger count than the chosen response's, a tie half of one."""
    args = [*own, "--task.reward", "own.py:count", "--ruler.prompts", "6", "--ruler.n", "1"]
    done = tiltlm("run", "pairs/reference", *args, cwd=work)
    folder = work / done.stdout.splitlines()[-1]
    shown = lines(folder / "samples.jsonl")
    gaps = [row["generated"].count("e") - row["chosen"].count("e") for row in shown]
    wins = sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps)
    assert len(shown) == 6 and abs(rows_of(folder)["reference", "win_rate"]["value"] - wins) < 1e-9
    assert [row["reward"] for row in shown] == [float(row["generated"].count("e")) for row in shown]


def test_a_finished_run_is_read_again_where_its_data_is_not(own, work, tmp_path):
    """From another folder the data's name leads nowhere: what is finished is shown; a new run says what is missing."""
    args = [*own, *LEARN, "--task.reward", f"{work}/own.py:count", "--feed.source", "own"]
    done = tiltlm("run", "pairs/dpo", *args, cwd=work)
    folder = (work / done.stdout.splitlines()[-1]).resolve()
    assert "dpo" in tiltlm("measure", str(folder), cwd=tmp_path).stdout
    tiltlm("report", str(folder), "--out", "page.html", cwd=tmp_path)
    done = tiltlm("run", "pairs/dpo", *args, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "mine.jsonl: no such file (--task.data" in done.stderr


def test_a_user_s_own_labelled_groups(own, work):
    """{prompt, completions, rewards}: what the original calls hh_rw."""
    columns = ("prompt", "completions", "rewards")
    rows = [{name: row[name] for name in columns} for row in lines(folder_of(work, "label") / "train.jsonl")]
    (work / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [*own, *LEARN, "--task.data", "groups.jsonl", "--task.valid-rows", "4", "--task.test-rows", "4"]
    args += ["--task.reward", "own.py:count", "--feed.source", "own"]
    for name in ("exo-rw", "dpo", "kto"):
        done = tiltlm("run", f"pairs/{name}", *args, cwd=work)
        assert (name, "objective") in rows_of(work / done.stdout.splitlines()[-1])


OTHERS = {
    "sft": "--fit.evaluations 1 --fit.checkpoints 1",
    "rloo": "--fit.steps 2 --fit.batch-size 8 --fit.evaluations 1 --fit.checkpoints 1",
    "ppo": "--fit.steps 2 --fit.batch-size 8 --fit.evaluations 1 --fit.checkpoints 1",
    "ctl": "--fit.steps 2 --feed.particles 4 --feed.prompts 2",
    "q-sharp": "--fit.steps 2 --fit.batch-size 8 --feed.draws.n 2 --feed.draws.prompts 8",
    "best-of-n": "",
    "smc": "",
}
"""Methods of other worlds, and settings that make them short."""


@pytest.mark.parametrize("name", OTHERS)
def test_methods_of_other_worlds_run_on_preferences(own, work, name):
    args = [*own, *TEST, "--task.reward", "own.py:count", *options(OTHERS[name])]
    done = tiltlm("run", f"pairs/{name}", *args, cwd=work)
    rows = rows_of(work / done.stdout.splitlines()[-1])
    assert (name, "reward") in rows and (name, "win_rate") in rows


def test_lora_all_the_way(own, work):
    """SFT by adapters that are merged, a policy of adapters on top, the reference being the model without them."""
    args = [*own, *LEARN, "--task.sft.lora", "2", "--net.policy", "lora", "--net.lora-rank", "2"]
    args += ["--task.reward", "own.py:count", "--fit.lr", "1e-2", "--fit.evaluations", "0"]
    done = tiltlm("run", "pairs/exo-rw", *args, cwd=work)
    rows = rows_of(work / done.stdout.splitlines()[-1])
    policies = [best_checkpoint(folder) for folder in (work / "runs" / "pairs" / "exo-rw-policy").iterdir()]
    (policy,) = [folder for folder in policies if (folder / "adapter_model.safetensors").is_file()]
    assert load_file(policy / "adapter_model.safetensors") and not (policy / "model.safetensors").exists()
    assert rows["exo-rw", "kl_to_reference"]["value"] > FLOAT32
    sft = [f for f in (work / "runs" / "pairs" / "sft-model").iterdir() if (f / "merged").is_dir()]
    assert len(sft) == 1 and (sft[0] / "merged" / "model.safetensors").is_file()
    assert located(str(sft[0])) == str(sft[0] / "merged")
    with pytest.raises(ValueError, match="holds adapters alone"):
        CausalLM.load(policy)


def test_a_model_to_start_from_brings_its_tokenizer_and_needs_no_other(compared, work, tmp_path):
    """The SFT run of another recipe by its folder: no base model, no SFT; the reference is that very model."""
    sft, rows = folder_of(work, "sft-model"), lines(folder_of(work, "data") / "train.jsonl")[:40]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(OWN_REWARD)
    args = options("--task.data mine.jsonl --task.valid-rows 8 --task.test-rows 8 --task.stop 0 --task.device cpu "
                   "--task.most-tokens 80 --task.new-tokens 6 --draws.n 2 --draws.prompts 8")  # fmt: skip
    args += ["--task.start", str(sft), "--task.reward", "own.py:count"]
    tiltlm("run", "pairs/label", *args, cwd=tmp_path)
    made = {folder.name for folder in (tmp_path / "runs" / "pairs").iterdir()}
    assert made == {"data", "generate", "label"}
    row = lines(next((tmp_path / "runs" / "pairs" / "generate").iterdir()) / "test.jsonl")[0]
    assert row["prompt"].startswith("\n\nHuman: ") and row["prompt"].endswith("\n\nAssistant:")


def test_bf16_training_starts_at_its_own_reference(own, work, monkeypatch):
    """log_ref is computed in the precision of training: h is exactly 0 at the first step, as in float32."""
    args = [*own, *LEARN, "--task.reward", "own.py:count", "--fit.precision", "bfloat16"]
    done = tiltlm("run", "pairs/exo-rw", *args, cwd=work)
    monkeypatch.chdir(work)
    policy = load_run(Path(done.stdout.splitlines()[-1])).inputs["learnt"]
    assert abs(lines(policy.folder / "metrics.jsonl")[0]["h"]) < 1e-3
    assert policy.recipe.fit.precision == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exo-rw", "dpo-rw"])
def test_both_rw_losses_raise_j_and_lower_the_gap(own, work, method):
    """120 updates towards more of the letter e: J rises by four standard errors of the difference, prompt by prompt."""
    args = [*own, *LEARN, *options(
        "--task.reward own.py:count --task.beta 0.5 --task.test-rows 16 --feed.draws.n 4 --feed.draws.prompts 36 "
        "--feed.size 4 --fit.lr 1e-3 --fit.epochs 20 --fit.evaluations 0 --ruler.prompts 16 --ruler.n 64 "
        "--ruler.checkpoints 1"
    )]  # fmt: skip
    done = tiltlm("run", "pairs/evaluate", *args, "--methods", "reference", method, cwd=work)
    run = load_run(work / done.stdout.splitlines()[-1])
    kept = [each.folder / "measurement.safetensors" for each in run.inputs.values()]
    before, after = (Measurement.load(path) for path in kept)
    (gain,) = [d.estimate for d in paired(after, before) if d.metric == "objective"]
    assert gain.value > 4 * gain.stderr > 0
    rows = rows_of(run.folder)
    assert rows[method, "gap"]["value"] < rows["reference", "gap"]["value"]


# ---- pieces -------------------------------------------------------------------------------------------------


def divided(
    folder: Path, train: list[dict], test: list[dict] | None, how: Dataset, own: Stream
) -> dict[str, list[dict]]:
    """The rows of every split."""
    pool = None if test is None else Pool(folder, test)
    found = divide(Pool(folder, train), pool, how, own)
    return {split: [json.loads(line) for line in rows.lines(which)] for split, (rows, which) in found.items()}


def test_rows_are_divided_without_overlap_and_the_same_way_twice(tmp_path):
    rows = [{"prompt": str(k)} for k in range(40)]
    how = Dataset(valid_rows=5, test_rows=7)
    found = divided(tmp_path, rows, None, how, stream(0, "x"))
    assert {name: len(part) for name, part in found.items()} == {"valid": 5, "test": 7, "train": 28}
    assert sorted(int(row["prompt"]) for part in found.values() for row in part) == list(range(40))
    assert (
        divided(tmp_path, rows, None, how, stream(0, "x"))
        == found
        != divided(tmp_path, rows, None, how, stream(1, "x"))
    )
    given = divided(tmp_path, rows, [{"prompt": f"t{k % 8}"} for k in range(9)], how, stream(0, "x"))
    assert (len(given["test"]), len(given["train"])) == (7, 35)
    with pytest.raises(
        ValueError, match="12 different prompts in the training data cannot spare 5 to validate and 7 to"
    ):
        divided(tmp_path, rows[:12] * 3, None, how, stream(0, "x"))


def test_no_prompt_of_a_held_out_row_is_trained_on(tmp_path):
    """Three rows a prompt: the held-out splits take one each, and the others are left out of training too."""
    rows = [{"prompt": str(k // 3), "chosen": str(k)} for k in range(90)]
    how = Dataset(valid_rows=5, test_rows=7)
    found = divided(tmp_path, rows, None, how, stream(0, "x"))
    asked = {name: [row["prompt"] for row in part] for name, part in found.items()}
    assert len(set(asked["valid"])) == 5 and len(set(asked["test"])) == 7 and len(asked["train"]) == 3 * 18
    assert not set(asked["train"]) & {*asked["valid"], *asked["test"]} and not set(asked["valid"]) & set(
        asked["test"]
    )


def test_answers_are_judged_where_the_pairs_are():
    """Verdicts are made on the pairs' own device."""
    side = Samples(Tokens.of([[5]]), torch.tensor([0]), torch.tensor([[1]]), torch.tensor([[True]]))
    assert judged(PairsOf(side, side)).reward.tolist() == [1, 0]
    moved = PairsOf(side, side)
    assert judged(moved).reward.device == moved.chosen.device


def test_a_folder_s_content_is_part_of_a_key(tmp_path):
    """A folder of data or of a model: another content, another key; a hub's name stands for itself."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text("a")
    value = replace(recipe("pairs/data"), task=Pairs(Dataset((str(tmp_path / "d"),))))
    first = value.key
    assert value.key == first
    (tmp_path / "d" / "train.jsonl").write_text("b")
    assert value.key != first
    model = replace(recipe("pairs/sft-model"), task=Pairs(reader=Reader(str(tmp_path / "d"))))
    second = model.key
    (tmp_path / "d" / "more.bin").write_text("weights")
    assert model.key != second


def test_a_stage_s_key_is_free_of_what_it_does_not_depend_on():
    """Data, reference and draws do not depend on reward or beta, labels not on beta; another beta trains another policy."""
    task = preset("dialogues").task
    other = replace(task, reward="exact-answer", beta=2.0)
    needed = {each.stage: each for each in task.needs(0).values()}
    for stage in ("data", "base", "sft-model"):
        assert task.stages(0)[stage].key == other.stages(0)[stage].key == needed[stage].key
    draws = recipe("dialogues/exo-rw").feed.draws
    assert Draws(task.untilted(), draws).key == Draws(other.untilted(), draws).key
    assert Labels.of(task, draws, 0).key == Labels.of(task.at(2.0), draws, 0).key != Labels.of(other, draws, 0).key
    assert "reward-model" not in task.untilted().needs(0) and "reward-model" in task.needs(0)
    policy = recipe("dialogues/exo-rw-policy")
    assert policy.key != replace(policy, task=task.at(2.0)).key


def test_runs_with_other_reward_models_are_not_compared_by_reward(compared, work):
    """Another seed's data and reward model: its rewards have another zero."""
    one, other = (load_run(folder_of(work, name)) for name in ("exo-rw", "ipo"))
    assert not {"reward", "objective"} & incomparable(one, other)
    strange = Run(other.recipe, other.folder, {**other.inputs, "reward-model": Run(None, Path("x/y/z"), {})})
    assert {"reward", "objective", "win_rate"} <= incomparable(one, strange)


def test_cached_log_probabilities_follow_content_not_names(tmp_path):
    """Another token, another reference: another file; the same samples are read back, not computed."""
    from families import build

    done, asked = Tokens.of([[1, 2], [3]]), Tokens.of([[5]])
    samples = Samples(asked, torch.tensor([0, 0]), done.ids, done.mask)

    def log_ref(some: Samples, seed: int, name: str) -> torch.Tensor:
        target = Target(build("gpt2", seed=seed), lambda x: torch.zeros(len(x)), 1.0)
        problem = Problem(
            target, {"train": asked, "test": asked}, 2, stream(0, "x"), Facts(1.0), reference_name=name
        )
        return referring(tmp_path, problem, "float32", some, "train").log_ref

    first = log_ref(samples, 0, "a")
    assert torch.equal(log_ref(samples, 1, "a"), first) and not torch.equal(log_ref(samples, 1, "b"), first)
    other = samples.with_(tokens=torch.tensor([[1, 2], [4, 0]]))
    assert content_of(other) != content_of(samples) == content_of(samples.with_(reward=torch.ones(2)))
    assert not torch.equal(log_ref(other, 0, "a"), first)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["evaluate", "--methods", "exo"], "there is no method 'exo'"),
        (["exo-rw", "--feed.size", "1"], "a group has two completions or more"),
        (["exo-rw", "--feed.size", "8"], "want as many draws of a prompt, and 4 are stored: --feed.draws.n 8"),
        (["exo-rw", "--task.beta", "0"], "beta must be positive"),
        (["data", "--task.data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["data", "--task.data", __file__, "--task.test-data", __file__], "named as training and as test data"),
        (["label", "--task.reward", "nowhere.py:f"], "nowhere.py: no such file"),
        (["sft-model", "--task.new-tokens", "600"], "must leave room for a prompt"),
    ],
)
def test_mistakes_are_said_before_any_work(args, message, tmp_path):
    done = tiltlm("run", f"dialogues/{args[0]}", *args[1:], cwd=tmp_path, check=False)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("DONE"))


def test_the_objective_of_a_group_method_states_the_target_once():
    value = recipe("hh-small/exo-rw-policy")
    assert value.method.bound(value.task.beta) == ExoRw(0.2, 0.25) and value.task.beta == pytest.approx(0.2 * 0.25)

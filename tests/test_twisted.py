"""The twisted-SMC recipes from the command line, with networks too small and too short to learn anything."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from close import FLOAT32
from command import tiltlm
from tiltlm.data.stories import train_tokenizer
from tiltlm.recipes import catalogue, recipe, twisted_report
from tiltlm.recipes.twisted import FAMILIES, KINDS, STAGES
from tiltlm.recipes.twisted_methods import MEASURED
from tiltlm.recipes.twisted_settings import Goal
from tiltlm.ruler.bounds import Bounds
from tiltlm.ruler.log_z import LogZ
from tiltlm.run import Run, from_json
from tiltlm.seeds import stream

OWN = ["--language.model=", "--language.stories", "200", "--language.new-tokens", "4"]
OWN += ["--language.fit.pace.steps", "6", "--language.fit.pace.warmup", "1"]
FEW = ["--exact.n", "20", "--exact.batch-size", "200"]
TWISTS = [
    part
    for name in ("ctl", "rl", "sixo", "fudge", "dpg")
    for part in (f"--{name}.fit.pace.steps", "2", f"--{name}.particles", "6")
]
POLICIES = [
    part
    for name in ("ppo", "value", "sft", "reinforce", "dpo", "rpo")
    for part in (f"--{name}.fit.pace.steps", "2", f"--{name}.fit.batch-size", "6")
]
ALL = [*OWN, *FEW, *TWISTS, *POLICIES, "--log-z.draws", "400", "--test.n", "40"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """One folder for the whole file: the model and whatever else stages share is made once."""
    return tmp_path_factory.mktemp("twisted")


@pytest.fixture(scope="module")
def compared(work) -> Path:
    """The run that compares all methods."""
    done = tiltlm("run", "animals-small/evaluate", *ALL, "--methods", *MEASURED, cwd=work)
    return work / done.stdout.splitlines()[-1]


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "report.json").read_text())


def test_every_stage_is_in_the_catalogue_and_every_preset_is_a_value():
    assert list(KINDS) == list(STAGES)
    for family in FAMILIES:
        for stage in STAGES:
            value = recipe(f"{family}/{stage}")
            assert value.name == f"{family}/{stage}" and from_json(type(value), as_json(value)) == value
    assert {name for entry in catalogue() for name in entry.families} >= set(FAMILIES)


def as_json(value) -> dict:
    from dataclasses import asdict

    return json.loads(json.dumps(asdict(value)))


def test_all_methods_are_measured_by_one_ruler(compared):
    rows = rows_of(compared)
    assert list(dict.fromkeys(row["method"] for row in rows)) == list(MEASURED)
    table = {(row["method"], row["metric"]): row for row in rows}
    for method in MEASURED:
        both = table[method, "kl_to_target"], table[method, "kl_from_target"]
        for row in both:
            assert row["unit"] == "nats" and row["stderr"] > 0 and row["stderr_log_z"] == both[0]["stderr_log_z"]
            assert row["low"] < row["value"] < row["high"] and row["high"] - row["low"] > 2.5 * row["stderr"]
    assert table["untrained", "kl_to_reference"]["value"] == 0
    assert table["untrained", "kl_to_target"]["value"] > 0
    assert (compared / "kl.png").stat().st_size > 5000


def test_a_finished_comparison_is_shown_again_not_made_again(compared, work):
    again = tiltlm("run", "animals-small/evaluate", *ALL, "--methods", *MEASURED, cwd=work)
    assert "KL(pi*‖q)" in again.stdout and "log Z " in again.stdout and "certified, 95%" in again.stdout
    assert "->" not in again.stderr and again.stdout.splitlines()[-1] == str(compared.relative_to(work))


def test_runs_are_compared_in_pairs_by_measure(compared, work):
    pair = [
        tiltlm("run", f"animals-small/{name}", *settings_of(name), cwd=work).stdout.splitlines()[-1]
        for name in ("ctl", "dpg")
    ]
    said = tiltlm("measure", *pair, cwd=work).stdout
    assert "KL(q‖pi*)" in said and "KL(pi*‖q)" in said and ("no difference shown" in said or "higher" in said)


def settings_of(name: str) -> list[str]:
    trained = [f"--{name}.fit.pace.steps", "2", f"--{name}.particles", "6"]
    base = ["--ctl.fit.pace.steps", "2", "--ctl.particles", "6"] if name != "ctl" else []
    return [*OWN, *FEW, *trained, *base, "--log-z.draws", "400", "--test.n", "40"]


def test_a_measured_method_can_be_sampled_from(compared, work):
    folder = tiltlm("run", "animals-small/ctl", *settings_of("ctl"), cwd=work).stdout.splitlines()[-1]
    (work / "p.jsonl").write_text('{"prompt": "Once upon a time"}\n')
    tiltlm("sample", folder, "--prompts", "p.jsonl", "--n", "3", "--out", "y.jsonl", cwd=work)
    lines = [json.loads(line) for line in (work / "y.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(len(line["completion_ids"]) == 4 for line in lines)
    comparison = str(compared.relative_to(work))
    done = tiltlm("sample", comparison, "--prompts", "p.jsonl", "--out", "z.jsonl", cwd=work, check=False)
    assert done.returncode == 2 and "name the run of one of them" in done.stderr


@pytest.mark.parametrize("positives", ["exact", "csmc"])
def test_positives_from_exact_draws_and_conditional_smc(work, positives):
    settings = [*OWN, *FEW, "--ctl.fit.pace.steps", "2", "--ctl.particles", "5", "--ctl.positives", positives]
    for supply in ("fresh", "stored"):
        tiltlm("run", "animals-small/ctl-twist", *settings, "--ctl.supply", supply, cwd=work)


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("ctl-twist", ["--ctl.contrast", "next"]),
        ("ctl-twist", ["--ctl.dpg", "0.5", "--net.body", "frozen", "--net.mlp-layers", "1"]),
        ("ctl-twist", ["--ctl.tempered", "0.5", "--net.body", "lora"]),
        ("sixo-twist", ["--sixo.drawn-by", "resampled"]),
        ("rl-twist", ["--rl.target", "linear", "--rl.drawn-by", "mixed"]),
        ("rl-twist", ["--rl.target", "mean", "--rl.multi-step", "0.5", "--rl.drawn-by", "reference"]),
        ("rl-twist", ["--rl.drawn-by", "exact"]),
        ("fudge-twist", ["--fudge.prefixes", "--fudge.positives", "exact"]),
        ("ppo-policy", ["--ppo.policy", "full"]),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_every_variant_of_the_training_trains(work, stage, flags):
    name = stage.split("-")[0]
    size = ["--ppo.fit.batch-size", "6"] if name == "ppo" else [f"--{name}.particles", "6"]
    done = tiltlm(
        "run", f"animals-small/{stage}", *OWN, *FEW, f"--{name}.fit.pace.steps", "2", *size, *flags, cwd=work
    )
    folder = work / done.stdout.splitlines()[-1]
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert (folder / "checkpoint-2" / "COMPLETE").is_file()


def test_kept_checkpoints_make_a_curve(work):
    flags = ["--ctl.fit.pace.steps", "4", "--ctl.particles", "6", "--ctl.keep", "1", "2"]
    done = tiltlm(
        "run", "animals-small/ctl", *OWN, *FEW, *flags, "--log-z.draws", "400", "--test.n", "40", cwd=work
    )
    curve = json.loads((work / done.stdout.splitlines()[-1] / "curve.json").read_text())
    assert sorted({row["step"] for row in curve}) == [1, 2, 4]
    assert {row["metric"] for row in curve} == {"kl_to_target", "kl_from_target"}


def test_bounds_around_log_z(work):
    flags = ["--ctl.fit.pace.steps", "2", "--ctl.particles", "6", "--bounds.particles", "2", "8"]
    done = tiltlm("run", "animals-small/bounds", *OWN, *FEW, *flags, "--bounds.repeats", "20", cwd=work)
    folder = work / done.stdout.splitlines()[-1]
    rows = json.loads((folder / "bounds.json").read_text())
    assert len(rows) == 2 * 2 * 3 * 2  # particles, proposals, estimators, sides
    assert (folder / "bounds.png").stat().st_size > 5000
    assert "log Z lies between" in done.stdout and "gap" in done.stdout


def test_log_z_by_bounds_gives_intervals(work):
    flags = ["--log-z.by", "bounds", "--log-z.particles", "4", "--log-z.repeats", "5", "--test.n", "40"]
    train = ["--ctl.fit.pace.steps", "2", "--ctl.particles", "6"]
    done = tiltlm("run", "animals-small/ctl", *OWN, *FEW, *flags, *train, cwd=work)
    rows = {row["metric"]: row for row in rows_of(work / done.stdout.splitlines()[-1])}
    row = rows["kl_to_target"]
    (kept,) = (work / "runs/animals-small/log-z").glob("*/bounds.json")
    log_z = LogZ.from_json(json.loads(kept.with_name("log_z.json").read_text()))
    own = math.sqrt(row["stderr"] ** 2 - row["stderr_log_z"] ** 2)
    long = row["high"] - row["low"]
    assert 0 < log_z.width < long < log_z.width + 2 * 2.1 * own and "fewer than 10 repeats" in row["doubt"]


def test_the_frontier_trains_and_measures_at_every_beta(work):
    flags = ["--frontier.betas", "1", "0.5", "--frontier.methods", "ctl", "ppo", "--log-z.draws", "400"]
    size = ["--test.n", "40", "--ctl.fit.pace.steps", "2", "--ctl.particles", "6", "--ppo.fit.pace.steps", "2"]
    done = tiltlm(
        "run", "animals-small/frontier", *OWN, *FEW, *flags, *size, "--ppo.fit.batch-size", "6", cwd=work
    )
    folder = work / done.stdout.splitlines()[-1]
    points = list(dict.fromkeys((row["method"], row["beta"]) for row in rows_of(folder)))
    assert points == [("ctl (beta 1)", 1), ("ppo (beta 1)", 1), ("ctl (beta 0.5)", 0.5), ("ppo (beta 0.5)", 0.5)]
    optimum = json.loads((folder / "optimum.json").read_text())
    assert len(optimum) > 5 and [p["reward"] for p in optimum] == sorted(p["reward"] for p in optimum)
    assert (folder / "frontier.png").stat().st_size > 5000


def test_samples_by_weight_with_their_trace(work):
    flags = [
        "--ctl.fit.pace.steps",
        "2",
        "--ctl.particles",
        "6",
        "--shown.particles",
        "8",
        "--shown.threshold",
        "1",
    ]
    done = tiltlm("run", "animals-small/qualitative", *OWN, *flags, cwd=work)
    folder = work / done.stdout.splitlines()[-1]
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    weights = [row["weight"] for row in rows]
    assert weights == sorted(weights, reverse=True) and math.isclose(sum(weights), 1, rel_tol=FLOAT32)
    trace = json.loads((folder / "trace.json").read_text())
    assert len(trace["ess"]) == 5 and len(trace["ancestors"]) == 4 and len(trace["pieces"]) == 8
    assert (folder / "ess.png").stat().st_size > 5000 and (folder / "genealogy.png").stat().st_size > 5000


def test_reach_at_growing_lengths(work):
    flags = ["--reach.lengths", "2", "4", "--reach.particles", "4", "--reach.repeats", "5"]
    train = ["--ctl.fit.pace.steps", "2", "--ctl.particles", "6"]
    done = tiltlm("run", "animals-small/reach", *OWN, *FEW, *flags, *train, cwd=work)
    assert "2 tokens, iwae, 4 particles" in done.stdout and "4 tokens, smc-ess, 4 particles" in done.stdout
    folder = work / done.stdout.splitlines()[-1]
    found = {(row["method"], row["metric"]): row["value"] for row in rows_of(folder)}
    low, high, lower = (
        found["2 tokens, iwae, 4 particles", m] for m in ("certified_low", "certified_high", "log_z_lower")
    )
    assert low == pytest.approx(lower - math.log(40) / 5) and high > lower and "certified from" in done.stdout
    assert load_file(str(folder / "bounds_4.safetensors"))["4/twist/iwae/lower"].shape == (5, 1)


def test_log_z_is_drawn_until_its_certificate_is_as_narrow_as_asked(work):
    flags = ["--log-z.width", "0.5", "--log-z.draws", "100", "--log-z.batch-size", "100", "--log-z.limit", "400"]
    done = tiltlm("run", "animals-small/log-z", *OWN, *FEW, *flags, cwd=work)
    log_z = LogZ.from_json(json.loads((work / done.stdout.splitlines()[-1] / "log_z.json").read_text()))
    low, high = log_z.certificate
    assert high - low <= 0.5 and "certified, 95%" in done.stdout
    short = tiltlm("run", "animals-small/log-z", *OWN, *FEW, *flags[:-1], "1", cwd=work)
    assert "nats wide at the limit, not 0.5: raise --log-z.limit" in " ".join(short.stderr.split())
    bounds = [*flags[:2], "--log-z.by", "bounds", "--log-z.particles", "8", "--log-z.repeats", "5"]
    train = ["--ctl.fit.pace.steps", "2", "--ctl.particles", "6"]
    done = tiltlm("run", "animals-small/log-z", *OWN, *FEW, *train, *bounds, cwd=work)
    (row, _) = json.loads((work / done.stdout.splitlines()[-1] / "bounds.json").read_text())
    assert row["repeats"] > 5 and row["repeats"] % 5 == 0
    wrong = tiltlm(
        "run",
        "animals-small/log-z",
        *OWN,
        "--log-z.width",
        "0.1",
        "--log-z.by",
        "rejection",
        cwd=work,
        check=False,
    )
    assert wrong.returncode == 2 and "certificate goes with --log-z.by" in re.sub(r"[\s│]+", " ", wrong.stderr)


def test_log_z_by_rejection_is_read_off_the_search(work):
    done = tiltlm("run", "animals-small/log-z", *OWN, *FEW, "--log-z.by", "rejection", cwd=work)
    assert "draws of the reference kept by rejection" in done.stdout and "certified, 95%" in done.stdout


def test_stored_exact_draws_of_other_words_and_betas_are_refused(work):
    """With a reward of other words, and at another beta; taken where they belong."""
    kept = work / tiltlm("run", "animals-small/exact", *OWN, *FEW, cwd=work).stdout.splitlines()[-1]
    stored = [*OWN, "--exact.stored", str(kept / "exact.safetensors")]
    for change, message in (
        (["--goal.words", "the", "a"], "the exact draws are of another target: their reward is"),
        (["--goal.beta", "0.5"], "the exact draws are of beta 1, the target's beta is 0.5"),
    ):
        done = tiltlm("run", "animals-small/exact", *stored, *change, cwd=work, check=False)
        assert done.returncode == 2 and message in done.stderr
    tiltlm("run", "animals-small/exact", *stored, cwd=work)


def test_infilling_with_every_twist_and_exact_log_z(work, monkeypatch):
    """A vocabulary of 270 (bytes and little more): log Z sums over its square."""
    monkeypatch.setattr("tiltlm.recipes.own_model.train_tokenizer", partial(train_tokenizer, vocab_size=270))
    flags = [*OWN, "--language.new-tokens", "2", *FEW, "--test.conditions", "5", "--test.n", "4"]
    train = [part for name in ("rl", "sixo", "fudge", "dpg") for part in (f"--{name}.fit.pace.steps", "2")]
    train += [part for name in ("rl", "sixo", "fudge", "dpg") for part in (f"--{name}.conditions", "5")]
    train += ["--ctl.fit.pace.steps", "2", "--ctl.conditions", "2", "--ctl.particles", "3"]
    train += ["--ppo.fit.pace.steps", "2", "--ppo.fit.batch-size", "8", "--ppo.conditions", "4"]
    train += ["--value.fit.pace.steps", "2", "--value.fit.batch-size", "8", "--value.conditions", "4"]
    done = tiltlm("run", "infill2-small/evaluate", *flags, *train, cwd=work)
    folder = work / done.stdout.splitlines()[-1]
    rows = {(row["method"], row["metric"]): row for row in rows_of(folder)}
    assert rows["ctl", "kl_to_target"]["n"] == 5 and "stderr_log_z" not in rows["ctl", "kl_to_target"]
    assert {m for m, _ in rows} == {"untrained", "ctl", "rl", "sixo", "fudge", "dpg", "ppo", "q-sharp", "cd"}
    shown = [json.loads(line) for line in (folder.parents[1] / "ctl").glob("*/samples.jsonl").__next__().open()]
    assert all("must follow" in row for row in shown)


def test_infilling_with_log_z_between_bounds(work):
    flags = [
        *OWN,
        "--language.new-tokens",
        "3",
        "--exact.n",
        "20",
        "--log-z.conditions",
        "6",
        "--log-z.particles",
        "4",
        "16",
    ]
    flags += ["--ctl.fit.pace.steps", "2", "--ctl.conditions", "2", "--ctl.particles", "3", "--test.n", "5"]
    done = tiltlm("run", "infill15-small/ctl", *flags, "--test.conditions", "6", cwd=work)
    rows = {row["metric"]: row for row in rows_of(work / done.stdout.splitlines()[-1])}
    row = rows["kl_to_target"]
    assert row["n"] == 6 and row["stderr_log_z"] == 0 and row["high"] - row["low"] > 2 * 1.96 * row["stderr"]
    done = tiltlm("run", "infill15-small/ctl", *flags, "--test.conditions", "7", cwd=work, check=False)
    assert done.returncode == 2 and "known for 6 prompts, but 7 are measured" in done.stderr


def test_policies_that_see_no_conditions_refuse_infilling(work):
    done = tiltlm("run", "infill2-small/dpo-policy", *OWN, cwd=work, check=False)
    assert done.returncode == 2 and "does not see what must follow" in done.stderr
    done = tiltlm("run", "infill2-small/ppo-policy", *OWN, "--ppo.policy", "full", cwd=work, check=False)
    assert done.returncode == 2 and "--ppo.policy head" in done.stderr


def test_a_classifier_of_one_s_own_is_trained_and_leaned_on(work):
    rows = [("good fun", 1), ("what a joy", 1), ("bad and dull", 0), ("a sad bore", 0)] * 10
    (work / "mine.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    judge = ["--classify.data", "mine.csv", "--classify.classes", "1=good", "0=bad", "--goal.label", "good"]
    judge += [
        "--classify.fit.pace.steps",
        "4",
        "--classify.fit.pace.warmup",
        "1",
        "--classify.fit.batch-size",
        "8",
    ]
    done = tiltlm("run", "sentiment-small/classifier", *OWN, *judge[:-2], cwd=work, check=False)
    assert done.returncode == 2 and "goal" in done.stderr  # the classifier has no goal
    judged = [flag for k, flag in enumerate(judge) if "goal" not in flag and "goal" not in judge[k - 1]]
    done = tiltlm("run", "sentiment-small/classifier", *OWN, *judged, cwd=work)
    report = {row["metric"]: row for row in rows_of(work / done.stdout.splitlines()[-1])}
    assert report["accuracy"]["n"] == 8
    judge_run = done.stdout.splitlines()[-1]
    (work / "y.jsonl").write_text(
        '{"prompt": "a dog", "completion": " ran"}\n{"prompt": "", "completion": "sad"}\n'
    )
    tiltlm("score", f"classifier:{judge_run}:good", "y.jsonl", "--out", "good.jsonl", cwd=work)
    tiltlm("score", f"classifier:{judge_run}:bad", "y.jsonl", "--out", "bad.jsonl", cwd=work)
    good, bad = ([json.loads(x)["reward"] for x in (work / f"{n}.jsonl").open()] for n in ("good", "bad"))
    assert [math.exp(a) + math.exp(b) for a, b in zip(good, bad, strict=True)] == pytest.approx(
        [1, 1], rel=FLOAT32
    )
    for name, message in (
        (f"classifier:{judge_run}:fine", "it has bad, good"),
        ("sentiment:6", "there is no reward"),
    ):
        refused = tiltlm("score", name, "y.jsonl", "--out", "no.jsonl", cwd=work, check=False)
        assert refused.returncode == 2 and message in refused.stderr
    short = ["--log-z.draws", "400", "--test.n", "40"]
    done = tiltlm("run", "sentiment-small/untrained", *OWN, *judge, *FEW, *short, cwd=work)
    found = {row["metric"]: row["value"] for row in rows_of(work / done.stdout.splitlines()[-1])}
    assert found["reward"] < 0 and found["kl_to_target"] < 2
    a_run_is_a_classifier_s_name(work, judge_run, found["reward"], short)


def a_run_is_a_classifier_s_name(work: Path, judge_run: str, reward: float, short: list[str]) -> None:
    """`--goal.classifier RUN` is the classifier trained there, and a sum of rewards states the terms it is made of."""
    goal = ["--goal.classifier", judge_run, "--goal.label"]
    refused = tiltlm("run", "sentiment-small/untrained", *OWN, *FEW, *short, *goal, "fine", cwd=work, check=False)
    assert refused.returncode == 2 and "has no class 'fine'; it has bad, good" in refused.stderr
    (work / "length.py").write_text("def f(prompts, completions):\n    return [len(y) for y in completions]\n")
    named = f"classifier:{judge_run}:good"
    flags = ["--goal.reward", "file", "--goal.file", f"{named} - 0.01*length.py:f"]
    refused = tiltlm("run", "sentiment-small/untrained", *OWN, *FEW, *short, *flags, cwd=work, check=False)
    assert refused.returncode == 2 and "an upper bound of the reward" in refused.stderr
    done = tiltlm("run", "sentiment-small/untrained", *OWN, *FEW, *short, *flags, "--goal.r-max", "0", cwd=work)
    found = {row["metric"]: row for row in rows_of(work / done.stdout.splitlines()[-1])}
    parts = [found[f"reward[{name}]"]["value"] for name in (named, "length.py:f")]
    assert parts[0] == pytest.approx(
        reward, abs=1e-6
    )  # the same draws of the reference, judged by the same classifier
    assert found["reward"]["value"] == pytest.approx(parts[0] - 0.01 * parts[1], abs=1e-6) and parts[1] > 1
    assert found["reward[length.py:f]"]["unit"] == "reward"


def test_a_reward_of_one_s_own_file(work):
    (work / "mine.py").write_text(
        "def short(prompts, completions):\n    return [-len(y) / 10 for y in completions]\n"
    )
    flags = ["--goal.reward", "file", "--goal.file", "mine.py:short", "--goal.r-max", "0"]
    done = tiltlm(
        "run", "animals-small/untrained", *OWN, *FEW, *flags, "--log-z.draws", "400", "--test.n", "40", cwd=work
    )
    assert rows_of(work / done.stdout.splitlines()[-1])[0]["metric"] == "reward"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["animals-small/untrained", "--goal.beta", "0"], "beta must be positive"),
        (["animals-small/evaluate", "--methods", "ctk"], r"unknown methods \['ctk'\]"),
        (["sentiment-small/classifier", "--classify.data", "no.csv"], "no.csv: no such file"),
        (["animals-small/reference", "--language.model", "gpt2"], "there is nothing to train"),
        (
            ["animals-small/exact", "--language.model", "no/such"],
            "'no/such' is no folder or hub name",
        ),
        (["animals-small/exact", "--goal.words", "Dog"], "words are looked for"),
        (["infill2-small/untrained", "--log-z.by", "reference"], "log Z of its own"),
        (["infill2-small/bounds"], "each condition has one exact draw"),
    ],
)
def test_mistakes_are_named(work, args, message):
    own = [] if "--language.model" in args or args[0].endswith("classifier") else [*OWN, *FEW]
    if args[0].endswith("bounds"):
        own += ["--ctl.fit.pace.steps", "1", "--ctl.conditions", "2", "--ctl.particles", "3"]
    done = tiltlm("run", *args, *own, cwd=work, check=False)
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr


# ---- what is refused before any work, and what does not fool the ruler --------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["infill2-small/exact", "--goal.beta", "0.5"], "at beta 1 alone"),
        (["infill2-small/exact", "--goal.kind", "probability"], "kind probability"),
        (["infill2-small/bounds"], "each condition has one exact draw"),
        (["infill2-small/reach"], "each condition has one exact draw"),
        (["animals-small/frontier", "--frontier.methods", "best"], r"unknown methods \['best'\]"),
        (["animals-small/untrained", "--goal.reward", "continuation"], "name the text that must follow"),
        (["animals-small/ctl", "--ctl.fit.batch-size", "500"], "does nothing"),
        (["animals-small/fudge", "--fudge.dpg", "0.5"], "FUDGE draws from the reference"),
        (["animals-small/fudge", "--fudge.positives", "exact"], "set prefixes and positives together"),
        (["animals-small/ctl", "--ctl.supply", "stored"], "set positives to exact or csmc"),
        (["animals-small/evaluate", "--goal.reward", "file", "--goal.file", "none.py:f"], "none.py: no such file"),
        (["animals-small/ctl", "--test.n", "-5"], "n of Test must be 1 or more; got -5"),
        (["animals-small/ctl", "--exact.n", "0"], "n of ExactSettings must be 1 or more"),
        (["animals-small/ctl", "--language.new-tokens", "0"], "new-tokens of Language must be 1 or more"),
        (["animals-small/ctl", "--ctl.particles", "0"], "particles of LearnCTL must be 1 or more"),
        (["animals-small/evaluate", "--log-z.by", "enumeration"], "infill with one token to follow"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else x,
)
def test_refused_before_any_work(tmp_path, args, message):
    done = tiltlm("run", *args, "--language.model=", cwd=tmp_path, check=False)
    said = re.sub(r"[\s│]+", " ", done.stderr + done.stdout)
    assert done.returncode == 2 and re.search(message, said), said
    assert not list(tmp_path.glob("runs/**/config.json"))


def test_stored_draws_for_training_are_not_those_for_measuring():
    value = recipe("animals-small/dpg")

    stored = replace(value, dpg=replace(value.dpg, positives="exact", supply="stored"))
    trained = stored.inputs()["trained"]
    assert trained.inputs()["training"].key != stored.inputs()["exact"].key


def test_a_file_of_one_s_own_that_changes_makes_another_run_and_the_old_one_stays_readable(work):
    def run() -> str:
        flags = ["--goal.reward", "file", "--goal.file", "changing.py:f", "--goal.r-max", "0"]
        flags += ["--log-z.draws", "400", "--test.n", "40"]
        return tiltlm("run", "animals-small/untrained", *OWN, *FEW, *flags, cwd=work).stdout.splitlines()[-1]

    (work / "changing.py").write_text("def f(x, y):\n    return [-len(a) / 10 for a in y]\n")
    first = run()
    (work / "changing.py").write_text("def f(x, y):\n    return [-len(a) / 20 for a in y]\n")
    second = run()
    assert first != second and run() == second
    elsewhere = work / "elsewhere"
    elsewhere.mkdir()
    for place, path in ((work, first), (elsewhere, f"../{first}")):
        assert "finished runs" in tiltlm("measure", path, cwd=place).stdout
        tiltlm("report", path, "--out", "old.html", cwd=place)
    said = tiltlm("measure", first, second, cwd=work)
    assert "KL(q‖ref)" in said.stdout


def test_a_mistake_in_a_function_of_one_s_own_names_its_line(work):
    (work / "broken.py").write_text(
        "def f(x, y):\n    return [1 / 0 for _ in y]\n\ndef lines(rows):\n    return [0.0] * len(rows)\n"
    )
    flags = ["--goal.r-max", "0", "--goal.reward", "file", "--goal.file", "broken.py:f"]
    done = tiltlm("run", "animals-small/exact", *OWN, *flags, cwd=work, check=False)
    assert done.returncode == 2 and "broken.py:f failed at line 2: ZeroDivisionError" in done.stderr
    flags[-1] = "broken.py:lines"
    done = tiltlm("run", "animals-small/exact", *OWN, *flags, cwd=work, check=False)
    assert (
        done.returncode == 2
        and "takes one argument (rows): a reward is f(prompts, completions, **columns)" in done.stderr
    )


def test_stored_draws_of_another_length_are_refused(work, compared):
    kept = next((work / "runs/animals-small/exact").glob("*/exact.safetensors"))
    flags = [*OWN, "--language.new-tokens", "5", "--exact.stored", str(kept)]
    done = tiltlm("run", "animals-small/exact", *flags, cwd=work, check=False)
    assert done.returncode == 2 and "holds draws of 4 tokens, the settings want 5" in done.stderr


def test_samples_of_infilling_are_weighed_condition_by_condition(work):
    flags = [
        *OWN,
        "--language.new-tokens",
        "2",
        "--ctl.fit.pace.steps",
        "1",
        "--ctl.conditions",
        "2",
        "--ctl.particles",
        "3",
    ]
    done = tiltlm("run", "infill2-small/qualitative", *flags, "--shown.particles", "6", cwd=work)
    rows = [json.loads(line) for line in (work / done.stdout.splitlines()[-1] / "samples.jsonl").open()]
    assert len(rows) == 18
    for k in range(3):
        own = [row["weight"] for row in rows[6 * k : 6 * k + 6]]
        assert own == sorted(own, reverse=True) and math.isclose(sum(own), 1, rel_tol=FLOAT32)


def test_a_reward_without_a_bound_has_a_log_z_in_doubt_and_no_curve_of_the_optimum(tmp_path, monkeypatch):
    """Exact draws may come from a file then, and the frontier wants none: neither may end in a demand for a bound."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def f(prompts, completions):\n    return [len(y) for y in completions]\n")
    goal = Goal(reward="file", file="mine.py:f")
    log_z = replace(recipe("animals-small/log-z"), goal=goal)
    assert log_z.log_w_max is None and replace(log_z, goal=replace(goal, r_max=2.0, beta=0.5)).log_w_max == 4
    with pytest.raises(ValueError, match=r"--log-z.width wants a certificate.*--goal.r-max"):
        stored = replace(log_z, exact=replace(log_z.exact, stored="mine.py"))
        replace(stored, log_z=replace(log_z.log_z, width=0.1)).check()
    assert optimum_s_curve(goal) == ([], [])


def test_log_z_by_rejection_of_stored_draws_is_refused_before_any_work(tmp_path):
    (tmp_path / "exact.safetensors").touch()
    value = recipe("animals-small/log-z")
    how = replace(value.log_z, by="rejection")
    with pytest.raises(ValueError, match=r"searched for here: leave --exact\.stored out"):
        replace(value, log_z=how, exact=replace(value.exact, stored=str(tmp_path / "exact.safetensors"))).check()


@pytest.mark.parametrize("stage", ["bounds", "reach"])
def test_figures_of_bounds_that_contradict_each_other_are_errors(tmp_path, monkeypatch, stage):
    """Lower bounds a nat above the upper ones, as exact draws of another target give them."""
    noise = 0.01 * stream(0, "crossed").uniform(range(20), 2)
    crossed = Bounds(
        {(4, "twist", "smc-ess", side): noise[:, k, None] - k for k, side in enumerate(("lower", "upper"))}
    )
    monkeypatch.setattr(twisted_report, "bound_repeats", lambda *args, **options: crossed)
    exact = SimpleNamespace(load=lambda path: exact, to=lambda device: exact)
    monkeypatch.setattr(twisted_report, "Samples", exact)
    lab = SimpleNamespace(device="cpu", target=None, prompt=None, width=4, stream=stream(0))
    kept = SimpleNamespace(folder=tmp_path, recipe=SimpleNamespace(lab=lambda run: lab, twist_of=lambda run: None))
    for kind in (twisted_report.BoundsFigure, twisted_report.ReachFigure):
        monkeypatch.setattr(kind, "lab", lambda figure, run: lab)
        monkeypatch.setattr(kind, "exact_of", lambda figure, run: exact)
    figure, inputs = recipe(f"animals-small/{stage}"), dict.fromkeys(["twist", "twist 4", "exact 4"], kept)
    if stage == "reach":
        figure = replace(figure, reach=replace(figure.reach, lengths=(4,)))
    with pytest.raises(ValueError, match="lie above the upper ones"):
        figure.build(Run(figure, tmp_path, inputs))


def optimum_s_curve(goal: Goal) -> tuple[list[float], list[float]]:
    """The curve of the optimum, of a lab that only says whether it has conditions."""
    figure = replace(recipe("animals-small/frontier"), goal=goal)
    lab = SimpleNamespace(conditioned=False)
    return figure.curve_of_optimum(SimpleNamespace(recipe=SimpleNamespace(lab=lambda run: lab)))

"""Methods on a text task from the command line: variants of training, log Z, curves; nothing learns anything here."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from command import tiltlm
from tiltlm.ruler.log_z import LogZ

OWN = ["--task.model=", "--task.stories", "200", "--task.new-tokens", "4", "--task.fit.steps", "6"]
OWN += ["--task.fit.warmup", "1", "--exact.n", "20", "--exact.batch-size", "200"]
SHORT = ["--log-z.draws", "400", "--ruler.n", "40"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """One folder for the whole file: the model and whatever else stages share is made once."""
    return tmp_path_factory.mktemp("methods")


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "report.json").read_text())


def learning(*args: str) -> list[str]:
    """The options that a stage of training has: no log Z and no ruler."""
    return [*OWN, *args]


@pytest.mark.parametrize("positives", ["exact", "csmc"])
def test_positives_from_exact_draws_and_conditional_smc(work, positives):
    flags = ["--fit.steps", "2", "--feed.particles", "5", "--feed.positives", positives]
    for supply in ("fresh", "stored"):
        tiltlm("run", "animals/ctl-twist", *learning(*flags, "--feed.supply", supply), cwd=work)


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("ctl-twist", ["--method.contrast", "next"]),
        ("ctl-dpg-twist", ["--net.body", "frozen", "--net.mlp-layers", "1"]),
        ("ctl-twist", ["--feed.tempered", "0.5", "--net.body", "lora"]),
        ("sixo-twist", ["--feed.drawn-by", "resampled"]),
        ("rl-twist", ["--method.target", "linear", "--feed.drawn-by", "mixed"]),
        ("rl-twist", ["--method.target", "mean", "--method.multi-step", "0.5", "--feed.drawn-by", "reference"]),
        ("rl-twist", ["--feed.drawn-by", "exact"]),
        ("fudge-twist", ["--feed.prefixes", "--feed.positives", "exact"]),
        ("ppo-policy", ["--net.policy", "full"]),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_every_variant_of_the_training_trains(work, stage, flags):
    size = ["--fit.batch-size", "6"] if stage.startswith("ppo") else ["--feed.particles", "6"]
    done = tiltlm("run", f"animals/{stage}", *learning("--fit.steps", "2", *size, *flags), cwd=work)
    folder = work / done.stdout.splitlines()[-1]
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert (folder / "checkpoint-2" / "COMPLETE").is_file()


def test_kept_checkpoints_make_a_curve(work):
    flags = ["--fit.steps", "4", "--feed.particles", "6", "--fit.keep", "1", "2", "--ruler.checkpoints", "3"]
    done = tiltlm("run", "animals/ctl", *OWN, *SHORT, *flags, cwd=work)
    curve = json.loads((work / done.stdout.splitlines()[-1] / "curve.json").read_text())
    assert sorted({row["updates"] for row in curve}) == [1, 2, 4]
    assert {row["metric"] for row in curve} >= {"kl_to_target", "kl_from_target"}


def test_a_measured_method_can_be_sampled_from(work):
    flags = ["--fit.steps", "2", "--feed.particles", "6"]
    folder = tiltlm("run", "animals/ctl", *OWN, *SHORT, *flags, cwd=work).stdout.splitlines()[-1]
    (work / "p.jsonl").write_text('{"prompt": "Once upon a time"}\n')
    tiltlm("sample", folder, "--prompts", "p.jsonl", "--n", "3", "--out", "y.jsonl", cwd=work)
    lines = [json.loads(line) for line in (work / "y.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(len(line["completion_ids"]) == 4 for line in lines)


def test_log_z_by_bounds_gives_intervals(work):
    flags = ["--log-z.by", "bounds", "--log-z.particles", "4", "--log-z.repeats", "5", "--ruler.n", "40"]
    flags += ["--fit.steps", "2", "--feed.particles", "6", "--twist.fit.steps", "2", "--twist.feed.particles", "6"]
    done = tiltlm("run", "animals/ctl", *OWN, *flags, cwd=work)
    row = {row["metric"]: row for row in rows_of(work / done.stdout.splitlines()[-1])}["kl_to_target"]
    (kept,) = (work / "runs/animals/log-z").glob("*/bounds.json")
    log_z = LogZ.from_json(json.loads(kept.with_name("log_z.json").read_text()))
    own = math.sqrt(row["stderr"] ** 2 - row["stderr_log_z"] ** 2)
    long = row["high"] - row["low"]
    assert 0 < log_z.width < long < log_z.width + 2 * 2.1 * own and "fewer than 10 repeats" in row["doubt"]


def test_log_z_is_drawn_until_its_certificate_is_as_narrow_as_asked(work):
    flags = ["--log-z.width", "0.5", "--log-z.draws", "100", "--log-z.batch-size", "100", "--log-z.limit", "400"]
    done = tiltlm("run", "animals/log-z", *OWN, *flags, cwd=work)
    log_z = LogZ.from_json(json.loads((work / done.stdout.splitlines()[-1] / "log_z.json").read_text()))
    low, high = log_z.certificate
    assert high - low <= 0.5 and "certified, 95%" in done.stdout
    short = tiltlm("run", "animals/log-z", *OWN, *flags[:-1], "1", cwd=work)
    assert "nats wide at the limit, not 0.5: raise --log-z.limit" in " ".join(short.stderr.split())
    bounds = [*flags[:2], "--log-z.by", "bounds", "--log-z.particles", "8", "--log-z.repeats", "5"]
    train = ["--twist.fit.steps", "2", "--twist.feed.particles", "6"]
    done = tiltlm("run", "animals/log-z", *OWN, *train, *bounds, cwd=work)
    (row, _) = json.loads((work / done.stdout.splitlines()[-1] / "bounds.json").read_text())
    assert row["repeats"] > 5 and row["repeats"] % 5 == 0
    wrong = ["--log-z.width", "0.1", "--log-z.by", "rejection"]
    refused = tiltlm("run", "animals/log-z", *OWN, *wrong, cwd=work, check=False)
    assert refused.returncode == 2
    assert "certificate goes with --log-z.by" in re.sub(r"[\s│]+", " ", refused.stderr)


def test_log_z_by_rejection_is_read_off_the_search(work):
    done = tiltlm("run", "animals/log-z", *OWN, "--log-z.by", "rejection", cwd=work)
    assert "draws of the reference kept by rejection" in done.stdout and "certified, 95%" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["animals/reference", "--task.beta", "0"], "beta must be positive"),
        (["animals/evaluate", "--methods", "ctk"], "there is no method 'ctk'. Did you mean ctl"),
        (["animals/frontier", "--methods", "ctk"], "there is no method 'ctk'. Did you mean ctl"),
        (["infill2-small/reference", "--log-z.by", "reference"], "log Z of its own"),
        (["infill2-small/exact", "--task.beta", "0.5"], "at beta 1 alone"),
        (["animals/fudge", "--feed.prefixes"], "set positives to exact or csmc as well; got positives particles"),
        (["animals/ctl", "--feed.supply", "stored"], "set positives to exact or csmc"),
        (["animals/ctl", "--ruler.n", "-5"], "n of RulerSettings must be 1 or more; got -5"),
        (["animals/ctl", "--exact.n", "0"], "n of ExactSettings must be 1 or more"),
        (["animals/ctl", "--task.new-tokens", "0"], "new-tokens of Language must be 1 or more"),
        (["animals/ctl", "--feed.particles", "0"], "particles of TwistFeed must be 1 or more"),
        (["animals/ctl", "--log-z.by", "enumeration"], "infill with one token to follow"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else x,
)
def test_refused_before_any_work(tmp_path, args, message):
    done = tiltlm("run", *args, "--task.model=", cwd=tmp_path, check=False)
    said = re.sub(r"[\s│]+", " ", done.stderr + done.stdout)
    assert done.returncode == 2 and message in said, said
    assert not list(tmp_path.glob("runs/**/config.json"))

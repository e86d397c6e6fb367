"""Twisted SMC from the command line, with networks too small and too short to learn anything."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from close import FLOAT32
from command import tiltlm
from tiltlm.commands.options import from_json
from tiltlm.data.stories import train_tokenizer
from tiltlm.feeds import TwistFeed
from tiltlm.methods import names
from tiltlm.recipes import preset_of, recipe, tasks, twisted_smc
from tiltlm.recipes.stages import COMMON
from tiltlm.tasks.mine import Mine
from tiltlm.twists.ctl import CTL
from tiltlm.twists.dpg import DPG
from tiltlm.twists.fudge import FudgeLearning
from tiltlm.twists.mixture import Mixture

OWN = ["--task.model=", "--task.stories", "200", "--task.new-tokens", "4", "--task.fit.steps", "6"]
OWN += ["--task.fit.warmup", "1", "--exact.n", "20", "--exact.batch-size", "200"]
SHORT = ["--log-z.draws", "400", "--ruler.n", "40"]
QUICK = ["--fit.steps", "2", "--feed.particles", "6"]
MEASURED = ("reference", "ctl", "rl", "sixo", "fudge", "dpg", "ppo", "q-sharp", "cd", "sft", "rloo", "dpo", "rpo")
ALL = [*OWN, *SHORT, *QUICK, "--fit.batch-size", "6", "--methods", *MEASURED]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """One folder for the whole file: the model and whatever else stages share is made once."""
    return tmp_path_factory.mktemp("twisted")


@pytest.fixture(scope="module")
def compared(work) -> Path:
    """The run that compares all methods."""
    done = tiltlm("run", "animals/evaluate", *ALL, cwd=work)
    return work / done.stdout.splitlines()[-1]


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("task", twisted_smc.TASKS)
def test_every_stage_is_in_the_catalogue_and_every_preset_is_a_value(task):
    own = preset_of(task).task.stages(0)
    for stage in (*names(), *COMMON, "evaluate", "frontier", "value", "ctl-twist", "ppo-policy", *own):
        value = recipe(f"{task}/{stage}")
        assert value.name == f"{task}/{stage}" and from_json(value, as_json(value)) == value
    assert task in tasks()


def as_json(value) -> dict:
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
    assert table["reference", "kl_to_reference"]["value"] == 0
    assert table["reference", "kl_to_target"]["value"] > 0
    assert (compared / "kl.png").stat().st_size > 5000


def test_a_finished_comparison_is_shown_again_not_made_again(compared, work):
    again = tiltlm("run", "animals/evaluate", *ALL, cwd=work)
    assert "KL(pi*‖q)" in again.stdout and "log Z " in again.stdout and "certified, 95%" in again.stdout
    assert "->" not in again.stderr and again.stdout.splitlines()[-1] == str(compared.relative_to(work))


def test_runs_are_compared_in_pairs_by_measure(compared, work):
    known = {path.parent.name for path in work.glob("runs/animals/*/*") if (path / "DONE").is_file()}
    pair = [
        tiltlm("run", f"animals/{name}", *OWN, *SHORT, *QUICK, cwd=work).stdout.splitlines()[-1]
        for name in ("ctl", "dpg")
    ]
    assert known == {path.parent.name for path in work.glob("runs/animals/*/*")}  # those of the comparison
    said = tiltlm("measure", *pair, cwd=work).stdout
    assert "KL(q‖pi*)" in said and "KL(pi*‖q)" in said and ("no difference shown" in said or "higher" in said)


def test_a_comparison_draws_nothing_itself(compared, work):
    """What a single method's run does is in test_text_methods.py."""
    (work / "p.jsonl").write_text('{"prompt": "Once upon a time"}\n')
    comparison = str(compared.relative_to(work))
    done = tiltlm("sample", comparison, "--prompts", "p.jsonl", "--out", "z.jsonl", cwd=work, check=False)
    assert done.returncode == 2 and "name the run of one of them" in done.stderr


def test_infilling_with_every_twist_and_exact_log_z(work, monkeypatch):
    """A vocabulary of 270 (bytes and little more): log Z sums over its square."""
    monkeypatch.setattr("tiltlm.stages.reference.train_tokenizer", lambda texts, size: train_tokenizer(texts, 270))
    flags = [*OWN, "--task.new-tokens", "2", "--task.stories", "201", "--ruler.prompts", "5", "--ruler.n", "4"]
    flags += ["--fit.steps", "2", "--feed.prompts", "5", "--ctl.feed.prompts", "2", "--ctl.feed.particles", "3"]
    flags += ["--fit.batch-size", "8", "--ppo.feed.n", "2", "--q-sharp.feed.n", "2", "--cd.feed.n", "2"]
    done = tiltlm("run", "infill2-small/evaluate", *flags, cwd=work)
    folder = work / done.stdout.splitlines()[-1]
    rows = {(row["method"], row["metric"]): row for row in rows_of(folder)}
    assert rows["ctl", "kl_to_target"]["n"] == 5 and "stderr_log_z" not in rows["ctl", "kl_to_target"]
    assert {m for m, _ in rows} == {"reference", "ctl", "rl", "sixo", "fudge", "dpg", "ppo", "q-sharp", "cd"}
    shown = [json.loads(line) for line in (folder.parents[1] / "ctl").glob("*/samples.jsonl").__next__().open()]
    assert all("must follow" in row for row in shown)


def test_a_classifier_of_one_s_own_is_trained_and_leaned_on(work):
    rows = [("good fun", 1), ("what a joy", 1), ("bad and dull", 0), ("a sad bore", 0)] * 10
    (work / "mine.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    judge = ["--classify.data", "mine.csv", "--classify.text", "text", "--classify.label", "label"]
    judge += ["--classify.classes", "1=good", "0=bad", "--classify.fit.steps", "4", "--classify.fit.warmup", "1"]
    judge += ["--classify.fit.batch-size", "8"]
    own = ["--base.stories", "200", "--base.fit.steps", "6", "--base.fit.warmup", "1", "--model="]
    done = tiltlm("run", "sentiment-small/classifier", *own, *judge, "--task.label", "good", cwd=work, check=False)
    assert done.returncode == 2 and "no option --task.label" in done.stderr  # the classifier has no goal
    done = tiltlm("run", "sentiment-small/classifier", *own, *judge, cwd=work)
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
    leaned = [flag.replace("--classify", "--task.classify") for flag in judge] + ["--task.label", "good"]
    done = tiltlm("run", "sentiment-small/reference", *OWN, *leaned, *SHORT, cwd=work)
    found = {row["metric"]: row["value"] for row in rows_of(work / done.stdout.splitlines()[-1])}
    assert found["reward"] < 0 and found["kl_to_target"] < 2
    (made,) = (work / "runs/sentiment-small/classifier").iterdir()  # the task leans on that very run
    assert str(made.relative_to(work)) == judge_run
    a_run_is_a_classifier_s_name(work, judge_run, found["reward"])


def a_run_is_a_classifier_s_name(work: Path, judge_run: str, reward: float) -> None:
    """`--task.classifier RUN` is the classifier trained there, and a sum of rewards states the terms it is made of."""
    goal = ["--task.classifier", judge_run, "--task.label"]
    refused = tiltlm("run", "sentiment-small/reference", *OWN, *SHORT, *goal, "fine", cwd=work, check=False)
    assert refused.returncode == 2 and "has no class 'fine'; it has bad, good" in refused.stderr
    done = tiltlm("run", "sentiment-small/reference", *OWN, *SHORT, *goal, "good", cwd=work)
    found = {row["metric"]: row["value"] for row in rows_of(work / done.stdout.splitlines()[-1])}
    assert found["reward"] == pytest.approx(reward, abs=1e-6)
    (work / "length.py").write_text("def f(prompts, completions):\n    return [len(y) for y in completions]\n")
    named = f"classifier:{judge_run}:good"
    flags = [*OWN, "--task.reward", f"{named} - 0.01*length.py:f"]
    refused = tiltlm("run", "mine/exact", *flags, cwd=work, check=False)
    assert refused.returncode == 2 and "an upper bound of the reward" in refused.stderr
    done = tiltlm("run", "mine/reference", *flags, *SHORT, "--task.r-max", "0", cwd=work)
    found = {row["metric"]: row for row in rows_of(work / done.stdout.splitlines()[-1])}
    parts = [found[f"reward[{name}]"]["value"] for name in (named, "length.py:f")]
    assert found["reward"]["value"] == pytest.approx(parts[0] - 0.01 * parts[1], abs=1e-6) and parts[1] > 1
    assert found["reward[length.py:f]"]["unit"] == "reward"
    drawn = [json.loads(line) for line in (work / done.stdout.splitlines()[-1] / "samples.jsonl").open()]
    (work / "drawn.jsonl").write_text("".join(json.dumps(row | {"reward": None}) + "\n" for row in drawn))
    tiltlm("score", f"{named} - 0.01*length.py:f", "drawn.jsonl", "--out", "judged.jsonl", cwd=work)
    judged = [json.loads(line)["reward"] for line in (work / "judged.jsonl").open()]
    assert [row["reward"] for row in drawn] == pytest.approx(judged, abs=2e-4)  # by the same classifier


# ---- a reward of one's own ------------------------------------------------------------------------------------


def test_a_reward_of_one_s_own_file(work):
    (work / "mine.py").write_text(
        "def short(prompts, completions):\n    return [-len(y) / 10 for y in completions]\n"
    )
    flags = ["--task.reward", "mine.py:short", "--task.r-max", "0"]
    done = tiltlm("run", "mine/reference", *OWN, *SHORT, *flags, cwd=work)
    assert rows_of(work / done.stdout.splitlines()[-1])[0]["metric"] == "reward"


def test_a_file_of_one_s_own_that_changes_makes_another_run_and_the_old_one_stays_readable(work):
    def run() -> str:
        flags = ["--task.reward", "changing.py:f", "--task.r-max", "0", "--task.prompts", "asked.txt"]
        return tiltlm("run", "mine/reference", *OWN, *SHORT, *flags, cwd=work).stdout.splitlines()[-1]

    (work / "asked.txt").write_text("Once upon a time\nOne day\n")

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
    flags = ["--task.r-max", "0", "--task.reward", "broken.py:f"]
    done = tiltlm("run", "mine/exact", *OWN, *flags, cwd=work, check=False)
    assert done.returncode == 2 and "broken.py:f failed at line 2: ZeroDivisionError" in done.stderr
    flags[-1] = "broken.py:lines"
    done = tiltlm("run", "mine/exact", *OWN, *flags, cwd=work, check=False)
    assert (
        done.returncode == 2
        and "takes one argument (rows): a reward is f(prompts, completions, **columns)" in done.stderr
    )


def test_a_reward_without_a_bound_has_a_log_z_without_a_certificate(tmp_path, monkeypatch):
    """Exact draws may come from a file then: no demand for a bound may end what wants none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def f(prompts, completions):\n    return [len(y) for y in completions]\n")
    log_z = replace(recipe("mine/log-z"), task=Mine(reward="mine.py:f"))
    log_z.check()
    free, bound = log_z.task.facts(), replace(log_z.task, r_max=2.0, beta=0.5).facts()
    assert log_z.log_w_max(problem_of(free)) is None and log_z.log_w_max(problem_of(bound)) == 4
    with pytest.raises(ValueError, match=r"--log-z.width wants a certificate.*--task.r-max"):
        stored = replace(log_z, exact=replace(log_z.exact, stored="mine.py"))
        replace(stored, log_z=replace(log_z.log_z, width=0.1)).check()


def problem_of(facts):
    """No more of a problem than a bound of its weights asks for."""
    return SimpleNamespace(facts=facts, beta=facts.beta)


# ---- what is refused before any work ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sentiment-small/classifier", "--classify.data", "no.csv"], "no.csv: no such file"),
        (["animals/base", "--task.model", "gpt2"], "animals/base has no option --task.model"),
        (["animals/exact", "--task.model", "no/such"], "'no/such' is no folder or hub name"),
        (["animals/exact", "--task.words", "Dog"], "words are looked for"),
        (["infill2-small/bounds"], "each condition has one exact draw"),
        (["infill2-small/reach"], "each condition has one exact draw"),
        (["continuation/reference", "--task.continuation="], "name the text that must follow"),
        (["animals/ctl", "--fit.batch-size", "500"], "--fit.batch-size 500 does nothing"),
        (["animals/ctl-twist", "--fit.batch-size", "500"], "its particles (--feed.particles) times its prompts"),
        (["animals/bounds", "--twist.fit.batch-size", "500"], "does nothing"),
        (["animals/evaluate", "--ctl.fit.batch-size", "500"], "does nothing"),
        (["animals/fudge", "--feed.drawn-by", "mixed"], "FUDGE draws from the reference"),
        (["animals/fudge", "--feed.tempered", "0.5"], "FUDGE draws from the reference"),
        (["animals/fudge", "--feed.positives", "exact"], "set prefixes and positives together"),
        (["animals/fudge-twist", "--feed.positives", "csmc"], "got prefixes False, positives csmc"),
        (["animals/ctl", "--feed.prefixes", "--feed.positives", "exact"], "leave --feed.prefixes out"),
        (["animals/ctl-dpg", "--feed.prefixes", "--feed.positives", "csmc"], "prefixes with labels of their own"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else x,
)
def test_refused_before_any_work(tmp_path, args, message):
    named = "--task.model" in args or args[0].endswith("classifier")
    done = tiltlm("run", *args, *([] if named else ["--task.model="]), cwd=tmp_path, check=False)
    said = re.sub(r"[\s│]+", " ", done.stderr + done.stdout)
    assert done.returncode == 2 and message in said, said
    assert not list(tmp_path.glob("runs/**/config.json"))


def test_fudge_takes_what_it_looks_at():
    """Its own settings and the papers'; of no other objective prefixes."""
    value = recipe("animals/fudge")
    for feed in (
        TwistFeed(),
        TwistFeed(positives="exact", prefixes=True),
        TwistFeed(positives="csmc", prefixes=True),
    ):
        replace(value, feed=feed).check()
    assert recipe("infill2/fudge").feed.prefixes


def test_no_mixture_holds_a_probability_and_another_objective():
    with pytest.raises(ValueError, match="no mixture holds both"):
        Mixture(FudgeLearning(), DPG())
    with pytest.raises(ValueError, match="no mixture holds both"):
        Mixture(CTL(), FudgeLearning())


def test_log_z_by_rejection_of_stored_draws_is_refused_before_any_work(tmp_path):
    (tmp_path / "exact.safetensors").touch()
    value = recipe("animals/log-z")
    how = replace(value.log_z, by="rejection")
    with pytest.raises(ValueError, match=r"searched for here: leave --exact\.stored out"):
        replace(value, log_z=how, exact=replace(value.exact, stored=str(tmp_path / "exact.safetensors"))).check()

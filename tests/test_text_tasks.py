"""The tasks on text, with networks too small and too short to learn anything."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from close import FLOAT32
from command import tiltlm
from tiltlm.data.stories import train_tokenizer
from tiltlm.device import check_devices
from tiltlm.feeds import TwistFeed
from tiltlm.fit import Fit
from tiltlm.problem import Problem
from tiltlm.recipes import preset_of, recipe, twisted_smc
from tiltlm.rewards.classifier import FLOOR
from tiltlm.ruler.bounds import Bounds
from tiltlm.run import Run, ensure
from tiltlm.samples import conditions_of
from tiltlm.seeds import stream
from tiltlm.stages import bounds as bounds_stage
from tiltlm.stages import reach as reach_stage
from tiltlm.stages.classifier import ClassifierSettings
from tiltlm.stages.exact import Exact, ExactSettings
from tiltlm.tasks.classified import Classified
from tiltlm.tasks.continuation import Continuation
from tiltlm.tasks.infill import Infill
from tiltlm.tasks.language import Language
from tiltlm.tasks.words import Words

TINY = Language(stories=200, new_tokens=4, fit=Fit(lr=3e-3, steps=6, warmup=1, batch_size=32))
OWN = ["--task.model=", "--task.stories", "200", "--task.new-tokens", "4", "--task.fit.steps", "6"]
OWN += ["--task.fit.warmup", "1", "--exact.n", "20", "--exact.batch-size", "200"]
TWIST = ["--twist.fit.steps", "2", "--twist.feed.particles", "6"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """One folder for the whole file: the model and whatever else stages share is made once."""
    return tmp_path_factory.mktemp("text")


def built(task, work: Path) -> Problem:
    """The task's problem, what it needs built."""
    runs = {name: ensure(needed, work / "runs") for name, needed in task.needs(0).items()}
    return task.problem(runs, 0)


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "report.json").read_text())


# ---- the tasks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", twisted_smc.TASKS)
def test_every_preset_is_a_value_with_cells_that_make_sense(name):
    found = preset_of(name)
    facts = found.task.facts()
    assert found.task.name == name and facts.r_max == 0 and set(found.methods) - set(found.cells) == {"reference"}
    assert all(cell.why_not(facts) is None for cell in found.cells.values())
    assert {metric for _, metric in found.expected} <= {"kl_to_target", "kl_from_target"}


def test_words_are_counted_in_the_completion_and_drawn_exactly(work):
    problem = built(Words(TINY, words=("the", "a", "and"), name="animals"), work)
    assert problem.prompts["train"] is problem.prompts["test"] and len(problem.prompts["test"]) == 1
    drawn = problem.exact_draws(problem.prompts["test"], 200, stream(1))
    row = problem.rows(drawn)[0]
    hits = sum(word in ("the", "a", "and") for word in row["completion"].lower().replace(".", " ").split())
    assert row["prompt"] == "Once upon a time, there was a"
    assert row["reward"] == pytest.approx(-math.log1p(math.exp(5 - 5 * hits)), rel=1e-5)
    assert problem.stream == stream(0, "twisted") and problem.width == 4


def test_a_copy_to_train_has_no_dropout_and_leaves_the_reference_alone(work):
    problem = built(Words(TINY, name="animals"), work)
    copied = problem.copy()
    assert all(p.requires_grad for p in copied.parameters()) and not any(
        p.requires_grad for p in problem.reference.parameters()
    )
    assert all(module.p == 0 for module in copied.modules() if isinstance(module, torch.nn.Dropout))


def test_prompt_ids_take_the_prompt_s_place(work):
    problem = built(Words(replace(TINY, prompt_ids=(0, 5, 7)), name="animals"), work)
    assert problem.prompts["test"].lists() == [[0, 5, 7]]


def test_what_ends_a_completion_is_no_part_of_its_reward(work):
    problem = built(Words(replace(TINY, stop=("5", "6")), name="animals"), work)
    assert problem.reference.eos_ids == (5, 6)


def test_infilling_draws_conditions_with_an_exact_draw_each(work):
    problem = built(Infill(replace(TINY, new_tokens=3), condition_tokens=2, name="infill2-small"), work)
    prompts, exact = problem.fresh(5, stream(1))
    assert conditions_of(prompts).ids.shape == (5, 2) and exact.tokens.shape == (5, 3)
    again = problem.target.reward(exact)
    assert torch.allclose(again, exact.reward.to(again), atol=1e-4) and problem.facts.conditioned


def test_a_continuation_is_rewarded_by_its_probability(work):
    log = built(Continuation(TINY, continuation=" little girl", name="animals"), work)
    plain = built(Continuation(TINY, continuation=" little girl", kind="probability", name="animals"), work)
    drawn = plain.exact_draws(plain.prompts["test"], 20, stream(1))
    assert torch.allclose(log.target.reward(drawn).exp(), plain.target.reward(drawn)) and plain.facts.r_max == 1


def test_a_classifier_of_one_s_own_is_trained_and_leaned_on(work):
    fit = Fit(lr=1e-3, steps=4, warmup=1, batch_size=8)
    task = Classified(TINY, label="positive", classify=ClassifierSettings(fit=fit), name="sentiment-small")
    run = ensure(task.needs(0)["classifier"], work / "runs")
    report = {(row["method"], row["metric"]): row for row in rows_of(run.folder)}
    assert report["classifier", "accuracy"]["n"] == 800 and report["classifier", "loss"]["unit"] == "nats"
    problem, above = built(task, work), built(replace(task, threshold=0.0), work)
    drawn = problem.exact_draws(problem.prompts["test"], 50, stream(1))
    log_p, hit = problem.target.reward(drawn), above.target.reward(drawn)
    assert bool((log_p < 0).all()) and torch.equal(hit == 0, log_p > math.log(0.5))
    assert above.facts.atoms == (FLOOR, 0.0) and set(hit.tolist()) <= {0.0, torch.tensor(FLOOR).item()}
    (named,) = {str(run.folder)}
    assert (
        built(replace(task, classifier=named, name="animals"), work).target.reward(drawn).tolist()
        == log_p.tolist()
    )


def test_the_own_model_does_not_depend_on_what_is_asked_of_it():
    first, second = (
        Words(TINY, name="x"),
        Words(replace(TINY, new_tokens=9, prompt="A dog"), ("cat",), 0.5, name="x"),
    )
    assert first.needs(0)["base"].key == second.needs(0)["base"].key
    assert first.needs(1)["base"].key != first.needs(0)["base"].key


def test_the_device_is_called_as_on_the_command_line():
    value = Exact(Words(replace(TINY, device="cudo"), name="x"))
    with pytest.raises(ValueError, match=r"^--task\.device cudo: there is no such device"):
        check_devices(value)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Words(TINY, beta=0), "beta must be positive"),
        (lambda: Words(TINY, words=("Dog",)), "words are looked for as single lower-case words"),
        (lambda: Infill(TINY, beta=0.5), "at beta 1 alone; got beta 0.5"),
        (lambda: Infill(TINY).at(0.5), "at beta 1 alone"),
        (lambda: Infill(replace(TINY, stop=("5",))).check(), "leave --task.stop out"),
        (lambda: Continuation(TINY).check(), "name the text that must follow, --task.continuation TEXT"),
        (lambda: Classified(TINY).check(), "--task.label NAME"),
        (lambda: Classified(TINY, label="cross").check(), "no class 'cross'; it has negative, positive"),
        (lambda: Words(replace(TINY, new_tokens=600)).check(), "holds 512 tokens: lower --task.new-tokens"),
        (lambda: replace(TINY, new_tokens=0), "new-tokens of Language must be 1 or more"),
    ],
)
def test_mistakes_are_named_before_any_work(made, message):
    with pytest.raises(ValueError, match=message):
        made()


def test_files_that_are_not_there_are_named():
    task = Classified(TINY, label="a", classify=ClassifierSettings(data=("no.csv",)))
    with pytest.raises(FileNotFoundError, match=r"no\.csv: no such file \(--task\.classify\.data\)"):
        task.check()
    with pytest.raises((ValueError, OSError), match="'no/such' is no folder or hub name"):
        Words(replace(TINY, model="no/such")).check()


# ---- exact draws ----------------------------------------------------------------------------------------------------


def test_stored_exact_draws_of_another_target_or_length_are_refused(work):
    task = Words(TINY, words=("the", "a"), name="animals")
    few = ExactSettings(n=20, batch_size=200)
    kept = ensure(Exact(task, few), work / "runs").folder / "exact.safetensors"
    stored = replace(few, stored=str(kept))
    for other, message in (
        (replace(task, words=("dog", "and")), "the exact draws are of another target: their reward is"),
        (replace(task, beta=0.5), "the exact draws are of beta 1, the target's beta is 0.5"),
        (task.at_length(5), "holds draws of 4 tokens, the settings want 5"),
    ):
        with pytest.raises(ValueError, match=message):
            ensure(Exact(other, stored), work / "runs")
    assert ensure(Exact(task, stored), work / "runs").done


def test_stored_draws_for_training_are_not_those_for_measuring():
    value = recipe("animals/dpg")
    stored = replace(value, feed=TwistFeed(positives="exact", supply="stored"))
    assert stored.inputs()["learnt"].inputs()["training"].key != stored.inputs()["exact"].key


# ---- figures ----------------------------------------------------------------------------------------------------


def test_bounds_around_log_z(work):
    flags = [*TWIST, "--bounds.particles", "2", "8", "--bounds.repeats", "20"]
    done = tiltlm("run", "animals/bounds", *OWN, *flags, cwd=work)
    folder = work / done.stdout.splitlines()[-1]
    assert len(json.loads((folder / "bounds.json").read_text())) == 2 * 2 * 3 * 2  # particles, proposals, …, sides
    assert (folder / "bounds.png").stat().st_size > 5000
    assert "log Z lies between" in done.stdout and "gap" in done.stdout
    assert len(rows_of(folder)) == 24 and rows_of(folder)[0]["metric"] == "log_z_lower"


def test_reach_at_growing_lengths(work):
    flags = ["--reach.lengths", "2", "4", "--reach.particles", "4", "--reach.repeats", "5"]
    done = tiltlm("run", "animals/reach", *OWN, *TWIST, *flags, cwd=work)
    assert "2 tokens, iwae, 4 particles" in done.stdout and "4 tokens, smc-ess, 4 particles" in done.stdout
    folder = work / done.stdout.splitlines()[-1]
    found = {(row["method"], row["metric"]): row["value"] for row in rows_of(folder)}
    metrics = ("certified_low", "certified_high", "log_z_lower")
    low, high, lower = (found["2 tokens, iwae, 4 particles", m] for m in metrics)
    assert low == pytest.approx(lower - math.log(40) / 5) and high > lower and "certified from" in done.stdout
    assert load_file(str(folder / "bounds_4.safetensors"))["4/twist/iwae/lower"].shape == (5, 1)


def test_samples_by_weight_with_their_trace(work):
    flags = [*TWIST, "--shown.particles", "8", "--shown.threshold", "1"]
    done = tiltlm("run", "animals/qualitative", *OWN, *flags, cwd=work)
    folder = work / done.stdout.splitlines()[-1]
    weights = [json.loads(line)["weight"] for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert weights == sorted(weights, reverse=True) and math.isclose(sum(weights), 1, rel_tol=FLOAT32)
    trace = json.loads((folder / "trace.json").read_text())
    assert len(trace["ess"]) == 5 and len(trace["ancestors"]) == 4 and len(trace["pieces"]) == 8
    assert (folder / "ess.png").stat().st_size > 5000 and (folder / "genealogy.png").stat().st_size > 5000


def test_samples_of_infilling_are_weighed_condition_by_condition(work):
    flags = ["--twist.fit.steps", "1", "--twist.feed.prompts", "2", "--twist.feed.particles", "3"]
    done = tiltlm(
        "run",
        "infill2-small/qualitative",
        *OWN,
        "--task.new-tokens",
        "2",
        *flags,
        "--shown.particles",
        "6",
        cwd=work,
    )
    rows = [json.loads(line) for line in (work / done.stdout.splitlines()[-1] / "samples.jsonl").open()]
    assert len(rows) == 18
    for k in range(3):
        own = [row["weight"] for row in rows[6 * k : 6 * k + 6]]
        assert own == sorted(own, reverse=True) and math.isclose(sum(own), 1, rel_tol=FLOAT32)


def test_the_frontier_trains_and_measures_at_every_beta(work):
    flags = ["--at", "1", "0.5", "--log-z.draws", "400", "--ruler.n", "40", "--fit.steps", "2"]
    size = ["--ctl.feed.particles", "6", "--ppo.fit.batch-size", "6"]
    done = tiltlm("run", "animals/frontier", *OWN, *flags, *size, cwd=work)
    folder = work / done.stdout.splitlines()[-1]
    points = list(dict.fromkeys((row["method"], row["beta"]) for row in rows_of(folder)))
    assert points == [("ctl (beta 1)", 1), ("ppo (beta 1)", 1), ("ctl (beta 0.5)", 0.5), ("ppo (beta 0.5)", 0.5)]
    optimum = json.loads((folder / "optimum.json").read_text())
    assert len(optimum) > 5 and [p["reward"] for p in optimum] == sorted(p["reward"] for p in optimum)
    assert (folder / "frontier.png").stat().st_size > 5000


def test_where_nothing_bounds_the_reward_no_curve_of_the_optimum_is_drawn(work):
    problem = built(Words(TINY, name="animals"), work)
    unknown = replace(problem, facts=replace(problem.facts, r_max=None))
    figure = recipe("animals/frontier")
    assert figure.curve_of_optimum(unknown) is None
    assert figure.curve_of_optimum(replace(problem, facts=replace(problem.facts, prompts="several"))) is None


@pytest.mark.parametrize("stage", ["bounds", "reach"])
def test_bounds_of_infilling_and_of_too_few_exact_draws_are_refused(stage):
    with pytest.raises(ValueError, match="each condition has one exact draw"):
        recipe(f"infill2-small/{stage}").check()
    value = recipe(f"animals/{stage}")
    with pytest.raises(ValueError, match=f"raise --exact.n to 20, or lower --{stage}.repeats"):
        replace(value, exact=ExactSettings(n=5)).check()


@pytest.mark.parametrize("stage", ["bounds", "reach"])
def test_figures_of_bounds_that_contradict_each_other_are_errors(work, tmp_path, monkeypatch, stage):
    """Lower bounds a nat above the upper ones, as exact draws of another target give them."""
    noise = 0.01 * stream(0, "crossed").uniform(range(20), 2)
    sides = enumerate(("lower", "upper"))
    crossed = Bounds({(4, "twist", "smc-ess", side): noise[:, k, None] - k for k, side in sides})
    task = Words(TINY, name="animals")
    kept = ensure(Exact(task, ExactSettings(n=20, batch_size=200)), work / "runs")
    twist = SimpleNamespace(recipe=SimpleNamespace(decoder=lambda run: SimpleNamespace(twist=None)))
    for module in (bounds_stage, reach_stage):
        monkeypatch.setattr(module, "bound_repeats", lambda *args, **options: crossed)
    figure = replace(recipe(f"animals/{stage}"), task=task)
    inputs = {"base": kept.inputs["base"], "exact": kept, "exact 4": kept, "twist": twist, "twist 4": twist}
    if stage == "reach":
        figure = replace(figure, reach=replace(figure.reach, lengths=(4,)))
    with pytest.raises(ValueError, match="lie above the upper ones"):
        figure.build(Run(figure, tmp_path, inputs))


# ---- infilling, measured ----------------------------------------------------------------------------------------


def test_infilling_with_exact_log_z(work, monkeypatch):
    """A vocabulary of 270 (bytes and little more): log Z sums over its square."""
    monkeypatch.setattr("tiltlm.stages.reference.train_tokenizer", lambda texts, size: train_tokenizer(texts, 270))
    own = [*OWN, "--task.new-tokens", "2", "--task.stories", "201", "--ruler.prompts", "5", "--ruler.n", "4"]
    feeds = {"ctl": ("--feed.prompts", "2", "--feed.particles", "3"), "dpg": ("--feed.prompts", "5")}
    feeds |= dict.fromkeys(("ppo", "q-sharp"), ("--fit.batch-size", "8"))
    for method, feed in feeds.items():
        done = tiltlm("run", f"infill2-small/{method}", *own, "--fit.steps", "2", *feed, cwd=work)
        folder = work / done.stdout.splitlines()[-1]
        rows = {row["metric"]: row for row in rows_of(folder)}
        assert rows["kl_to_target"]["n"] == 5 and "stderr_log_z" not in rows["kl_to_target"]
        assert all("must follow" in json.loads(line) for line in (folder / "samples.jsonl").open())


def test_infilling_with_log_z_between_bounds(work):
    few = ["--log-z.prompts", "6", "--log-z.particles", "4", "16", "--ruler.n", "5", "--fit.steps", "2"]
    few += ["--feed.prompts", "2", "--feed.particles", "3", "--twist.fit.steps", "2", "--twist.feed.prompts", "2"]
    flags = [*OWN, "--task.new-tokens", "3", *few, "--twist.feed.particles", "3"]
    done = tiltlm("run", "infill15-small/ctl", *flags, "--ruler.prompts", "6", cwd=work)
    row = {row["metric"]: row for row in rows_of(work / done.stdout.splitlines()[-1])}["kl_to_target"]
    assert row["n"] == 6 and row["stderr_log_z"] == 0 and row["high"] - row["low"] > 2 * 1.96 * row["stderr"]
    done = tiltlm("run", "infill15-small/ctl", *flags, "--ruler.prompts", "7", cwd=work)
    assert "measured on the 6 prompts whose log Z is known, of 7" in done.stderr
    row = {row["metric"]: row for row in rows_of(work / done.stdout.splitlines()[-1])}["kl_to_target"]
    assert row["n"] == 6


def test_policies_that_see_no_conditions_refuse_infilling(work):
    for name, flags in (("dpo", ["--net.policy", "full"]), ("ppo", ["--net.policy", "full"])):
        done = tiltlm("run", f"infill2-small/{name}", *OWN, *flags, cwd=work, check=False)
        assert done.returncode == 2 and "does not see what must follow" in done.stderr
        assert "--net.policy head" in done.stderr

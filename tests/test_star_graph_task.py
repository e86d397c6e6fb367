"""The star graph as a task: its problem against enumeration, its own rows, its keys, the paper's settings."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tiltlm.data.star_graph_pairs import read_pairs
from tiltlm.data.star_graph_tokens import check
from tiltlm.data.star_graph_world import World
from tiltlm.exact import kl, log_density, solve
from tiltlm.fit import Fit
from tiltlm.models.teacherless import Teacherless
from tiltlm.recipes import preset_of
from tiltlm.recipes.stages import measured, stage_of
from tiltlm.run import Run, ensure
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Conditioned, Samples, conditions_of
from tiltlm.stages.measure import RulerSettings, ruler_of
from tiltlm.stages.star_graph import RolloutSettings
from tiltlm.stages.star_graph_bench import Network
from tiltlm.tasks.star_graph import StarGraph, right_path
from tiltlm.twists.value import Decode

TINY = StarGraph(
    World(posttrain=40, test=6), Network(layers=1, width=16, heads=2, mlp=16), Fit(lr=2e-3, steps=150, batch_size=16)
)  # fmt: skip
FEW = {"steps": 4, "warmup": 0, "until": 0.0, "watch": (), "batch_size": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("star")


def runs_of(task: StarGraph, root) -> dict[str, Run]:
    return {name: ensure(needed, root) for name, needed in task.needs(0).items()}


@pytest.fixture(scope="module")
def problem(root):
    return TINY.problem(runs_of(TINY, root), 0)


# ---- the problem ---------------------------------------------------------------------------------------------------------


def test_log_z_and_pi_star_are_those_of_enumeration(problem):
    """All 14³ completions of every test graph, at two temperatures: log Z, E_q[r], and pi*'s own row."""
    prompts = problem.prompts["test"]
    for beta in (0.1, 1.0):
        at = problem.at(beta)
        solved = solve(at.target, prompts, at.width)
        torch.testing.assert_close(at.log_z(prompts, beta), solved.log_z.double(), atol=1e-4, rtol=0)
        expected = (solved.log_ref.exp() * solved.reward).sum(1)
        torch.testing.assert_close(at.expected_reward(at.reference, prompts), expected, atol=1e-6, rtol=1e-4)
        found = at.optimum(ruler_of(at, RulerSettings(n=1))).values
        star = (solved.log_pi_star.exp() * solved.reward).sum(1)
        torch.testing.assert_close(found["reward"].float(), star, atol=1e-4, rtol=0)
        far = kl(solved.log_pi_star, solved.log_ref)
        torch.testing.assert_close(found["kl_to_reference"].float(), far, atol=2e-3, rtol=0)
        valid = problem.checks["valid_rate"](solved.samples).reshape(solved.reward.shape)
        rate = (solved.log_pi_star.exp() * valid).sum(1)
        torch.testing.assert_close(found["valid_rate"].float(), rate, atol=1e-4, rtol=0)


def test_rewards_and_checks_know_their_prompts_whichever_are_asked(problem):
    """Right answers have reward 1 for any prompts in any order; checks are those of the key for the first ones."""
    train, test = problem.prompts["train"], problem.prompts["test"]
    some = train.select(torch.tensor([7, 3, 30]))
    right = conditions_of(some)
    shuffled = Samples(some, torch.tensor([2, 0, 1, 1]), right.ids[[2, 0, 1, 0]], right.mask[[2, 0, 1, 0]])
    assert right_path(shuffled).tolist() == [1.0, 1.0, 1.0, 0.0]
    first = test.select(slice(0, 4))
    arms = TINY.bench(0).tokenizer.key(TINY.bench(0).graphs("test")).arms[:4]
    for column in range(2):
        rows = Samples(first, torch.arange(4), arms[:, column], torch.ones_like(arms[:, column], dtype=torch.bool))
        assert bool(problem.checks["valid_rate"](rows).all())
        exact = (arms[:, column] == conditions_of(first).ids).all(1)
        assert torch.equal(problem.checks["accuracy"](rows), exact)
    assert not problem.facts.conditioned and isinstance(test, Conditioned)


def test_fewer_test_graphs_are_the_first_of_them(problem):
    whole, few = (ruler_of(problem, RulerSettings(n=1, prompts=k)) for k in (0, 3))
    a, b = whole.measure(problem.reference)[0].values, few.measure(problem.reference)[0].values
    for metric in ("reward", "log_z", "accuracy", "kl_to_target"):
        torch.testing.assert_close(b[metric], a[metric][:3], atol=1e-5, rtol=0)
    further = problem.further(problem.reference, few.prompts)
    assert len(further["forced_loss"]) == 3
    log_p = log_density(problem.reference, answers(few.prompts))
    torch.testing.assert_close(further["forced_loss"].float(), -log_p, atol=1e-5, rtol=0)


def answers(prompts: Conditioned) -> Samples:
    right = prompts.conditions
    return Samples(prompts, torch.arange(len(prompts)), right.ids, right.mask)


# ---- its own rows --------------------------------------------------------------------------------------------------------


def test_its_own_rows_are_pairs_right_paths_and_labelled_draws(problem, root):
    pairs, values, right = (problem.own[kind]("train") for kind in ("pairs", "values", "answers"))
    stored = read_pairs(runs_of(TINY, root)["rollouts"].folder / "pairs.jsonl").pairs
    assert torch.equal(pairs.chosen.tokens, stored.chosen.tokens) and 1 <= len(pairs) <= 40
    for side in (pairs.chosen, pairs.rejected):
        log_ref = problem.reference.log_prob(side)
        torch.testing.assert_close(side.log_ref, log_ref.detach(), atol=1e-6, rtol=0)
    assert len(values) == 80 and torch.equal(values.reward, right_path(values))
    assert bool((right_path(right) == 1).all()) and len(right) == 40
    with pytest.raises(ValueError, match="train on alone"):
        problem.own["pairs"]("valid")


def test_values_may_learn_from_both_sides_of_the_pairs(root):
    task = replace(TINY, values="pairs", rollouts=RolloutSettings(n=0))
    problem = task.problem(runs_of(task, root), 0)
    values = problem.own["values"]("train")
    n = len(values) // 2
    assert values.reward.tolist() == [1.0] * n + [0.0] * n
    rate = log_density(problem.reference, answers(problem.prompts["train"])).exp().mean().item()
    assert problem.log_odds() == pytest.approx(torch.logit(torch.tensor(rate)).item(), abs=1e-4)
    assert not (runs_of(task, root)["rollouts"].folder / "rollouts.safetensors").exists()


# ---- runs ----------------------------------------------------------------------------------------------------------------


def tiny(name: str, task: StarGraph = TINY, **changed):
    made = measured(replace(preset_of("star-graph"), task=task), name)
    fit = replace(made.fit, **FEW)
    return replace(made, fit=fit, ruler=replace(made.ruler, prompts=5, also=(1.0,)), **changed)


def test_a_value_reports_itself_and_is_measured_at_other_temperatures(root):
    run = ensure(tiny("q-sharp"), root)
    learnt = json.loads((run.inputs["learnt"].folder / "report.json").read_text())
    metrics = [row["metric"] for row in learnt]
    assert metrics[:3] == ["value_loss_1", "value_loss_2", "value_loss_3"] and "p_wrong_3" in metrics
    assert {row["method"] for row in learnt} == {"value"} and learnt[0]["n"] == 6
    rows = json.loads((run.folder / "report.json").read_text())
    log_z = {row["method"]: row["value"] for row in rows if row["metric"] == "log_z"}
    assert list(log_z) == ["q-sharp", "q-sharp (beta 1)"] and log_z["q-sharp"] > log_z["q-sharp (beta 1)"]
    again = ensure(tiny("cd"), root)
    assert again.inputs["learnt"].folder == run.inputs["learnt"].folder  # one value serves all rules


def test_a_comparison_ends_in_the_originals_file(root):
    run = ensure(replace(stage_of(replace(preset_of("star-graph"), task=TINY), "evaluate", ("dpo", "q-sharp")),
                         cells={name: tiny(name).cell for name in ("dpo", "q-sharp")}), root)  # fmt: skip
    found = json.loads((run.folder / "results_deg_2_path_3.json").read_text())
    assert set(found) == {"dpo", "q# (0.1)"}
    rows = json.loads((run.folder / "report.json").read_text())
    assert any(row["method"] == "optimum (exact)" for row in rows)
    forced = [row["metric"] for row in rows if row["method"] == "dpo" and row["metric"].startswith("forced")]
    assert forced == ["forced_loss", "forced_accuracy", "forced_token_1", "forced_token_2", "forced_token_3"]


def test_a_teacherless_world_trains_and_refuses_a_language_modelling_loss(root):
    task = replace(TINY, world=replace(TINY.world, teacherless=True))
    problem = task.problem(runs_of(task, root), 0)
    assert isinstance(problem.reference, Teacherless)
    run = ensure(tiny("dpo", task), root)
    policy = run.recipe.decoder(run)
    assert isinstance(policy, Teacherless) and policy.tokenizer is not None
    with pytest.raises(ValueError, match="reads no answers"):
        tiny("q-sharp", task).check()


def test_written_graphs_are_read_back(root):
    written = ensure(replace(TINY, world=replace(TINY.world, pretrain=20)).stages(0)["graphs"], root)
    assert sorted(path.name for path in written.folder.glob("*.txt")) == [
        f"deg_2_path_3_nodes_10_{n}_{split}.txt" for n, split in ((20, "pretrain"), (40, "posttrain"), (6, "test"))
    ]
    read = replace(TINY, world=replace(TINY.world, folder=str(written.folder), posttrain=30))
    read.check()
    ours, theirs = (task.bench(0).prompts(task.bench(0).graphs("posttrain")) for task in (TINY, read))
    assert torch.equal(theirs.ids, ours.ids[:30]) and torch.equal(theirs.conditions.ids, ours.conditions.ids[:30])


# ---- keys and refusals -------------------------------------------------------------------------------------------------


def test_a_key_moves_with_what_its_result_depends_on_alone():
    def keys(task: StarGraph) -> tuple[str, str]:
        return tuple(each.key for each in task.needs(0).values())

    base, rollouts = keys(TINY)
    same = replace(TINY, beta=2.0, values="pairs", device="auto", world=replace(TINY.world, test=7))
    assert keys(same) == (base, rollouts)
    assert keys(replace(TINY, rollouts=RolloutSettings(batch_size=3))) == (base, rollouts)
    assert keys(replace(TINY, world=replace(TINY.world, posttrain=41)))[0] == base
    assert keys(replace(TINY, world=replace(TINY.world, posttrain=41)))[1] != rollouts
    assert keys(replace(TINY, rollouts=RolloutSettings(n=3)))[1] != rollouts
    assert keys(replace(TINY, world=replace(TINY.world, degree=3)))[0] != base
    assert keys(replace(TINY, network=replace(TINY.network, layers=2)))[0] != base
    assert tiny("dpo", replace(TINY, beta=0.7)).learn().key == tiny("dpo").learn().key  # its own beta is 0.1


def test_what_cannot_be_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="labelled draws"):
        StarGraph(rollouts=RolloutSettings(n=0))
    with pytest.raises(ValueError, match="beta"):
        StarGraph(beta=0.0)
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl: no such file"):
        tiny("dpo", replace(TINY, rollouts=RolloutSettings(pairs="gone.jsonl"))).check()
    with pytest.raises(ValueError, match="must hold one file"):
        tiny("dpo", replace(TINY, world=replace(TINY.world, folder=str(tmp_path)))).check()
    with pytest.raises(ValueError, match="measures nothing"):
        TINY.needs(0)["base"].__class__(replace(TINY, base=Fit(evaluations=2))).check()
    calibrated = replace(tiny("q-sharp").method, decode=Decode(calibrate=True))
    with pytest.raises(ValueError, match="needs none"):
        tiny("q-sharp", method=calibrated).check()


# ---- the paper -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "degree", "length", "network"),
    [("star-graph-g25", 2, 5, "gpt2"), ("star-graph-g55", 5, 5, "gpt2"), ("star-graph-g38", 3, 8, "gpt2-medium")],
)
def test_the_papers_settings(name, degree, length, network):
    """Appendix C, and the original's README: batches of 256, 10 epochs of 200,000 graphs, lr 1e-4 (REINFORCE 1e-5)."""
    preset = preset_of(name)
    task, cells = preset.task, preset.cells
    assert (task.world.degree, task.world.path_length, task.world.nodes) == (degree, length, 50)
    assert (task.world.pretrain, task.world.posttrain, task.world.test) == (200_000, 200_000, 20_000)
    assert task.network.name == task.network.tokenizer == network and preset.seed == 1337
    assert task.world.imitate == "goal" and task.values == "pairs" and task.rollouts.n == 0
    assert (task.base.lr, task.base.steps, task.base.batch_size, task.base.weight_decay) == (
        2.5e-4,
        23_430,
        256,
        0.1,
    )
    for method in ("dpo", "rpo", "q-sharp", "cd"):
        fit = cells[method].fit
        assert (fit.lr, fit.steps, fit.warmup, fit.batch_size) == (1e-4, 7810, 781, 256)
    assert cells["reinforce"].fit == replace(cells["dpo"].fit, lr=1e-5) and cells["reinforce"].method.beta == 0
    assert cells["q-sharp"].method.decode.top_k == 10 and cells["q-sharp"].net.start == "untrained"
    assert task.beta == cells["dpo"].method.beta == cells["rpo"].method.beta == 0.1
    assert preset.ruler.prompts == 20_000 and preset.ruler.n == 1


def test_the_key_to_the_answers_is_the_tokenizers(problem):
    """`check` with the whole key, on the reference's own draws, against the problem's checks."""
    bench = TINY.bench(0)
    drawn = draw(problem.reference, problem.prompts["test"], n=50, max_new_tokens=3, stream=problem.stream)
    found = check(drawn, bench.tokenizer.key(bench.graphs("test")))
    assert torch.equal(problem.checks["accuracy"](drawn), found.exact)
    assert torch.equal(problem.checks["valid_rate"](drawn), found.valid_arm)
    assert torch.equal(problem.checks["token_2"](drawn), found.per_token[:, 1])

"""What stands on the report page, by hand: verdicts, warnings, stages apart from methods, curves, samples, seeds."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from test_compare import Aim, Other, Third, Toy, noise, run_of
from tiltlm.commands.compared import contestants, what_differs
from tiltlm.commands.page_curves import POINTS, by_metric, curves, thinned
from tiltlm.commands.page_samples import SamplesTable, choice
from tiltlm.commands.page_tables import alike, result_tables, verdict, verdicts, warnings, wide
from tiltlm.commands.report import pieces
from tiltlm.recipes import recipe
from tiltlm.ruler.estimate import Estimate, t_975
from tiltlm.ruler.judge import doubt
from tiltlm.ruler.table import over_seeds
from tiltlm.run import Run


@dataclass(frozen=True)
class Judge(Toy):
    stage: ClassVar[str] = "reward-model"


@pytest.fixture
def three(tmp_path) -> list[Run]:
    """toy a nat above other, prompt by prompt; third within noise of toy."""
    shared = noise("page prompts", 30)
    values = {
        Other: shared,
        Toy: shared + 1 + 0.1 * noise("toy", 30),
        Third: shared + 1 + 0.1 * noise("third", 30),
    }
    return [run_of(tmp_path, kind(), {"objective": x, "reward": 2 * x}) for kind, x in values.items()]


def test_the_verdict_says_who_is_ahead_of_whom(three):
    found = verdict(contestants(three))
    names = [row["method"] for row in found["rows"]]
    assert set(names[:2]) == {"toy", "third"} and names[2] == "other"
    said = [row["verdict"] for row in found["rows"]]
    assert said[0] == "the highest" and said[1].startswith("not shown to be behind (would show 0.")
    assert said[2] == "shown to be behind (p < 0.001)"
    assert found["title"] == f"{names[0]} has the highest J, shown against other; not told apart from {names[1]}"
    assert found["rows"][2]["behind by"]["v"] == pytest.approx(1, abs=0.1) and "Trained once" in found["about"]


def test_two_that_are_apart_and_two_that_are_not(three):
    other, toy, third = three
    assert verdict(contestants([other, toy]))["title"] == "toy is ahead in J, shown against every other method"
    assert verdict(contestants([toy, third]))["title"].startswith(
        "No method is shown to be ahead in J; the highest is t"
    )
    assert verdict(contestants([toy])) is None


def test_a_verdict_names_those_it_does_not_speak_of(three):
    other, toy, third = contestants(three)
    found = verdict([other, toy], [other, toy, third])
    assert found["title"] == "toy is ahead in J, shown against every other method of this table"
    assert "Not compared with these (other prompts, seeds, reference or target): third. " in found["about"]


def test_methods_of_another_target_are_judged_by_themselves(tmp_path):
    runs = [
        run_of(tmp_path, kind(Aim(reward=reward)), {"objective": noise(f"{reward} {kind.stage}", 9)})
        for reward in ("r", "s")
        for kind in (Toy, Other)
    ]
    assert [len(group) for group in alike(contestants(runs))] == [2, 2] and len(verdicts(runs)) == 2


def accuracies(own: tuple[float, float, float], ahead: tuple[float, float, float]) -> list[dict]:
    rows = {"reward model": own, "the longer response wins": (0.6, 0.5, 0.7), "reward model − longer wins": ahead}
    named = [{"method": name, "value": v, "low": low, "high": high} for name, (v, low, high) in rows.items()]
    return [row | {"metric": "accuracy", "n": 128, "stderr": 0.04, "seed": 0, "recipe": "f/r"} for row in named]


def test_a_reward_model_no_better_than_a_coin_or_length_is_said_in_words(tmp_path):
    coin = doubt(accuracies((0.55, 0.46, 0.64), (-0.05, -0.1, 0.0)))
    length = doubt(accuracies((0.66, 0.58, 0.75), (0.06, -0.03, 0.14)))
    assert "0.550 (95%: 0.460 to 0.640) on 128 pairs, not shown to be better than a coin" in coin
    assert "than the rule that the longer response wins (0.600; difference 0.060 (95%: -0.030 to 0.140))" in length
    assert doubt(accuracies((0.75, 0.67, 0.83), (0.25, 0.14, 0.36))) is None and doubt([]) is None
    names = {
        "the longer response wins": "the commoner verdict",
        "reward model − longer wins": "reward model − commoner verdict",
    }
    verdicts = [
        row | {"method": names.get(row["method"], row["method"])}
        for row in accuracies((0.8, 0.7, 0.9), (0.0, -0.1, 0.1))
    ]
    assert "on 128 verdicts, not shown to be better than always the commoner one (0.600;" in doubt(verdicts)
    assert "difference 0.000 (" in doubt(accuracies((0.75, 0.67, 0.83), (0.0, None, None)))  # alike on every pair
    run = run_of(tmp_path, Judge(), {"accuracy": noise("judge", 3)})
    (run.folder / "report.json").write_text(json.dumps(accuracies((0.55, 0.46, 0.64), (-0.05, -0.1, 0.0))))
    (said,) = warnings([run])
    assert said.startswith("f/reward-model, seed 0: the reward model") and "coin" in said


def test_stages_that_are_no_methods_stand_apart_a_line_a_number(three, tmp_path):
    run = run_of(tmp_path, Judge(), {"accuracy": noise("judge", 3)})
    (run.folder / "measurement.safetensors").unlink()
    (run.folder / "report.json").write_text(json.dumps(accuracies((0.7, 0.6, 0.8), (0.1, 0.0, 0.2))))
    methods, way = result_tables([*three, run])
    assert {row["method"] for row in methods["rows"]} == {"toy", "other", "third"}
    assert way["title"] == "f: on the way" and way["rows"][0]["what"] == "reward model"
    assert all(row["stage"] == "reward-model" and row["metric"] == "accuracy" for row in way["rows"])


def test_curves_are_thinned_to_means_and_skip_what_is_no_number(tmp_path):
    points = [[float(k), float(k)] for k in range(10 * POINTS)]
    found = thinned(points)
    assert len(found) == POINTS and found[0] == [9.0, 4.5] and found[-1][0] == 10 * POINTS - 1
    assert thinned([[0, 1.0]]) == [[0, 1.0]] and thinned([]) == []
    rows = [{"step": 1, "loss": 2.0, "note": "x", "bad": float("nan"), "flag": True}, {"step": 2, "loss": 1.0}]
    assert by_metric(rows) == {"loss": [[1, 2.0], [2, 1.0]]}
    assert curves(tmp_path) == {}
    (tmp_path / "evals.jsonl").write_text(json.dumps({"step": 3, "objective": 0.5}) + "\n")
    assert curves(tmp_path) == {"on the way: objective": [[3, 0.5]]}
    rows = [{"method": "ctl", "metric": "reward", "value": v, "updates": k} for k, v in ((10, 0.5), (20, 0.7))]
    (tmp_path / "curve.json").write_text(json.dumps(rows))
    assert curves(tmp_path)["measured: reward"] == [[10, 0.5], [20, 0.7]]
    (tmp_path / "curve.json").write_text(json.dumps([*rows, rows[0] | {"method": "dpo"}]))
    assert "measured: reward" not in curves(tmp_path)  # a comparison: its methods have curves of their own


def test_a_verdict_over_seeds_averages_them(tmp_path):
    runs = []
    for seed in (0, 1, 2):
        shared = noise(f"seed {seed}", 8)
        runs += [
            run_of(tmp_path, kind(seed=seed), {"objective": shared + up}) for kind, up in ((Toy, 1), (Other, 0))
        ]
    found = verdict(contestants(runs))
    means = torch.stack([noise(f"seed {seed}", 8).mean() for seed in (0, 1, 2)])
    assert found["rows"][0]["J"]["v"] == pytest.approx(float(means.mean()) + 1)
    assert "Over 3 seeds" in found["about"]


def test_a_method_that_shares_no_seed_with_the_highest_is_not_called_the_highest(tmp_path):
    """other was trained from two seeds, each of the rest from one: the rest are never compared with each other."""
    made = ((Other, 0, 0.0), (Other, 1, 0.0), (Toy, 0, 2.0), (Third, 1, 1.0))
    runs = [
        run_of(tmp_path, kind(seed=seed), {"objective": noise(f"seed {seed}", 30) + up}) for kind, seed, up in made
    ]
    (group,) = alike(contestants(runs))
    found = verdict(group)
    said = {row["method"]: row["verdict"] for row in found["rows"]}
    assert said["toy"] == "the highest" and said["third"] == "not compared with the highest: no seed in common"
    assert "not told apart from third" in found["title"]


# ---- samples ------------------------------------------------------------------------------------------------


def test_rows_go_to_the_page_one_by_one(tmp_path):
    """16 MB of samples are written with less than 1 MB in memory."""
    line = json.dumps({"completion": "x" * 16_000}) + "\n"
    run = run_of(tmp_path, Toy(), {"reward": noise("toy", 3)})
    (run.folder / "samples.jsonl").write_text(line * 1000)
    tracemalloc.start()
    table = SamplesTable([run], {run.folder: "it"}, 1000, tmp_path / "page.html").table()
    written = sum(map(len, pieces({"samples": table})))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written > 16e6 and peak < 1e6


def test_where_rewards_say_nothing_all_are_random_and_what_is_no_number_is_not_extreme(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"reward": 1}\n{"reward": 1.0}\n' * 20 + '{"reward": null}\n' * 60)
    assert set(choice(path, 100, 40).values()) == {"at random"} and len(choice(path, 100, 40)) == 40
    path.write_text('{"reward": NaN}\n' * 50 + '{"reward": 1}\n{"reward": Infinity}\n' + '{"reward": NaN}\n' * 48)
    found = choice(path, 100, 4)
    assert found[51] == "highest reward" and found[50] == "lowest reward" and len(found) == 4


# ---- the numbers over seeds ---------------------------------------------------------------------------------


def test_students_quantiles_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 5, 10, 11, 20, 100, 10_000):
        assert t_975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-4)
    with pytest.raises(ValueError, match="at least one degree"):
        t_975(0)


def test_over_three_seeds_by_hand():
    """1, 2, 3: mean 2, standard error 1/√3, t(2) = 4.3027: 2 ± 2.484."""
    rows = [
        {"method": "a", "metric": "m", "seed": k, "value": v, "stderr": 0.1, "certified": v - 1}
        for k, v in enumerate((1.0, 2.0, 3.0))
    ]
    (row,) = over_seeds(rows)
    assert "certified" not in row  # one seed's alone
    assert row["n"] == 3 and row["stderr"] == pytest.approx(3**-0.5)
    assert (row["low"], row["high"]) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert Estimate(1.0, 0.1, 1).interval() == (-torch.inf, torch.inf)


def test_a_bracketed_log_z_stays_an_interval_over_seeds():
    rows = [
        {
            "method": "a",
            "metric": "m",
            "value": v,
            "stderr": 0.1,
            "low": v - 1,
            "high": v + 2,
            "gap": 3.0,
            "seed": v,
        }
        for v in (1.0, 2.0)
    ]
    (row,) = over_seeds(rows)
    half = (
        12.7062 * 0.5
    )  # Student's t with two seeds: the spread over seeds is in it, beyond the bracket's mean ends
    assert (row["low"], row["high"], row["gap"]) == pytest.approx((0.5 - half, 3.5 + half, 3.0), abs=1e-3)
    assert wide([row], "t", "")["rows"][0]["m"]["t"] == "[-5.853, 9.853]"


def test_runs_that_differ_in_more_than_the_seed_are_told_apart():
    one = recipe("animals/ctl")
    other = replace(one, task=one.task.at(0.1))
    assert what_differs([one, other, replace(one, seed=7)]) == ["task.beta=1.0", "task.beta=0.1", "task.beta=1.0"]
    assert what_differs([one, replace(one, seed=7)]) == ["", ""]
    policy = recipe("animals/rloo")
    parts = replace(policy, fit=replace(policy.fit, shard=True, checkpoint_every=5))
    assert what_differs([policy, parts]) == ["", ""]  # nothing of it changes a result
    assert what_differs([one, recipe("animals/dpg")]) == ["", ""]  # other stages are no variants

"""Intervals hold as often as they say, or say that they may not; tables print no certainty that draws do not give."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console

from tiltlm.ruler.agreement import possible
from tiltlm.ruler.estimate import Estimate, mean
from tiltlm.ruler.intervals import bootstrap_t, of_mean, of_rate, wilson
from tiltlm.ruler.measure import Measurement
from tiltlm.ruler.plots import kl_bars
from tiltlm.ruler.student import errors, t_975
from tiltlm.ruler.table import cell, over_seeds, table
from tiltlm.seeds import stream

ROOT = stream(5, "test-intervals")


def rows_of(**values: torch.Tensor) -> dict[str, dict]:
    return {
        row["metric"]: row for row in Measurement({k: x.double() for k, x in values.items()}).rows("r", "m", 0)
    }


def test_student_s_quantiles_by_the_table():
    assert [t_975(f) for f in (1, 4, 9, 30)] == pytest.approx([12.7062, 2.7764, 2.2622, 2.0423], abs=1e-4)
    assert errors(3, 19) == pytest.approx(3.4472, abs=1e-3) and errors(3, 10**6) == pytest.approx(3, abs=1e-3)
    with pytest.raises(ValueError, match="at least one degree of freedom"):
        t_975(0)


def test_wilson_by_hand():
    """0 of 10 at z = 2: middle (4/20)/(1 + 4/10) = 1/7, half the same; 5 of 10: 1/2 ± √(1/40 + 1/100)·2/1.4."""
    assert wilson(0.0, 10, 2.0) == pytest.approx((0, 2 / 7))
    half = 2 * math.sqrt(0.25 / 10 + 4 / 400) / 1.4
    assert wilson(0.5, 10, 2.0) == pytest.approx((0.5 - half, 0.5 + half))


@pytest.mark.parametrize(("n", "p"), [(20, 0.5), (20, 0.95), (200, 0.01), (1000, 0.999)])
def test_a_rate_s_interval_covers(n, p):
    x = (ROOT.child("rate", n, p).uniform(range(2000), n) < p).double()
    ends = [of_rate(row) for row in x]
    assert sum(e.low <= p <= e.high for e in ends) / 2000 > 0.93


def test_prompts_that_spread_more_than_draws_widen_a_rate():
    """100 prompts, each all right or all wrong: n is 100. Each half right: the draws behind them count for more."""
    apart, alike = torch.tensor([0.0, 1.0] * 50), torch.tensor([0.45, 0.55] * 50)
    wide, narrow = of_rate(apart), of_rate(alike)
    assert wide.high - wide.low > 0.19 and narrow.high - narrow.low < 0.03


@pytest.mark.parametrize("n", [3, 5, 20])
def test_a_mean_of_few_covers(n):
    x = torch.randn(3000, n, generator=ROOT.child("few", n).generator()).double()
    ends = [of_mean(row) for row in x]
    assert abs(sum(e.low < 0 < e.high for e in ends) / 3000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 3000)
    assert all(("fewer than 10" in e.doubt) == (n < 10) for e in ends)


def test_skewed_means_are_covered_by_bootstrap_t_more_often_than_by_student():
    """exp(N(0, 1.5²)), 20 of them: mean exp(1.125). Student covers some 76%; this one more, or says that it may not."""
    x = (1.5 * torch.randn(300, 20, generator=ROOT.child("skew").generator()).double()).exp()
    truth, student, ours, said = math.exp(1.125), 0, 0, 0
    for row in x:
        low, high = mean(row).interval()
        student += low < truth < high
        low, high = bootstrap_t(row)
        ours += low < truth < high
        said += bool(of_mean(row).doubt)
    assert ours > student + 15 and said > 0.9 * (300 - ours)


def test_the_same_draws_give_the_same_interval():
    x = torch.randn(40, generator=ROOT.generator()).exp().double()
    assert bootstrap_t(x) == bootstrap_t(x)


def test_nothing_is_certain_of_draws_alike():
    """1000 of 1000 right, rewards all alike, a single draw; but a KL of 0 for every draw is computed, not drawn."""
    one, none = rows_of(accuracy=torch.ones(1000), reward=torch.ones(1000)), rows_of(accuracy=torch.zeros(1000))
    assert cell(one["accuracy"]) == "1.000 (≥ 0.996)" and cell(none["accuracy"]) == "0.000 (≤ 0.004)"
    assert cell(one["reward"]) == "1.000 (all alike)" and one["reward"]["low"] is None
    single = rows_of(reward=torch.tensor([0.5]), accuracy=torch.tensor([1.0]))
    assert cell(single["reward"]) == "0.500 ± ?" and cell(single["accuracy"]).startswith("1.000 (≥ 0.02")
    assert cell(rows_of(kl_to_reference=torch.zeros(50))["kl_to_reference"]) == "0.000"
    assert cell(rows_of(reward=torch.tensor([0.99991, 0.99999] * 50))["reward"]) == "0.9999 ± <0.0001"
    computed = rows_of(accuracy=1 - 1e-5 * torch.rand(1000, generator=ROOT.generator()))["accuracy"]
    assert cell(computed) == "1.0000 ± <0.0001"  # not "1.000 (≥ 1.000)"
    assert str(Estimate(0.5, math.nan, 1)) == "0.5000 ± ?" and str(Estimate(0.5, 0.0, 1)) == "0.5000"


def test_a_table_explains_its_stars():
    rows = list(rows_of(reward=torch.tensor([1.0, 2.0, 4.0])).values())
    out = Console(width=90, record=True, file=io.StringIO())
    out.print(table(rows))
    said = out.export_text()
    assert "2.333 ± 0.882*" in said and "may not hold: fewer than 10 observations" in said


def test_a_kl_below_zero_is_an_error_in_tables_and_bars(tmp_path):
    """−0.132 ± 0.013 of 500 draws is a mistake; −0.02 ± 0.013 is chance, drawn where it is."""
    x = 0.013 * math.sqrt(500) * torch.randn(500, generator=ROOT.child("kl").generator()).double()
    x = x - x.mean()
    with pytest.raises(
        ValueError, match=r"kl_from_target of m is -0\.1320 .* a KL cannot be below 0: the exact draws"
    ):
        rows_of(kl_from_target=x - 0.132)
    row = rows_of(kl_from_target=x - 0.02)["kl_from_target"]
    kl_bars([row], tmp_path / "a.png")
    worse = {**row, "value": -0.132, "low": -0.16, "high": -0.1}
    for show in (lambda r: table([r]), lambda r: kl_bars([r], tmp_path / "b.png")):
        with pytest.raises(ValueError, match="a KL cannot be below 0"):
            show(worse)
    assert possible({**worse, "metric": "reward"})["value"] == -0.132


def test_over_seeds_a_gap_does_not_hide_the_spread():
    """Seeds' intervals [0, 2], [1, 3], [2, 4]: mean ends 1 and 3, each ± 4.3027·√⅓."""
    head = {
        "recipe": "r",
        "method": "m",
        "metric": "kl_to_target",
        "unit": "nats",
        "stderr": 0.1,
        "n": 9,
        "gap": 2.0,
    }
    rows = [{**head, "seed": s, "value": 1.0 + s, "low": 0.0 + s, "high": 2.0 + s} for s in range(3)]
    (row,) = over_seeds(rows)
    half = 4.3027 / math.sqrt(3)
    assert (row["low"], row["high"], row["gap"]) == pytest.approx((1 - half, 3 + half, 2.0), abs=1e-4)
    (alone,) = over_seeds(rows[:1])
    assert alone["low"] is None and alone["stderr"] is None and alone["doubt"] == "one seed"


def test_what_is_no_rate_gets_no_interval_of_a_rate():
    """A task's check may be a number of any size (a completion's length); Wilson's rule would put it below 1."""
    lengths = torch.tensor([5.0, 7, 9, 12, 4, 6, 8, 9, 10, 22, 13, 5])
    found = rows_of(length=lengths, turns=lengths, finished=(lengths > 6).double())
    assert found["length"]["unit"] == "tokens" and found["finished"]["interval"] in ("exact", "Wilson")
    for name in ("length", "turns"):
        row = found[name]
        assert row["low"] < row["value"] < row["high"] and row["interval"] not in ("exact", "Wilson")

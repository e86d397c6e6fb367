"""Certificates miss no more often than they may, whatever the draws; estimates of log Z widen where draws cannot tell."""

from __future__ import annotations

import math

import pytest
import torch

from laws.world import HORIZON, PROMPTS, perturbed, world
from tiltlm.ruler.betting import interval_of_mean
from tiltlm.ruler.certificate import certified, one_sided, runs_for
from tiltlm.ruler.frontier import tilted_curve
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.stopping import bounds_to_width, weights_to_width
from tiltlm.samplers.rejection import Search, reject, search
from tiltlm.seeds import stream
from tiltlm.twists.learned import LearnedTwist

ROOT = stream(17, "test-certificate")
RUNS = 200
ONE = PROMPTS.select(slice(0, 1))


def test_a_certificate_by_hand():
    """Lower bounds 0, 1, upper 2, 3: ½ − ln(40)/2 and 2½ + ln(40)/2; chosen among 8: ln(320)/2; two prompts' pairs: /4."""
    lower, upper = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])
    assert certified(lower, upper) == pytest.approx((0.5 - math.log(40) / 2, 2.5 + math.log(40) / 2))
    assert certified(lower, upper, choices=8) == pytest.approx((0.5 - math.log(320) / 2, 2.5 + math.log(320) / 2))
    two = certified(lower[:, None].expand(2, 2), upper[:, None].expand(2, 2))
    assert two == pytest.approx((0.5 - math.log(40) / 4, 2.5 + math.log(40) / 4))
    assert one_sided(lower, "lower") == pytest.approx(0.5 - math.log(40) / 2)
    with pytest.raises(ValueError, match=r"which cannot be .* the exact draws may belong to another target"):
        certified(lower + 20, upper)
    assert runs_for(0.1, 0.02) == math.ceil(2 * math.log(40) / 0.08) and runs_for(0.1, 0.1) == math.inf


def test_certificates_hold_at_every_number_of_runs_at_once():
    """Ẑ = Z·w, w log-normal of mean 1 with heavy tails, Ẑᶜ its mirror image; looked at after each of 60 runs."""
    g = ROOT.child("ville").generator()
    s = 1.5
    logs = [s * torch.randn(2000, 60, generator=g).double() - s * s / 2 for _ in range(2)]
    cost = math.log(40) / torch.arange(1, 61)
    low, high = (x.cumsum(1) / torch.arange(1, 61) for x in logs)  # log Ẑ − log Z, and its negative for Ẑᶜ
    missed = (low - cost > 0).any(1) | (high - cost > 0).any(1)
    assert missed.double().mean() <= 0.05
    assert (low - cost / 4 > 0).any(1).double().mean() > 0.05  # power: a quarter of the price would not do


@pytest.mark.parametrize("p", [0.5, 0.05, 0.002])
def test_betting_covers_at_every_time_and_is_not_idle(p):
    x = (ROOT.child("bet", p).uniform(range(100), 400) < p).double()
    missed = 0
    for row in x:
        ends = [interval_of_mean(row[:n].log()) for n in (10, 60, 400)]
        missed += any(not low <= math.log(p) <= high for low, high in ends)
    assert missed <= 5 + 3 * math.sqrt(5)
    assert math.exp(ends[-1][1]) < p + 6 * math.sqrt(p / 400) + 8 / 400  # power: it closes in


def test_betting_closes_in_from_both_sides_alike():
    """Weights e^-1, …, 1, the last exactly: where the bound is reached, the upper side must not be lost to rounding."""
    log_x = torch.tensor([-1.0, -0.889, -0.556, 0.0]).double()
    for k in range(20):
        counts = torch.tensor([1000, 600, 300, 100 + k])
        low, high = interval_of_mean(log_x, counts)
        middle = float((log_x.exp() * counts).sum() / counts.sum())
        assert 0.4 < (high - math.log(middle)) / (math.log(middle) - low) < 2.5 and high - low < 0.06


def test_betting_on_weights_between():
    """Uniform weights, mean ½: the ends close in on log ½ from both sides; weights above their bound are refused."""
    x = ROOT.child("uniform").uniform(range(3000), 1)[:, 0].double()
    low, high = interval_of_mean(x.log())
    assert math.log(0.47) < low < math.log(0.5) < high < math.log(0.53)
    assert interval_of_mean(x.log(), bounded=False)[1] == math.inf
    with pytest.raises(ValueError, match="within"):
        interval_of_mean(x.log() + 1)
    both = interval_of_mean(torch.tensor([0.0, -math.inf]), torch.tensor([3, 97]))
    assert both == pytest.approx(interval_of_mean(torch.tensor([1.0] * 3 + [0.0] * 97).log()))


@pytest.mark.parametrize("beta", [0.6, 0.2, 0.08])
def test_log_z_by_importance_is_honest_at_any_beta(beta):
    """A reward of 1 in a hundredth of the draws, 200 of them; small betas rest on what is rarely met. By the delta
    method alone the interval covers less than 90% there, without a word."""
    p, n = 0.01, 200
    truth = math.log(1 - p + p * math.exp(1 / beta))
    hits = ROOT.child("honest").uniform(range(RUNS), n) < p
    covered, plain, held = 0, 0, 0
    for row in hits:
        found = LogZ.of_importance(row.double() / beta, "draws", 1 / beta)
        low, high = found.interval
        covered += low <= truth <= high
        held += found.certificate[0] <= truth <= found.certificate[1]
        plain += abs(found.value - truth) <= 1.96 * found.stderr
    assert covered / RUNS >= 0.93 and held / RUNS >= 0.95
    if beta < 0.3:
        assert plain / RUNS < 0.9  # power: the world is hard enough


def test_no_interval_of_log_z_has_width_zero():
    """A threshold never hit, a rate of 0 in 1000: as wide as what 1000 draws cannot tell."""
    floor = LogZ.of_importance(torch.full((1000,), -36.8), "draws", 0.0)
    assert floor.interval[1] == pytest.approx(math.log(math.log(80) / 1000), abs=0.01) and "lies between" in str(
        floor
    )
    rate = LogZ.of_success_rate(0, 1000, 0.1)
    assert rate.value == 0 and rate.interval[1] == pytest.approx(10 + math.log(3.84 / 1000), abs=0.05)
    kept = LogZ.of_acceptance(0, 1000, 0.0)
    assert kept.interval[0] == -math.inf and kept.interval[1] < math.log(0.004)
    with pytest.raises(ValueError, match="above its bound"):
        LogZ.of_importance(torch.ones(100), "draws", 0.0)


def test_rejection_s_tries_tell_log_z():
    w = world(beta=0.4)
    found = search(w.target(), ONE, n=500, max_new_tokens=HORIZON, stream=ROOT, r_max=1.0, batch_size=200)
    assert isinstance(found, Search) and found.accepted >= 500 and found.tries % 200 == 0
    log_z, truth = LogZ.of_acceptance(found.accepted, found.tries, 1 / 0.4), float(w.log_z()[0])
    assert abs(log_z.value - truth) < 4 * log_z.stderr < 0.4
    assert log_z.certificate[0] < truth < log_z.certificate[1]


def test_the_optimum_s_curve_stops_where_draws_cannot_tell():
    """One draw in 1000 pays: at beta 0.1 it is all of pi*. Its 10 hits, or none at all, draw no curve."""
    reward = torch.zeros(10_000)
    reward[:10] = 1.0
    betas = torch.tensor([10.0, 0.1])
    assert len(tilted_curve(reward, betas, 1.0)[0]) == 1
    assert (
        len(tilted_curve(torch.zeros(10_000), betas, 1.0)[0]) == 1
    )  # by its own weights it would be "fine" everywhere


def test_drawing_until_a_width_is_reached():
    w = world(beta=0.4)
    exact = reject(
        w.target(), ONE, n=400, max_new_tokens=HORIZON, stream=ROOT.child("e"), r_max=1.0, batch_size=2000
    )
    seen: list[float] = []
    found = bounds_to_width(
        w.target(), LearnedTwist(perturbed(w.twist(w.log_psi_star()))), ONE, exact, width=0.3, k=16, batch=10, limit=200,
        max_new_tokens=HORIZON, stream=ROOT.child("s"), on_width=lambda runs, limit, m: seen.append(m["width"]),
    )  # fmt: skip
    x = found.values[16, "twist", "smc-ess", "lower"]
    assert seen[-1] <= 0.3 < seen[-2] and seen == sorted(seen, reverse=True) and len(x) == 10 * len(seen)
    assert len(x[:, 0].unique()) > 1


def test_weights_until_a_width_is_reached():
    u = ROOT.child("weights").uniform(range(100_000), 1)[:, 0].log()
    asked: list[int] = []

    def more(k: int) -> torch.Tensor:
        asked.append(k)
        return u[k : k + 500]

    log_w = weights_to_width(more, width=0.1, limit=50_000, log_w_max=0.0)
    low, high = LogZ.of_importance(log_w, "draws", 0.0).certificate
    assert high - low <= 0.1 and 1000 < len(log_w) < 20_000 and asked == list(range(0, len(log_w), 500))
    assert len(weights_to_width(more, width=1e-6, limit=2000, log_w_max=0.0)) == 2000

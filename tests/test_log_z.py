"""What is known of log Z, and how it enters every distance."""

from __future__ import annotations

import json
import math

import pytest
import torch

from laws.world import HORIZON, PROMPTS, world
from tiltlm.models.table import TableLM
from tiltlm.ruler.bounds import Bounds, bound_repeats, log_z_of
from tiltlm.ruler.estimate import Estimate
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.ruler.plots import bounds_plot, curve_plot, ess_plot, genealogy_plot, kl_bars
from tiltlm.ruler.weights import pareto_k, trust
from tiltlm.samplers.rejection import reject
from tiltlm.samplers.smc import SMC, smc
from tiltlm.samples import Samples
from tiltlm.seeds import stream

ROOT = stream(13, "test-log-z")
ONE = PROMPTS.select(slice(0, 1))


def policy(seed: int = 0) -> TableLM:
    return TableLM(2, 3, HORIZON).randomise(ROOT.child("q", seed).generator()).requires_grad_(False)


def exact_draws(w, n: int) -> Samples:
    return reject(
        w.target(), ONE, n=n, max_new_tokens=HORIZON, stream=ROOT.child("exact"), r_max=1.0, batch_size=5000
    )


# ---- LogZ ---------------------------------------------------------------------------------------------------


def test_of_importance_by_hand():
    """Weights 1 and 3: log Z = log 2; relative spread √½ of each, its standard error ½·√2·√½ = 0.5."""
    found = LogZ.of_importance(torch.tensor([1.0, 3.0]).log(), "draws")
    assert "may not hold: no upper bound" in str(found) and found.certificate is None
    assert found.value == pytest.approx(math.log(2)) and found.stderr == pytest.approx(0.5)
    assert found.gap == 0 and found.interval == pytest.approx((math.log(2) - 0.98, math.log(2) + 0.98))


def test_of_bounds_by_hand():
    """Lower bounds 0, 1 and upper 2, 3: middles 1, 2, so 1.5 ± ½; from 0.5 − 12.706·½ (Student, two of them) to 2.5 + …"""
    found = LogZ.of_bounds(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0]), "by hand")
    assert (found.value, found.stderr, found.gap) == (1.5, 0.5, 2.0)
    assert found.interval == pytest.approx((0.5 - 6.3531, 2.5 + 6.3531))
    assert "lies between" in str(found) and "gap 2.0000" in str(found)
    assert LogZ.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_of_pairs_by_hand(tmp_path):
    """Prompts with bounds (0, 2) and (10, 11): middles 1, 10.5; half gaps 1, ½: ¾ ± ¼. Own noise stays with the prompts."""
    found = LogZ.of_pairs(torch.tensor([0.0, 10.0]), torch.tensor([2.0, 11.0]), "by hand")
    assert found.certificate == pytest.approx((5.0 - math.log(40) / 2, 6.5 + math.log(40) / 2))
    assert found.value == 5.75 and found.gap == 1.5 and found.shared_stderr == 0
    assert found.interval == pytest.approx((5.0 - 12.7062 * 0.25, 6.5 + 12.7062 * 0.25))
    assert found.per_prompt(1).tolist() == [1.0]
    with pytest.raises(ValueError, match="known for 2 prompts, but 3 are measured"):
        found.per_prompt(3)
    again = LogZ.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found and torch.equal(again.each, found.each)


@pytest.mark.parametrize(
    "wrong",
    [{"low": []}, {"value": 10**400}, {"stderr": "x"}, {"certificate": [1.0]}, {"lower": {}}, {"each": "x"}],
)
def test_a_stored_log_z_with_something_else_for_a_number_is_refused(wrong):
    stored = LogZ(0.5, 0.1, source="draws", low=0.0, high=1.0).to_json()
    assert LogZ.from_json(stored).value == 0.5
    with pytest.raises(ValueError, match="not a stored log Z"):
        LogZ.from_json(stored | wrong)


def test_a_log_z_per_prompt_is_subtracted_prompt_by_prompt():
    w = world(beta=0.4)
    exact = w.log_z()
    known = LogZ.of_pairs(exact - 0.1, exact + 0.1, "by hand")
    rows = {}
    for log_z in (exact, known):
        ruler = Ruler(w.target(), PROMPTS, HORIZON, ROOT.child("pairs"), n=50, log_z=log_z)
        rows[type(log_z).__name__] = ruler.measure(policy())[0]
    torch.testing.assert_close(rows["LogZ"].values["kl_to_target"], rows["Tensor"].values["kl_to_target"])
    (row,) = [row for row in rows["LogZ"].rows("", "", 0) if row["metric"] == "kl_to_target"]
    assert row["stderr_log_z"] == 0  # two prompts: Student's t with one degree of freedom
    assert row["high"] - row["low"] == pytest.approx(0.2 + 2 * 12.7062 * row["stderr"], rel=1e-5)


def test_importance_s_interval_covers_as_often_as_it_says():
    w, many = world(), ONE.select(torch.zeros(200, dtype=torch.int64))
    found = smc(w.target(), None, many, SMC(400, 0.0), max_new_tokens=HORIZON, stream=ROOT.child("cover"))
    ends = [LogZ.of_importance(x, "draws", 1 / w.beta).interval for x in found.samples.log_w.reshape(200, 400)]
    share = sum(low < float(w.log_z()[0]) < high for low, high in ends) / 200
    assert 0.95 - 4 * (0.95 * 0.05 / 200) ** 0.5 < share <= 1


# ---- bounds -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bounds() -> Bounds:
    w = world(beta=0.3)
    return bound_repeats(
        w.target(), None, ONE, exact_draws(w, 300), ks=(2, 16), repeats=300, max_new_tokens=HORIZON,
        stream=ROOT.child("bounds"), estimators=("iwae", "smc"), proposals=("reference",),
    )  # fmt: skip


def test_bounds_lie_on_their_sides_and_close(bounds):
    truth = float(world(beta=0.3).log_z()[0])
    for estimator in ("iwae", "smc"):
        gaps = []
        for k in (2, 16):
            low, high = (bounds.estimate(k, "reference", estimator, side) for side in ("lower", "upper"))
            assert low.value - 4 * low.stderr < truth < high.value + 4 * high.stderr
            gaps.append(high.value - low.value)
        assert gaps[0] > gaps[1]
    assert bounds.estimate(2, "reference", "iwae", "lower").value < truth - 0.02  # power: with few it is a bound
    found = log_z_of(bounds)
    assert found.source.startswith("smc bounds, 16 particles") and found.interval[0] < truth < found.interval[1]


def test_bounds_are_kept_with_their_repeats(bounds, tmp_path):
    again = Bounds.of_tensors(bounds.tensors())
    assert again.rows() == bounds.rows() and len(bounds.rows()) == 8
    assert bounds_plot(bounds.rows(), tmp_path / "b.png").stat().st_size > 5000


def test_importance_alone_has_no_middle(bounds):
    only = Bounds({key: x for key, x in bounds.values.items() if key[2] == "iwae"})
    with pytest.raises(ValueError, match="give bounds by SMC"):
        log_z_of(only)


def test_too_few_exact_draws_are_named():
    w = world()
    with pytest.raises(ValueError, match="5 upper bounds need as many exact draws per prompt; prompt 0 has 3"):
        bound_repeats(
            w.target(), None, ONE, exact_draws(w, 3), ks=(2,), repeats=5, max_new_tokens=HORIZON, stream=ROOT,
            proposals=("reference",),
        )  # fmt: skip


# ---- both KLs -----------------------------------------------------------------------------------------------


def test_both_kls_cover_enumeration_with_exact_and_estimated_log_z():
    w = world(beta=0.4)
    q, truth = policy(), float(w.log_z()[0])
    p_star, p = w.p_star()[0], w.density(q)[0]
    want = {"kl_to_target": (p * (p / p_star).log()).sum(), "kl_from_target": (p_star * (p_star / p).log()).sum()}
    assert abs(float(want["kl_to_target"] - want["kl_from_target"])) > 0.05  # power: they differ
    for log_z in (torch.tensor([truth]), LogZ(truth + 0.01, 0.02), LogZ.exact(truth)):
        ruler = Ruler(
            w.target(), ONE, HORIZON, ROOT.child("ruler"), n=5000, log_z=log_z, exact=exact_draws(w, 3000)
        )
        rows = {row["metric"]: row for row in ruler.measure(q)[0].rows("r", "m", 0)}
        for name, value in want.items():
            assert abs(rows[name]["value"] - value) < 4 * rows[name]["stderr"], (name, log_z)
        total = rows["log_w_exact"]["value"] - rows["log_w"]["value"]  # G − F, without log Z
        assert total == pytest.approx(rows["kl_to_target"]["value"] + rows["kl_from_target"]["value"], abs=1e-6)


def test_the_common_log_z_s_error_stands_beside_the_distance():
    """Observations 1 and 3 (2 ± 1) with log Z's ± 0.75: ± 1.25, of which 0.75 is log Z's; beta scales the gap of J."""
    values = {
        name: torch.tensor([1.0, 3.0], dtype=torch.float64) for name in ("kl_to_target", "objective_gap", "reward")
    }
    rows = {row["metric"]: row for row in Measurement(values, LogZ(5.0, 0.75), beta=0.5).rows("r", "m", 0)}
    assert (rows["kl_to_target"]["stderr"], rows["kl_to_target"]["stderr_log_z"]) == (1.25, 0.75)
    assert rows["objective_gap"]["stderr_log_z"] == 0.375 and "stderr_log_z" not in rows["reward"]
    assert rows["reward"]["stderr"] == 1.0


def test_a_bracketed_log_z_turns_small_distances_into_intervals():
    """log Z within [−1, 3], value 0: KL(q‖pi*) = 0.5 there lies in [−0.5, 3.5]; KL(pi*‖q) = 9 is mirrored: [6, 10]."""
    log_z = LogZ(0.0, 0.0, Estimate(-1.0, 0.0, 9), Estimate(3.0, 0.0, 9))
    off = torch.tensor([-1e-9, 1e-9] * 5).double()  # as good as no spread
    values = {"kl_to_target": 0.5 + off, "kl_from_target": 9.0 + off}
    rows = {row["metric"]: row for row in Measurement(values, log_z).rows("r", "m", 0)}
    one, other = rows["kl_to_target"], rows["kl_from_target"]
    assert (one["low"], one["high"], one["gap"]) == pytest.approx((-0.5, 3.5, 4.0), abs=1e-6)
    assert (other["low"], other["high"]) == pytest.approx((6.0, 10.0), abs=1e-6)
    assert "gap" not in other  # known well enough for 9 nats


def test_a_lower_bound_alone_gives_a_lower_bound():
    w = world()
    ruler = Ruler(w.target(), ONE, HORIZON, ROOT, n=50, log_z=LogZ(0.0, 0.1, lower=Estimate(0.0, 0.1, 5)))
    found = ruler.measure(policy())[0].values
    assert "kl_to_target_at_least" in found and "kl_to_target" not in found and "objective" in found


def test_a_measurement_keeps_its_log_z(tmp_path):
    log_z = LogZ(1.0, 0.1, Estimate(0.9, 0.1, 5), Estimate(1.1, 0.1, 5), "bounds")
    kept = Measurement({"kl_to_target": torch.tensor([1.0, 2.0]).double()}, log_z, 0.25)
    kept.save(tmp_path / "m.safetensors")
    again = Measurement.load(tmp_path / "m.safetensors")
    assert again.log_z == log_z and again.beta == 0.25
    assert again.rows("r", "m", 0) == kept.rows("r", "m", 0)


# ---- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.1, 0.5, 0.9])
def test_the_pareto_shape_of_weights_with_a_known_tail(shape):
    """u^{−k} has a Pareto tail of shape k; 5000 of them tell it to 0.15."""
    u = ROOT.child("pareto", shape).uniform(range(5000), 1)[:, 0]
    assert abs(pareto_k(-shape * u.log()) - shape) < 0.15


def test_the_shape_s_fit_against_scipy_s_maximum_likelihood():
    stats = pytest.importorskip("scipy.stats")
    u = ROOT.child("scipy").uniform(range(20_000), 1)[:, 0].double()
    log_w = -0.4 * u.log()
    tail = math.ceil(3 * math.sqrt(20_000))
    w = log_w.exp().sort().values
    fitted, _, _ = stats.genpareto.fit((w[-tail:] - w[-tail - 1]).numpy(), floc=0)
    assert abs(pareto_k(log_w) - fitted) < 0.05


def test_what_is_said_of_weights():
    u = ROOT.child("said").uniform(range(5000), 1)[:, 0]
    assert "do not trust it" in trust(-1.2 * u.log()) and "nothing wrong seen" in trust(-0.1 * u.log())
    assert pareto_k(torch.zeros(100)) == -math.inf and "nothing was hit" in trust(torch.zeros(100))
    assert math.isnan(pareto_k(torch.randn(10))) and "too few draws" in trust(torch.randn(10))


# ---- pictures -----------------------------------------------------------------------------------------------


def test_every_picture_is_drawn_from_stored_rows(tmp_path):
    rows = [
        {"method": m, "metric": name, "value": v, "stderr": 0.1, "n": 50}
        for m, v in (("a", 1.0), ("b", 2.0))
        for name in ("kl_to_target", "kl_from_target")
    ]
    trace = {
        "prompt": "p", "particles": 3, "ess": [3.0, 2.0, 1.5], "resampled": [False, True, False], "log_z": [0.0, 0.1, 0.2],
        "ancestors": [[0, 1, 2], [0, 0, 2]], "pieces": [["a", "b"], ["c", "d"], ["e", "f"]], "log_w": [0.0, -1.0, -2.0],
    }  # fmt: skip
    curve = [{**row, "step": step} for row in rows for step in (1, 2)]
    drawn = [
        kl_bars(rows, tmp_path / "kl.png"),
        ess_plot(trace, tmp_path / "e.png"),
        genealogy_plot(trace, tmp_path / "g.png"),
        curve_plot(curve, "kl_to_target", tmp_path / "c.png"),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in drawn)


def test_which_bounds_count_is_settled_before_they_are_seen():
    """The narrower interval belongs to fewer particles, the broken pair (lower above upper) to the reference's proposal:
    taken are the most particles, with the twist."""
    sure, noisy = torch.tensor([[0.0], [0.001], [0.002]]).double(), torch.tensor([[-0.2], [0.0], [0.2]]).double()
    values = {(4, "twist", "smc"): (sure, sure + 0.001), (64, "twist", "smc-ess"): (noisy, noisy + 0.3)}
    values[64, "reference", "smc-ess"] = sure + 0.5, sure - 0.5
    found = Bounds({(*key, side): x for key, pair in values.items() for side, x in zip(SIDES, pair, strict=True)})
    chosen = log_z_of(found)
    assert chosen.source.startswith("smc-ess bounds, 64 particles, twist proposal")
    assert "the most particles of 3 settings" in chosen.source
    only = Bounds({key: x for key, x in found.values.items() if key[1] == "reference"})
    with pytest.raises(
        ValueError, match=r"lie above the upper ones .* by more than three errors: the exact draws may"
    ):
        log_z_of(only)


SIDES = ("lower", "upper")


def test_bounds_that_cross_within_their_errors_show_no_gap():
    """Lower 3.137, upper 3.128, errors of .007: no "between 3.137 and 3.128", and an interval that holds both."""
    spread = torch.linspace(-0.05, 0.05, 20).double()
    found = LogZ.of_bounds(3.137 + spread, 3.128 - spread, "by hand")
    assert found.gap == 0 and "no gap seen" in str(found) and "between" not in str(found)
    low, high = found.interval
    assert low < 3.128 - 0.01 and high > 3.137 + 0.01


def test_a_lower_bound_s_own_error_is_in_what_it_bounds():
    """Observations 1 ± 0.1 (10 of them), lower bound of log Z ± 0.3 from 5: at least 1 − √((t₉·.1)² + (t₄·.3)²) = 0.137."""
    even = torch.linspace(-1, 1, 10, dtype=torch.float64)
    x = 1 + 0.1 * math.sqrt(10) * even / even.std()
    z = LogZ(0.0, 0.3, lower=Estimate(0.0, 0.3, 5))
    (row,) = Measurement({"kl_to_target_at_least": x}, z).rows("r", "m", 0)
    assert row["stderr"] == pytest.approx(math.hypot(0.1, 0.3)) and row["high"] is None
    assert row["low"] == pytest.approx(1 - math.hypot(2.2622 * 0.1, 2.7764 * 0.3), abs=1e-4)


def test_bounds_that_contradict_each_other_on_every_prompt_are_refused_however_prompts_differ():
    """Prompts' log Z spread by 5 nats; the lower bound of each lies half a nat above its upper one, give or take 0.05."""
    where = 5 * torch.linspace(-1, 1, 20)
    apart = 0.5 + 0.05 * torch.linspace(-1, 1, 20)[torch.arange(20) * 7 % 20]
    with pytest.raises(ValueError, match="lie above the upper ones"):
        LogZ.of_pairs(where + apart, where, "pairs")
    assert LogZ.of_pairs(where, where + apart, "pairs").gap == pytest.approx(0.5)


def test_runs_of_several_prompts_know_each_one_s_log_z():
    """Lognormal weights, log Z = mu_p + 1/2: the mean over 400 prompts is unbiased at n = 50; the plain log is not."""
    generator = torch.Generator().manual_seed(3)
    mu = torch.linspace(-2, 2, 400, dtype=torch.float64)
    log_w = mu[:, None] + torch.randn(400, 50, generator=generator, dtype=torch.float64)
    found, truth = LogZ.of_runs(log_w, "draws"), mu + 0.5
    assert found.each is not None and found.paired and found.shared_stderr == 0
    off = found.each - truth
    assert abs(float(off.mean())) < 4 * float(off.std()) / 20
    plain = log_w.logsumexp(1) - math.log(50) - truth
    assert float(plain.mean()) < -2 * float(plain.std()) / 20  # the bias that the correction takes off
    assert abs(found.stderr - float(off.std()) / 20) < 0.3 * found.stderr
    assert "of" in LogZ.of_runs(3 * log_w, "draws").doubt and not LogZ.of_runs(0.1 * log_w, "draws").doubt

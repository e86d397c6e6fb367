"""The ruler agrees with exact enumeration, and its errors are honest."""

from __future__ import annotations

import math

import pytest
import torch

from close import FLOAT32, NETWORK, close
from families import build
from tiltlm.exact import solve
from tiltlm.models.table import TableLM
from tiltlm.rewards.exact_answer import ExactAnswer
from tiltlm.ruler.compare import paired
from tiltlm.ruler.estimate import mean, per_prompt
from tiltlm.ruler.frontier import binary_curve, frontier_plot, tilted_curve
from tiltlm.ruler.kl import _walking, kl_along
from tiltlm.ruler.log_z import BinaryTarget, LogZ, log1mexp
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.ruler.table import cell
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Tokens
from tiltlm.seeds import stream
from tiltlm.target import Target

ROOT = stream(3, "test-ruler")
PROMPTS = Tokens.of([[0], [1], [2]])
BETA = 0.4


def table_lm(name: str, eos_ids: tuple[int, ...] = ()) -> TableLM:
    return TableLM(3, 3, 3, eos_ids).randomise(ROOT.child(name).generator()).requires_grad_(False)


def reward(samples):
    return (samples.tokens * samples.mask).sum(1).double() / 3


@pytest.mark.parametrize("eos_ids", [(), (2,), (0, 2)])
def test_measured_distances_cover_the_exact_ones(eos_ids):
    """3 prompts × 4000 draws; every metric within 4 standard errors (over draws) of enumeration."""
    reference, q = table_lm("ref", eos_ids), table_lm("q", eos_ids)
    target = Target(reference, reward, BETA)
    solution = solve(target, PROMPTS, 3)
    log_q = solution.density(q)
    exact = {
        "reward": (log_q.exp() * solution.reward).sum(1),
        "kl_to_target": solution.kl_to_target(log_q),
        "objective": solution.objective(log_q),
        "objective_gap": BETA * solution.kl_to_target(log_q),
    }
    ruler = Ruler(target, PROMPTS, 3, ROOT.child("measure"), n=4000, log_z=solution.log_z)
    measured, samples = ruler.measure(q)
    row_kl = samples.log_q.sum(1).double() - samples.log_ref.sum(1) - reward(samples) / BETA
    for name, value in exact.items():
        scale = BETA if name in ("objective", "objective_gap") else 1.0
        spread = torch.stack([row_kl[samples.prompt_index == p].std() for p in range(3)])
        assert ((measured.values[name] - value).abs() < 4 * scale * spread / math.sqrt(4000)).all(), name
    assert (measured.values["kl_to_target"] > 0.05).all()  # power: a q at the optimum would measure 0


def test_one_prompt_gets_its_error_from_its_draws():
    """200 measurements of one prompt, 60 draws each: two standard errors cover the exact value about 95%."""
    reference, q, prompt = table_lm("ref"), table_lm("q"), PROMPTS.select(slice(1, 2))
    target = Target(reference, reward, BETA)
    solution = solve(target, prompt, 3)
    exact = solution.kl_to_target(solution.density(q)).item()
    inside = 0
    for k in range(200):
        ruler = Ruler(target, prompt, 3, ROOT.child("one", k), n=60, log_z=solution.log_z)
        estimate = ruler.measure(q)[0].estimates()["kl_to_target"]
        assert estimate.n == 60
        inside += abs(estimate.value - exact) < 2 * estimate.stderr
    assert 0.88 < inside / 200 <= 0.995


def test_rao_blackwell_kl_is_unbiased_and_spreads_less_than_the_log_ratio():
    reference, q = table_lm("ref"), table_lm("q")
    solution = solve(Target(reference, reward, BETA), PROMPTS, 3)
    exact = (solution.density(q).exp() * (solution.density(q) - solution.log_ref)).sum(1)
    samples = draw(q, PROMPTS, n=5000, max_new_tokens=3, stream=ROOT.child("rb"))
    rows = kl_along(q, reference, samples).sum(1)
    plain = (q.log_prob(samples) - reference.log_prob(samples)).sum(1)
    for p in range(3):
        mine = rows[samples.prompt_index == p]
        assert abs(mine.mean() - exact[p]) < 4 * mine.std() / math.sqrt(5000)
    assert rows.std() < 0.8 * plain.std()


@pytest.mark.kernels
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_from_one_pass_equals_walking(family, temperature, monkeypatch):
    """Ragged prompts and completions, tempered; a few positions at a time; 0 at padding. Another model's KL is not 0."""
    q, p = (build(family, torch.float64, seed=seed, eos_ids=(3,)).at(temperature) for seed in (0, 1))
    samples = draw(q, Tokens.of([[3, 5, 7], [2]]), n=4, max_new_tokens=6, stream=ROOT.child("one pass"))
    walked = _walking(q, p, samples)
    monkeypatch.setattr("tiltlm.ruler.kl.AT_ONCE", 3 * q.vocab_size)
    close(kl_along(q, p, samples).double(), walked.double(), FLOAT32)
    assert walked.sum(1).min() > 1e-3 and (walked[~samples.mask] == 0).all()
    plain = q.at(1.0).next_logits(samples)(slice(0, 5)).softmax(-1)
    close(plain.sum(1), torch.ones(len(plain), dtype=plain.dtype), NETWORK)


def test_kl_of_a_model_to_itself_is_zero():
    q = table_lm("q")
    samples = draw(q, PROMPTS, n=5, max_new_tokens=3, stream=ROOT)
    assert kl_along(q, q, samples).abs().max() < 1e-12


@pytest.mark.parametrize("beta", [0.05, 0.4, 3.0])
def test_binary_closed_forms_equal_enumeration(beta):
    reference = table_lm("ref")
    answers = Tokens.of([[0, 1, 2], [2, 2, 2], [1, 0, 0]])
    solution = solve(Target(reference, ExactAnswer(answers), beta), PROMPTS, 3)
    right = solution.reward == 1
    log_p = (solution.log_ref.exp() * right).sum(1).log()
    closed = BinaryTarget(log_p, beta)
    torch.testing.assert_close(closed.log_z, solution.log_z, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(closed.success, (solution.log_pi_star.exp() * right).sum(1), atol=1e-10, rtol=1e-10)
    kl = (solution.log_pi_star.exp() * (solution.log_pi_star - solution.log_ref)).sum(1)
    torch.testing.assert_close(closed.kl_to_reference, kl, atol=1e-10, rtol=1e-10)


def test_closed_forms_by_hand():
    """p = 1/2, beta = 1: Z = (1 + e)/2, log Z = 0.6201; success e/(1+e) = 0.7311; KL the difference, 0.1109."""
    target = BinaryTarget(torch.tensor([0.5]).log(), 1.0)
    assert target.log_z.item() == pytest.approx(0.6201, abs=5e-5)
    assert target.success.item() == pytest.approx(0.7311, abs=5e-5)
    assert target.kl_to_reference.item() == pytest.approx(0.1109, abs=5e-5)


def test_log1mexp_at_both_ends():
    x = torch.tensor([-1e-12, -1e-3, -1.0, -50.0], dtype=torch.float64)
    expected = torch.tensor(
        [math.log(1e-12), math.log(-math.expm1(-1e-3)), math.log(1 - math.exp(-1)), -math.exp(-50)]
    )
    torch.testing.assert_close(log1mexp(x), expected.double(), rtol=1e-6, atol=0)


def test_log_z_from_a_rate_propagates_its_error():
    """Against the spread of log Z over simulated rates: p = 0.3 from 2000 draws, beta 1."""
    n, p = 2000, 0.3
    rates = torch.distributions.Binomial(n, torch.tensor(p)).sample((4000,)) / n
    logs = torch.log1p(rates.double() * math.expm1(1.0))
    stated = LogZ.of_success_rate(600, n, 1.0)
    assert stated.stderr == pytest.approx(logs.std().item(), rel=0.1)
    assert stated.value == pytest.approx(math.log(1 + 0.3 * (math.e - 1)))
    assert LogZ.of_success_rate(600, n, 1e-4).value == pytest.approx(1e4 + math.log(0.3))  # no overflow
    with pytest.raises(ValueError, match="successes within 0 and n"):
        LogZ.of_success_rate(601, 600, 1.0)


def test_standard_errors_cover():
    """Of 400 means of 50 exponentials, about 95% lie within 2 standard errors of 1; 4 s.e. of that count."""
    draws = torch.distributions.Exponential(1.0).sample((400, 50))
    inside = sum(abs(e.value - 1) < 2 * e.stderr for e in map(mean, draws))
    assert 0.88 < inside / 400 < 0.99


def test_per_prompt_averages_by_hand():
    values = per_prompt(torch.tensor([1.0, 3.0, 10.0]), torch.tensor([0, 0, 2]), 3)
    assert values[0] == 2 and values[2] == 10 and values[1].isnan()


def test_paired_differences_cancel_what_prompts_share():
    shared = torch.randn(500, generator=ROOT.generator()).double() * 10
    a, b = Measurement({"kl_to_target": shared + 0.5}), Measurement({"kl_to_target": shared})
    (row,) = paired(a, b)
    assert row.estimate.value == pytest.approx(0.5) and row.estimate.stderr < 1e-6 and row.verdict == "higher"
    (same,) = paired(b, b)
    assert same.verdict == "identical"
    with pytest.raises(ValueError, match="same prompts"):
        paired(a, Measurement({"kl_to_target": shared[:10]}))


def test_noise_is_not_called_a_difference():
    """Two measurements of the same thing: at most a few of 200 called different (5% expected; 4 s.e. = 11%)."""
    generator = ROOT.child("noise").generator()
    draw_one = lambda: Measurement({"m": torch.randn(100, generator=generator).double()})  # noqa: E731
    called = sum(paired(draw_one(), draw_one())[0].verdict != "no difference shown" for _ in range(200))
    assert called <= 22


def test_measurement_round_trip_and_rows(tmp_path):
    measured = Measurement({"accuracy": torch.tensor([0.0, 1.0, 1.0, 0.0]).double()})
    measured.save(tmp_path / "m.safetensors")
    (row,) = Measurement.load(tmp_path / "m.safetensors").rows("star-graph/dpo", "dpo", 7)
    assert set(row) == {
        "recipe", "method", "metric", "value", "stderr", "n", "unit", "low", "high", "interval", "seed",
    }  # fmt: skip
    assert (row["value"], row["n"], row["unit"]) == (0.5, 4, "rate")
    assert cell(row) == "0.500 ± 0.289" and cell(None) == "–"


def test_frontier_curve_starts_at_the_reference_and_ends_at_certainty(tmp_path):
    kl, success = binary_curve(torch.full((4,), 0.5).log(), torch.tensor([1e3, 1.0, 0.02]))
    assert success.tolist() == pytest.approx([0.5, 0.7311, 1.0], abs=1e-3)
    assert kl.tolist() == pytest.approx([0.0, 0.1110, math.log(2)], abs=1e-3)
    row = {"recipe": "r", "method": "m", "value": 0.6, "stderr": 0.01, "n": 1, "unit": "", "seed": 0}
    rows = [row | {"metric": "reward"}, row | {"metric": "kl_to_reference"}]
    assert frontier_plot(rows, (kl, success), tmp_path / "f.png").stat().st_size > 10_000


def test_the_optimum_s_curve_by_importance_weights_is_that_of_enumeration():
    reference = table_lm("curve")
    drawn = draw(reference, PROMPTS.select(slice(0, 1)), n=40_000, max_new_tokens=3, stream=ROOT.child("curve"))
    betas = torch.tensor([10.0, 1.0, 0.5, 0.001])
    kl, value = tilted_curve(reward(drawn), betas, 2.0)
    assert len(kl) == 4  # beta 0.001 rests on one completion, which some 590 of the draws are
    for k, beta in enumerate((10.0, 1.0, 0.5, 0.001)):
        s = solve(Target(reference, reward, beta), PROMPTS.select(slice(0, 1)), 3)
        assert abs(float((s.log_pi_star.exp() * s.reward).sum()) - float(value[k])) < 0.01
        assert abs(float(s.kl_from_target(s.log_ref)) - float(kl[k])) < (0.02 if beta > 0.01 else 0.15)
    few, _ = tilted_curve(torch.tensor([0.0] * 99 + [1.0]), torch.tensor([0.01]), 1.0)
    assert len(few) == 0
    with pytest.raises(ValueError, match="state the reward's upper bound"):
        tilted_curve(torch.tensor([0.0, 1.0]), torch.tensor([1.0]), 0.5)


def test_differences_of_distances_need_no_common_log_z():
    """The same draws held against log Z = 1 and log Z = 2: each distance moves by 1, their difference by nothing."""
    log_w = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    one, other = (
        {"log_w": log_w, "kl_to_target": z - log_w, "kl_from_target": log_w - z, "log_w_exact": log_w}
        for z in (1, 2)
    )
    found = {d.metric: d.estimate for d in paired(Measurement(one), Measurement(other))}
    assert found["kl_to_target"].value == found["kl_from_target"].value == 0

"""Rejection draws pi* itself; best-of-n moves as far as its formula says."""

from __future__ import annotations

import math

import pytest
import torch

from laws.world import HORIZON, PROMPTS, World, world
from tiltlm.samplers.ancestral import draw
from tiltlm.samplers.best_of import best_of, kl_estimate, kl_upper_bound
from tiltlm.samplers.rejection import Search, outlook, reject
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.target import Target

N = 20_000
ROOT = stream(9, "test-rejection")
ONE = PROMPTS.select(slice(0, 1))


def counts(w: World, samples: Samples) -> torch.Tensor:
    """How often every completion of the first prompt was drawn, in the world's order."""
    own = [row[1:] for row in w.rows if row[0] == 0]
    index = {row: k for k, row in enumerate(own)}
    drawn = torch.tensor([index[tuple(row)] for row in samples.completions.lists()])
    return torch.bincount(drawn, minlength=len(own)).double()


@pytest.mark.parametrize("eos_ids", [(), (2,), (1, 2)])
@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_kept_draws_follow_pi_star(eos_ids, beta):
    """Every completion's frequency within 4 standard errors of its probability, and r_max need not be tight."""
    w = world(eos_ids=eos_ids, beta=beta)
    want = w.p_star()[0]
    for r_max in (1.0, 1.3):
        samples = reject(
            w.target(), ONE, n=N, max_new_tokens=HORIZON, stream=ROOT.child(r_max), r_max=r_max, batch_size=5000
        )
        share = counts(w, samples) / N
        assert ((share - want).abs() <= 4 * (want * (1 - want) / N).sqrt() + 1e-12).all()
        torch.testing.assert_close(samples.log_ref, w.reference.log_prob(samples).detach())
    reference = w.p_ref()[0]
    assert ((share - reference).abs() > 8 * (want * (1 - want) / N).sqrt()).any()  # power: it is not the reference


def test_batches_and_interruption_change_nothing(tmp_path):
    w = world()
    settings = {"n": 300, "max_new_tokens": HORIZON, "stream": ROOT, "r_max": 1.0}
    whole = reject(w.target(), ONE, batch_size=400, **settings)
    small = reject(w.target(), ONE, batch_size=7, **settings)
    assert whole.completions.lists() == small.completions.lists()

    path, seen = tmp_path / "search.safetensors", []

    def stop(kept: int, wanted: int, notes: dict[str, float]) -> None:
        seen.append(notes["tries"])
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reject(w.target(), ONE, batch_size=50, path=path, on_try=stop, **settings)
    assert Search.load(path).tries == 150
    resumed = reject(w.target(), ONE, batch_size=50, path=path, **settings)
    assert resumed.completions.lists() == whole.completions.lists() and torch.equal(resumed.reward, whole.reward)


def test_the_outlook_knows_the_acceptance_rate_and_refuses_what_is_hopeless():
    w = world(beta=0.3)
    want = (w.log_z() - 1.0 / 0.3)[0]
    found = outlook(w.target(), ONE, max_new_tokens=HORIZON, stream=ROOT, r_max=1.0, pilot=4000)
    assert 0 < found.log_rate_stderr < 0.1 and abs(found.log_rate - want) < 4 * found.log_rate_stderr
    assert math.isclose(found.expected_tries, math.exp(-found.log_rate))
    told = []
    with pytest.raises(ValueError, match=r"A larger beta, fewer draws or a shorter completion helps"):
        reject(
            w.target(), ONE, n=10, max_new_tokens=HORIZON, stream=ROOT, r_max=1.0, max_tries=15, tell=told.append
        )
    assert "10 exact draws wanted; acceptance rate" in told[0]


def test_what_a_short_pilot_never_saw_is_searched_for_up_to_the_limit():
    """One completion in some 300 pays: a pilot of 20 sees none, which proves nothing; a limit of 40 draws ends it."""
    w = world()
    rare = int(w.p_ref()[0].argmin())
    row = torch.tensor(w.rows[rare][1:])

    def reward(samples: Samples) -> torch.Tensor:
        return torch.where((samples.tokens == row).all(1), 0.0, -50.0)

    target = Target(w.reference, reward, 1.0)
    blind = outlook(target, ONE, max_new_tokens=HORIZON, stream=ROOT, pilot=20)
    assert blind.log_rate < -40 and blind.highest_rate == pytest.approx(3 / 20)
    found = reject(target, ONE, n=3, max_new_tokens=HORIZON, stream=ROOT, batch_size=500)
    assert found.completions.lists() == [row.tolist()] * 3
    with pytest.raises(ValueError, match=r"of 3 exact draws after 40 draws of the reference, which is the limit"):
        reject(target, ONE, n=3, max_new_tokens=HORIZON, stream=ROOT, batch_size=20, max_tries=40, pilot=False)


def test_a_reward_above_its_bound_and_several_prompts_are_refused():
    w = world()
    with pytest.raises(ValueError, match=r"r_max is 0\.5, but a draw has r = 1"):
        reject(w.target(), ONE, n=100, max_new_tokens=HORIZON, stream=ROOT, r_max=0.5)
    with pytest.raises(ValueError, match="one prompt at a time; got 2"):
        reject(w.target(), PROMPTS, n=1, max_new_tokens=HORIZON, stream=ROOT)


# ---- best of n ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
def test_best_of_n_s_kl_by_enumeration(n):
    """The law of the best of n (first of ties) summed over all completions, against the formula in rewards."""
    w = world()
    p, reward = w.p_ref()[0], w.reward[0]
    below = torch.stack([p[reward < r].sum() for r in reward])
    upto = torch.stack([p[reward <= r].sum() for r in reward])
    q = p * (upto**n - below**n) / (upto - below)
    exact = float((q * (q / p).log()).sum())
    assert math.isclose(float(q.sum()), 1, rel_tol=1e-9)
    assert exact <= kl_upper_bound(n) + 1e-12
    drawn = draw(w.reference, ONE, n=100_000, max_new_tokens=HORIZON, stream=ROOT.child("kl"))
    assert abs(kl_estimate(w.reward_of(drawn), n) - exact) < 0.01
    best = best_of(w.reference, w.reward_of, Tokens.of([[0]] * 8000), n=n, max_new_tokens=HORIZON, stream=ROOT)
    share = counts(w, best) / len(best)
    assert ((share - q).abs() <= 4.5 * (q * (1 - q) / len(best)).sqrt() + 1e-12).all()


def test_kl_of_best_of_n_by_hand():
    """A fair coin, best of 2: (¼, ¾) against (½, ½) is ¼·log ½ + ¾·log 3/2 = 0.1308; distinct rewards: the bound."""
    assert kl_estimate(torch.tensor([0.0, 1.0]), 2) == pytest.approx(0.13081, abs=1e-5)
    assert kl_upper_bound(2) == pytest.approx(math.log(2) - 0.5)
    many = torch.arange(20_000.0)
    assert kl_estimate(many, 4) == pytest.approx(kl_upper_bound(4), abs=1e-3)
    assert kl_estimate(torch.zeros(5), 3) == 0
    with pytest.raises(ValueError, match="best of 3 needs at least 3 draws; got 2"):
        kl_estimate(torch.zeros(2), 3)


def test_a_target_of_constant_reward_keeps_every_draw():
    w = world()
    target = Target(w.reference, lambda s: torch.zeros(len(s)), 1.0)
    found = reject(target, ONE, n=50, max_new_tokens=HORIZON, stream=ROOT, batch_size=50)
    plain = draw(
        w.reference, ONE, n=50, max_new_tokens=HORIZON, stream=ROOT.child("rejection"), rows=torch.arange(50)
    )
    assert found.completions.lists() == plain.completions.lists()

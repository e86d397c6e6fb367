"""Exact draws of another target are refused: by beta, reward, reference, prompt, and by what they are on average."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from laws.world import HORIZON, PROMPTS, perturbed, world
from tiltlm.models.table import TableLM
from tiltlm.ruler.bounds import bound_repeats
from tiltlm.ruler.measure import Ruler
from tiltlm.samplers.ancestral import draw
from tiltlm.samplers.exact_draws import confirm, marked
from tiltlm.samplers.rejection import reject
from tiltlm.samples import Samples
from tiltlm.seeds import stream
from tiltlm.target import Target
from tiltlm.twists.learned import LearnedTwist

ROOT = stream(19, "test-exact-draws")
ONE = PROMPTS.select(slice(0, 1))
W = world(beta=0.4)


def exact(w=W, n=400, prompt=ONE) -> Samples:
    return reject(w.target(), prompt, n=n, max_new_tokens=HORIZON, stream=ROOT, r_max=1.0, batch_size=2000)


def test_exact_draws_carry_their_beta_and_keep_it(tmp_path):
    found = exact(n=20)
    assert found.exact_at is not None and (found.exact_at == 0.4).all() and len(found.exact_at) == 20
    found.select(slice(3, 9)).save(tmp_path / "e.safetensors")
    assert Samples.load(tmp_path / "e.safetensors").exact_at.tolist() == [0.4] * 6
    confirm(W.target(), found, ONE)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (replace(W, beta=0.3).target(), "are of beta 0.4, the target's beta is 0.3; draw them again"),
        (Target(W.reference, lambda s: 2 * W.reward_of(s), 0.4), "another target: their reward is"),
        (Target(perturbed(W.reference), W.reward_of, 0.4), "another target: their log pi_ref is"),
    ],
    ids=["beta", "reward", "reference"],
)
def test_draws_of_another_target_are_refused_wherever_they_are_used(target, message):
    found = exact()
    for use in (
        lambda: confirm(target, found),
        lambda: Ruler(target, ONE, HORIZON, ROOT, exact=found),
        lambda: bound_repeats(target, None, ONE, found, ks=(2,), repeats=2, max_new_tokens=HORIZON, stream=ROOT),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_draws_of_another_prompt_are_refused():
    with pytest.raises(ValueError, match="answer another prompt"):
        confirm(W.target(), exact(n=5), PROMPTS.select(slice(1, 2)))


def test_older_draws_without_a_beta_are_compared_all_the_same():
    old = exact().with_(exact_at=None)
    confirm(W.target(), old)
    with pytest.raises(ValueError, match="their reward is"):
        confirm(Target(W.reference, lambda s: W.reward_of(s) + 0.5, 0.4), old)


@pytest.mark.parametrize("pins", ["the reference's", "another beta's"])
def test_pins_that_say_nothing_of_themselves_are_told_by_their_mean(pins):
    """With the perfect twist the bounds close on each other whatever is pinned: the gap shows nothing, E[r] does."""
    if pins == "the reference's":
        drawn = draw(W.reference, ONE, n=400, max_new_tokens=HORIZON, stream=ROOT.child("plain"))
        wrong = W.target().scored(drawn.with_(log_q=None))
    else:
        wrong = exact(replace(W, beta=1.0)).with_(exact_at=None)
    twist = LearnedTwist(W.twist(W.log_psi_star()))
    common = {"ks": (8,), "repeats": 30, "max_new_tokens": HORIZON, "stream": ROOT.child("pins")}
    with pytest.raises(ValueError, match=r"E\[r\] under pi\* is .* by the exact draws and .* by weighted ones"):
        bound_repeats(W.target(), twist, ONE, wrong, **common)
    right = bound_repeats(W.target(), twist, ONE, exact(), **common)
    assert right.values[8, "twist", "smc-ess", "upper"].shape == (30, 1)


def test_like_prompts_get_draws_of_their_own_by_number():
    """Two equal prompts under one stream: numbers 0 and 1 give other draws, and number 0 what it always gave."""
    one, two, again = (
        reject(W.target(), ONE, n=50, max_new_tokens=HORIZON, stream=ROOT, r_max=1.0, batch_size=200, number=k)
        for k in (0, 1, 0)
    )
    assert one.completions.lists() == again.completions.lists() != two.completions.lists()


def test_marks_do_not_travel_to_what_is_not_exact():
    q = TableLM(2, 3, HORIZON).randomise(ROOT.generator())
    drawn = draw(q, ONE, n=3, max_new_tokens=HORIZON, stream=ROOT)
    assert drawn.exact_at is None and marked(drawn, 0.5).exact_at.tolist() == [0.5] * 3
    assert torch.equal(marked(drawn, 0.5).tokens, drawn.tokens)

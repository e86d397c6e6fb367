"""Sequential Monte Carlo in enumerable worlds: unbiased in Z, exact with psi*, and the same however it is batched.

Thousands of repeats run as groups of one batch. Statistics within 4 standard errors, seeds fixed.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from close import NETWORK, close
from families import FAMILIES, build
from laws.world import HORIZON, PROMPTS, WORLDS, World, perturbed, world
from tiltlm.exact import solve
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.models.table import TableValues
from tiltlm.samplers.guided import Guided
from tiltlm.samplers.smc import IMPORTANCE, SMC, Particles, smc, smc_in_batches
from tiltlm.samples import Conditioned, Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.target import Target
from tiltlm.twists.learned import LearnedTwist

R = 4000
PLACES = ("fixed length, graded", "with eos, graded", "two ends, graded")


def psi_star(w: World, shift: float = 0.0) -> TableValues:
    """The table of log psi*, plus `shift` times the step's number."""
    return w.twist({p: x + shift * len(p) for p, x in w.log_psi_star().items() if len(p) > 1})


def twist(w: World) -> LearnedTwist:
    return LearnedTwist(perturbed(psi_star(w), 0.8))


def many(repeats: int = R) -> Tokens:
    """Both prompts, over and over."""
    return PROMPTS.select(torch.arange(2).repeat(repeats))


def exact_draws(w: World, repeats: int, seed: int = 7) -> Samples:
    """An exact draw of pi* for each row of `many(repeats)`."""
    size = w.reward.shape[1]
    picked = torch.multinomial(w.p_star(), repeats, replacement=True, generator=stream(seed).generator())
    rows = (picked + torch.arange(2)[:, None] * size).T.flatten()
    own = w.samples().select(rows)
    return Samples(many(repeats), torch.arange(2 * repeats), own.tokens, own.mask)


def run(
    w: World, settings: SMC, *, pinned: Samples | None = None, policy: str = "induced", seed: int = 0
) -> Particles:
    proposal = {"induced": None, "reference": w.reference, "policy": perturbed(w.optimum(), 0.7, seed=5)}[policy]
    return smc(
        w.target(), twist(w), many(), settings, max_new_tokens=HORIZON, stream=stream(seed), pinned=pinned,
        proposal=proposal,
    )  # fmt: skip


def assert_mean_is(x: Tensor, want: float) -> None:
    for column in x.unbind(1):
        assert abs(column.mean() - want) < 4 * column.std() / len(column) ** 0.5


SETTINGS = [
    SMC(4, threshold, scheme, first)
    for threshold, scheme, first in product(
        (0.5, 1.0), ("systematic", "multinomial", "stratified", "residual"), (True, False)
    )
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("settings", [SMC(4, 0.0), *SETTINGS], ids=str)
def test_the_estimate_of_z_is_unbiased(place, settings):
    w = WORLDS[place]()
    ratio = (run(w, settings).log_z.reshape(R, 2) - w.log_z()).exp()
    assert_mean_is(ratio, 1.0)
    assert (ratio.std(0) > 0.01).all()  # there was something to average


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("policy", ["reference", "policy"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_so_it_is_with_any_proposal(place, policy, threshold):
    w = WORLDS[place]()
    assert_mean_is((run(w, SMC(4, threshold), policy=policy).log_z.reshape(R, 2) - w.log_z()).exp(), 1.0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        *((SMC(3, *how), "induced") for how in product((0.0, 0.5, 1.0), ("systematic", "multinomial"), (True, False))),
        (SMC(3, 1.0), "reference"),
        (SMC(3, 0.5, "multinomial"), "policy"),
    ],
    ids=str,
)  # fmt: skip
def test_around_an_exact_draw_the_inverse_is_unbiased(place, settings, policy):
    """E[1/Ẑ] = 1/Z: conditional SMC's upper bound. And the pinned row is where it was put."""
    w = WORLDS[place]()
    pinned = exact_draws(w, R)
    found = run(w, settings, pinned=pinned, policy=policy, seed=1)
    assert_mean_is((w.log_z() - found.log_z.reshape(R, 2)).exp(), 1.0)
    first = found.samples.select(torch.arange(0, len(found.samples), settings.particles))
    assert first.completions.lists() == pinned.completions.lists()


def test_bounds_hold_and_close_with_particles():
    w = WORLDS["fixed length, graded"]()
    pinned, gaps = exact_draws(w, R), []
    for k in (1, 4, 16):
        lower = run(w, SMC(k, 0.0)).log_z.reshape(R, 2).mean(0) - w.log_z()
        upper = run(w, SMC(k, 0.0), pinned=pinned, seed=1).log_z.reshape(R, 2).mean(0) - w.log_z()
        assert (lower < 0).all() and (upper > 0).all()
        gaps.append(upper - lower)
    assert (gaps[0] > gaps[1]).all() and (gaps[1] > gaps[2]).all()


def test_resampling_first_is_tighter_than_resampling_after():
    """On average over worlds; in a single world resampling may even hurt."""
    lower = {}
    for first in (True, False):
        found = []
        for seed in range(6):
            w = world(seed=seed, beta=0.3)
            z = smc(
                w.target(),
                twist(w),
                many(1500),
                SMC(4, 1.0, "multinomial", first),
                max_new_tokens=HORIZON,
                stream=stream(seed),
            )
            found.append((z.log_z.reshape(1500, 2) - w.log_z()).mean())
        lower[first] = torch.stack(found).mean()
    assert lower[True] > lower[False]


@pytest.mark.parametrize("place", WORLDS)
@pytest.mark.parametrize(
    "settings", [SMC(5, 0.0), SMC(5, 0.5), SMC(5, 1.0), SMC(5, 1.0, "multinomial", False)], ids=str
)
def test_with_psi_star_there_is_no_variance(place, settings):
    """Every particle's weight is Z, at every step, whatever is done."""
    w = WORLDS[place]()
    found = smc(w.target(), LearnedTwist(psi_star(w)), PROMPTS, settings, max_new_tokens=HORIZON, stream=stream(0))
    assert found.samples.log_w is not None
    torch.testing.assert_close(found.log_z, w.log_z(), atol=1e-10, rtol=0)
    torch.testing.assert_close(found.samples.log_w, w.log_z().repeat_interleave(5), atol=1e-10, rtol=0)


@pytest.mark.parametrize("settings", [SMC(5, 0.0), SMC(5, 1.0)], ids=str)
def test_a_constant_per_step_in_the_twist_cancels_where_rows_do_not_end(settings):
    w = WORLDS["fixed length, graded"]()
    shifted = LearnedTwist(psi_star(w, shift=0.9))
    found = smc(w.target(), shifted, PROMPTS, settings, max_new_tokens=HORIZON, stream=stream(0))
    torch.testing.assert_close(found.log_z, w.log_z(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("place", PLACES)
def test_importance_weights_are_densities(place):
    """log w = log pi_ref + r/beta − log q, row by row; q is the guided model."""
    w = WORLDS[place]()
    found = smc(
        w.target(), twist(w), many(50), replace(IMPORTANCE, particles=3), max_new_tokens=HORIZON, stream=stream(2)
    ).samples
    q = Guided(w.reference, twist(w))
    want = w.target().log_unnormalised(found) - q.log_prob(found).sum(1)
    torch.testing.assert_close(found.log_w, want.detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(found.log_ref, w.reference.log_prob(found).detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("place", PLACES)
def test_weighted_particles_follow_pi_star(place):
    """Self-normalised over very many particles: the law of the first token is pi*'s."""
    w = WORLDS[place]()
    found = smc(w.target(), twist(w), PROMPTS, SMC(40_000, 1.0), max_new_tokens=HORIZON, stream=stream(3))
    weights = found.samples.log_w.reshape(2, -1).softmax(1)
    first = found.samples.tokens[:, 0].reshape(2, -1)
    p_star = w.mass(w.p_star())
    for x, v in product(range(2), range(3)):
        assert abs(weights[x][first[x] == v].sum() - p_star[x, v]) < 0.015


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_batches_change_nothing(place, size):
    w = WORLDS[place]()
    whole = smc(w.target(), twist(w), many(20), SMC(6, 0.7), max_new_tokens=HORIZON, stream=stream(4))
    parts = smc_in_batches(
        w.target(), twist(w), many(20), SMC(6, 0.7), max_new_tokens=HORIZON, stream=stream(4), batch_size=size
    )
    torch.testing.assert_close(parts.log_z, whole.log_z, atol=1e-12, rtol=0)
    assert parts.samples.completions.lists() == whole.samples.completions.lists()
    torch.testing.assert_close(parts.trace.ess, whole.trace.ess, atol=1e-9, rtol=0)


@pytest.mark.parametrize("place", PLACES)
def test_the_trace_tells_what_happened(place):
    w = WORLDS[place]()
    k = 8
    found = smc(w.target(), twist(w), many(30), SMC(k, 0.6), max_new_tokens=HORIZON, stream=stream(5))
    trace = found.trace
    assert bool((trace.ess >= 1 - 1e-9).all()) and bool((trace.ess <= k + 1e-9).all())
    assert bool(trace.resampled.any()) and bool((trace.ess[trace.resampled] <= 0.6 * k).all())
    torch.testing.assert_close(trace.log_z[-1], found.log_z)
    stay = torch.arange(k).expand_as(trace.ancestors[0])
    moved = (trace.ancestors != stay).any(2)
    assert not bool((moved & ~trace.resampled[:-1]).any())


@pytest.mark.kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_on_networks_what_is_recorded_is_what_the_models_say(family):
    """After resampling, with prompts of unequal length: cached decoding equals scoring from scratch."""
    reference = build(family, torch.float64)
    value = ValueHead(build(family, torch.float64, seed=1), per_token=True, mlp_layers=1).double().eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(value.out.weight, std=0.5)
    prompts = Tokens.of([[1, 2, 3, 4], [5, 6]])
    target = Target(reference, lambda s: (s.tokens == 7).float().sum(1) - s.tokens.float().mean(1) / 9, 0.4)
    found = smc(target, LearnedTwist(value), prompts, SMC(6, 1.0), max_new_tokens=5, stream=stream(0))
    rows = found.samples
    assert bool(found.trace.resampled.any())
    with torch.no_grad():
        close(rows.log_ref, reference.log_prob(rows), NETWORK)
        close(rows.log_psi, value.values(rows)[..., 0], NETWORK)
        close(rows.log_q, value.tilted_log_prob(reference, rows), NETWORK)
    close(rows.reward.float(), target.reward(rows))


@pytest.mark.kernels
@pytest.mark.parametrize("reads", ["tokens", "class"])
@pytest.mark.parametrize("per_token", [True, False])
def test_a_conditional_head_reads_its_own_prompt_s_condition(reads, per_token):
    """Decoding, scoring and shuffled rows agree, and another condition says something else."""
    reference, body = (build("llama", torch.float64, seed=seed) for seed in (0, 1))
    value = ValueHead(body, per_token=per_token, mlp_layers=1, reads=reads, classes=9).double().eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(value.out.weight, std=0.5)
    conditions = Tokens.of([[3], [8], [5]]) if reads == "class" else Tokens.of([[3, 4], [8, 1], [5, 5]])
    ids = Tokens.of([[1, 2], [1, 2], [1, 2]])
    prompts = Conditioned(ids.ids, ids.mask, conditions)
    target = Target(reference, lambda s: s.tokens.float().mean(1) / -9, 0.4)
    rows = smc(target, LearnedTwist(value), prompts, SMC(4, 1.0), max_new_tokens=3, stream=stream(0)).samples
    mixed = rows.select(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        close(mixed.log_psi, value.values(mixed)[..., 0], NETWORK)
        same = replace(mixed, prompts=prompts.select(torch.tensor([1, 1, 1])))
        assert (value.values(same)[..., 0] - mixed.log_psi).abs().max() > 0.01


@pytest.mark.kernels
@pytest.mark.parametrize("per_token", [True, False], ids=["judges the next token", "reads a token"])
@pytest.mark.parametrize("body", ["whole", "lora"])
def test_the_tilted_log_probability_has_the_values_and_gradients_of_plain_passes(per_token, body):
    """By hand: at every token by itself both logits over the whole vocabulary, without a cache; of a head that reads tokens
    a row of the body for each. In one pass, or along the cache: the same, gradients of the body included."""
    reference, own = (build("gpt2", torch.float64, seed=seed) for seed in (0, 1))
    heads = [ValueHead(made(copy_of(own), body), per_token=per_token, mlp_layers=1).double() for _ in range(2)]
    torch.manual_seed(0)
    for parameter in (heads[0].out.weight, *(p for name, p in heads[0].named_parameters() if "lora_B" in name)):
        torch.nn.init.normal_(parameter, std=0.3)
    heads[1].load_state_dict(heads[0].state_dict())
    rows = Samples(Tokens.of([[1, 2, 3]]), torch.zeros(2, dtype=torch.int64), torch.tensor([[4, 5, 6], [6, 7, 0]]),
                   torch.tensor([[True, True, True], [True, True, False]]))  # fmt: skip
    fused = heads[0].tilted_log_prob(reference, rows)
    out = []
    for t in range(3):
        before = torch.cat([torch.tensor([[1, 2, 3]] * 2), rows.tokens[:, :t]], 1)
        logits = reference.model(before).logits[:, -1].detach() + judged(heads[1], before)
        out.append(torch.log_softmax(logits, -1).gather(1, rows.tokens[:, t : t + 1])[:, 0])
    plain = torch.where(rows.mask, torch.stack(out, 1), 0.0)
    close(fused, plain, NETWORK)
    (fused * torch.tensor([[1.0, -2.0, 3.0], [0.5, 9.0, 1.0]])).sum().backward()
    (plain * torch.tensor([[1.0, -2.0, 3.0], [0.5, 9.0, 1.0]])).sum().backward()
    for (name, one), other in zip(heads[0].named_parameters(), heads[1].parameters(), strict=True):
        if one.requires_grad and "lm_head" not in name:
            close(one.grad, other.grad, NETWORK)


def made(body: CausalLM, kind: str) -> CausalLM:
    return body.with_lora(2, 4) if kind == "lora" else body


def judged(head: ValueHead, before: Tensor) -> Tensor:
    """What a head says of every token that may follow rows [N, L], [N, V], by plain passes of its body."""
    body = head.body.model.base_model
    if head.per_token:
        return head.head(body(before).last_hidden_state[:, -1])
    size = head.body.vocab_size
    longer = torch.cat([before.repeat_interleave(size, 0), torch.arange(size).repeat(len(before))[:, None]], 1)
    return head.head(body(longer).last_hidden_state[:, -1]).view(len(before), size)


def test_resampled_rows_are_equally_weighted_draws():
    w = WORLDS["fixed length, graded"]()
    found = smc(w.target(), twist(w), PROMPTS, SMC(2000, 0.0), max_new_tokens=HORIZON, stream=stream(6))
    rows = found.resampled(200_000, stream(7))
    assert rows.log_w is None and torch.bincount(rows.prompt_index).tolist() == [200_000] * 2
    want = (found.samples.log_w.reshape(2, -1).softmax(1) * found.samples.reward.reshape(2, -1)).sum(1)
    # systematic: each of the 2000 particles' shares is off by less than one draw
    torch.testing.assert_close(rows.reward.reshape(2, -1).mean(1), want, atol=1e-3, rtol=0)


# ---- what is refused ----------------------------------------------------------------------------------------


def test_weights_that_are_nan_or_all_zero_name_the_step():
    w = WORLDS["fixed length, graded"]()
    for bad, message in (
        (torch.nan, "step 3: the weight of particle 0 of prompt 0 is NaN"),
        (-torch.inf, "step 3: every particle"),
    ):
        target = Target(w.reference, lambda s, bad=bad: torch.full((len(s),), bad), 1.0)
        with pytest.raises(FloatingPointError, match=message):
            smc(target, None, PROMPTS, SMC(3), max_new_tokens=HORIZON, stream=stream(0))


def test_pinned_rows_must_be_whole_and_one_per_prompt():
    w = WORLDS["fixed length, graded"]()
    pinned = exact_draws(w, 1)
    with pytest.raises(ValueError, match="one exact draw per prompt"):
        smc(
            w.target(),
            None,
            PROMPTS,
            SMC(3),
            max_new_tokens=HORIZON,
            stream=stream(0),
            pinned=pinned.select(slice(0, 1)),
        )
    short = Samples(PROMPTS, torch.arange(2), pinned.tokens[:, :2], pinned.mask[:, :2])
    with pytest.raises(ValueError, match="must be 3 tokens long"):
        smc(w.target(), None, PROMPTS, SMC(3), max_new_tokens=HORIZON, stream=stream(0), pinned=short)
    with pytest.raises(ValueError, match="multinomial or systematic"):
        settings = SMC(3, 0.5, "residual")
        smc(w.target(), None, PROMPTS, settings, max_new_tokens=HORIZON, stream=stream(0), pinned=pinned)


@pytest.mark.parametrize("wrong", [{"particles": 0}, {"threshold": 1.5}, {"threshold": -0.1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="particles must be"):
        SMC(**wrong)


def test_the_enumeration_used_here_agrees():
    w = WORLDS["with eos, graded"]()
    torch.testing.assert_close(solve(w.target(), PROMPTS, HORIZON).log_z, w.log_z(), atol=1e-12, rtol=0)

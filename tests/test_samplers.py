"""Samplers draw what they say they draw, and hand back its log-probability."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from close import EXACT, FLOAT32, NETWORK, close
from families import FAMILIES, VOCAB, build
from laws.world import HORIZON, N_PROMPTS, PROMPTS, World, perturbed, world
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.models.table import TableLM
from tiltlm.samplers.ancestral import Warp, Warped, draw, draw_in_batches
from tiltlm.samplers.best_of import best_of, kl_upper_bound
from tiltlm.samplers.guided import Guided
from tiltlm.samplers.inverse_cdf import draw_tokens
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.twists.cd import CD
from tiltlm.twists.q_sharp import QSharp
from tiltlm.twists.value import ValueTwist

RAGGED = Tokens.of([[3, 5, 7, 11], [2], [9, 9, 1]])
ALMOST_ONE = math.nextafter(1.0, 0.0)
SHAPES = {"one block": 7, "blocks": 600, "chunks of rows": 5000}


def logits_of(vocab: int, seed: int = 0) -> Tensor:
    """A row of float32 logits: twelve likely tokens scattered over unlikely ones."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(vocab, generator=generator) - 9
    row[torch.randperm(vocab, generator=generator)[:12]] += 9
    return row


def z_scores(counts: Tensor, p: Tensor) -> Tensor:
    """How many standard errors each count lies from its expectation n·p."""
    n = counts.sum()
    return (counts - n * p) / (n * p * (1 - p)).sqrt().clamp_min(1e-12)


# ---- draw_tokens --------------------------------------------------------------------------------------------


def chi_square(tokens: Tensor, p: Tensor) -> float:
    """P-value of the draws under `p`; tokens expected less than five times share one bin."""
    counts, expected = torch.bincount(tokens, minlength=len(p)).double(), len(tokens) * p
    often = expected >= 5
    pooled = [torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, expected)]
    kept = pooled[1] > 0
    counts, expected = pooled[0][kept], pooled[1][kept]
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), torch.tensor(len(counts) - 1.0).double()
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


@pytest.mark.parametrize("vocab", SHAPES.values(), ids=SHAPES)
def test_tokens_come_as_often_as_they_should(vocab):
    """Chi-square against the exact softmax; logits moved by 0.2 on one likely token are told apart."""
    n = 20_000 if vocab < 4096 else 8_000
    row = logits_of(vocab)
    tokens, _ = draw_tokens(row.expand(n, vocab), stream(1, "chi", vocab).uniform(range(n), 1)[:, 0])
    assert chi_square(tokens, row.double().softmax(0)) > 1e-4
    other = row.double().clone()
    other[row.argmax()] += 0.2
    assert chi_square(tokens, other.softmax(0)) < 1e-4


@pytest.mark.parametrize("vocab", SHAPES.values(), ids=SHAPES)
def test_evenly_spread_uniforms_give_every_token_its_share_to_within_one(vocab):
    """The distribution function is inverted exactly: (i + 1/2)/n hits a token of mass p n·p ± 1 times."""
    n, row = 4000, logits_of(vocab, seed=3)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = torch.bincount(draw_tokens(row.expand(n, vocab), u)[0], minlength=vocab)
    assert (counts - n * row.double().softmax(0)).abs().max() < 1.01


@pytest.mark.kernels
@pytest.mark.parametrize("vocab", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_prob_of_the_drawn_token_is_log_softmax(vocab, dtype):
    rows = torch.stack([logits_of(vocab, seed) for seed in range(30)]).to(dtype)
    tokens, log_prob = draw_tokens(rows, stream(2).uniform(range(30), 1)[:, 0])
    expected = rows.double().log_softmax(1).gather(1, tokens[:, None])[:, 0]
    assert log_prob.dtype == torch.promote_types(dtype, torch.float32)
    close(log_prob.double(), expected, EXACT if dtype == torch.float64 else FLOAT32)


@pytest.mark.parametrize("vocab", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("u", [0.0, 5e-324, 2.0**-54, 1e-9, 0.5, 1 - 1e-9, ALMOST_ONE])
def test_an_impossible_token_is_never_drawn(vocab, u):
    """Impossible first, last, between, whole blocks of them; and one possible token alone."""
    rows = logits_of(vocab).repeat(6, 1)
    half = vocab // 2
    rows[0, :half], rows[1, half:], rows[2, ::2], rows[3, 1::2] = 4 * [-torch.inf]
    rows[4] = torch.full((vocab,), -torch.inf)
    rows[4, half] = -3.0
    rows[5, -1] = rows[5, 0] = -torch.inf
    tokens, log_prob = draw_tokens(rows, torch.full((6,), u, dtype=torch.float64))
    assert torch.isfinite(rows[torch.arange(6), tokens]).all()
    assert torch.isfinite(log_prob).all()
    assert tokens[4] == half and log_prob[4] == 0


@pytest.mark.parametrize("vocab", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bad", ["nan", "one nan", "all -inf", "+inf"])
def test_a_row_from_which_nothing_can_be_drawn_is_named(vocab, bad):
    rows = torch.stack([logits_of(vocab, seed) for seed in range(20)])
    rows[11] = {"nan": torch.nan, "all -inf": -torch.inf}.get(bad, rows[11])
    rows[11, 3] = {"one nan": torch.nan, "+inf": torch.inf}.get(bad, rows[11, 3])
    with pytest.raises(ValueError, match="row 11 "):
        draw_tokens(rows, torch.full((20,), 0.7, dtype=torch.float64))


def test_a_boundary_belongs_to_the_next_possible_token():
    """Weights (1, 0, 1, 2): u = 1/4 and 1/2 are the ends of tokens 0 and 2; the first index *above* is drawn."""
    row = torch.tensor([[1.0, 0.0, 1.0, 2.0]]).log().expand(4, 4)
    u = torch.tensor([0.0, 0.25, 0.5, ALMOST_ONE], dtype=torch.float64)
    assert draw_tokens(row, u)[0].tolist() == [0, 2, 3, 3]


@pytest.mark.kernels
def test_a_row_s_token_does_not_depend_on_its_batch_mates():
    rows, u = torch.stack([logits_of(5000, seed) for seed in range(19)]), stream(4).uniform(range(19), 1)[:, 0]
    together = draw_tokens(rows, u)
    for n in (0, 7, 8, 18):
        alone = draw_tokens(rows[n : n + 1], u[n : n + 1])
        assert alone[0] == together[0][n]
        close(alone[1][0], together[1][n])


# ---- draw ---------------------------------------------------------------------------------------------------


def ending(model: CausalLM, drawer: LanguageModel | None = None) -> CausalLM:
    """`model`, ending at the token that `drawer` (default: itself) draws most often after the first."""
    drawn = draw(drawer or model, RAGGED, n=20, max_new_tokens=3, stream=stream(0, "eos"))
    model.eos_ids = (int(drawn.tokens[:, 1:].flatten().mode().values),)
    return model


def frequencies(samples: Samples, w: World) -> Tensor:
    """How often each completion of the world came, [P, S]."""
    counts = dict.fromkeys(w.rows, 0)
    prompts = samples.row_prompts.lists()
    for x, y in zip(prompts, samples.completions.lists(), strict=True):
        counts[(*x, *y)] += 1
    return torch.tensor([counts[row] for row in w.rows], dtype=torch.float64).reshape(w.reward.shape)


@pytest.mark.parametrize("eos_ids", [(), (2,), (1, 2)])
def test_draw_draws_the_model_s_own_distribution(eos_ids):
    """Every completion within 4 standard errors; a perturbed table's frequencies are not."""
    w = world(eos_ids=eos_ids)
    samples = draw(w.reference, PROMPTS, n=10_000, max_new_tokens=HORIZON, stream=stream(0, "frequencies"))
    counts, p, other = frequencies(samples, w), w.p_ref(), w.density(perturbed(w.reference, 0.2))
    for x in range(N_PROMPTS):
        assert z_scores(counts[x], p[x]).abs().max() < 4
        assert z_scores(counts[x], other[x]).abs().max() > 4


@pytest.mark.parametrize("eos_ids", [(), (2,), (1, 2)])
def test_log_q_of_a_table_is_its_log_prob(eos_ids):
    w = world(eos_ids=eos_ids)
    samples = draw(w.reference, PROMPTS, n=50, max_new_tokens=HORIZON, stream=stream(3))
    assert samples.log_q.dtype == torch.float64
    torch.testing.assert_close(samples.log_q, w.reference.log_prob(samples), atol=1e-10, rtol=0)


@pytest.mark.kernels
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ends", [False, True])
def test_log_q_of_a_network_is_its_log_prob(family, ends):
    model = build(family, torch.float64)
    model = ending(model) if ends else model
    samples = draw(model, RAGGED, n=12, max_new_tokens=7, stream=stream(5))
    assert len(samples) == 36 and samples.tokens.max() < VOCAB
    assert (len(set(samples.completions.lengths.tolist())) > 2) == ends
    close(samples.log_q, model.log_prob(samples), NETWORK)
    assert (samples.log_q[~samples.mask] == 0).all()


def test_a_completion_ends_with_the_first_end_of_text_which_counts_as_drawn():
    w = world(eos_ids=(2,))
    samples = draw(w.reference, PROMPTS, n=200, max_new_tokens=HORIZON, stream=stream(6))
    ends = [row[-1] == 2 for row in samples.completions.lists()]
    assert samples.finished.tolist() == ends and 0 < sum(ends) < len(ends)
    assert all(2 not in row[:-1] for row in samples.completions.lists())
    cut = [row for row, end in zip(samples.completions.lists(), ends, strict=True) if not end]
    assert all(len(row) == HORIZON for row in cut)
    assert (samples.tokens[~samples.mask] == 0).all()


def test_without_an_end_of_text_token_every_row_has_the_caller_s_length_and_is_finished():
    samples = draw(world().reference, PROMPTS, n=5, max_new_tokens=2, stream=stream(6))
    assert samples.tokens.shape == (10, 2) and samples.mask.all() and samples.finished.all()


def test_when_all_rows_end_early_no_empty_columns_are_left():
    """Prompt 0 always ends at once, so the batch is one column wide."""
    table = TableLM(1, 3, 3, eos_ids=(2,))
    table.tables[0].data[0, 0] = torch.tensor([-torch.inf, -torch.inf, 0.0])
    samples = draw(table, Tokens.of([[0]]), n=4, max_new_tokens=3, stream=stream(0))
    assert samples.tokens.tolist() == 4 * [[2]] and samples.finished.all() and (samples.log_q == 0).all()


@pytest.mark.parametrize("n", [0, -1])
def test_fewer_than_one_draw_of_a_prompt_is_refused(n):
    with pytest.raises(ValueError, match="n"):
        draw(world().reference, PROMPTS, n=n, max_new_tokens=HORIZON, stream=stream(0))


@torch.no_grad()
@pytest.mark.parametrize("score", ["log_prob", "values"])
def test_an_empty_prompt_is_refused_when_scoring_as_it_is_when_drawing(score):
    """There is no position before the first token: reading one further along would be a silent mistake."""
    model = build("gpt2")
    ids = torch.tensor([[1, 2], [5, 6]])
    samples = Samples(Tokens.of([[], [3, 4]]), torch.tensor([0, 1]), ids, torch.ones_like(ids, dtype=torch.bool))
    scorer = model.log_prob if score == "log_prob" else random_values(model, per_token=True).values
    with pytest.raises(ValueError, match="prompt is empty"):
        scorer(samples)


def test_row_r_answers_prompt_r_div_n():
    samples = draw(build("gpt2"), RAGGED, n=3, max_new_tokens=1, stream=stream(0))
    assert samples.prompt_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert samples.prompts is RAGGED


def same(a: Samples, b: Samples) -> None:
    """Same tokens row by row, same log_q to rounding; padding may differ in width."""
    assert a.completions.lists() == b.completions.lists()
    close(a.log_q.sum(1), b.log_q.sum(1), NETWORK)
    assert torch.equal(a.finished, b.finished)
    assert torch.equal(a.prompt_index, b.prompt_index) and a.prompts.lists() == b.prompts.lists()


@pytest.mark.kernels
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_a_network_s_draws_do_not_depend_on_batch_size(ends, batch_size):
    model = build("llama", torch.float64)
    model = ending(model) if ends else model
    options = {"n": 2, "max_new_tokens": 6, "stream": stream(8)}
    whole = draw(model, RAGGED, **options)
    same(draw_in_batches(model, RAGGED, batch_size=batch_size, **options), whole)


@pytest.mark.parametrize("eos_ids", [(), (2,), (1, 2)])
@pytest.mark.parametrize("batch_size", [1, 7, 8, 1000])
def test_a_table_s_draws_do_not_depend_on_batch_size(eos_ids, batch_size):
    w = world(eos_ids=eos_ids)
    prompts = Tokens.of([[0], [1], [1], [0], [1]])
    options = {"n": 3, "max_new_tokens": HORIZON, "stream": stream(8)}
    whole = draw(w.reference, prompts, **options)
    parts = draw_in_batches(w.reference, prompts, batch_size=batch_size, **options)
    same(parts, whole)
    assert torch.equal(parts.log_q, whole.log_q)


@pytest.mark.kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_s_draws_do_not_depend_on_its_batch_mates(family):
    """Prompt 1 alone, with its rows' own numbers, draws what it drew in company; the numbers matter."""
    model = ending(build(family, torch.float64))
    together = draw(model, RAGGED, n=4, max_new_tokens=6, stream=stream(9))
    alone = Tokens.of([RAGGED.lists()[1]])
    options = {"n": 4, "max_new_tokens": 6, "stream": stream(9)}
    rows = draw(model, alone, rows=torch.arange(4, 8), **options)
    assert rows.completions.lists() == together.completions.lists()[4:8]
    close(rows.log_q.sum(1), together.log_q[4:8].sum(1), NETWORK)
    assert draw(model, alone, **options).completions.lists() != rows.completions.lists()


@pytest.mark.kernels
def test_same_stream_same_draws_another_seed_other_draws():
    model = build("gpt2")
    first, again, other = (draw(model, RAGGED, n=4, max_new_tokens=5, stream=stream(s)) for s in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.log_q, again.log_q)
    assert not torch.equal(first.tokens, other.tokens)
    assert len({tuple(row) for row in first.tokens.tolist()}) > 6  # rows differ among themselves


# ---- Warp ---------------------------------------------------------------------------------------------------


def warped_by_hand(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities after temperature, top-k, top-p, one token at a time."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda v: (-weights[v], v))
    kept = order[: top_k or len(order)]
    total, nucleus, reached = sum(weights[v] for v in kept), [], 0.0
    for v in kept:
        if reached < top_p or top_p == 1:
            nucleus.append(v)
        reached += weights[v] / total
    total = sum(weights[v] for v in nucleus)
    return [weights[v] / total if v in nucleus else 0.0 for v in range(len(weights))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 4, 11, 50])
@pytest.mark.parametrize("top_p", [0.01, 0.45, 0.8, 1.0])
def test_warp_is_temperature_then_top_k_then_top_p(temperature, top_k, top_p):
    rows = torch.randn(20, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.5
    got = Warp(temperature, top_k, top_p)(rows).softmax(1)
    expected = [warped_by_hand(row, temperature, top_k, top_p) for row in rows.tolist()]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_temperature_comes_before_top_p():
    """p = (.6, .3, .1), T = 1/2 sharpens to (.36, .09, .01)/.46: the first reaches .75 alone; else two stay."""
    logits = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    assert Warp(temperature=0.5, top_p=0.75)(logits).isfinite().tolist() == [[True, False, False]]
    assert Warp(top_p=0.75)(logits).isfinite().tolist() == [[True, True, False]]


def test_top_k_comes_before_top_p():
    """p = (.4, .3, .2, .1): of the top two the first holds 4/7 > .5; of all four it takes two to reach .5."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    assert Warp(top_k=2, top_p=0.5)(logits).isfinite().tolist() == [[True, False, False, False]]
    assert Warp(top_p=0.5)(logits).isfinite().tolist() == [[True, True, False, False]]


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [0.5, 0.9])
def test_the_nucleus_really_reaches_top_p(dtype, top_p):
    """2000 tokens: what is kept holds p of the mass by a float64 sum, and its least token was needed for it."""
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)).to(dtype)
    p = logits.double().softmax(1)
    kept = Warp(top_p=top_p)(logits).isfinite()
    mass, least = (p * kept).sum(1), torch.where(kept, p, 1.0).amin(1)
    assert (mass >= top_p - 1e-6).all() and (mass - least < top_p + 1e-6).all()


@pytest.mark.parametrize("vocab", [10, 50, 600])
def test_k_tokens_are_kept_even_where_they_tie_and_the_likeliest_is_among_them(vocab):
    logits = torch.zeros(2, vocab)
    logits[1, -1] = 1.0
    kept = Warp(top_k=3)(logits).isfinite()
    assert kept.sum(1).tolist() == [3, 3] and kept[1, -1]


def test_the_plain_warp_changes_nothing():
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Warp()(rows), rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive; got 0.0"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"top_k": -1}, "top_k must be 0 .* or more; got -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\]; got 1.5"),
        ({"top_p": math.nan}, r"top_p must lie in"),
    ],
)
def test_a_warp_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Warp(**options)


WARP = Warp(temperature=0.7, top_k=2, top_p=0.85)


@pytest.mark.parametrize("eos_ids", [(), (2,), (1, 2)])
def test_a_warped_table_s_densities_sum_to_one_and_are_what_is_drawn(eos_ids):
    w = world(eos_ids=eos_ids)
    warped = Warped(w.reference, WARP)
    density = w.density(warped)
    torch.testing.assert_close(density.sum(1), torch.ones(N_PROMPTS, dtype=torch.float64), atol=1e-10, rtol=0)
    assert (density == 0).any() and (density - w.p_ref()).abs().max() > 0.01
    samples = draw(warped, PROMPTS, n=4000, max_new_tokens=HORIZON, stream=stream(11))
    torch.testing.assert_close(samples.log_q, warped.log_prob(samples), atol=1e-10, rtol=0)
    for counts, p in zip(frequencies(samples, w), density, strict=True):
        assert z_scores(counts, p).abs().max() < 4 and (counts[p == 0] == 0).all()


def test_a_warped_table_s_density_is_the_warped_next_token_s_product():
    w = world()
    density, row = w.density(Warped(w.reference, WARP)), (1, 2, 0, 1)
    logits = [w.reference.tables[t][1, code].tolist() for t, code in enumerate([0, 2, 6])]
    steps = [warped_by_hand(x, 0.7, 2, 0.85)[v] for x, v in zip(logits, row[1:], strict=True)]
    assert density[1, w.rows[27:].index(row)].item() == pytest.approx(math.prod(steps), abs=1e-12)


@pytest.mark.kernels
@torch.no_grad()
def test_a_warped_network_s_log_q_is_its_warped_log_prob():
    model = ending(build("gpt_neo", torch.float64))
    warped = Warped(model, Warp(temperature=1.3, top_k=9, top_p=0.9))
    samples = draw(warped, RAGGED, n=6, max_new_tokens=7, stream=stream(12))
    close(samples.log_q, warped.log_prob(samples), NETWORK)
    assert (samples.log_q.sum(1) - model.log_prob(samples).sum(1)).abs().min() > 1e-3


# ---- Guided -------------------------------------------------------------------------------------------------


def random_values(model: CausalLM, per_token: bool, width: int = 1) -> ValueHead:
    """A value model of its own body, its last layer random and large enough to matter."""
    value = ValueHead(copy_of(model), width=width, per_token=per_token).to(model.model.dtype).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in value.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return value


def guided_by_hand(
    model: CausalLM, value: ValueHead, rule: QSharp | CD, prefix: list[int], *, top_k: int, temperature: float
) -> Tensor:
    """log q(next | prefix) [V]: the network's own logits, one Samples row per candidate, no cache anywhere."""
    logits = model.model(input_ids=torch.tensor([prefix]), use_cache=False).logits[0, -1] / temperature
    q = torch.full_like(logits, -torch.inf)
    for v in logits.argsort(descending=True)[: top_k or VOCAB].tolist():
        done = torch.tensor([[*prefix[1:], v]])
        row = Samples(Tokens.of([prefix[:1]]), torch.tensor([0]), done, torch.ones_like(done, dtype=torch.bool))
        z = value.values(row)[0, -1, 0].double()
        p = 1 / (1 + math.exp(-z))
        q[v] = logits[v] + (p / rule.beta if isinstance(rule, CD) else math.log1p(p * math.expm1(1 / rule.beta)))
    return q.log_softmax(0)


@pytest.mark.kernels
@torch.no_grad()
@pytest.mark.parametrize("per_token", [False, True], ids=["V-type", "Q-type"])
@pytest.mark.parametrize("family", FAMILIES)
def test_guided_decoding_equals_scoring_every_candidate_by_itself(family, per_token):
    """Step by step along drawn tokens, with rows reordered and repeated on the way; top-k 5, T = 0.8."""
    model = build(family, torch.float64)
    value, rule = random_values(model, per_token), QSharp(0.3)
    state = Guided(model, ValueTwist(value, rule), top_k=5, temperature=0.8).start(RAGGED, 4)
    prefixes = RAGGED.lists()
    for t in range(4):
        got = state.log_next()
        for row, prefix in enumerate(prefixes):
            expected = guided_by_hand(model, value, rule, prefix, top_k=5, temperature=0.8)
            close(got[row], expected, NETWORK)
        tokens, _ = draw_tokens(got, stream(13).uniform(range(len(prefixes)), [t])[:, 0])
        if t == 1:
            state.select(torch.tensor([2, 0, 0, 1]))
            prefixes, tokens = [prefixes[i] for i in (2, 0, 0, 1)], tokens[[2, 0, 0, 1]]
        state.append(tokens)
        prefixes = [[*prefix, token] for prefix, token in zip(prefixes, tokens.tolist(), strict=True)]


@pytest.mark.kernels
@torch.no_grad()
@pytest.mark.parametrize("per_token", [False, True], ids=["V-type", "Q-type"])
def test_top_k_of_the_whole_vocabulary_is_no_cut_and_a_cut_is_a_cut(per_token):
    model = build("opt", torch.float64)
    twist = ValueTwist(random_values(model, per_token), CD(0.2))
    full, all_k, more, cut = (Guided(model, twist, top_k=k).start(RAGGED, 1).log_next() for k in (0, VOCAB, 99, 6))
    assert torch.equal(full, all_k) and torch.equal(full, more) and torch.isfinite(full).all()
    by_hand = guided_by_hand(model, twist.values, CD(0.2), RAGGED.lists()[1], top_k=0, temperature=1.0)
    close(full[1], by_hand, NETWORK)
    kept = model.start(RAGGED, 1).log_next().topk(6).indices.sort(1).values
    assert torch.isfinite(cut).nonzero()[:, 1].reshape(3, 6).tolist() == kept.tolist()


@pytest.mark.kernels
@torch.no_grad()
@pytest.mark.parametrize("per_token", [False, True], ids=["V-type", "Q-type"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_guided_network_s_log_q_is_its_log_prob(family, per_token):
    """With end of text, so rows leave on the way; and it is not the reference's."""
    model = build(family, torch.float64)
    twist = ValueTwist(random_values(model, per_token), QSharp(0.2))
    guided = Guided(ending(model, Guided(model, twist, top_k=6)), twist, top_k=6)
    samples = draw(guided, RAGGED, n=6, max_new_tokens=6, stream=stream(14))
    assert len(set(samples.completions.lengths.tolist())) > 2
    close(samples.log_q, guided.log_prob(samples), NETWORK)
    assert (samples.log_q.sum(1) - model.log_prob(samples).sum(1)).abs().max() > 0.1


@pytest.mark.kernels
@torch.no_grad()
def test_guided_draws_do_not_depend_on_batch_size():
    model = build("gpt2", torch.float64)
    twist = ValueTwist(random_values(model, False), QSharp(0.2))
    guided = Guided(ending(model, Guided(model, twist, top_k=6)), twist, top_k=6)
    options = {"n": 3, "max_new_tokens": 6, "stream": stream(15)}
    same(draw_in_batches(guided, RAGGED, batch_size=3, **options), draw(guided, RAGGED, **options))


@pytest.mark.kernels
@torch.no_grad()
def test_a_value_of_zero_everywhere_guides_nothing():
    model = build("gpt2", torch.float64)
    guided = Guided(model, ValueTwist(ValueHead(copy_of(model)), QSharp(0.1)))
    close(guided.start(RAGGED, 1).log_next(), model.start(RAGGED, 1).log_next(), NETWORK)


def test_the_twist_s_strength_does_not_depend_on_the_temperature():
    """logits = log_ref/T + log psi: T = 2 halves the reference's part and leaves the twist's."""
    w = world()
    twist = ValueTwist(w.law(), QSharp(w.beta), w.atoms)
    hot, plain = (Guided(w.reference, twist, temperature=t).start(PROMPTS, 3).log_next() for t in (2.0, 1.0))
    log_ref = w.reference.start(PROMPTS, 3).log_next()
    torch.testing.assert_close(hot, (plain - log_ref / 2).log_softmax(1), atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_k": -2}])
def test_a_guide_that_makes_no_sense_is_refused(options):
    w = world()
    with pytest.raises(ValueError, match="temperature must be > 0 and top_k >= 0; got"):
        Guided(w.reference, ValueTwist(w.law(), QSharp(1.0), w.atoms), **options)


# ---- best_of ------------------------------------------------------------------------------------------------


def best_of_n_exactly(w: World, n: int) -> Tensor:
    """P(best of n = y) [P, S]: F(r)^n − F(r−)^n for the level, pi_ref within it (ties go to the first draw)."""
    p, reward = w.p_ref(), w.reward
    at_most = (p[:, None, :] * (reward[:, None, :] <= reward[:, :, None])).sum(2)
    below = (p[:, None, :] * (reward[:, None, :] < reward[:, :, None])).sum(2)
    return p / (at_most - below) * (at_most**n - below**n)


@pytest.mark.parametrize("binary", [False, True])
def test_the_kl_of_best_of_n_lies_below_its_bound(binary):
    w = world(binary=binary)
    for n in (2, 3, 8, 64):
        q = best_of_n_exactly(w, n)
        torch.testing.assert_close(q.sum(1), torch.ones(N_PROMPTS, dtype=torch.float64))
        kl = (q * (q / w.p_ref()).log()).sum(1)
        assert (kl > 0.05).all() and (kl < kl_upper_bound(n)).all()


def test_the_bound_is_tight_when_rewards_do_not_tie_and_single_answers_are_rare():
    """2000 equally likely answers of distinct rewards, n = 4: log 4 − 3/4 = 0.6363 less a little."""
    edges = torch.linspace(0, 1, 2001, dtype=torch.float64) ** 4
    q = edges.diff()
    kl = (q * (q * 2000).log()).sum().item()
    assert kl_upper_bound(4) == pytest.approx(math.log(4) - 0.75, abs=1e-12)
    assert kl_upper_bound(4) - 2e-3 < kl < kl_upper_bound(4)
    assert kl_upper_bound(1) == 0


def test_best_of_draws_the_best_of_n():
    """Frequencies within 4 standard errors of the exact law for n = 3; those of n = 4 are told apart."""
    w, copies = world(), 5000
    prompts = Tokens.of([[x] for x in range(N_PROMPTS)] * copies)
    best = best_of(
        w.reference, w.reward_of, prompts, n=3, max_new_tokens=HORIZON, stream=stream(16), batch_size=10**6
    )
    assert len(best) == len(prompts) and best.prompt_index.tolist() == list(range(len(prompts)))
    counts = frequencies(best, w)
    for x in range(N_PROMPTS):
        assert z_scores(counts[x], best_of_n_exactly(w, 3)[x]).abs().max() < 4
        assert z_scores(counts[x], best_of_n_exactly(w, 4)[x]).abs().max() > 4


def test_best_of_keeps_the_highest_reward_of_what_was_drawn():
    w, n = world(eos_ids=(2,)), 5
    prompts = Tokens.of([[0], [1], [1], [0]])
    options = {"n": n, "max_new_tokens": HORIZON, "stream": stream(17)}
    drawn = draw(w.reference, prompts, **options)
    best = best_of(w.reference, w.reward_of, prompts, batch_size=7, **options)
    rewards = w.reward_of(drawn).reshape(4, n)
    assert torch.equal(best.reward, rewards.amax(1)) and (rewards.amax(1) > rewards.amin(1)).all()
    first = [max(range(n), key=lambda k, x=x: (rewards[x, k], -k)) + x * n for x in range(4)]
    assert best.completions.lists() == [drawn.completions.lists()[row] for row in first]
    torch.testing.assert_close(w.reward_of(best), best.reward)
    assert best.log_q is None


def test_best_of_one_is_plain_sampling():
    w = world()
    options = {"n": 1, "max_new_tokens": HORIZON, "stream": stream(18)}
    prompts = Tokens.of([[0], [1], [0]])
    best = best_of(w.reference, w.reward_of, prompts, **options)
    assert torch.equal(best.tokens, draw(w.reference, prompts, **options).tokens)


def test_best_of_refuses_a_reward_that_is_nan():
    """argmax would take it for the highest."""
    w = world()
    with pytest.raises(ValueError, match=r"(?i)nan"):
        best_of(
            w.reference, lambda s: w.reward_of(s) * torch.nan, PROMPTS, n=2, max_new_tokens=3, stream=stream(0)
        )


@pytest.mark.parametrize("n", [0, -1])
def test_best_of_fewer_than_one_is_refused(n):
    w = world()
    with pytest.raises(ValueError, match="n >= 1 draws"):
        best_of(w.reference, w.reward_of, PROMPTS, n=n, max_new_tokens=HORIZON, stream=stream(0))
    with pytest.raises(ValueError, match="n >= 1 draws"):
        kl_upper_bound(n)


def test_one_prompt_s_draws_are_cut_into_batches_too():
    model = TableLM(2, 3, 3).randomise(torch.Generator().manual_seed(5)).requires_grad_(False)
    seen = []
    original = TableLM.start

    def noting(self, prompts, capacity):
        state = original(self, prompts, capacity)
        select = state.select

        def counted(index):
            seen.append(len(index))
            select(index)

        state.select = counted
        return state

    prompts, settings = Tokens.of([[0], [1]]), {"n": 50, "max_new_tokens": 3, "stream": stream(1)}
    whole = draw(model, prompts, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableLM, "start", noting)
        parts = draw_in_batches(model, prompts, batch_size=20, **settings)
    assert max(seen) <= 20 and parts.completions.lists() == whole.completions.lists()
    assert torch.equal(parts.prompt_index, whole.prompt_index) and torch.equal(parts.log_q, whole.log_q)

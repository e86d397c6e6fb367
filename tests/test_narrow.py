"""Drawing and scoring in bfloat16: how far from float32, and that what is drawn has the density that it says."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import tiltlm as tl
from families import VOCAB, build
from tiltlm.decoders.best_of_n import BestOf
from tiltlm.exact import all_completions, every_pair, log_density
from tiltlm.models import output, scoring
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM
from tiltlm.models.narrow import Narrow, rounded
from tiltlm.models.output import head_logits
from tiltlm.models.precision import computing_in, wide_attention
from tiltlm.models.scoring import Fixed, head_log_prob
from tiltlm.models.table import TableLM
from tiltlm.ruler.measure import Ruler
from tiltlm.samplers.ancestral import draw
from tiltlm.samplers.serving import Serving
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.target import Target

pytestmark = pytest.mark.kernels

HALF_STEP = 2.0**-8
"""The largest relative error of a number rounded to bfloat16."""

M, D, V = 64, 32, 400


def head_and_states(bias: bool = False) -> tuple[nn.Linear, Tensor, Tensor]:
    """Logits of 150 ± 6: a common part, of which softmax knows nothing. Pretrained networks have one (GPT-2: some −100)."""
    generator = torch.Generator().manual_seed(0)
    head, states = nn.Linear(D, V, bias=bias), torch.randn(M, D, generator=generator)
    head.weight.data = torch.randn(V, D, generator=generator)
    head.weight.data[:, 0], states[:, 0] = 10, 15
    return head, states, torch.randint(V, (M,), generator=generator)


def logits_in_full(head: nn.Linear, states: Tensor) -> Tensor:
    """What the rounded factors multiply to, in float64."""
    weight = head.weight.detach().bfloat16().double()
    logits = states.bfloat16().double() @ weight.t()
    return logits if head.bias is None else logits + head.bias.detach().double()


def rounding(logits: Tensor, level: Tensor, bias: Tensor | None) -> Tensor:
    """What rounding W·h − level may do to logits, [M, V]."""
    plain = logits if bias is None else logits - bias.detach().double()
    return HALF_STEP * (plain - level[:, None]).abs() + 1e-3


def worst(head: nn.Linear, states: Tensor, targets: Tensor, under: Fixed | None = None) -> float:
    """The largest error of a log-probability, as a part of what rounding around the target's logit may cost."""
    with torch.autocast("cpu", torch.bfloat16):
        found = head_log_prob(states, head, targets, under).double()
    logits, rows = logits_in_full(head, states), torch.arange(M)
    plain = logits if head.bias is None else logits - head.bias.detach().double()
    allowed = rounding(logits, plain[rows, targets], head.bias)
    if under is not None:
        theirs = logits_in_full(under.head, under.states)
        allowed = allowed + rounding(
            theirs, theirs[rows, targets] - under.head.bias.double()[targets], under.head.bias
        )
        logits = logits + theirs
    log_p = logits.log_softmax(1)
    allowed = (log_p.exp() * allowed).sum(1) * 1.1 + 2e-3  # to first order, and float32's own
    return ((found - log_p[rows, targets]).abs() / allowed).max().item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_the_head_is_off_by_what_rounding_around_the_target_costs(bias, fixed, monkeypatch):
    """Products of 16 bits, sums in float32: |Δ log p(y)| ≤ 2⁻⁸ Σ p(v) |l(v) − l(y)|; tile by tile."""
    monkeypatch.setattr(scoring, "CHUNK_ENTRIES", 37 * M)
    head, states, targets = head_and_states(bias)
    generator = torch.Generator().manual_seed(1)
    under = Fixed(torch.randn(M, 5, generator=generator), nn.Linear(5, V)) if fixed else None
    assert worst(head, states, targets, under) < 1


def test_logits_that_are_summed_in_bfloat16_would_be_noticed(monkeypatch):
    """Rounded as the kernel hands them over, without a level, logits of 150 are off by half a nat."""

    def carelessly(self: scoring._Logits, tile: slice) -> Tensor:
        return self.curve.in_place((self.weight[tile] @ self.states.t()).float())

    head, states, targets = head_and_states()
    right = worst(head, states, targets)
    monkeypatch.setattr(scoring._Logits, "__call__", carelessly)
    assert right < 1 < worst(head, states, targets) / 3


@pytest.mark.parametrize("bias, sharpness, error", [(False, 1, 0.01), (True, 1, 0.01), (False, 4, 0.03)])
def test_the_heads_gradient_is_float64s_to_a_percent_and_its_value_as_close_as_said(bias, sharpness, error):
    """Of the same rounded factors; the weight's own dtype comes back. With sharp logits, ln p(v)/p(y) of up to 128, whose
    exponential is no number of 16 bits, rounding costs more."""
    head, states, targets = head_and_states(bias)
    states[:, 1:] *= sharpness
    leaf = states.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        head_log_prob(leaf, head, targets).sum().backward()
    wide, there = (x.detach().bfloat16().double().requires_grad_() for x in (head.weight, states))
    logits = there @ wide.t() + (head.bias.detach().double() if bias else 0)
    logits.log_softmax(1)[torch.arange(M), targets].sum().backward()
    for ours, expected in ((leaf.grad, there.grad), (head.weight.grad, wide.grad)):
        assert ours.dtype == torch.float32
        assert ((ours - expected).norm() / expected.norm()).item() < error
    assert worst(head, states, targets) < 1


@pytest.mark.parametrize("grad", [False, True])
def test_logits_to_draw_from_are_rounded_around_a_large_one(grad, monkeypatch):
    """The level is the largest of the first entries; here of all."""
    monkeypatch.setattr(output, "LEVEL_ENTRIES", 150)
    head, states, _ = head_and_states(bias=True)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        found = head_logits(states, head)
    logits = logits_in_full(head, states)
    level = (logits - head.bias.double())[:, :150].amax(1)
    assert found.dtype == torch.float32
    allowed = rounding(logits, level, head.bias)
    assert ((found.double() - logits).abs() <= 1.1 * allowed + HALF_STEP).all()  # the level is rounded itself


def test_sixty_four_tokens_of_a_pretrained_model_are_off_by_a_tenth_of_a_nat(shared_data):
    """stories260K, 64 draws of 64 tokens: |Δ Σ log p| 0.1 on average, 0.4 at most; a network is not one head."""
    model = CausalLM.load(shared_data / "models" / "stories260K", eos_ids=())
    drawn = draw(Narrow(model), Tokens.of([[1]]), n=64, max_new_tokens=64, stream=stream(0, "narrow"))
    with torch.no_grad():
        wide, narrow = (each.log_prob(drawn).sum(1) for each in (model, Narrow(model)))
    for found in (drawn.log_q.sum(1), narrow):
        error = (found - wide).abs()
        assert 0.02 < error.mean() < 0.25 and error.max() < 1.0


# ---- what is drawn ------------------------------------------------------------------------------------------------------


class Doubled(LanguageModel):
    """A `Narrow` model scored token by token as it draws, without `log_prob`: for the answer sheet."""

    def __init__(self, model: Narrow) -> None:
        super().__init__()
        self.model, self.vocab_size, self.eos_ids = model, model.vocab_size, model.eos_ids

    def start(self, prompts, capacity):
        return self.model.start(prompts, capacity)


def sharp() -> CausalLM:
    """A model whose logits are large: bfloat16 is far away from it."""
    model = build("llama")
    model.head.weight.data.mul_(4)
    return model


def test_the_measured_divergence_of_what_draws_in_bfloat16_is_unbiased():
    """529 completions enumerated as they are drawn. Both KLs of the ruler, whose reference is in float32, cover what they
    come to; were log q the reference's, KL(q‖pi_ref) would be 0, ten standard errors off."""
    model, asked, horizon = sharp().requires_grad_(False), Tokens.of([[1, 2]]), 2
    q, everything = Narrow(model), every_pair(asked, all_completions(VOCAB, horizon))
    log_q, log_ref = log_density(Doubled(q), everything), log_density(model, everything)
    assert abs(log_q.logsumexp(0).item()) < 1e-5

    target = Target(model, lambda samples: (samples.tokens == 3).sum(1).double(), 0.5)
    log_pi = log_ref + target.reward(everything) / target.beta
    log_z = log_pi.logsumexp(0)
    expected = (log_q.exp() * (log_q - log_pi + log_z)).sum().item()
    ruler = Ruler(target, asked, horizon, stream(0, "narrow"), n=4000, log_z=log_z[None])
    found = ruler.measure(q)[0].estimates()
    assert abs(found["kl_to_target"].value - expected) < 4 * found["kl_to_target"].stderr
    apart = (log_q.exp() * (log_q - log_ref)).sum().item()
    assert abs(found["kl_to_reference"].value - apart) < 4 * found["kl_to_reference"].stderr
    assert apart > 10 * found["kl_to_reference"].stderr


def test_a_state_rounds_the_weights_that_the_model_has_when_it_starts():
    """Embeddings, norms and the model itself stay as they are; after an update the next state draws from new weights."""
    model = build("gpt2")
    before, copied = copy.deepcopy(model.state_dict()), rounded(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert copied.head.weight.dtype == torch.bfloat16 and model.head.weight.dtype == torch.float32
    assert (
        copied.model.transformer.wte.weight is model.model.transformer.wte.weight
    )  # tied to the head, and not rounded
    narrow, asked = Narrow(model), Tokens.of([[1, 2]])
    first = narrow.start(asked, 1).logits()
    with torch.no_grad():
        model.model.transformer.h[0].mlp.c_fc.weight.mul_(2)
    assert not torch.equal(narrow.start(asked, 1).logits(), first)


def test_what_is_drawn_has_the_log_probability_that_training_sees():
    """Ragged prompts, through the cache: far closer to one pass of the engine's than to float32. (With attention in 16
    bits, which a CPU's training has not, it would be hardly closer.)"""
    model = sharp().requires_grad_(False)
    asked = Tokens.of([[1, 2], [3], [4, 5, 6]])
    drawn = draw(Narrow(model), asked, n=40, max_new_tokens=6, stream=stream(0, "narrow"))
    wide = (model.log_prob(drawn) - drawn.log_q).abs().mean()
    with computing_in(model, model.device, "bfloat16"):
        trained = (model.log_prob(drawn) - drawn.log_q).abs().mean()
    assert trained < wide / 2


@pytest.mark.parametrize("source", ["live", "fresh"])
def test_a_feed_draws_in_bfloat16_and_its_reference_is_float32(source):
    """log q is what drew; log_ref is the reference's, which is another number even where the reference drew."""
    model = sharp().requires_grad_(False)
    problem = tl.Problem.of(
        model, reward=lambda samples: (samples.tokens == 3).sum(1).double(), prompts=[[1, 2], [3]], beta=0.5,
        max_new_tokens=4,
    )  # fmt: skip
    seen: list[Samples] = []
    problem = replace(problem, target=replace(problem.target, reward=noting(problem.target.reward, seen)))
    feed = tl.Feed(source=source, n=4, draw=Serving(precision="bfloat16"))
    tl.learn(problem, "rloo" if source == "live" else "dpo", fit=tl.Fit(steps=1, batch_size=8, lr=1e-9), feed=feed,
             progress=False)  # fmt: skip
    rows = seen[0]
    narrow, wide = (each.log_prob(rows).sum(1) for each in (Narrow(model), model))
    assert (rows.log_q.sum(1) - narrow).abs().mean() < (rows.log_q.sum(1) - wide).abs().mean() / 2
    if rows.log_ref is not None:
        torch.testing.assert_close(rows.log_ref.sum(1), wide, rtol=1e-5, atol=1e-4)


def noting(reward, seen):
    def noted(samples):
        seen.append(samples)
        return reward(samples)

    return noted


def test_what_cannot_draw_in_bfloat16_says_so():
    with pytest.raises(ValueError, match="float32 weights draws in bfloat16; this is a TableLM"):
        Narrow(TableLM(1, 3, 2))
    with pytest.raises(ValueError, match=r"this is a CausalLM in torch\.float64"):
        Narrow(build("gpt2", torch.float64))
    with pytest.raises(ValueError, match="a server has its own precision"):
        Serving("http://localhost:1/v1", precision="bfloat16")
    with pytest.raises(ValueError, match="float32 or bfloat16; got 'float16'"):
        Serving(precision="float16")
    with pytest.raises(ValueError, match=r"leave draw_at\.precision out"):
        BestOf(draw_at=Serving(precision="bfloat16"))


def test_attention_is_wide_however_it_is_called():
    """By place, or by name: in float32 inside, rounded once at its end."""
    query, key, value = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    attention = nn.functional.scaled_dot_product_attention
    expected = attention(query.float(), key.float(), value.float()).bfloat16()
    with wide_attention(nn.Linear(1, 1), torch.device("cpu"), "bfloat16"):
        assert torch.equal(attention(query, key, value), expected)
        assert torch.equal(attention(query, key=key, value=value), expected)
        assert torch.equal(attention(query=query, key=key, value=value), expected)

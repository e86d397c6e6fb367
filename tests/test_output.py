"""Soft caps, scales and what else stands between body and logits: all of it in scores, gradients and draws alike.

At head outputs of size 30 a soft cap of 20 or 30 cannot hide. Networks in float64; their norms compute in float32, which
leaves differences of 1e-6 or so in logits of this size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from every_family import VOCAB, build, loud, plain
from tiltlm.models import scoring
from tiltlm.models.base import LanguageModel, Values
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.models.output import STRAIGHT, Curve, head_logits
from tiltlm.models.scoring import Fixed, head_log_prob
from tiltlm.models.teacherless import Teacherless
from tiltlm.models.unadapted import Unadapted
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream

CURVES = {
    "gemma2": Curve(cap=20.0),
    "gemma3_text": Curve(cap=20.0),
    "nanochat": Curve(cap=20.0),
    "cohere": Curve(scale=0.0625),
    "cohere2": Curve(scale=0.0625),
    "granite": Curve(scale=0.25),
    "hyperclovax": Curve(scale=4.0),
    "falcon_h1": Curve(scale=0.5),
    "minicpm3": STRAIGHT,
    "bert": STRAIGHT,
    "roberta": STRAIGHT,
}
"""Families that do something between body and logits, and the curve of each as its tiny configuration has it."""

SOME = ["gemma2", "cohere2", "granite", "minicpm3", "bert"]
PROMPTS, COMPLETIONS = [[3, 5, 7, 11], [9], [9, 12, 4]], [[1, 2, 3, 4], [5, 6], [7]]


def model_of(family: str) -> CausalLM:
    """A tiny network in float64, its head scaled until it gives numbers of size 30."""
    model = CausalLM(build(family).double())
    loud(model)
    return model


def samples() -> Samples:
    done = Tokens.of(COMPLETIONS)
    return Samples(Tokens.of(PROMPTS), torch.arange(3), done.ids, done.mask)


@torch.no_grad()
@pytest.mark.parametrize("family", CURVES)
def test_what_stands_between_body_and_logits_is_read_off_the_network(family):
    model = model_of(family)
    assert model.plain_curve == CURVES[family]
    assert (model.log_prob(samples()) - plain(model, samples())).abs().max() < 2e-5
    drawn = draw(model, Tokens.of(PROMPTS), n=2, max_new_tokens=4, stream=stream(0, "draws"))
    assert (model.log_prob(drawn) - drawn.log_q).abs().max() < 2e-5
    model.plain_curve, model.entry = STRAIGHT, type(model.entry)()
    with_nothing = model.log_prob(samples()) if family not in ("bert", "roberta") else torch.inf
    assert abs(with_nothing - plain(model, samples())).max() > 0.1


@pytest.mark.parametrize("family", SOME)
def test_gradients_are_autograd_s_own_through_the_network(family, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK_ENTRIES", 100)  # several tiles of the vocabulary
    model = model_of(family)
    weight = torch.linspace(0.5, 2, 12, dtype=torch.float64).reshape(3, 4)

    def gradient(log_p: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (log_p * weight).sum().backward()
        return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}

    ours, theirs = gradient(model.log_prob(samples())), gradient(plain(model, samples()))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name], expected, atol=2e-5 * max(1, expected.abs().max().item()), rtol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("family", SOME)
def test_a_temperature_divides_the_capped_logits(family):
    """The cap comes first, then the temperature: log-softmax(logits/T), a bias and a cap included."""
    model = model_of(family).at(0.5)
    row = torch.tensor([[3, 5, 7]])
    expected = (model.model(input_ids=row, use_cache=False).logits[:, -1] / 0.5).log_softmax(-1)
    torch.testing.assert_close(model.start(Tokens.full(row), 1).log_next(), expected, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(
        LanguageModel.log_prob(model, samples()), model.log_prob(samples()), atol=5e-5, rtol=0
    )
    found = model.next_logits(samples())(slice(0, 4))
    expected = (
        model.model(input_ids=torch.tensor([PROMPTS[0] + COMPLETIONS[0]]), use_cache=False).logits[0, 3:7] / 0.5
    )
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", SOME)
def test_a_twist_over_such_a_reference_is_scored_as_it_is_walked(family):
    """Q-type: both heads tile by tile in one pass, the reference's cap, scale, bias and temperature included."""
    reference = model_of(family).at(0.8)
    value = ValueHead(CausalLM(build("llama").double()), per_token=True)
    nn.init.normal_(value.out.weight, generator=torch.Generator().manual_seed(0))
    walked = Values.tilted_log_prob(value, reference, samples())
    torch.testing.assert_close(value.tilted_log_prob(reference, samples()), walked, atol=5e-5, rtol=0)


@torch.no_grad()
def test_teacherless_and_unadapted_models_keep_cap_and_temperature():
    blind = Teacherless(model_of("gemma2").model, dummy_id=VOCAB - 1).at(0.5)
    assert isinstance(blind, Teacherless)
    torch.testing.assert_close(
        LanguageModel.log_prob(blind, samples()), blind.log_prob(samples()), atol=5e-5, rtol=0
    )
    model = model_of("gemma2").at(0.5)
    expected = model.log_prob(samples())
    reference = Unadapted(copy_of(model).with_lora(rank=2, init_lora_weights=False).at(0.5))
    torch.testing.assert_close(reference.log_prob(samples()), expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(LanguageModel.log_prob(reference, samples()), expected, atol=5e-5, rtol=0)


CASES = [Curve(), Curve(scale=3.0), Curve(cap=2.0), Curve(0.5, 2.0, 0.7), Curve(2.0, None, 0.7, entries=17)]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("curve", CASES, ids=str)
def test_the_tiled_head_is_log_softmax_of_the_curve_in_value_and_gradient(curve, fixed, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK_ENTRIES", 20)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    head, other = nn.Linear(6, 23).double(), nn.Linear(4, 17 if curve.entries else 23).double()
    under = (
        Fixed(torch.randn(5, 4, generator=generator, dtype=torch.float64), other, Curve(cap=3.0))
        if fixed
        else None
    )
    targets = torch.tensor([0, 16, 3, 3, 9])

    def by_hand() -> Tensor:
        x = (states @ head.weight.T + head.bias)[:, : curve.entries] * curve.scale
        x = (x if curve.cap is None else curve.cap * torch.tanh(x / curve.cap)) / curve.temperature
        if under is not None:
            x = x + 3 * torch.tanh(other(under.states) / 3).detach()
        return x.log_softmax(1).gather(1, targets[:, None])[:, 0]

    def value_and_gradient(log_p: Tensor) -> list[Tensor]:
        states.grad = None
        head.zero_grad()
        (log_p * torch.linspace(1, 2, 5)).sum().backward()
        return [log_p.detach(), states.grad.clone(), head.weight.grad.clone(), head.bias.grad.clone()]

    ours = value_and_gradient(head_log_prob(states, head, targets, under, curve))
    for a, b in zip(ours, value_and_gradient(by_hand()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_decoding_tile_by_tile_is_the_curve_of_the_whole_head(bias):
    head, curve = nn.Linear(8, 5000, bias=bias), Curve(2.0, 1.5, 0.7, entries=4990)
    states = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        head_logits(states, head, curve), curve(head(states)[:, :4990]), atol=1e-5, rtol=1e-5
    )


class Cubed(GPT2LMHeadModel):
    """A network that does what no one expects: its logits are a little less than straight, beyond any soft cap."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits - 1e-6 * out.logits**3
        return out


class Placed(GPT2LMHeadModel):
    """Logits that depend on where a token stands."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / (1 + 1e-3 * torch.arange(out.logits.shape[1])[:, None])
        return out


@pytest.mark.parametrize("kind", [Cubed, Placed])
def test_what_is_neither_scale_nor_cap_is_refused_by_name(kind):
    """Small weights: on the network's own logits, 0.01 in size, none of this could be seen."""
    network = kind(GPT2Config(vocab_size=23, n_layer=1, n_head=2, n_embd=8, initializer_range=1e-3))
    with pytest.raises(ValueError, match=f"{kind.__name__} changes its logits after the output head by more than"):
        CausalLM(network)

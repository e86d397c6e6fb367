"""Packed rows: fewer of them, the same numbers and gradients; networks that would mix sequences up are refused."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor

from close import NETWORK, close
from families import FAMILIES, VOCAB, build
from tiltlm.engine import Engine, Optim
from tiltlm.models.body import body_of
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.packing import first_fit, packs_exactly
from tiltlm.policies.sft import SFT
from tiltlm.samples import Samples, Tokens

pytestmark = pytest.mark.kernels

EXACT = [family for family in FAMILIES if family != "opt"]


def ragged() -> Samples:
    """Ten rows of 3 to 18 tokens, every prompt its own: 81 real tokens in 180 places."""
    generator = torch.Generator().manual_seed(0)
    prompts = Tokens.of([[k, (3 * k) % VOCAB, 1, 2][: 1 + k % 4] for k in range(10)])
    lengths = torch.tensor([2, 16, 3, 9, 4, 1, 5, 6, 9, 3])
    mask = torch.arange(16) < lengths[:, None]
    return Samples(prompts, torch.arange(10), torch.randint(VOCAB, mask.shape, generator=generator) * mask, mask)


def shapes_of(model: CausalLM) -> list[tuple[int, ...]]:
    """The shapes of the ids that the model's body is run on from now on."""
    seen: list[tuple[int, ...]] = []
    body_of(model.model).register_forward_pre_hook(
        lambda _, __, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def value_and_gradient(model: CausalLM) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    log_p = model.log_prob(ragged())
    (log_p * torch.linspace(0.5, 2, log_p.numel()).view_as(log_p)).sum().backward()
    return log_p.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_first_fit_decreasing_by_hand():
    """Rows of 6 for 2, 5, 4, 1, 0, 3, 2: 5 opens row 0, 4 row 1, 3 row 2; 2 fits row 1, 2 row 2, 1 row 0."""
    rows, starts = first_fit([2, 5, 4, 1, 0, 3, 2], 6)
    assert rows == [1, 0, 1, 0, 0, 2, 2]
    assert starts == [4, 0, 0, 5, 6, 0, 3]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", EXACT)
def test_packed_rows_give_the_same_log_probabilities_and_gradients(family, attention):
    """GPT-Neo with a window of 5, beyond which rows reach; 81 tokens in 5 rows of 18 (90 places)."""
    model = build(family, torch.float64)
    if family != "gpt_neo":  # has eager attention alone
        model.model.set_attn_implementation(attention)
    expected, expected_gradient = value_and_gradient(model)
    packed = copy_of(model).with_packing()
    shapes = shapes_of(packed)
    ours, gradient = value_and_gradient(packed)
    assert shapes == [(5, 18)]
    close(ours, expected, NETWORK)
    for a, b in zip(gradient, expected_gradient, strict=True):
        close(a, b, NETWORK)


def test_packing_goes_on_in_training():
    """Asked for in training mode, too: the self-test does without dropout."""
    model = build("gpt2").train().with_packing()
    shapes = shapes_of(model)
    metrics = Engine(model, Optim()).update(SFT(), ragged())
    assert shapes == [(5, 18)] and metrics["grad_norm"] > 0


def test_rows_that_need_as_many_rows_packed_are_left_alone():
    model = build("gpt2").with_packing()
    samples, shapes = ragged(), shapes_of(model)
    even = samples.select(samples.row_prompts.followed_by(samples.completions).lengths == 10)
    expected = build("gpt2").log_prob(even)
    assert torch.equal(model.log_prob(even), expected) and shapes == [(2, 10)]


def test_prompts_that_many_rows_answer_are_still_run_once():
    model = build("gpt2").with_packing()
    shapes = shapes_of(model)
    shared = Samples(Tokens.of([[1, 2, 3]]), torch.zeros(10, dtype=torch.int64), ragged().tokens, ragged().mask)
    close(model.log_prob(shared), build("gpt2").log_prob(shared))
    assert shapes == [(1, 3), (10, 16)]


def test_a_network_that_does_not_look_at_positions_is_refused_and_left_as_it_was():
    model = build("opt").train()
    assert not packs_exactly(model.model)
    with pytest.raises(
        ValueError, match=r"OPTForCausalLM cannot be packed: states .* differ by .*leave packing off"
    ):
        model.with_packing()
    assert model.model.training and not model.packs


def windowed(window: int) -> CausalLM:
    config = hf.MistralConfig(
        vocab_size=VOCAB, num_hidden_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=2048, sliding_window=window, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = CausalLM.from_config(config)
    for k, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(k))
    return model


def test_windows_are_tested_beyond_their_width_and_refused_where_that_is_too_far():
    narrow = windowed(6)
    shapes = shapes_of(narrow)
    assert packs_exactly(narrow.model) and shapes == [(3, 20), (6, 20)]
    with pytest.raises(ValueError, match="window of 1000 tokens is wider than the 512"):
        windowed(1000).with_packing()

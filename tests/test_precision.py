"""bfloat16 inside the network, and activations computed twice: less of a machine for (nearly) the same gradient."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from close import FLOAT32, NETWORK, close, size_of
from families import VOCAB, build
from tiltlm.engine import Engine, Optim
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.precision import computing_in
from tiltlm.objective import Outcome
from tiltlm.policies.sft import SFT
from tiltlm.samples import Samples, Tokens

pytestmark = pytest.mark.kernels

PRECISE = ["float32", "bfloat16"]


def ragged(n: int = 12) -> Samples:
    """`n` rows of 1 to 6 tokens; three to a prompt of 2 to 5 tokens, so that prompts are shared."""
    generator = torch.Generator().manual_seed(0)
    prompts = Tokens.of([[(7 * k + j) % VOCAB for j in range(2 + k % 4)] for k in range((n + 2) // 3)])
    mask = torch.arange(6) < 1 + torch.arange(n)[:, None] % 6
    return Samples(
        prompts, torch.arange(n) // 3, torch.randint(VOCAB, mask.shape, generator=generator) * mask, mask
    )


class Noting(SFT):
    """Maximum likelihood that notes the dtype of the log-probabilities it sees."""

    seen: ClassVar[set[torch.dtype]] = set()

    def loss(self, model: CausalLM, batch: Samples) -> Outcome:
        self.seen.add(model.log_prob(batch).dtype)
        return super().loss(model, batch)


def loss_and_gradient(family: str, precision: str) -> tuple[float, Tensor]:
    engine = Engine(build(family), Optim(lr=1e-12, clip=0, micro_batch=5, precision=precision))
    loss = engine.update(Noting(), ragged())["loss"]
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in engine.parameters)
    return loss, torch.cat([p.grad.flatten() for p in engine.parameters])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_bfloat16_is_on_and_close_to_float32(family):
    """8 bits of mantissa, relative error 2⁻⁸ a product: the loss within 1 %, the gradient's direction within 3 %."""
    (loss, gradient), (rough, rough_gradient) = (loss_and_gradient(family, name) for name in PRECISE)
    assert Noting.seen == {torch.float32}
    assert rough != loss and rough == pytest.approx(loss, rel=0.01)
    error = ((rough_gradient - gradient).norm() / gradient.norm()).item()
    assert 1e-4 < error < 0.03


def test_a_precision_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="float32 or bfloat16; got 'float16'"):
        Optim(precision="float16")


def gradient_and_bytes(model: CausalLM, rows: Samples, training: bool = True) -> tuple[Tensor, int]:
    """The gradient of the log-probability of `rows`, and the bytes that autograd keeps for it (but weights)."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.train(training).zero_grad()
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        total = model.log_prob(rows).sum()
    total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), sum(kept.values())


def alone(samples: Samples) -> Samples:
    """The same completions, each behind a prompt of its own."""
    prompts = Tokens.of([[k % VOCAB, k // VOCAB, 1, 2][: 2 + k % 3] for k in range(len(samples))])
    return Samples(prompts, torch.arange(len(samples)), samples.tokens, samples.mask)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpointing_keeps_the_gradient_and_frees_the_activations(family, lora):
    """GPT-2 with its dropout of 0.1. Rows have prompts of their own: shared ones are run otherwise without it."""
    model, rows = build(family), alone(ragged(40))
    if lora:
        targets = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
        model = model.with_lora(rank=2, init_lora_weights=False, target_modules=targets[family])
    expected, plenty = gradient_and_bytes(model, rows)
    gradient, little = gradient_and_bytes(copy_of(model).with_checkpointing(), rows)
    close(gradient, expected, FLOAT32, size_of(expected))
    assert little < plenty / 2


def test_layers_that_are_computed_again_in_bfloat16_are_computed_as_before():
    """Or torch would find other tensors there. Attention is float32 without them: the gradient's direction within 2 %."""
    rows = alone(ragged())

    def gradient(model: CausalLM) -> Tensor:
        engine = Engine(model.train(), Optim(lr=1e-12, clip=0, precision="bfloat16"))
        engine.update(SFT(), rows)
        return torch.cat([p.grad.flatten() for p in engine.parameters])

    expected = gradient(build("llama"))
    error = (gradient(build("llama").with_checkpointing()) - expected).norm() / expected.norm()
    assert error < 0.02


def test_checkpointing_is_off_in_evaluation_and_leaves_a_frozen_model_without_gradients():
    model = build("gpt2").with_checkpointing()
    _, little = gradient_and_bytes(model, ragged(40))
    _, plenty = gradient_and_bytes(model, ragged(40), training=False)
    assert little < plenty / 2
    assert not model.requires_grad_(False).log_prob(ragged()).requires_grad


def test_prompts_that_are_shared_without_checkpointing_give_the_same_gradient_with_it():
    """No dropout, which falls on other tokens when a prompt is run once for three rows."""
    model = build("gpt2", torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected, _ = gradient_and_bytes(model, ragged(40))
    gradient, _ = gradient_and_bytes(model.with_checkpointing(), ragged(40))
    close(gradient, expected, NETWORK, size_of(expected))


def test_a_pass_keeps_no_rounded_copy_of_a_weight():
    """Of weights in parts they would come to the whole network."""
    layer, kept = nn.Linear(7, 5), list[weakref.ref[Tensor]]()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.shape == layer.weight.shape and made.dtype == torch.bfloat16:
                kept.append(weakref.ref(made))
            return made

    with torch.no_grad(), computing_in(layer, torch.device("cpu"), "bfloat16"):
        with Seen():
            assert layer(torch.ones(2, 7)).dtype == torch.bfloat16
        assert kept and all(copy() is None for copy in kept)

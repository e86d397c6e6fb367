"""The adapters' reference is the base model, bit for bit, however far the adapters have been trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from families import build
from tiltlm.engine import Engine, Optim
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.unadapted import Unadapted
from tiltlm.policies.sft import SFT
from tiltlm.samples import Samples, Tokens

pytestmark = pytest.mark.kernels

TARGETS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "down_proj"]}
PROMPTS = Tokens.of([[3, 5, 7], [2], [9, 1]])


def rows() -> Samples:
    done = Tokens.of([[1, 2, 3, 4], [5, 6], [7], [8, 9, 10], [1, 1]])
    return Samples(PROMPTS, torch.tensor([0, 0, 1, 1, 2]), done.ids, done.mask)


def adapted(family: str) -> tuple[CausalLM, CausalLM]:
    """A base model and a policy: its copy with adapters that have dropout and were trained for five steps."""
    base = build(family)
    policy = copy_of(base).with_lora(rank=2, dropout=0.5, target_modules=TARGETS[family]).train()
    engine = Engine(policy, Optim(lr=0.1))
    for _ in range(5):
        engine.update(SFT(), rows())
    return base, policy


def walked(model: LanguageModel, between: LanguageModel | None = None) -> Tensor:
    """Next-token log-probabilities along a few appends, selecting on the way; `between` computes in the gaps."""
    state, seen = model.start(PROMPTS, 3), []
    for tokens in ([1, 2, 3], [4, 5, 6]):
        state.append(torch.tensor(tokens))
        state.select(torch.tensor([2, 0, 0]))
        if between is not None:
            between.log_prob(rows())
        seen.append(state.log_next())
    return torch.stack(seen)


@torch.no_grad()
@pytest.mark.parametrize("family", TARGETS)
def test_the_reference_is_the_base_model_before_and_after_training_and_the_policy_is_not(family):
    """In scoring and along states that outlive the policy's own passes; in training mode too, dropout and all."""
    base = build(family)
    fresh = Unadapted(copy_of(base).with_lora(rank=2, dropout=0.5, target_modules=TARGETS[family]).train())
    assert torch.equal(fresh.log_prob(rows()), base.log_prob(rows()))
    with torch.enable_grad():
        base, policy = adapted(family)
    reference = Unadapted(policy)
    for mode in (True, False):
        policy.train(mode)
        assert torch.equal(reference.log_prob(rows()), base.log_prob(rows()))
        assert torch.equal(walked(reference, policy), walked(base))
    assert (policy.log_prob(rows()) - base.log_prob(rows())).abs().max() > 0.1
    assert (walked(policy) - walked(base)).abs().max() > 0.1


def test_everything_is_as_it_was_afterwards():
    """Adapters on, modes and trained parameters the same: also where some adapters were frozen, or it broke off."""
    _, policy = adapted("gpt2")
    policy.model.transformer.h[0].eval()
    next(p for p in policy.parameters() if p.requires_grad).requires_grad_(False)
    before = [m.training for m in policy.modules()], [p.requires_grad for p in policy.parameters()]
    policy.eval()
    expected = policy.log_prob(rows())
    for module, mode in zip(policy.modules(), before[0], strict=True):
        module.training = mode
    Unadapted(policy).log_prob(rows())
    with pytest.raises(ValueError, match="prompt is empty"):
        Unadapted(policy).start(Tokens.of([[]]), 1)
    assert before == ([m.training for m in policy.modules()], [p.requires_grad for p in policy.parameters()])
    assert torch.equal(policy.eval().log_prob(rows()), expected)


def test_training_goes_on_through_the_reference_s_pass():
    """The gradient of a loss that needs both is the policy's own."""
    _, policy = adapted("gpt2")
    policy.eval()

    def gradient(reference: Unadapted | None) -> list[Tensor]:
        policy.zero_grad()
        log_p = policy.log_prob(rows())
        log_ref = torch.zeros(()) if reference is None else reference.log_prob(rows())
        (log_p - log_ref).sum().backward()
        return [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    plain, beside = gradient(None), gradient(Unadapted(policy))
    assert plain and all(torch.equal(a, b) for a, b in zip(plain, beside, strict=True))


def test_what_is_done_to_the_reference_is_not_done_to_the_policy():
    _, policy = adapted("gpt2")
    reference = Unadapted(policy)
    reference.requires_grad_(False).eval()
    assert policy.training and any(p.requires_grad for p in policy.parameters())
    assert list(reference.parameters()) == [] and reference.device == policy.device
    policy.eval().at(0.5)
    assert torch.equal(reference.log_prob(rows()), build("gpt2").log_prob(rows()))


def test_models_that_hold_no_reference_are_refused():
    with pytest.raises(ValueError, match="no adapters"):
        Unadapted(build("gpt2"))
    biased = copy_of(build("gpt2")).with_lora(rank=2, target_modules=["c_attn"], bias="lora_only")
    with pytest.raises(ValueError, match=r"trains biases \(lora_only\)"):
        Unadapted(biased)

"""Teacherless models: blind to their own answer, and otherwise a language model like any other."""

from __future__ import annotations

import pytest
import torch

from close import NETWORK, close
from families import build
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import copy_of
from tiltlm.models.teacherless import Teacherless
from tiltlm.ruler.kl import kl_along_in_batches
from tiltlm.samples import Samples, Tokens

pytestmark = pytest.mark.kernels

PROMPTS, COMPLETIONS = Tokens.of([[3, 5, 7], [2], [9, 9, 1, 4]]), Tokens.of([[1, 2, 3], [5, 6], [7]])
SAMPLES = Samples(PROMPTS, torch.arange(3), COMPLETIONS.ids, COMPLETIONS.mask)


@torch.no_grad()
def test_every_token_is_predicted_from_prompt_and_dummies_alone():
    model = Teacherless(build("gpt2", torch.float64).model, dummy_id=22)
    log_p = model.log_prob(SAMPLES)
    logits = model.model(input_ids=torch.tensor([[3, 5, 7, 22, 22]]), use_cache=False).logits.log_softmax(-1)[0]
    expected = torch.stack([logits[2, 1], logits[3, 2], logits[4, 3]])
    close(log_p[0], expected, NETWORK)
    other = model.log_prob(SAMPLES.with_(tokens=torch.tensor([[8, 2, 3], [5, 6, 0], [7, 0, 0]])))
    close(other[0, 1:], log_p[0, 1:], NETWORK)  # the first token changed; the rest does not see it


@torch.no_grad()
def test_walking_the_state_equals_scoring_and_copies_stay_teacherless():
    model = copy_of(Teacherless(build("gpt2", torch.float64).model, dummy_id=22))
    assert isinstance(model, Teacherless)
    close(LanguageModel.log_prob(model, SAMPLES), model.log_prob(SAMPLES), NETWORK)
    state = model.start(PROMPTS, 3)
    state.select(torch.tensor([2, 0]))
    state.append(torch.tensor([1, 1]))
    whole = model.start(PROMPTS, 3)
    whole.append(torch.tensor([1, 1, 1]))
    close(state.log_next(), whole.log_next()[[2, 0]], NETWORK)


@torch.no_grad()
def test_the_laws_along_a_completion_are_those_that_it_was_drawn_by():
    """KL(q‖p) token by token, as the ruler takes it, against the states' own laws; and with adapters it stays blind."""
    q, p = (Teacherless(build("gpt2", torch.float64, seed=seed).model, dummy_id=22) for seed in (0, 1))
    expected = torch.zeros(3, dtype=torch.float64)
    states = q.start(PROMPTS, 3), p.start(PROMPTS, 3)
    for t in range(3):
        log_q, log_p = (state.log_next().double() for state in states)
        expected += torch.where(SAMPLES.mask[:, t], (log_q.exp() * (log_q - log_p)).sum(1), 0.0)
        for state in states:
            state.append(SAMPLES.tokens[:, t])
    close(kl_along_in_batches(q, p, SAMPLES, 2).double(), expected)  # taken in float32


@torch.no_grad()
def test_adapters_leave_it_teacherless():
    model = Teacherless(build("gpt2").model, dummy_id=22)
    before = model.log_prob(SAMPLES)
    adapted = model.with_lora(2)
    assert isinstance(adapted, Teacherless)
    torch.testing.assert_close(adapted.log_prob(SAMPLES), before)  # adapters begin at nothing

"""A decoder of ours in `model.generate`: the very tokens of our own samplers, and nothing ignored in silence."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, StoppingCriteria

import tiltlm as tl
from completions import shaken
from tiltlm.models.causal import CausalLM

PROMPTS = [[1, 2], [3, 2], [4, 4]]


@pytest.fixture(scope="module")
def world() -> tl.Problem:
    size = GPT2Config(vocab_size=5, n_layer=1, n_head=2, n_embd=8, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = shaken(CausalLM.from_config(size, eos_ids=(0,)))
    return tl.Problem.of(
        model, reward=lambda samples: ((samples.tokens == 2) & samples.mask).sum(1).double(), prompts=PROMPTS,
        beta=0.5, max_new_tokens=4, r_max=4.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def guided(world) -> tl.Learnt:
    return tl.learn(world, tl.CTL(), steps=8, lr=0.1, progress=False)


def rows(sequences, prompts, eos=0):
    """Completions as lists, up to their end."""
    found = []
    for ids in sequences[:, prompts.shape[1] :].tolist():
        found.append(ids[: ids.index(eos) + 1] if eos in ids else ids)
    return found


def generated(world, decoder, prompts=None, **options):
    ids = torch.tensor(PROMPTS) if prompts is None else prompts
    options = {"max_new_tokens": 4, "pad_token_id": 0, "seed": 3} | options
    found = world.reference.model.generate(ids, custom_generate=tl.generate_with(decoder), **options)
    assert torch.equal(found[:, : ids.shape[1]].unique(dim=0), ids.unique(dim=0))
    return rows(found, ids)


def test_guided_decoding_in_generate_draws_our_own_tokens(world, guided):
    wanted = guided.draw(seed=3).completions.lists()
    assert generated(world, guided) == wanted == generated(world, guided.model)
    many = torch.tensor(PROMPTS * 20)
    drawn = guided.draw(many.tolist(), seed=3).completions.lists()
    assert generated(world, guided, many) == drawn != generated(world, guided, many, seed=4)
    assert generated(world, world.reference, many) != drawn  # the twist has learnt something


def test_several_of_each_prompt_are_the_rows_of_draw(world, guided):
    wanted = guided.draw(n=5, seed=3).completions.lists()
    assert generated(world, guided, num_return_sequences=5, do_sample=True, top_k=0) == wanted


@pytest.mark.parametrize("method", [tl.SMCDecoding(8), tl.SMCDecoding(8, twist=tl.CTL()), tl.BestOf(3)])
def test_smc_in_generate_picks_our_own_particles(world, method):
    learnt = tl.learn(world, method, steps=2, progress=False) if method.trained() is not method else None
    learnt = learnt or tl.learn(world, method)
    assert (
        generated(world, learnt, num_return_sequences=2, do_sample=True, top_k=0)
        == learnt.draw(n=2, seed=3).completions.lists()
    )


def test_prompts_padded_on_the_left_are_read_without_their_padding(world, guided):
    ids = torch.tensor([[0, 0, 3], [1, 2, 1]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    found = rows(
        world.reference.model.generate(
            ids,
            attention_mask=mask,
            custom_generate=tl.generate_with(guided),
            max_new_tokens=4,
            pad_token_id=0,
            seed=3,
        ),
        ids,
    )
    assert found == guided.draw([[3], [1, 2, 1]], seed=3).completions.lists()


def test_ended_rows_are_filled_with_the_pad_token(world, guided):
    ids = torch.tensor(PROMPTS[:2] * 30)
    found = world.reference.model.generate(
        ids, custom_generate=tl.generate_with(guided), max_new_tokens=4, pad_token_id=4, return_dict_in_generate=True
    ).sequences[:, 2:]  # fmt: skip
    ended = (found == 0).cumsum(1) - (found == 0).long() > 0
    assert bool(ended.any()) and bool((found[ended] == 4).all())


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **options):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"do_sample": True, "temperature": 0.5, "top_k": 0},
            "TemperatureLogitsWarper would bend the decoder's law",
        ),
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor would bend"),
        ({"num_beams": 2}, "num_beams 1, and no streamer"),
        ({"stopping_criteria": [Never()]}, "Never is not heeded"),
    ],
)
def test_what_would_be_ignored_is_refused(world, guided, options, words):
    with pytest.raises(ValueError, match=words):
        generated(world, guided, **options)


def test_a_model_of_another_vocabulary_is_refused(world, guided):
    wide = CausalLM.from_config(GPT2Config(vocab_size=7, n_layer=1, n_head=1, n_embd=4, n_positions=16))
    with pytest.raises(ValueError, match="the decoder knows 5 tokens and the model whose generate is called 7"):
        wide.model.generate(
            torch.tensor(PROMPTS), custom_generate=tl.generate_with(guided), max_new_tokens=2, pad_token_id=0
        )

"""A chosen dozen of families is drawn from and scored right, and the self-test sees what is wrong with a network."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

import every_family
from families import build as known
from tiltlm.models import selftest
from tiltlm.models.backbone import BackboneState, hidden
from tiltlm.models.base import LanguageModel
from tiltlm.models.body import Trust, trust_of
from tiltlm.models.cache import BufferLayer
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.models.prefixes import WholePasses, body_state
from tiltlm.samples import Samples, Tokens

VERDICTS = {
    "bloom": "cache",
    "cohere2": "cache",
    "gemma2": "cache",
    "gpt2": "cache",
    "gpt_neox": "cache",
    "granite": "cache",
    "llama": "cache",
    "llama4_text": "cache",
    "lfm2": "passes",
    "mamba": "passes",
    "mamba2": "passes",
    "minimax": "passes",
    "mistral": "cache",
    "opt": "cache",
    "phi": "cache",
    "qwen3_next": "passes",
}
"""Windows of 6 tokens (gemma2, cohere2, mistral) and chunks of 6 (llama4) are narrower than the rows drawn."""

PROMPTS = [[3, 5, 7, 11], [9], [4, 6, 8, 10, 12, 14, 16, 18]]


@pytest.mark.parametrize("family", VERDICTS)
def test_a_family_is_scored_and_drawn_as_plain_passes_of_each_row_say(family):
    """Logits of size 30 in float32: 1e-4 is a few roundings of those."""
    row = every_family.judge(family)
    assert (row.verdict, row.error < 1e-4) == (VERDICTS[family], True), row


@pytest.fixture(params=["mamba2", "qwen3_next"])
def recurrent(request) -> CausalLM:
    return CausalLM(every_family.build(request.param))


@torch.no_grad()
def test_whole_passes_append_select_and_peek_as_any_state_does(recurrent):
    state = recurrent.start(Tokens.of(PROMPTS), 4)
    assert isinstance(state.state, WholePasses)
    state.append(torch.tensor([1, 2, 3]))
    state.select(torch.tensor([2, 0, 0]))
    state.append(torch.tensor([5, 6, 7]))
    rows = [[*PROMPTS[2], 3, 5], [*PROMPTS[0], 1, 6], [*PROMPTS[0], 1, 7]]
    for k, row in enumerate(rows):
        logits = recurrent.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(state.logits()[k], logits, atol=1e-5, rtol=1e-5)
    value = ValueHead(recurrent, width=2)
    torch.nn.init.normal_(value.out.weight, generator=torch.Generator().manual_seed(0))
    peeking, candidates = value.start(Tokens.of(rows), 1), torch.tensor([[1, 2], [3, 4], [5, 6]])
    found = peeking.peek(candidates)
    for n, row in enumerate(rows):
        for k in range(2):
            done = candidates[n : n + 1, k : k + 1]
            one = Samples(Tokens.of([row]), torch.tensor([0]), done, torch.ones_like(done, dtype=torch.bool))
            torch.testing.assert_close(found[n, k], value.values(one)[0, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(peeking.peek(candidates), found)


@torch.no_grad()
def test_rows_of_one_length_together_are_the_rows_alone_gradients_included():
    """What networks get that cannot stand padding: here one that can, so that both ways must agree."""
    model = known("llama")
    sequences = Tokens.of([[1, 2, 3], [4], [5, 6, 7], [8, 9]])
    weight = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0)) * sequences.mask[:, :, None]

    def value_and_gradient() -> list[torch.Tensor]:
        model.zero_grad()
        with torch.enable_grad():
            total = (hidden(model.model, sequences) * weight).sum()
            total.backward()
        return [total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    padded = value_and_gradient()
    vars(model.model)["tiltlm_trust"] = replace(model.trust, padding=False)
    for a, b in zip(value_and_gradient(), padded, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def broken(monkeypatch, kind: type, name: str, wrong) -> Trust:
    """What the self-test finds of a small Llama with one of our own functions replaced."""
    model = known("llama").model
    assert selftest.run(model) == Trust()
    monkeypatch.setattr(kind, name, wrong)
    return selftest.run(model)


_RIGHT = BufferLayer.take_rows


def _take_the_first_rows(self: BufferLayer, index: torch.Tensor) -> None:
    """As many rows as asked for, but not those: an error of content alone."""
    _RIGHT(self, torch.arange(len(index)) % len(self.stores()[0]))


def test_a_cache_whose_rows_are_not_repeated_is_found_out(monkeypatch):
    trust = broken(monkeypatch, BufferLayer, "take_rows", _take_the_first_rows)
    assert not trust.cache and not trust.sharing and "differ from a plain pass" in trust.why


def test_a_peek_that_moves_the_prefix_is_found_out_and_the_cache_is_not_blamed(monkeypatch):
    right = BackboneState.peek
    trust = broken(monkeypatch, BackboneState, "peek", lambda self, candidates: right(self, candidates.flip(1)))
    assert trust.cache and not trust.peek


@torch.no_grad()
def test_without_trust_in_peeking_every_candidate_gets_a_row():
    model = known("llama")
    candidates = torch.tensor([[1, 2], [3, 4], [5, 6]])
    together = body_state(model.model, Tokens.of(PROMPTS), 2).peek(candidates)
    vars(model.model)["tiltlm_trust"] = Trust(peek=False)
    state = body_state(model.model, Tokens.of(PROMPTS), 2)
    torch.testing.assert_close(state.peek(candidates), together, atol=1e-5, rtol=1e-5)


def test_a_network_that_sees_what_comes_after_is_refused_by_name():
    config = BertConfig(
        vocab_size=23, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(ValueError, match=r"^BertLMHeadModel cannot be used: it is not causal \(.*\)$"):
        CausalLM(BertLMHeadModel(config))


class Crowded(GPT2LMHeadModel):
    """Rows that change with their batch mates: states lose the mean over the batch."""

    def __init__(self, config):
        super().__init__(config)
        self.transformer.ln_f.register_forward_hook(lambda _, __, x: x - x.mean(0, keepdim=True) * (len(x) > 1))


def test_a_network_whose_rows_change_each_other_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^Crowded cannot be used: rows of a batch change each other"):
        CausalLM(Crowded(GPT2Config(vocab_size=23, n_layer=1, n_head=2, n_embd=8)))


def test_even_a_network_whose_context_has_no_effect_yet_is_tested(monkeypatch):
    """All projections out of attention are zero at the start of training: a wrong cache would not show."""
    model = known("llama").model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name:
                parameter.zero_()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert selftest.run(model).cache
    monkeypatch.setattr(BufferLayer, "take_rows", _take_the_first_rows)
    assert not selftest.run(model).cache
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_longer_rows_than_a_chunk_are_drawn_by_full_passes_where_the_chunk_is_too_wide_to_test():
    model = CausalLM(every_family.build("llama4_text"))
    vars(model.model)["tiltlm_trust"] = Trust(reach=10)
    assert isinstance(body_state(model.model, Tokens.of([[1] * 6]), 4), BackboneState)
    assert isinstance(body_state(model.model, Tokens.of([[1] * 6]), 5), WholePasses)
    config = every_family.config_of("llama4_text")
    config.attention_chunk_size = 8192
    model = CausalLM.from_config(config)
    assert model.trust == Trust(reach=8192)


def test_the_test_leaves_modes_and_random_state_alone():
    model = known("gpt2").train().model
    model.transformer.h[0].eval()
    modes, before = [m.training for m in model.modules()], torch.get_rng_state()
    selftest.run(model)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def forgotten(monkeypatch, tmp_path):
    """A process that has tested nothing, with a cache folder of its own; counts the tests run."""
    runs: list[str] = []
    right = selftest.run
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(selftest, "_FOUND", {})
    monkeypatch.setattr(selftest, "_SAID", set())
    monkeypatch.setattr(selftest, "run", lambda model: runs.append(type(model).__name__) or right(model))
    return runs


def test_what_was_found_is_remembered_in_the_process_and_on_disk(forgotten, tmp_path, monkeypatch):
    model = known("gpt2")
    assert forgotten == ["GPT2LMHeadModel"] and trust_of(copy_of(model).model) == model.trust
    known("gpt2", seed=1)
    monkeypatch.setattr(selftest, "_FOUND", {})
    known("gpt2")
    assert len(forgotten) == 1
    (file,) = (tmp_path / "cache" / "tiltlm" / "selftest").glob("*.json")
    assert json.loads(file.read_text())["cache"] is True
    monkeypatch.setattr(selftest, "_FOUND", {})
    file.write_text("{ cut short")
    known("gpt2")
    assert len(forgotten) == 2
    CausalLM.from_config(GPT2Config(vocab_size=23, n_layer=1, n_head=2, n_embd=8))
    assert len(forgotten) == 3


def test_a_cache_folder_that_cannot_be_written_costs_a_test_and_nothing_else(forgotten, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert known("gpt2").trust == Trust()
    monkeypatch.setattr(selftest, "_FOUND", {})
    assert known("gpt2").trust == Trust() and len(forgotten) == 2


def test_full_passes_are_announced_once(forgotten, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(selftest, "note", said.append)
    for seed in range(2):
        CausalLM.from_config(every_family.config_of("mamba2"), seed=seed)
    assert len(said) == 1 and said[0].startswith("Mamba2ForCausalLM is drawn from by full forward passes")


@torch.no_grad()
def test_a_network_that_takes_no_position_ids_walks_as_it_scores():
    """BLOOM biases attention by distance and has no argument for positions; rows are ragged."""
    model = CausalLM(every_family.build("bloom"))
    done = Tokens.of([[1, 2, 3], [4, 5], [6]])
    rows = Samples(Tokens.of(PROMPTS), torch.arange(3), done.ids, done.mask)
    torch.testing.assert_close(LanguageModel.log_prob(model, rows), model.log_prob(rows), atol=2e-5, rtol=1e-5)

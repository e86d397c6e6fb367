"""Every model family tells the same story whichever way it is asked: whole, in chunks, cached, padded, peeked."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config

from close import FLOAT32, NETWORK, close
from families import FAMILIES, VOCAB, build
from tiltlm.models import scoring
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream

pytestmark = pytest.mark.kernels

PROMPTS = [[3, 5, 7, 11], [2], [9, 9, 1], [4, 6, 8, 10, 12, 14, 16, 18]]
COMPLETIONS = [[1, 2, 3, 4], [5, 6], [7], [8, 9, 10]]


@pytest.fixture(params=FAMILIES)
def model(request) -> CausalLM:
    """In float64: what is tested here are laws, not a processor's rounding."""
    return build(request.param, torch.float64)


def ragged() -> Samples:
    done = Tokens.of(COMPLETIONS)
    return Samples(Tokens.of(PROMPTS), torch.arange(4), done.ids, done.mask)


def plain_log_prob(model: CausalLM, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """One row, no padding, no cache, the network's own logits."""
    ids = torch.tensor([prompt + completion])
    log_p = model.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0]
    return torch.stack([log_p[len(prompt) - 1 + t, y] for t, y in enumerate(completion)])


@torch.no_grad()
def test_log_prob_of_a_ragged_batch_is_that_of_each_row_alone(model):
    batch = model.log_prob(ragged())
    for n, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        close(batch[n, : len(completion)], plain_log_prob(model, prompt, completion), NETWORK)
        assert (batch[n, len(completion) :] == 0).all()


@torch.no_grad()
def test_log_prob_does_not_depend_on_batch_mates(model):
    samples = ragged()
    alone = torch.cat([_widen(model.log_prob(samples.select(torch.tensor([n])))) for n in range(4)])
    close(alone, model.log_prob(samples), NETWORK)


def _widen(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 4 - x.shape[1]))


def test_chunk_size_changes_neither_value_nor_gradient(model, monkeypatch):
    def value_and_gradient() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        total = (model.log_prob(ragged()) * torch.linspace(0.5, 2, 16).reshape(4, 4)).sum()
        total.backward()
        return total.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole, whole_gradient = value_and_gradient()
    monkeypatch.setattr(scoring, "CHUNK_ENTRIES", 3 * VOCAB)
    parts, parts_gradient = value_and_gradient()
    close(parts, whole, NETWORK)
    for a, b in zip(parts_gradient, whole_gradient, strict=True):
        close(a, b, NETWORK)


def test_gradient_of_log_prob_is_autograd_s_own(model):
    def gradient(log_p: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        log_p.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ours = gradient(model.log_prob(ragged()))
    rows = zip(PROMPTS, COMPLETIONS, strict=True)
    plain = gradient(torch.cat([plain_log_prob(model, p, c) for p, c in rows]))
    for a, b in zip(ours, plain, strict=True):
        close(a, b, NETWORK)


@torch.no_grad()
def test_walking_the_state_equals_scoring(model):
    samples = ragged()
    walked = super(CausalLM, model).log_prob(samples)
    close(walked, model.log_prob(samples), NETWORK)


@torch.no_grad()
def test_select_reorders_repeats_and_drops_rows(model):
    state = model.start(Tokens.of(PROMPTS), 4)
    state.append(torch.tensor([1, 2, 3, 4]))
    state.select(torch.tensor([3, 0, 0]))
    state.append(torch.tensor([5, 6, 7]))
    for row, prefix in enumerate([[*PROMPTS[3], 4, 5], [*PROMPTS[0], 1, 6], [*PROMPTS[0], 1, 7]]):
        alone = model.start(Tokens.of([prefix]), 1).log_next()[0]
        close(state.log_next()[row], alone, NETWORK)


@torch.no_grad()
@pytest.mark.parametrize("per_token", [False, True])
def test_peek_equals_scoring_each_candidate_and_moves_nothing(model, per_token):
    value = _random_value(model, per_token)
    candidates = torch.tensor([[1, 5, 9], [2, 2, 4], [0, 3, 7], [11, 13, 15]])
    state = value.start(Tokens.of(PROMPTS), 3)
    state.append(torch.tensor([6, 7, 8, 9]))
    peeked = state.peek(candidates)
    for n, prompt in enumerate(PROMPTS):
        for k in range(3):
            one = candidates[n : n + 1, k : k + 1]
            zero = torch.zeros(1, dtype=torch.int64)
            row = Samples(Tokens.of([[*prompt, 6 + n]]), zero, one, torch.ones_like(one, dtype=torch.bool))
            close(peeked[n, k], value.values(row)[0, 0], NETWORK)
    close(state.peek(candidates), peeked, NETWORK)


@torch.no_grad()
@pytest.mark.parametrize("picked", [[1, 2, 0, 15], [20, 2, 0, 15]], ids=["all peeked", "one not peeked"])
def test_append_after_peek_equals_append_alone(model, picked):
    value = _random_value(model, per_token=False)
    candidates = torch.tensor([[1, 5, 9], [2, 6, 4], [0, 3, 7], [11, 13, 15]])
    peeking, plain = value.start(Tokens.of(PROMPTS), 3), value.start(Tokens.of(PROMPTS), 3)
    peeking.peek(candidates)
    for state in (peeking, plain):
        state.append(torch.tensor(picked))
        state.append(torch.tensor([1, 1, 2, 2]))
    close(peeking.peek(candidates), plain.peek(candidates), NETWORK)


def _random_value(model: CausalLM, per_token: bool) -> ValueHead:
    value = ValueHead(copy_of(model), width=2, per_token=per_token, mlp_layers=1).to(model.model.dtype).eval()
    for parameter in value.head.parameters():  # the same numbers in every dtype
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return value


@torch.no_grad()
def test_a_fresh_value_head_is_zero_and_its_copy_leaves_the_model_alone(model):
    value = ValueHead(copy_of(model))
    assert (value.values(ragged()) == 0).all()
    before = model.log_prob(ragged())
    next(value.parameters()).add_(1.0)
    assert torch.equal(model.log_prob(ragged()), before)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_keep_every_number(family, tmp_path):
    model = build(family)
    value = _random_value(model, per_token=False)
    for kept, read in ((model, lambda s: s.log_prob(ragged())), (value, lambda s: s.values(ragged()))):
        folder = tmp_path / type(kept).__name__
        kept.save(folder)
        again = type(kept).load(folder)
        weights = again.state_dict()
        assert all(torch.equal(x, weights[name]) for name, x in kept.state_dict().items())
        close(read(again), read(kept))  # not bit for bit: weights read from a file lie elsewhere in memory


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_says_what_float64_says_but_for_rounding(family):
    """Scored, walked and peeked at: nothing on the way is coarser than the weights."""
    candidates, found = torch.tensor([[1, 5, 9], [2, 2, 4], [0, 3, 7], [11, 13, 15]]), []
    for dtype in (torch.float32, torch.float64):
        model = build(family, dtype)
        state = _random_value(model, per_token=False).start(Tokens.of(PROMPTS), 3)
        found.append([model.log_prob(ragged()), super(CausalLM, model).log_prob(ragged()), state.peek(candidates)])
    for single, double in zip(*found, strict=True):
        assert single.dtype == torch.float32
        close(single.double(), double, FLOAT32)


def test_lora_starts_as_the_reference_trains_adapters_only_and_saves_adapter_files(tmp_path):
    reference = build("gpt2")
    policy = copy_of(reference).with_lora(rank=2, target_modules=["c_attn"])
    close(policy.log_prob(ragged()), reference.log_prob(ragged()))
    policy.log_prob(ragged()).sum().backward()
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    policy.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_load_takes_the_dtype_it_is_told(tmp_path):
    build("gpt2").save(tmp_path)
    assert CausalLM.load(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert CausalLM.load(tmp_path).model.dtype == torch.float32


def test_empty_prompt_and_too_long_a_row_are_named():
    model = build("gpt2")
    with pytest.raises(ValueError, match="prompt is empty"):
        model.start(Tokens.of([[1], []]), 1)
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        model.start(Tokens.of([[1] * 60]), 10)


@torch.no_grad()
def test_the_real_stories_model_says_its_known_text(shared_data):
    """Greedy text from `<s>` equals the file beside the model."""
    from transformers import AutoTokenizer

    folder = shared_data / "models" / "stories260K"
    model, tokenizer = CausalLM.load(folder), AutoTokenizer.from_pretrained(folder)
    state, ids = model.start(Tokens.of([[1]]), 200), []
    for _ in range(200):
        token = state.logits().argmax(-1)
        ids.append(int(token))
        state.append(token)
    expected = (folder / "expected_greedy_200.txt").read_text().strip()
    assert tokenizer.decode(ids).strip()[: len(expected)] == expected


def test_a_fresh_model_is_in_evaluation_mode_so_that_a_reference_stays_the_same():
    config = GPT2Config(vocab_size=23, n_layer=1, n_head=2, n_embd=8, bos_token_id=None, eos_token_id=None)
    model = CausalLM.from_config(config)
    assert config.resid_pdrop > 0 and not model.training and not model.model.training
    rows = Samples(Tokens.of([[1]]), torch.tensor([0]), torch.tensor([[2, 3]]), torch.ones(1, 2).bool())
    assert torch.equal(model.log_prob(rows), model.log_prob(rows))


def test_a_frozen_body_stays_in_evaluation_mode_while_its_head_trains():
    """It may be the reference itself: dropout there would change pi_ref under everybody's feet."""
    body = build("gpt2")
    head = ValueHead(body, frozen=True).train()
    assert head.training and head.head.training and not body.training
    assert ValueHead(copy_of(build("gpt2"))).train().body.training


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_temperature_divides_the_logits_in_drawing_and_in_scoring(family):
    """log_prob and the log_q of draws at T = 0.5 are log-softmax(logits/T)."""
    model = build(family, torch.float64, eos_ids=(3,))
    cold = copy_of(model).at(0.5)
    samples = draw(cold, Tokens.of([[5, 7], [2]]), n=3, max_new_tokens=5, stream=stream(0, "temperature"))
    with torch.no_grad():
        close(samples.log_q, cold.log_prob(samples), NETWORK)
        plain = model.start(Tokens.of([[5, 7]]), 1).log_next()
        close(cold.start(Tokens.of([[5, 7]]), 1).log_next(), (plain / 0.5).log_softmax(-1), NETWORK)
        assert (cold.log_prob(samples) - model.log_prob(samples)).abs().max() > 0.05
    with pytest.raises(ValueError, match="temperature must be positive"):
        model.at(0.0)

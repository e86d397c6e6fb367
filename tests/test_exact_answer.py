"""The exact-match reward pays for the answer to its own prompt, in full, and for nothing else."""

from __future__ import annotations

import pytest
import torch

from tiltlm.rewards.exact_answer import ExactAnswer
from tiltlm.samples import Samples, Tokens

PROMPTS = Tokens.of([[9], [8]])
ANSWERS = Tokens.of([[1, 2, 3], [4, 0]])


def samples(rows: list[list[int]], index: list[int]) -> Samples:
    done = Tokens.of(rows)
    return Samples(PROMPTS, torch.tensor(index), done.ids, done.mask)


def test_only_the_whole_answer_to_the_own_prompt_pays():
    rows = [[4, 0], [1, 2, 3], [1, 2], [1, 2, 4], [4, 0, 0], [4], [1, 2, 3], [1, 2, 3, 0], []]
    got = ExactAnswer(ANSWERS)(samples(rows, [1, 0, 0, 0, 1, 1, 1, 0, 0]))
    assert got.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert got.dtype == torch.get_default_dtype()


def test_what_stands_under_the_padding_does_not_matter():
    ids = torch.tensor([[4, 0, 5]])
    row = Samples(PROMPTS, torch.tensor([1]), ids, torch.tensor([[True, True, False]]))
    assert ExactAnswer(ANSWERS)(row).tolist() == [1]


def test_the_payments_are_settings():
    got = ExactAnswer(ANSWERS, correct=1.0, wrong=-0.1)(samples([[4, 0], [4, 1]], [1, 1]))
    torch.testing.assert_close(got, torch.tensor([1.0, -0.1]))


def test_completions_narrower_than_the_answers():
    assert ExactAnswer(ANSWERS)(samples([[4, 0]], [1])).tolist() == [1]
    assert ExactAnswer(ANSWERS)(samples([[1, 2]], [0])).tolist() == [0]


def test_answers_to_other_prompts_are_refused():
    with pytest.raises(ValueError, match="1 answers for 2 prompts"):
        ExactAnswer(ANSWERS.select(slice(0, 1)))(samples([[4]], [1]))

"""What travels: shapes are checked at birth, padding means nothing, and no row is mixed up with another."""

from __future__ import annotations

import pytest
import torch

from tiltlm.samples import Conditioned, Pairs, Samples, Tokens, cat_samples, cat_tokens, conditions_of

PROMPTS = Tokens.of([[1, 2, 3], [4], [5, 6]])
DONE = Tokens.of([[10, 11], [12], [13, 14, 15], [16]])
INDEX = torch.tensor([2, 0, 1, 0])
ONES = torch.ones(4, 3, dtype=torch.bool)


def full() -> Samples:
    """Four ragged rows with every field set, each value naming its row."""
    row = torch.arange(4.0)
    per_token = (row[:, None] + torch.arange(3) / 10) * DONE.mask
    return Samples(
        PROMPTS, INDEX, DONE.ids, DONE.mask, finished=torch.tensor([True, False, True, False]), log_q=-per_token,
        log_ref=-2 * per_token, reward=row + 100, log_w=row + 200,
    )  # fmt: skip


def equal(a: Samples, b: Samples) -> bool:
    """Same rows, same fields, bit by bit."""
    fields = {**a.optional(), "i": a.prompt_index, "t": a.tokens, "m": a.mask, "p": a.prompts.ids}
    others = {**b.optional(), "i": b.prompt_index, "t": b.tokens, "m": b.mask, "p": b.prompts.ids}
    return set(fields) == set(others) and all(torch.equal(fields[name], others[name]) for name in fields)


# ---- Tokens -------------------------------------------------------------------------------------------------


def test_tokens_of_lists_and_back():
    rows = [[1, 2, 3], [], [4]]
    tokens = Tokens.of(rows)
    assert tokens.lists() == rows and tokens.lengths.tolist() == [3, 0, 1] and len(tokens) == 3
    assert tokens.ids.tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]]
    assert Tokens.of([]).ids.shape == (0, 0)
    assert Tokens.full(torch.tensor([[0, 0], [1, 0]])).lists() == [[0, 0], [1, 0]]


def test_length_not_the_token_decides_where_a_row_ends():
    """A real token 0 is a token, though padding is written as 0."""
    assert Tokens.of([[0], [7, 0, 0]]).lists() == [[0], [7, 0, 0]]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (
            torch.zeros(3, dtype=torch.int64),
            torch.ones(3, dtype=torch.bool),
            r"ids must be \[N, L\]; got shape \[3\]",
        ),
        (torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), "ids must be int64; got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool), r"mask must be bool \[2, 3\]"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3), "mask must be bool .* got torch.float32"),
        (torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[False, True]]), "must be right-padded"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[True, False, True]]), "must be right-padded"),
    ],
)
def test_tokens_that_are_not_right_padded_ids_are_refused(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        Tokens(ids, mask)


def test_followed_by_joins_ragged_rows_without_holes():
    left, right = [[1, 2, 3], [4], [], [5, 6]], [[7], [8, 9], [10], []]
    joined = Tokens.of(left).followed_by(Tokens.of(right))
    assert joined.lists() == [a + b for a, b in zip(left, right, strict=True)]
    assert (joined.ids[~joined.mask] == 0).all() and joined.ids.shape == (4, 4)


def test_followed_by_joins_equal_lengths_and_nothing():
    left = Tokens.of([[1, 2], [3, 4]])
    assert left.followed_by(Tokens.of([[5], [6, 7]])).lists() == [[1, 2, 5], [3, 4, 6, 7]]
    assert left.followed_by(Tokens.of([[], []])).lists() == left.lists()
    assert Tokens.of([[1], [2, 3]]).followed_by(Tokens.of([[], []])).lists() == [[1], [2, 3]]
    assert Tokens.of([[], []]).followed_by(left).lists() == left.lists()


def test_what_stands_under_the_padding_has_no_meaning():
    """Rubbish behind the rows is neither joined nor listed."""
    mask = torch.tensor([[True, False], [True, True]])
    dirty = Tokens(torch.tensor([[1, 99], [2, 3]]), mask)
    assert dirty.lists() == [[1], [2, 3]]
    assert dirty.followed_by(dirty).lists() == [[1, 1], [2, 3, 2, 3]]


def test_cat_tokens_pads_to_the_widest():
    assert cat_tokens([Tokens.of([[1]]), Tokens.of([[2, 3, 4], []])]).lists() == [[1], [2, 3, 4], []]


# ---- Samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_index": torch.zeros(3, dtype=torch.int64)}, r"prompt_index must be \[4\]; got \[3\]"),
        ({"prompt_index": torch.tensor([0, 1, 2, 3])}, "names prompts 0 to 3; there are 3 prompts"),
        ({"prompt_index": torch.tensor([0, 1, 2, -1])}, "names prompts -1 to 2; there are 3 prompts"),
        ({"tokens": torch.zeros(4, 3)}, "ids must be int64"),
        ({"mask": ~ONES | torch.tensor([False, True, False])}, "must be right-padded"),
        ({"finished": ONES}, r"Samples.finished must be \[4\]; got \[4, 3\]"),
        ({"reward": torch.zeros(4, 1)}, r"Samples.reward must be \[4\]; got \[4, 1\]"),
        ({"log_w": torch.zeros(5)}, r"Samples.log_w must be \[4\]; got \[5\]"),
        ({"log_q": torch.zeros(4)}, r"Samples.log_q must be \[4, 3\]; got \[4\]"),
        ({"log_ref": torch.zeros(4, 2)}, r"Samples.log_ref must be \[4, 3\]; got \[4, 2\]"),
    ],
)
def test_samples_of_the_wrong_shape_are_refused_with_what_came_and_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        full().with_(**fields)


@pytest.mark.parametrize("fields", [{"prompt_index": torch.zeros(4)}, {"finished": torch.zeros(4)}])
def test_a_prompt_index_that_is_not_whole_numbers_or_a_finished_that_is_not_bool_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        full().with_(**fields)


def test_with_checks_shapes_again_and_none_clears_a_field():
    bare = full().with_(log_q=None, reward=None)
    assert set(bare.optional()) == {"finished", "log_ref", "log_w"}


def test_every_row_finds_its_own_prompt():
    assert full().row_prompts.lists() == [[5, 6], [1, 2, 3], [4], [1, 2, 3]]
    assert full().sequences().lists() == [[5, 6, 10, 11], [1, 2, 3, 12], [4, 13, 14, 15], [1, 2, 3, 16]]


@pytest.mark.parametrize(
    "index",
    [torch.tensor([3, 0, 0]), slice(1, 3), torch.tensor([True, False, False, True]), torch.zeros(0).long()],
    ids=["numbers", "slice", "mask", "none"],
)
def test_select_takes_whole_rows_every_field_alike(index):
    part, whole = full().select(index), full()
    rows = torch.arange(4)[index].tolist()
    assert len(part) == len(rows) and part.prompts is whole.prompts
    assert part.reward.tolist() == [100.0 + n for n in rows] and part.log_w.tolist() == [200.0 + n for n in rows]
    assert part.completions.lists() == [DONE.lists()[n] for n in rows]
    assert part.row_prompts.lists() == [whole.row_prompts.lists()[n] for n in rows]
    assert torch.equal(part.finished, whole.finished[rows]) and torch.equal(part.log_q, whole.log_q[rows])
    assert torch.equal(part.log_ref, whole.log_ref[rows])


def test_cat_samples_keeps_every_row_with_its_prompt_and_numbers():
    other = Samples(
        Tokens.of([[7, 7, 7, 7], [8]]), torch.tensor([1, 0]), torch.tensor([[20], [21]]),
        torch.ones(2, 1, dtype=torch.bool), reward=torch.tensor([1.0, 2.0]), log_q=torch.tensor([[-1.0], [-2.0]]),
    )  # fmt: skip
    both = cat_samples([full(), other])
    assert both.row_prompts.lists() == [*full().row_prompts.lists(), [8], [7, 7, 7, 7]]
    assert both.completions.lists() == [*DONE.lists(), [20], [21]]
    assert set(both.optional()) == {"reward", "log_q"}  # what only one part knows is dropped
    assert both.reward.tolist() == [100, 101, 102, 103, 1, 2]
    assert both.log_q.sum(1).tolist() == pytest.approx([*full().log_q.sum(1).tolist(), -1, -2])
    halves = cat_samples([full().select(slice(0, 2)), full().select(slice(2, 4))])
    assert halves.sequences().lists() == full().sequences().lists()


def test_cat_samples_of_nothing_is_refused():
    with pytest.raises(ValueError, match="needs at least one part"):
        cat_samples([])


@pytest.mark.parametrize("samples", [full(), full().with_(log_q=None, reward=None, log_w=None)])
def test_save_and_load_keep_every_bit_and_dtype(samples, tmp_path):
    samples.save(tmp_path / "s.safetensors")
    back = Samples.load(tmp_path / "s.safetensors")
    assert equal(back, samples) and back.prompts.lists() == samples.prompts.lists()
    assert all(back.optional()[name].dtype == x.dtype for name, x in samples.optional().items())


def test_save_takes_tensors_that_need_gradients_and_are_not_contiguous(tmp_path):
    odd = full().with_(log_q=torch.zeros(3, 4).t().requires_grad_())
    odd.save(tmp_path / "s.safetensors")
    assert not Samples.load(tmp_path / "s.safetensors").log_q.requires_grad


def test_to_loses_nothing_on_the_way():
    assert equal(full().to("cpu"), full()) and equal(pair().to("cpu").rejected, pair().rejected)


# ---- Pairs --------------------------------------------------------------------------------------------------


def pair() -> Pairs:
    """Chosen answers one to three tokens long, rejected ones one; rewards 100… and 200…."""
    rejected = Samples(
        PROMPTS, INDEX, torch.tensor([[30], [31], [32], [33]]), torch.ones(4, 1, dtype=torch.bool),
        reward=torch.arange(4.0) + 200, log_ref=torch.arange(4.0)[:, None],
    )  # fmt: skip
    return Pairs(full(), rejected)


def test_both_lays_chosen_rows_first_then_rejected_ones():
    both = pair().both()
    assert both.completions.lists() == [*DONE.lists(), [30], [31], [32], [33]]
    assert both.row_prompts.lists() == 2 * full().row_prompts.lists()
    assert both.reward.tolist() == [100, 101, 102, 103, 200, 201, 202, 203]
    assert set(both.optional()) == {"reward", "log_ref"}
    assert both.log_ref.sum(1).tolist() == pytest.approx([*full().log_ref.sum(1).tolist(), 0, 1, 2, 3])


def test_select_of_pairs_keeps_the_sides_together():
    part = pair().select(torch.tensor([2, 0]))
    assert len(part) == 2
    assert part.chosen.completions.lists() == [[13, 14, 15], [10, 11]]
    assert part.rejected.completions.lists() == [[32], [30]]


def test_pairs_that_do_not_match_are_refused():
    chosen, rejected = pair().chosen, pair().rejected
    with pytest.raises(ValueError, match="as many rejected rows as chosen ones; got 3 and 4"):
        Pairs(chosen, rejected.select(slice(0, 3)))
    with pytest.raises(ValueError, match="must answer the same prompt"):
        Pairs(chosen, rejected.select(torch.tensor([1, 0, 2, 3])))
    other = Samples(Tokens.of([[1, 2, 3], [9], [5, 6]]), INDEX, rejected.tokens, rejected.mask)
    with pytest.raises(ValueError, match="must answer the same prompt"):
        Pairs(chosen, other)


def test_prompts_that_differ_in_length_alone_are_different_prompts():
    """[5] padded with 0 and the two tokens [5, 0] share their ids, not their mask."""
    done, mask, index = torch.tensor([[1]]), torch.tensor([[True]]), torch.tensor([0])
    short, long = Tokens.of([[5], [1, 2]]), Tokens.of([[5, 0], [1, 2]])
    with pytest.raises(ValueError, match="must answer the same prompt"):
        Pairs(Samples(short, index, done, mask), Samples(long, index, done, mask))


# ---- conditions ---------------------------------------------------------------------------------------------


def conditioned() -> Conditioned:
    prompts = Tokens.of([[1, 2], [3], [4, 5]])
    return Conditioned(prompts.ids, prompts.mask, Tokens.of([[7], [8, 9], [6]]))


def test_conditions_travel_with_their_prompts(tmp_path):
    some = conditioned().select(torch.tensor([2, 0]))
    assert some.lists() == [[4, 5], [1, 2]] and conditions_of(some).lists() == [[6], [7]]
    rows = Samples(conditioned(), torch.tensor([1, 1, 0]), torch.ones(3, 1).long(), torch.ones(3, 1).bool())
    assert conditions_of(rows.row_prompts).lists() == [[8, 9], [8, 9], [7]]
    assert conditions_of(rows.select(slice(0, 1)).prompts).lists() == [[7], [8, 9], [6]]
    rows.save(tmp_path / "s.safetensors")
    again = Samples.load(tmp_path / "s.safetensors")
    assert (
        conditions_of(again.prompts).lists() == [[7], [8, 9], [6]]
        and again.prompts.lists() == rows.prompts.lists()
    )


def test_rows_over_the_same_prompts_join_with_their_conditions():
    prompts = conditioned()
    one = Samples(prompts, torch.tensor([1]), torch.ones(1, 1).long(), torch.ones(1, 1).bool())
    other = Samples(prompts, torch.tensor([2]), torch.ones(1, 2).long(), torch.ones(1, 2).bool())
    both = cat_samples([one, other])
    assert both.prompts is prompts and conditions_of(both.row_prompts).lists() == [[8, 9], [6]]
    wide = cat_tokens([prompts, prompts])
    assert conditions_of(wide).lists() == [[7], [8, 9], [6]] * 2
    assert not isinstance(cat_tokens([prompts, Tokens.of([[1]])]), Conditioned)


def test_prompts_without_conditions_and_too_few_conditions_are_named():
    with pytest.raises(ValueError, match="carry no condition"):
        conditions_of(Tokens.of([[1]]))
    with pytest.raises(ValueError, match="one condition a prompt; got 1 for 3 prompts"):
        Conditioned(conditioned().ids, conditioned().mask, Tokens.of([[1]]))


def test_passes_hold_so_many_tokens_and_every_row_once(monkeypatch):
    prompts = Tokens.of([[1, 2, 3], [4]])
    samples = Samples(
        prompts, torch.tensor([0, 1, 1, 0, 1]), torch.ones(5, 4, dtype=torch.int64), torch.ones(5, 4).bool()
    )
    monkeypatch.setattr("tiltlm.samples.A_PASS", 15)  # the longest row has 7
    assert samples.passes() == [slice(0, 2), slice(2, 4), slice(4, 5)]
    monkeypatch.setattr("tiltlm.samples.A_PASS", 3)
    assert samples.passes() == [slice(k, k + 1) for k in range(5)]
    assert samples.select(torch.tensor([], dtype=torch.int64)).passes() == []

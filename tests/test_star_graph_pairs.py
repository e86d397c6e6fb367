"""Pairs of the star graph: the law of what is collected, and the JSONL it is kept in."""

from __future__ import annotations

import json

import pytest
import torch

from tiltlm.data.star_graph_pairs import KEYS, Rollouts, collect_pairs, read_pairs, write_pairs
from tiltlm.models.table import TableLM
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.seeds import stream

P_RIGHT = 0.75


def world(n: int = 4000) -> tuple[TableLM, Tokens, Tokens]:
    """n equal prompts; the answer (1, 1) has probability 0.75; wrong ones: (0, ·) 0.05 each, (1, 0) 0.15."""
    model = TableLM(n, 2, 2)
    with torch.no_grad():
        model.tables[0][:, 0] = torch.tensor([0.1, 0.9]).log()
        model.tables[1][:, 1] = torch.tensor([1 / 6, 5 / 6]).log()
    return model, Tokens.full(torch.arange(n)[:, None]), Tokens.full(torch.ones(n, 2, dtype=torch.int64))


def collect(n: int = 4000, *, seed: int = 0, **options) -> Rollouts:
    return collect_pairs(*world(n), stream=stream(seed, "pairs"), **options)


def within_four_errors(count: float, n: int, p: float) -> bool:
    return abs(count / n - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_right_draws_before_the_first_wrong_one_are_geometric():
    n, n_try = 4000, collect().n_try
    assert len(n_try) == n
    for k in range(6):
        assert within_four_errors((n_try == k).sum().item(), n, P_RIGHT**k * (1 - P_RIGHT))
    mean, variance = P_RIGHT / (1 - P_RIGHT), P_RIGHT / (1 - P_RIGHT) ** 2
    assert abs(n_try.double().mean().item() - mean) < 4 * (variance / n) ** 0.5


def test_rejects_follow_the_reference_among_wrong_completions():
    rejected = collect().pairs.rejected.tokens
    code = rejected[:, 0] * 2 + rejected[:, 1]
    counts = torch.bincount(code, minlength=4).tolist()
    assert counts[3] == 0
    for count, p in zip(counts, [0.05 / 0.25, 0.05 / 0.25, 0.15 / 0.25], strict=False):
        assert within_four_errors(count, 4000, p)


def same(one: Rollouts, two: Rollouts) -> bool:
    pairs = [(one.pairs.rejected.tokens, two.pairs.rejected.tokens), (one.n_try, two.n_try)]
    return all(torch.equal(a, b) for a, b in [*pairs, (one.global_idx, two.global_idx)])


def test_what_is_collected_depends_on_the_stream_and_on_no_batch_size():
    whole = collect(300, batch_size=10_000)
    assert same(whole, collect(300, batch_size=7)) and same(whole, collect(300, batch_size=300))
    assert not same(whole, collect(300, seed=1))


def test_neighbouring_prompts_do_not_share_their_draws():
    n_try = collect().n_try.double()
    a, b = n_try[0::2], n_try[1::2]
    mean, variance = P_RIGHT / (1 - P_RIGHT), P_RIGHT / (1 - P_RIGHT) ** 2
    covariance = ((a - mean) * (b - mean)).mean().item()
    assert abs(covariance) < 4 * variance / len(a) ** 0.5


@pytest.mark.parametrize("batch_size", [100, 10_000])
def test_prompts_never_wrong_within_the_cap_are_dropped(batch_size):
    capped, free = collect(500, max_tries=2, batch_size=batch_size), collect(500)
    keep = free.n_try < 2
    assert 0 < keep.sum() < 500
    assert torch.equal(capped.global_idx, keep.nonzero()[:, 0])
    assert torch.equal(capped.n_try, free.n_try[keep])
    assert torch.equal(capped.pairs.chosen.prompts.ids[:, 0], capped.global_idx)
    assert bool((capped.pairs.chosen.tokens == 1).all())


def test_a_model_that_is_always_right_yields_no_pair():
    model, prompts, answers = world(5)
    with torch.no_grad():
        for table in model.tables:
            table[:] = torch.tensor([-torch.inf, 0.0])
    assert len(collect_pairs(model, prompts, answers, stream=stream(0), max_tries=20)) == 0


def test_arguments_that_cannot_be_meant_are_refused():
    model, prompts, answers = world(5)
    with pytest.raises(ValueError, match="5 prompts, 4 answers"):
        collect_pairs(model, prompts, answers.select(slice(0, 4)), stream=stream(0))
    with pytest.raises(ValueError, match="max_tries"):
        collect_pairs(model, prompts, answers, stream=stream(0), max_tries=0)


def test_a_row_by_hand(tmp_path):
    prompts, own = Tokens.of([[7, 8]]), torch.tensor([0])
    chosen, rejected = Tokens.of([[1, 2, 3]]), Tokens.of([[1, 5, 3]])
    pairs = Pairs(*(Samples(prompts, own, side.ids, side.mask) for side in (chosen, rejected)))
    write_pairs(tmp_path / "pairs.jsonl", Rollouts(pairs, torch.tensor([4]), torch.tensor([17])))
    row = json.loads((tmp_path / "pairs.jsonl").read_text())
    assert row == {
        "x": [7, 8],
        "y_pred_chosen": [7, 8, 1, 2, 3],
        "y_pred_chosen_correct": [1.0, 1.0, 1.0],
        "y_pred_chosen_completely_correct": 1.0,
        "n_try": 4,
        "y_pred_reject": [7, 8, 1, 5, 3],
        "y_pred_reject_correct": [1.0, 0.0, 1.0],
        "y_pred_reject_completely_correct": 0.0,
        "global_idx": 17,
    }
    assert tuple(row) == KEYS


def test_a_shorter_reject_is_written_as_it_is(tmp_path):
    prompts, own = Tokens.of([[7, 8]]), torch.tensor([0])
    chosen, rejected = Tokens.of([[1, 2, 3]]), Tokens.of([[1, 5]])
    pairs = Pairs(*(Samples(prompts, own, side.ids, side.mask) for side in (chosen, rejected)))
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, Rollouts(pairs, torch.tensor([0]), torch.tensor([0])))
    row = json.loads(path.read_text())
    assert (row["y_pred_reject"], row["y_pred_reject_correct"]) == ([7, 8, 1, 5], [1.0, 0.0])
    assert read_pairs(path).filtered == 1


def test_what_is_written_is_read_back(tmp_path):
    path, rollouts = tmp_path / "pairs.jsonl", collect(200)
    write_pairs(path, rollouts)
    back = read_pairs(path)
    assert same(back, rollouts) and back.filtered == 0
    for side, other in (
        (back.pairs.chosen, rollouts.pairs.chosen),
        (back.pairs.rejected, rollouts.pairs.rejected),
    ):
        assert side.sequences().lists() == other.sequences().lists()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_pairs(path, rollouts)


def good_row(**changes) -> dict:
    row = {
        "x": [7, 8], "y_pred_chosen": [7, 8, 1, 2], "y_pred_chosen_correct": [1.0, 1.0],
        "y_pred_chosen_completely_correct": 1.0, "n_try": 0, "y_pred_reject": [7, 8, 2, 2],
        "y_pred_reject_correct": [0.0, 1.0], "y_pred_reject_completely_correct": 0.0, "global_idx": 3,
    }  # fmt: skip
    return row | changes


def test_rejects_of_another_length_are_left_out_and_counted(tmp_path):
    short = good_row(y_pred_reject=[7, 8, 1], y_pred_reject_correct=[1.0], global_idx=4)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [good_row(), short, good_row(global_idx=5)]))
    rollouts = read_pairs(path)
    assert rollouts.filtered == 1 and rollouts.global_idx.tolist() == [3, 5]


def test_a_file_of_which_nothing_is_kept_is_empty(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(good_row(y_pred_reject=[7, 8, 1], y_pred_reject_correct=[1.0])) + "\n")
    assert len(read_pairs(path)) == 0


@pytest.mark.parametrize(
    "bad, what",
    [
        ("{", "not JSON"),
        ("[1]", "exactly the keys"),
        (json.dumps(good_row(more=1)), "exactly the keys"),
        (json.dumps({k: v for k, v in good_row().items() if k != "n_try"}), "exactly the keys"),
        (json.dumps(good_row(x=[7, "8"])), "x must be a list of token ids"),
        (json.dumps(good_row(n_try=-1)), "n_try must be a count"),
        (json.dumps(good_row(y_pred_chosen=[7, 9, 1, 2])), "y_pred_chosen must be x and a completion"),
        (json.dumps(good_row(y_pred_reject=[7, 8])), "y_pred_reject must be x and a completion"),
        (json.dumps(good_row(y_pred_reject=[7, 8, 1, 2])), "must not be the right answer"),
        (json.dumps(good_row(y_pred_chosen_correct=[1.0, 0.0])), "y_pred_chosen_correct must be"),
        (json.dumps(good_row(y_pred_reject_correct=[1.0, 1.0])), "y_pred_reject_correct must be"),
        (json.dumps(good_row(y_pred_reject_completely_correct=1.0)), "y_pred_reject_completely_correct"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, bad, what):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(good_row()) + "\n" + bad + "\n")
    with pytest.raises(ValueError, match=what) as error:
        read_pairs(path)
    assert f"{path}:2:" in str(error.value)


def test_numbers_that_do_not_belong_to_the_pairs_are_refused():
    pairs = collect(5).pairs
    with pytest.raises(ValueError, match="n_try and global_idx"):
        Rollouts(pairs, torch.zeros(4), torch.zeros(5))

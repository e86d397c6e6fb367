"""What a round builds of graded answers."""

from __future__ import annotations

import pytest
import torch

from tiltlm.feeds import Rounds
from tiltlm.feeds.rounds import Shares, built, disagreement, joined
from tiltlm.objective import Weighed
from tiltlm.policies.sft import SFT
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream

OWN = stream(0, "test")


def graded(
    rewards: list[list[float]], texts: list[list[list[int]]] | None = None, finished: list[bool] | None = None
):
    """Prompts [10], [11], …; answer j to prompt i is the token 100·i + j, unless its text is given."""
    prompts = Tokens.of([[10 + k] for k in range(len(rewards))])
    index = [k for k, row in enumerate(rewards) for _ in row]
    texts = texts or [[[100 * k + j] for j in range(len(row))] for k, row in enumerate(rewards)]
    done = Tokens.of([ids for row in texts for ids in row])
    flags = torch.ones(len(index), dtype=torch.bool) if finished is None else torch.tensor(finished)
    reward = torch.tensor([r for row in rewards for r in row])
    return Samples(prompts, torch.tensor(index), done.ids, done.mask, flags, reward=reward)


def built_of(rows: Samples, fed, how: Rounds, right: float, own=OWN):
    return built([rows], fed, how, right, own)


THREE = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]


class Fixed:
    """A model with these log-probabilities, one row a sample."""

    def __init__(self, log_p: torch.Tensor) -> None:
        self.log_p = log_p

    def log_prob(self, batch):
        return self.log_p[: len(batch)]


def first_tokens(rows) -> list[int]:
    return rows.tokens[:, 0].tolist()


def test_shares_count_prompts_and_pairs():
    x = graded(THREE)
    assert Shares.of(x.reward >= 1, x.prompt_index) == Shares(right=1, mixed=1, wrong=1, pairs=2)


def test_two_draws_disagree_on_as_many_prompts():
    """Of three draws 2 right: 2·2·1/(3·2) = 2/3; none or all right: 0; a prompt with one draw says nothing."""
    x = graded([*THREE, [1.0]])
    assert disagreement(x.reward >= 1, x.prompt_index, 4) == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert disagreement(torch.tensor([True]), torch.tensor([0]), 1) == 0


def test_right_answers_are_imitated_and_wrong_ones_are_not():
    assert first_tokens(built_of(graded(THREE), "answers", Rounds(), 1.0, OWN)) == [0, 2, 200, 201, 202]


def test_a_cap_keeps_the_first_right_answers_of_each_prompt():
    assert first_tokens(built_of(graded(THREE), "answers", Rounds(cap=2), 1.0, OWN)) == [0, 2, 200, 201]


def test_the_same_answer_counts_once_where_that_is_asked_for():
    x = graded([[1.0, 1.0, 1.0]], [[[7, 8], [7, 8], [7]]])
    assert built_of(x, "answers", Rounds(), 1.0, OWN).completions.lists() == [[7, 8], [7, 8], [7]]
    assert built_of(x, "answers", Rounds(unique=True), 1.0, OWN).completions.lists() == [[7, 8], [7]]


def test_pairs_are_every_right_answer_with_every_wrong_one_of_its_prompt():
    pairs = built_of(graded([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]), "pairs", Rounds(), 1.0, OWN)
    found = list(zip(first_tokens(pairs.chosen), first_tokens(pairs.rejected), strict=True))
    assert found == [(0, 1), (0, 3), (2, 1), (2, 3), (100, 101), (100, 102), (100, 103)]


def test_some_pairs_are_some_of_all_and_follow_from_the_prompt():
    x = graded([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    some = built_of(x, "pairs", Rounds(pairs=2), 1.0, OWN)
    found = list(zip(first_tokens(some.chosen), first_tokens(some.rejected), strict=True))
    assert (
        len(found) == 4 and set(found[:2]) < {(0, 1), (0, 3), (2, 1), (2, 3)} and found[2][0] == found[3][0] == 100
    )
    seen = {tuple(first_tokens(built_of(x, "pairs", Rounds(pairs=2), 1.0, stream(k)).rejected)) for k in range(20)}
    assert len(seen) > 1


def test_losers_that_were_cut_off_can_be_dropped_winners_stay():
    x = graded([[1.0, 0.0, 0.0]], finished=[False, False, True])
    assert first_tokens(built_of(x, "pairs", Rounds(), 1.0, OWN).rejected) == [1, 2]
    assert first_tokens(built_of(x, "pairs", Rounds(cut_off="drop"), 1.0, OWN).rejected) == [2]


def test_weights_let_every_prompt_count_alike():
    rows = built_of(graded([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), "answers", Rounds(weigh="prompts"), 1.0, OWN)
    assert rows.log_w.exp().tolist() == pytest.approx([0.75, 0.75, 1.5])
    pairs = built_of(graded([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), "pairs", Rounds(weigh="prompts"), 1.0, OWN)
    assert pairs.chosen.log_w.exp().tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("size", [1, 2, 11])
def test_prompts_count_alike_in_an_epoch_whatever_the_batches(size):
    """Ten right answers and one: the pull of both prompts, summed over an epoch's batches, is the same."""
    rows = built_of(graded([[1.0] * 10, [1.0]]), "answers", Rounds(weigh="prompts"), 1.0)
    made, model = Weighed(SFT()), Fixed(torch.full((11, 1), -1.0))
    pulls = [0.0, 0.0]
    for begin in range(0, 11, size):
        part = rows.select(slice(begin, begin + size))
        share = made.loss(model, part).loss / made.weight(part).sum() * len(part)
        for k, x in zip(part.prompt_index.tolist(), share.tolist(), strict=True):
            pulls[k] += x
    assert pulls[0] == pytest.approx(pulls[1], rel=1e-6)
    assert sum(pulls) == pytest.approx(11)


def test_a_weighed_loss_by_hand():
    """Two rows of one token: −log p 2 with weight ½ and 3 with weight 1½: (½·2 + 1½·3) / 2 = 2.75."""
    x = graded([[1.0], [1.0]]).with_(log_w=torch.tensor([0.5, 1.5]).log())
    made = Weighed(SFT())
    model = Fixed(torch.tensor([[-2.0], [-3.0]]))
    assert float(made.loss(model, x).loss.sum() / made.weight(x).sum()) == pytest.approx(2.75)
    with pytest.raises(ValueError, match="no log_w"):
        made.loss(model, graded([[1.0], [1.0]]))


def test_a_cap_counts_in_each_round_and_for_answers_with_a_hint_too():
    first, second = graded([[1.0]]), graded([[1.0, 1.0]], [[[5], [6]]])
    found = built([first, second], "answers", Rounds(cap=1, accumulate=True), 1.0, OWN)
    assert first_tokens(found) == [0, 5]
    told = graded([[1.0, 1.0, 1.0]], [[[7], [7], [8]]])
    assert first_tokens(built([first], "answers", Rounds(cap=2), 1.0, OWN, [told])) == [0, 7, 7]
    assert first_tokens(built([first], "answers", Rounds(unique=True), 1.0, OWN, [told])) == [0, 7, 8]


def test_groups_are_all_answers_as_many_as_the_fewest_of_a_prompt():
    groups = built_of(graded([[1.0, 0.0, 1.0], [0.0, 1.0]]), "groups", Rounds(), 1.0, OWN)
    assert groups.reward.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(ValueError, match="two answers"):
        built_of(graded([[1.0], [0.0]]), "groups", Rounds(), 1.0, OWN)


def test_judged_answers_are_good_or_bad_by_the_bar():
    rows = built_of(graded([[0.4, 0.6, 0.9]]), "judged", Rounds(), 0.6, OWN)
    assert rows.reward.tolist() == [0, 1, 1]


def test_nothing_right_leaves_nothing():
    none = graded([[0.0, 0.0]])
    assert (
        len(built_of(none, "answers", Rounds(), 1.0, OWN)) == len(built_of(none, "pairs", Rounds(), 1.0, OWN)) == 0
    )


def test_joined_rounds_share_the_prompts_that_are_the_same():
    first, second = graded(THREE), graded(THREE[::-1])
    second = Samples(
        Tokens.of([[12], [11], [10]]), second.prompt_index, second.tokens, second.mask, second.finished,
        reward=second.reward,
    )  # fmt: skip
    both = joined([first, second])
    assert both.prompts.lists() == [[10], [11], [12]] and len(both) == 18
    rates = [float(both.reward[both.prompt_index == k].mean()) for k in range(3)]
    assert rates == pytest.approx([2 / 3, 0, 1])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count": 0}, "count of Rounds must be 1 or more; got 0$"),
        ({"cap": -1}, "cap of Rounds .* got -1$"),
        ({"pairs": -2}, "pairs of Rounds .* got -2$"),
        ({"show_hint": 0.5}, "rationalize"),
        ({"show_hint": -0.5, "rationalize": True}, "show-hint of Rounds is a part, from 0 to 1; got -0.5$"),
        ({"collapse": 2.0}, "collapse of Rounds is a part, from 0 to 1; got 2.0$"),
        ({"gain": 1.0}, "gain of Rounds is a part, from 0 to below 1; got 1.0$"),
        ({"growth": float("inf")}, "growth of Rounds is a factor, finite and above 0; got inf$"),
        ({"right": float("nan")}, "right of Rounds is a finite reward; got nan$"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Rounds(**settings)

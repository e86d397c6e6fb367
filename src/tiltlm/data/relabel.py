"""Pairs labelled anew by a reward: the better side is the chosen one, by how much is the margin.

    chosen = argmax r(x, y),   rejected = argmin r(x, y),   margin = r(x, chosen) − r(x, rejected) ≥ 0

A tie states no preference: such pairs are dropped and counted, or kept as they stood with the margin 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tiltlm.data.columns import Row
from tiltlm.data.preference_rows import Tally
from tiltlm.jsonl import in_parts
from tiltlm.rewards.by_name import TextFunction

TIE = "tie (the reward says the same of both)"
TURNED = "turned over by the reward"


AT_ONCE = 1024
"""Pairs that the reward is asked about together."""


def relabelled(rows: Iterable[Row], reward: TextFunction, tally: Tally, keep_ties: bool = False) -> Iterator[Row]:
    """The pairs of `rows` in the order of `reward`; `tally` counts what was turned over and what was a tie.

    Raises ValueError for rows that are no pairs, and for a reward that takes columns: pairs have none.
    """
    check_relabelling(reward)
    read = 0
    for part in in_parts(rows, AT_ONCE):
        for row, gap in zip(part, _gaps(part, reward), strict=True):
            read += 1
            if gap < 0:
                tally.notes[TURNED] += 1
            if gap or keep_ties:
                tally.notes.update([] if gap else [TIE])
                yield turned(row, gap)
            else:
                tally.drop(TIE, 1, f"pair {read} of those read")


def _gaps(rows: list[Row], reward: TextFunction) -> list[float]:
    """r(chosen) − r(rejected) of every pair."""
    odd = next((row for row in rows if "chosen" not in row), None)
    if odd is not None:
        raise ValueError(
            f"only pairs can be relabelled; these rows give {', '.join(odd)}: --as pairs makes pairs of groups"
        )
    prompts, n = [row["prompt"] for row in rows], len(rows)
    rewards = reward([*prompts, *prompts], [row[side] for side in ("chosen", "rejected") for row in rows])
    return [good - bad for good, bad in zip(rewards[:n], rewards[n:], strict=True)]


def check_relabelling(reward: TextFunction) -> None:
    """Raise ValueError for a reward that takes columns."""
    reward.check_columns((), "pairs that are labelled anew have no further columns")


def turned(row: Row, gap: float) -> Row:
    """The pair with its better side chosen; gap: r(chosen) − r(rejected) as it stood."""
    sides = row["chosen"], row["rejected"]
    chosen, rejected = sides if gap >= 0 else sides[::-1]
    return row | {"chosen": chosen, "rejected": rejected, "margin": abs(gap)}

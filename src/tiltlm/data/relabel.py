"""Pairs labelled anew by a reward: the better side is the chosen one, by how much is the margin.

    chosen = argmax r(x, y),   rejected = argmin r(x, y),   margin = r(x, chosen) − r(x, rejected) ≥ 0

A tie states no preference: such pairs are dropped and counted, or kept as they stood with the margin 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tiltlm.data.columns import Row
from tiltlm.data.preference_rows import Loaded
from tiltlm.rewards.by_name import TextFunction

TIE = "tie (the reward says the same of both)"
TURNED = "turned over by the reward"


def relabelled(found: Loaded, reward: TextFunction, keep_ties: bool = False) -> Loaded:
    """The pairs of `found` in the order of `reward`, which is asked once for all sides.

    Raises ValueError for rows that are no pairs, and for a reward that takes columns: pairs have none.
    """
    check_relabelling(reward)
    if any("chosen" not in row for row in found.rows):
        odd = next(row for row in found.rows if "chosen" not in row)
        raise ValueError(
            f"only pairs can be relabelled; these rows give {', '.join(odd)}: --as pairs makes pairs of groups"
        )
    prompts, n = [row["prompt"] for row in found.rows], len(found.rows)
    sides = [row[side] for side in ("chosen", "rejected") for row in found.rows]
    rewards = reward([*prompts, *prompts], sides)
    gaps = [good - bad for good, bad in zip(rewards[:n], rewards[n:], strict=True)]
    rows = [turned(row, gap) for row, gap in zip(found.rows, gaps, strict=True) if gap or keep_ties]
    return _counted(replace(found, rows=rows), gaps, keep_ties)


def check_relabelling(reward: TextFunction) -> None:
    """Raise ValueError for a reward that takes columns."""
    reward.check_columns((), "pairs that are labelled anew have no further columns")


def turned(row: Row, gap: float) -> Row:
    """The pair with its better side chosen; gap: r(chosen) − r(rejected) as it stood."""
    sides = row["chosen"], row["rejected"]
    chosen, rejected = sides if gap >= 0 else sides[::-1]
    return row | {"chosen": chosen, "rejected": rejected, "margin": abs(gap)}


def _counted(found: Loaded, gaps: Sequence[float], keep_ties: bool) -> Loaded:
    """What was turned over and what was a tie, among the notes and what was dropped."""
    ties, over = sum(gap == 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    notes = found.notes | ({TURNED: over} if over else {}) | ({TIE: ties} if ties and keep_ties else {})
    if not ties or keep_ties:
        return replace(found, notes=notes)
    first = f"pair {gaps.index(0) + 1} of those read"
    return replace(found, notes=notes, dropped=found.dropped | {TIE: ties}, examples=found.examples | {TIE: first})

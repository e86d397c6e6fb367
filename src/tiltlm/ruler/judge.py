"""Whether a reward model knows more than a coin, and more than the simplest rule (of pairs, that the longer response
wins; of verdicts, that all are the commoner one), in words.

What is measured with a reward model that knows neither rests on nothing: policies then learn length, or noise, and
every number is exact about the wrong thing. So this is said wherever such results stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MODEL, RULE, AHEAD = "reward model", "the longer response wins", "reward model − longer wins"
"""Methods under which a reward model's report states accuracies: its own, the rule's, their difference pair by pair."""

COMMONER, AHEAD_OF_COMMONER = "the commoner verdict", "reward model − commoner verdict"
"""The same of a reward model that learns from verdicts."""


def doubt(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence if the report `rows` of a reward model do not show it better than a coin and than length; else None."""
    found = {row["method"]: row for row in rows if row["metric"] == "accuracy"}
    if MODEL not in found:
        return None
    own, of_pairs = found[MODEL], AHEAD_OF_COMMONER not in found
    what = "pairs" if of_pairs else "verdicts"
    said = f"the reward model's accuracy is {_with_interval(own)} on {own['n']} {what}, not shown to be better"
    if of_pairs and not own["low"] > 0.5:
        return f"{said} than a coin: what rests on it says nothing about preferences"
    ahead, rule = found.get(AHEAD if of_pairs else AHEAD_OF_COMMONER), found.get(RULE if of_pairs else COMMONER)
    if ahead is not None and rule is not None and not (ahead["low"] is not None and ahead["low"] > 0):
        numbers = f"{rule['value']:.3f}; difference {_with_interval(ahead)}"
        if of_pairs:
            return f"{said} than the rule that the longer response wins ({numbers}): what rests on it may be about length"
        return f"{said} than always the commoner one ({numbers}): what rests on it says nothing about answers"
    return None


def _with_interval(row: Mapping[str, Any]) -> str:
    if row["low"] is None or row["high"] is None:
        return f"{row['value']:.3f} ({row.get('doubt', 'one pair')})"
    return f"{row['value']:.3f} (95%: {row['low']:.3f} to {row['high']:.3f})"

"""What a reward may return: one finite number for each completion, in whatever holds them.

A list, tuple or other sequence, a torch tensor or numpy array [N], or an iterator; of ints, floats, bools, numpy's or
zero-dimensional tensors. What is none of these, is not a number or has no end is refused with the row and its text. So is
−inf, although exp(−inf) = 0 is a fine weight: E[r] and J would be −inf for every policy but pi*, and losses on rewards
would meet inf − inf. What must not be said costs a large finite amount instead: −36.8 (log 1e-16) times beta is never seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor


def as_numbers(
    name: str, returned: Any, completions: Sequence[Any], places: Sequence[str] | None = None
) -> list[float]:
    """What the reward called `name` returned for `completions`, as floats, one each.

    places: where each completion comes from ("y.jsonl:3"), for errors; else they are counted from 0. Raises ValueError
    naming what does not fit.
    """
    values = _listed(name, returned)
    if len(values) != len(completions):
        raise ValueError(
            f"{name} returned {len(values)} numbers for {len(completions)} completions: one each is needed"
        )
    found = []
    for row, value in enumerate(values):
        number = _number(value)
        if number is None or not math.isfinite(number):
            where = places[row] if places else f"row {row}"
            raise ValueError(f"{name} gave {where} ({_short(completions[row])}) the reward {_said(value, number)}")
        found.append(number)
    return found


def _listed(name: str, returned: Any) -> list[Any]:
    if isinstance(returned, Tensor | np.ndarray) and returned.ndim:
        return list(returned.tolist()) if returned.ndim == 1 else [row.tolist() for row in returned]
    if isinstance(returned, str | bytes | Mapping | AbstractSet) or not isinstance(returned, Iterable | Sequence):
        raise ValueError(
            f"{name} must return one number for each completion, as a list, tensor or array; it returned "
            f"{type(returned).__name__} {_short(returned)}"
        )
    if isinstance(returned, Tensor | np.ndarray):
        raise ValueError(
            f"{name} must return one number for each completion; it returned the single number {returned}"
        )
    return list(returned)


def _number(value: Any) -> float | None:
    """`value` as a float; None for what is no number."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.item() if value.ndim == 0 else None
    if isinstance(value, np.bool_):
        value = bool(value)
    try:
        return float(value) if isinstance(value, Real) else None
    except OverflowError:
        return math.inf


def _said(value: Any, number: float | None) -> str:
    if number is None:
        return (
            "None: every completion needs a number"
            if value is None
            else f"{_short(value)} ({type(value).__name__}), no number"
        )
    if math.isnan(number):
        return "nan, no number"
    return f"{number}: rewards are finite (what must never be said costs a large amount, such as -36.8 times beta)"


def _short(value: Any) -> str:
    """`value` as it is written in Python, in a line at most."""
    text = repr(value)
    return text if len(text) <= 70 else text[:66] + " …" + text[-1]

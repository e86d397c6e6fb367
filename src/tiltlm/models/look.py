"""Reading off the network itself what stands between its body and its logits; see `output.py`.

The network is run once on a few tokens. What enters the head is compared with what left the body (`Entry`); what the
head gives is replaced by numbers of our choice, and the logits that come out are the curve at those numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tiltlm.models.body import body_of, call, run_body
from tiltlm.models.output import Curve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAME = 1e-5
"""Relative difference up to which two float32 numbers that went different ways are one."""


@dataclass(frozen=True)
class Entry:
    """What happens to hidden states before the head reads them: a factor, or a module around (or before) the head."""

    factor: float = 1.0
    module: nn.Module | None = None
    head: nn.Module | None = None

    def __call__(self, states: Tensor) -> Tensor:
        if self.module is None or self.head is None:
            return states if self.factor == 1 else states * self.factor
        with _in_place_of(self.head, lambda inputs, _: inputs):
            return self.module(states)


@torch.no_grad()
def look(model: PreTrainedModel, head: nn.Linear) -> tuple[Entry, Curve]:
    """The entry and the curve of `model`. Raises ValueError, by name, where there is more between than those."""
    after: list[Tensor] = []
    probe: list[Tensor] = []

    def swap(inputs: Tensor, outputs: Tensor) -> Tensor:
        after.append(inputs)
        probe.append(_numbers(outputs))
        return probe[-1]

    ids = torch.arange(1, min(9, head.out_features), device=head.weight.device)[None]
    try:
        with _in_place_of(head, swap), evaluating(model):
            before, logits = run_body(body_of(model), ids), call(model, input_ids=ids, use_cache=False).logits
    except Exception as error:  # foreign code: whatever it raises on a plain row of tokens, it cannot be used
        raise ValueError(f"{_name(model)} does not run on a plain row of tokens: {one_line(error)}") from None
    if len(probe) != 1 or logits.shape[:2] != ids.shape:
        raise ValueError(f"{_name(model)} does not read its logits off one output head")
    return _entry(model, head, before, after[0]), _curve(model, probe[0], logits)


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


def one_line(error: Exception) -> str:
    """Type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}"[:200] if text else type(error).__name__


def _numbers(like: Tensor) -> Tensor:
    """1, 10000 and 20000, then numbers from −60 to 60, in float64 and the shape of `like`."""
    numbers = torch.linspace(-60, 60, like.numel(), dtype=torch.float64, device=like.device)
    numbers[:3] = torch.tensor([1.0, 1e4, 2e4])
    return numbers.view_as(like)


def _curve(model: PreTrainedModel, x: Tensor, logits: Tensor) -> Curve:
    """The curve that takes `x` to `logits`; checked at every entry."""
    entries = logits.shape[-1]
    one, large, larger = logits.double().flatten()[:3].tolist() if entries > 2 else (math.nan,) * 3
    if math.isclose(larger, 2 * large, rel_tol=SAME):
        scale, cap = large / 1e4, None
    else:
        cap = _named(model, larger)
        scale = cap * math.atanh(max(-0.999999, min(one / cap, 0.999999))) if cap else math.nan
    curve = Curve(_named(model, scale), cap, entries=None if entries == x.shape[-1] else entries)
    expected = curve(x[..., :entries])
    if not torch.allclose(logits.double(), expected, rtol=10 * SAME, atol=SAME):
        raise ValueError(
            f"{_name(model)} changes its logits after the output head by more than a scale or a soft cap"
        )
    return curve


def _named(model: PreTrainedModel, measured: float) -> float:
    """The number of the configuration (or its reciprocal) that a measured one is; itself where there is none."""
    for number in (1.0, *_numbers_in(model.config.to_dict())):
        for exact in (number, 1 / number):
            if math.isclose(measured, exact, rel_tol=SAME):
                return exact
    return measured


def _numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _numbers_in(inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value != 0:
        yield float(value)


def _entry(model: PreTrainedModel, head: nn.Linear, before: Tensor, after: Tensor) -> Entry:
    """How `before`, the body's states, became `after`, what the head read."""
    if before.shape == after.shape:
        a, b = before.double(), after.double()
        factor = _named(model, float((a * b).sum() / (a * a).sum()))
        if torch.allclose(b, a * factor, rtol=_rounding(after), atol=_rounding(after) * float(b.abs().max())):
            return Entry(factor)
    inside = set(body_of(model).modules()) | {head, model}
    for module in model.modules():
        if module not in inside and _leads(entry := Entry(1.0, module, head), before, after):
            return entry
    raise ValueError(
        f"{_name(model)} transforms its hidden states before the output head in a way that is not known"
    )


def _leads(entry: Entry, before: Tensor, after: Tensor) -> bool:
    try:
        found = entry(before)
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError):
        return False  # not a module that takes hidden states alone
    return isinstance(found, Tensor) and found.shape == after.shape and torch.allclose(found, after, rtol=1e-3)


def _rounding(x: Tensor) -> float:
    return max(SAME, 2 * torch.finfo(x.dtype).eps)


@contextmanager
def _in_place_of(module: nn.Module, f: Any) -> Iterator[None]:
    """`module` gives f(its input, its output) for as long as this lasts."""
    hook = module.register_forward_hook(lambda _, inputs, output: f(inputs[0], output))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

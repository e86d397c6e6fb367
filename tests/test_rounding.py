"""The tools by which tests stay independent of a processor do what they say."""

from __future__ import annotations

import pytest
import torch

from close import FLOAT32, close
from rounding import addmm, bmm, mm


def test_products_in_another_order_differ_in_their_last_bits_by_shape_alone():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 300, generator=generator), torch.randn(300, 50, generator=generator)
    ours = mm(a, b)
    assert torch.equal(ours, mm(a, b)) and not torch.equal(ours, a @ b)
    assert not torch.equal(mm(a[:4], b), ours[:4])  # the same rows in another batch
    for other in (ours, mm(a[:4], b), bmm(a[None], b[None])[0], addmm(torch.zeros(50), a, b)):
        close(other.double(), (a.double() @ b.double())[: len(other)], FLOAT32)
    whole = torch.arange(6).reshape(2, 3)
    assert torch.equal(mm(whole, whole.T), whole @ whole.T)


def test_a_tolerance_is_relative_to_the_largest_number_but_never_to_less_than_one():
    close(torch.tensor([30.0, 2e-4]), torch.tensor([30.0, 0.0]))
    close(torch.tensor([0.1, -torch.inf]), torch.tensor([0.1 + 9e-6, -torch.inf]))
    for got, expected in (([30.0, 4e-4], [30.0, 0.0]), ([0.1], [0.1 + 2e-5]), ([0.0], [-torch.inf])):
        with pytest.raises(AssertionError):
            close(torch.tensor(got), torch.tensor(expected))

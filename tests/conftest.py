"""Shared pieces of the tests: one thread, small models of every family, small enumerable worlds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, read in place; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder (../shared/data beside the checkout) is not on this machine")
    return SHARED

"""Shared pieces of the tests: threads, other processors' rounding, real data read in place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--other-rounding", action="store_true", help="sum matrix products as another processor might"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--other-rounding"):
        import rounding

        rounding.install()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, read in place; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder (../shared/data beside the checkout) is not on this machine")
    return SHARED

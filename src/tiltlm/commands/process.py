"""Settings of a whole process: where runs live, how many threads, whose progress bars."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tiltlm.run import ROOT


def runs_root() -> Path:
    """Where runs live: $TILTLM_RUNS, or ./runs."""
    return Path(os.environ.get("TILTLM_RUNS", ROOT))


def prepare() -> None:
    """Process-wide settings of the command line: one thread unless told otherwise, no foreign progress bars."""
    from transformers.utils import logging

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()

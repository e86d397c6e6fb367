"""Settings of a whole process: where runs live, how many threads, whose progress bars."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from tiltlm.run import ROOT


def runs_root() -> Path:
    """Where runs live: $TILTLM_RUNS, or ./runs."""
    return Path(os.environ.get("TILTLM_RUNS", ROOT))


def prepare() -> None:
    """Process-wide settings of the command line: one thread unless told otherwise, no foreign progress bars."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported, if it ever is
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()

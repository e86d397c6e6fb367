"""The reference's log-probabilities of the rows that methods learn from, computed once for all runs of a task.

CACHE/log_ref-REFERENCE-PRECISION-ROWS.safetensors     of rows in memory
CACHE/log_ref-REFERENCE-PRECISION-ROWS/00000.arrow …   of rows in files, `SHARD` a file: an interrupted pass goes on behind
                                                       the last whole one
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from tiltlm import ranks
from tiltlm.data.arrow import Ragged, write_parts
from tiltlm.data.stored import StoredSamples
from tiltlm.models.base import LanguageModel
from tiltlm.models.precision import computing_in
from tiltlm.problem import Problem, Split
from tiltlm.progress import steps
from tiltlm.samples import Samples
from tiltlm.tensors import load_tensors, save_tensors

ROWS_AT_ONCE = 128
"""Rows that the reference scores in one pass, at most (`Samples.passes`)."""

SHARD = 32 * ROWS_AT_ONCE
"""Rows of a file; no more than are held in memory (`MANY`)."""


def referring(cache: Path, problem: Problem, precision: str, samples: Samples, split: Split) -> Samples:
    """`samples` with the reference's log-probabilities: read from `cache`, or computed and written there.

    The file's name holds what tells this reference from others and the hash of the samples, so neither another model nor
    relabelled or redrawn data finds stale numbers. precision: what the policy will be trained in, of the training split:
    at the start it must agree with its reference, to the last bit that bfloat16 rounds. Measuring is in float32.
    """
    precision = precision if split == "train" else "float32"
    if not problem.reference_name:
        return samples.with_(log_ref=score(samples, problem.reference, precision))
    name = f"log_ref-{problem.reference_name}-{precision}-{content_of(samples)}"
    if isinstance(samples, StoredSamples):
        return samples.with_log_ref(shards(cache / name, samples, problem.reference, precision))
    path = cache / f"{name}.safetensors"

    found: Tensor | None = ranks.from_first(lambda: load_tensors(path)["log_ref"] if path.is_file() else None)
    if found is None:
        found = score(samples, problem.reference, precision)
        if ranks.is_first():
            cache.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # runs side by side may both get here
            save_tensors({"log_ref": found}, aside)
            aside.rename(path)
    return samples.with_(log_ref=found)


def shards(folder: Path, samples: StoredSamples, model: LanguageModel, precision: str) -> Ragged:
    """`model`'s log-probability of every token, row by row, in the files of `folder`; missing ones are written."""
    paths = tuple(folder / f"{k:05d}.arrow" for k in range(-(-len(samples) // SHARD)))

    with steps("log_ref") as on_step:
        for k, path in enumerate(paths):
            if not ranks.from_first(path.is_file):
                part = samples.select(slice(k * SHARD, (k + 1) * SHARD))
                found = score(part, model, precision)
                if ranks.is_first():
                    write_parts(path, [{"log_ref": (found, part.mask)}])
            on_step(min((k + 1) * SHARD, len(samples)), len(samples), {})
    ranks.wait()
    return Ragged(paths, "log_ref")


def content_of(samples: Samples) -> str:
    """A short hash of what a language model sees of `samples`: of rows in files, part by part."""
    total = hashlib.blake2b(digest_size=8)
    whole = not isinstance(samples, StoredSamples)
    for part in (
        [samples] if whole else (samples.select(slice(k, k + SHARD)) for k in range(0, len(samples), SHARD))
    ):
        for x in (part.prompts.ids, part.prompts.mask, part.prompt_index, part.tokens, part.mask):
            total.update(str(tuple(x.shape)).encode() + x.cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


@torch.no_grad()
def score(samples: Samples, model: LanguageModel, precision: str = "float32") -> Tensor:
    """`model`'s log-probability of every token, [N, T] on the CPU, `ROWS_AT_ONCE` rows a pass; processes share the rows."""

    def scored(begin: int, end: int) -> list[Tensor]:
        starts = range(begin, end, ROWS_AT_ONCE)
        parts = [samples.select(slice(k, min(k + ROWS_AT_ONCE, end))).to(model.device) for k in starts]
        with computing_in(model, model.device, precision):
            return [model.log_prob(part.select(some)).cpu() for part in parts for some in part.passes()]

    return torch.cat(ranks.in_shares(len(samples), scored))

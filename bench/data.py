"""Large preference data: 1k, 10k and 100k synthetic pairs (some 120 tokens of prompt, 50 a side), step by step.

    prepare   `tiltlm prepare` of the rows as a file
    encode    everything that a run of DPO encodes: the prompts of the problem, and the pairs
    log_ref   the reference's log-probabilities of both sides (a network of one layer, so that it costs little itself)
    epoch     every row once, in batches of 64 in random order

*now* is this library on files; *before* holds everything in memory and encodes text by text, as it did (there encode goes
over the prompts twice, for the problem and for the pairs); *again* is encode where the files are found. Ratios: before /
now in CPU-seconds; the peak at 100k, libraries included, in MB; and growth from 10k to 100k, in MB, of memory that a process
owns (mapped pages of files are the system's). The check: batches of the epoch are equal on both sides.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from common import Side, Work, ratio, run

CASES = {"1k": 1_000, "10k": 10_000, "100k": 100_000}
MOST, NEW, BATCH, VOCABULARY = 256, 64, 64, 2000


@cache
def words() -> np.ndarray:
    """Some thousand words, the first of which are the commonest."""
    own, letters = np.random.default_rng(0), list("etaoinshrdlucmwfgypbvk")
    return np.array(["".join(own.choice(letters, 1 + own.poisson(3))) for _ in range(4000)])


def rows(n: int) -> Iterator[dict[str, str]]:
    """Pairs of unlike lengths, the same for every process."""
    own = np.random.default_rng(1)
    for k in range(n):
        lengths = own.poisson((70, 28, 28)) + 1
        prompt, chosen, rejected = (
            " ".join(words()[np.minimum(own.zipf(1.3, size) - 1, 3999)]) for size in lengths
        )
        yield {"prompt": f"{k} {prompt}", "chosen": f" {chosen}", "rejected": f" {rejected}"}


@cache
def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@cache
def source(n: int) -> Path:
    """The rows as a file."""
    path = Path(folder().name) / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(n))
    return path


@cache
def encoder() -> Any:
    from tiltlm.data.encoding import Encoder
    from tiltlm.data.stories import train_tokenizer

    texts = [row["prompt"] for row in rows(1000)]
    return Encoder(train_tokenizer(texts, VOCABULARY), (0,), MOST, NEW)


@cache
def problem() -> Any:
    """A reference, as much of a problem as log_ref asks for."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from tiltlm.models.causal import CausalLM

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=MOST, n_embd=32, n_layer=1, n_head=2, bos_token_id=None)
    return SimpleNamespace(reference=CausalLM(GPT2LMHeadModel(config).eval(), (0,)), reference_name="bench")


def encoded(n: int, cache: str) -> Any:
    from tiltlm.data.encoded import Encoded
    from tiltlm.jsonl import Lines

    return Encoded(Lines(source(n)), encoder(), Path(folder().name) / cache)


def in_memory(n: int, twice: bool = False) -> Any:
    """All pairs as tensors, text by text; twice: the prompts once more by themselves."""
    from tiltlm.samples import Pairs, Samples, Tokens

    found, how = [json.loads(line) for line in source(n).open(encoding="utf-8")], encoder()
    for _ in range(1 + twice):
        prompts = Tokens.of([how.prompt(row["prompt"]) for row in found])

    def side(name: str) -> Any:
        done = [how.completion(row[name]) for row in found]
        tokens, whole = Tokens.of([ids for ids, _ in done]), torch.tensor([each for _, each in done])
        return Samples(prompts, torch.arange(n), tokens.ids, tokens.mask, finished=whole)

    return Pairs(side("chosen"), side("rejected"))


def referred(pairs: Any, cache: str) -> Any:
    from tiltlm.feeds.fixed import mapped
    from tiltlm.stages.log_ref import referring

    where = Path(folder().name) / cache
    return mapped(pairs, lambda samples: referring(where, problem(), "float32", samples, "train"))


def prepare(n: int) -> Work:
    from tiltlm.commands.prepare import prepare as command

    path = source(n)

    def work() -> None:
        with redirect_stdout(io.StringIO()):
            command([str(path), "--out", str(path.with_name("out.jsonl"))])

    return work


def encode(n: int) -> Work:
    source(n), encoder()
    number = count()

    def work() -> None:
        made = encoded(n, f"cache{next(number)}")
        made.prompts(), made.pairs()

    return work


def again(n: int) -> Work:
    encode(n)()

    def work() -> None:
        made = encoded(n, "cache0")
        made.prompts(), made.pairs()

    return work


def encode_before(n: int) -> Work:
    source(n), encoder()
    return lambda: in_memory(n, twice=True) and None


def log_ref(n: int) -> Work:
    pairs, number = encoded(n, "cache").pairs(), count()
    problem()
    return lambda: referred(pairs, f"log_ref{next(number)}") and None


def log_ref_before(n: int) -> Work:
    pairs, number = in_memory(n), count()
    problem()
    return lambda: referred(pairs, f"log_ref{next(number)}") and None


def epoch(n: int) -> Work:
    return read(referred(encoded(n, "cache").pairs(), "log_ref"))


def epoch_before(n: int) -> Work:
    return read(referred(in_memory(n), "log_ref"))


def read(pairs: Any) -> Work:
    """An epoch's batches; returns a hash of some, and the bytes of files that are mapped."""
    from tiltlm.experience import Offline
    from tiltlm.seeds import stream

    experience = Offline(pairs, BATCH, stream(0, "bench"))

    def work() -> dict[str, Any]:
        total = hashlib.blake2b()
        for step in range(len(pairs) // BATCH):
            batch = experience.batch(step)
            if step < 100:
                for side in (batch.chosen, batch.rejected):
                    for x in (side.row_prompts.ids, side.tokens, side.log_ref):
                        total.update(x.numpy().tobytes())
        lines = Path("/proc/self/status").read_text().splitlines()
        mapped = next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))
        return {"hash": total.hexdigest(), "mapped": mapped * 1024}

    return work


SIDES = {
    "prepare": prepare, "encode": encode, "encode-before": encode_before, "again": again, "log_ref": log_ref,
    "log_ref-before": log_ref_before, "epoch": epoch, "epoch-before": epoch_before,
}  # fmt: skip


def report(case: str, found: dict[str, Side]) -> list[str]:
    ours, theirs = found["epoch"].results[0][0], found["epoch-before"].results[0][0]
    if ours["hash"] != theirs["hash"]:
        raise SystemExit(f"{case}: the batches differ")
    print(f"{case}: equal batches; {ours['mapped'] / 2**20:.0f} MiB of files (libraries among them) are mapped")
    lines = [
        ratio(f"data-{name}-{case}", found[f"{name}-before"].cpu / found[name].cpu, goal)
        for name, goal in (("encode", ">= 3"), ("log_ref", ">= 0.9"), ("epoch", ">= 0.5"))
    ]
    lines.append(ratio(f"data-again-{case}", found["encode-before"].cpu / found["again"].cpu, ">= 30"))
    return lines + [
        ratio(f"data-{name}-megabytes-{case}", found[name].peak / 1e6, "<= 1000")
        for name in ("prepare", "encode", "log_ref", "epoch")
    ]


if __name__ == "__main__":
    run(sys.modules[__name__], SIDES, CASES, report, rounds=1)

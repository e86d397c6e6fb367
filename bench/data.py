"""Large preference data: 1k, 10k and 100k synthetic pairs (some 80 tokens of prompt, 32 a side), step by step.

    prepare   `tiltlm prepare` of the rows as a file
    encode    the prompts of the problem, and the pairs
    again     the same once more, as every further run on that data does
    run       what the stages of a run of DPO encode one after the other: answers to fine-tune on, prompts and pairs to
              learn from, prompts to measure and to compare
    log_ref   the reference's log-probabilities of both sides (a network of one layer, so that it costs little itself)
    epoch     every row once, in batches of 64 in random order

*now* is this library; *before* holds everything in memory and encodes text by text, as it did: there every stage encodes
anew, and learning goes over the prompts twice. Ratios: before / now in CPU-seconds; peaks, libraries included, in MB; and
peaks of 100k / 10k, in which a step that held its rows would be seen. Beside them stands what of a peak is the process's
own and what are pages of files. 100k has one piece of work without a warm-up, and no *before*. The check: batches of an
epoch are equal on both sides.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from common import Side, Work, alternate, child, options, ratio

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


def folder() -> Path:
    """Where all processes of a case keep their files."""
    return Path(os.environ["BENCH_DATA"])


@cache
def source(n: int) -> Path:
    """The rows as a file."""
    path = folder() / "rows.jsonl"
    if not path.is_file():
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

    return Encoded(Lines(source(n)), replace(encoder()), folder() / cache)  # another: it knows no words yet


def in_memory(n: int, twice: bool = False, sides: tuple[str, ...] = ("chosen", "rejected")) -> Any:
    """All pairs as tensors, text by text; twice: the prompts once more by themselves; sides: some of them alone."""
    from tiltlm.samples import Pairs, Samples, Tokens

    found, how = [json.loads(line) for line in source(n).open(encoding="utf-8")], encoder()
    for _ in range(1 + twice):
        prompts = Tokens.of([how.prompt(row["prompt"]) for row in found])

    def side(name: str) -> Any:
        done = [how.completion(row[name]) for row in found]
        tokens, whole = Tokens.of([ids for ids, _ in done]), torch.tensor([each for _, each in done])
        return Samples(prompts, torch.arange(n), tokens.ids, tokens.mask, finished=whole)

    made = [side(name) for name in sides]
    return Pairs(*made) if len(made) == 2 else made


def referred(pairs: Any, cache: str) -> Any:
    from tiltlm.feeds.fixed import mapped
    from tiltlm.stages.log_ref import referring

    where = folder() / cache
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
    source(n), encoder()

    def work() -> None:
        made = encoded(n, "cache0")
        made.prompts(), made.pairs()

    return work


def encode_before(n: int) -> Work:
    source(n), encoder()
    return lambda: in_memory(n, twice=True) and None


def whole_run(n: int) -> Work:
    source(n), encoder()
    number = count()

    def work() -> None:
        cache = f"run{next(number)}"
        encoded(n, cache).answers(lambda row: row["chosen"])
        made = encoded(n, cache)
        made.prompts(), made.pairs()
        for _ in ("measure", "evaluate"):
            encoded(n, cache).prompts()

    return work


def whole_run_before(n: int) -> Work:
    source(n), encoder()

    def work() -> None:
        in_memory(n, sides=("chosen",)), in_memory(n, twice=True)
        for _ in ("measure", "evaluate"):
            in_memory(n, sides=())

    return work


def log_ref(n: int) -> Work:
    pairs, number = encoded(n, "cache0").pairs(), count()
    problem()
    return lambda: referred(pairs, f"log_ref{next(number)}") and None


def log_ref_before(n: int) -> Work:
    pairs, number = in_memory(n), count()
    problem()
    return lambda: referred(pairs, f"log_ref{next(number)}") and None


def epoch(n: int) -> Work:
    return read(referred(encoded(n, "cache0").pairs(), "log_ref0"))


def epoch_before(n: int) -> Work:
    return read(referred(in_memory(n), "log_ref0"))


def read(pairs: Any) -> Work:
    """An epoch's batches; returns a hash of some."""
    from tiltlm.experience import Offline
    from tiltlm.seeds import stream

    experience = Offline(pairs, BATCH, stream(0, "bench"))

    def work() -> str:
        total = hashlib.blake2b()
        for step in range(len(pairs) // BATCH):
            batch = experience.batch(step)
            if step < 100:
                for side in (batch.chosen, batch.rejected):
                    for x in (side.row_prompts.ids, side.tokens, side.log_ref):
                        total.update(x.numpy().tobytes())
        return total.hexdigest()

    return work


def resident() -> tuple[int, int]:
    """Bytes of this process in memory: its own (RssAnon), and of files, which the system may take back (RssFile)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {name: int(line.split()[1]) * 1024 for line in lines for name in [line.split(":")[0]] if name in KINDS}
    return found["RssAnon"], found["RssFile"]


KINDS = ("RssAnon", "RssFile")


def watched(work: Work) -> Work:
    """The same work; returns what it does, and the most that was resident meanwhile, looked at every hundredth second."""

    def watch(done: Event, most: list[int]) -> None:
        while not done.wait(0.01):
            most[:] = map(max, most, resident())

    def watching() -> dict[str, Any]:
        done, most = Event(), list(resident())
        thread = Thread(target=watch, args=(done, most))
        thread.start()
        try:
            found = work()
        finally:
            done.set()
            thread.join()
        return {"found": found, "own": most[0], "files": most[1]}

    return watching


NOW = {"prepare": prepare, "encode": encode, "again": again, "run": whole_run, "log_ref": log_ref, "epoch": epoch}
BEFORE = {
    "encode-before": encode_before, "run-before": whole_run_before, "log_ref-before": log_ref_before,
    "epoch-before": epoch_before,
}  # fmt: skip
GOALS = {"encode": ">= 3", "run": ">= 3", "log_ref": ">= 0.9", "epoch": ">= 0.5"}


def report(case: str, found: dict[str, Side]) -> list[str]:
    for name in found:
        own, files = (max(one[kind] for one in found[name].results[0]) / 2**20 for kind in ("own", "files"))
        print(
            f"{case}: {name:14s} at most {own:4.0f} MiB of its own, {files:4.0f} MiB of files, libraries among them"
        )
    lines = [ratio(f"data-{name}-megabytes-{case}", found[name].peak / 1e6, "<= 1000") for name in NOW]
    if "epoch-before" not in found:
        return lines
    if found["epoch"].results[0][0]["found"] != found["epoch-before"].results[0][0]["found"]:
        raise SystemExit(f"{case}: the batches differ")
    again = ratio(f"data-again-{case}", found["encode-before"].cpu / found["again"].cpu, ">= 30")
    cpu = {name: found[f"{name}-before"].cpu / found[name].cpu for name in GOALS}
    return [*(ratio(f"data-{name}-{case}", x, GOALS[name]) for name, x in cpu.items()), again, *lines]


def main() -> None:
    told = options(__doc__)
    torch.set_num_threads(1)
    if told.side:
        return child(watched((NOW | BEFORE)[told.side](CASES[told.case])), told.steps)
    lines, peaks = list[str](), dict[str, dict[str, float]]()
    for case in [told.only] if told.only else [case for case in CASES if not (told.quick and case == "100k")]:
        large = case == "100k"
        with tempfile.TemporaryDirectory() as here:
            os.environ["BENCH_DATA"] = here
            sides = tuple(NOW) if large else (*NOW, *BEFORE)
            found = alternate(__file__, sides, case, rounds=1, steps=0 if large else 3)
            lines, peaks[case] = lines + report(case, found), {name: found[name].peak for name in NOW}
    if {"10k", "100k"} <= set(peaks):
        grown = {name: peaks["100k"][name] / peaks["10k"][name] for name in NOW}
        lines += [ratio(f"data-{name}-100k-to-10k", x, "<= 1.05") for name, x in grown.items()]
    print("\n".join(lines))


if __name__ == "__main__":
    main()

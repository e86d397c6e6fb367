"""The memory that a training takes: what `--dry-run` foresees beside what a process takes, and tables for 1B, 8B and 70B.

    python bench/memory.py                   both
    python bench/memory.py --quick           the tables alone
    python bench/memory.py --models 1B 8B    the tables of these alone

First, on this machine: a DPO step of a GPT-2 of 35 million parameters (6 layers of width 384, 50,257 tokens), 4 pairs of
64 + 64 tokens a micro-batch, two of them a step, AdamW, one thread. Measured is by how much the process's highest resident
size exceeds what it held with the model read; foreseen are gradients, moments and an update. Then the tables, computed from
the published configurations of Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B, with no weight and no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import LARGE, Side, Size, Work, alternate, child, options, random_ids, ratio
from tiltlm.commands.footprint import footprint
from tiltlm.commands.options import parsed
from tiltlm.engine import Engine, Optim
from tiltlm.memory.making import Adapters
from tiltlm.memory.network import Network, Pass
from tiltlm.memory.process import Process
from tiltlm.models.causal import CausalLM
from tiltlm.policies.dpo import DPO
from tiltlm.recipes import recipe
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.stages.learn import Learn

PAIRS, MICRO, TOKENS = 8, 4, 64
CASES = ("whole", "bfloat16", "recomputed", "lora")

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "bos_token_id": 128000, "eos_token_id": 128009,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "tie_word_embeddings": False},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "tie_word_embeddings": False},
}  # fmt: skip
"""What differs between Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B, as their config.json files have it."""

RANKS = {"1B": (1, 8), "8B": (1, 8, 16), "70B": (8, 16, 64)}
METHODS = ("dpo", "exo-rw", "d2po", "ppo")
COMMON = [
    *(
        "--task.most-tokens",
        "1024",
        "--task.new-tokens",
        "512",
        "--fit.batch-size",
        "64",
        "--fit.micro-batch",
        "1",
    ),
    *("--fit.precision", "bfloat16", "--net.checkpointing", "--fit.evaluations", "0", "--task.device", "cuda"),
]
LORA = ["--net.policy", "lora", "--net.lora-rank", "16", "--net.lora-modules", "all-linear"]


# ---- foreseen and measured -------------------------------------------------------------------------------------------


def step(case: str, size: Size = LARGE) -> Work:
    """One update; each pair has a prompt of its own, so both of its rows share that one."""
    model = CausalLM.from_config(size.config(), seed=0)
    model = model.with_lora(8, 16) if case == "lora" else model
    model = model.with_checkpointing() if case == "recomputed" else model
    precision = "bfloat16" if case == "bfloat16" else "float32"
    engine = Engine(model, Optim(lr=1e-5, micro_batch=MICRO, precision=precision))
    asked, done = (
        Tokens.full(random_ids(0, PAIRS, TOKENS, size.vocab)),
        random_ids(1, 2 * PAIRS, TOKENS, size.vocab),
    )
    index, mask = torch.arange(PAIRS), torch.ones(PAIRS, TOKENS, dtype=torch.bool)
    zero = torch.zeros(PAIRS, TOKENS)
    sides = [Samples(asked, index, some, mask, log_ref=zero) for some in done.split(PAIRS)]

    def work() -> float:
        model.train()
        return engine.update(DPO(0.1), Pairs(*sides))["loss"]

    return work


def ready(case: str) -> Work:
    """The same behind an update of a network of next to no size, by which libraries load what they need."""
    step(case, Size(1, 64, 1000))()
    return step(case)


def foreseen(case: str) -> int:
    """Bytes beside the weights: gradients, moments, an update."""
    adapters = Adapters(8) if case == "lora" else None
    network = Network(
        LARGE.config(),
        trains="adapters" if adapters else "all",
        adapters=adapters,
        recomputes=case == "recomputed",
    )
    batch = Pass(2 * MICRO, 2 * TOKENS, TOKENS, case == "bfloat16")
    return 12 * network.trained + network.update(batch)


def measured(told: argparse.Namespace) -> list[str]:
    lines = []
    for case in [told.only] if told.only else CASES:
        found: Side = alternate(__file__, ("ours",), case, rounds=1, steps=3)["ours"]
        lines.append(ratio(f"memory-{case}", foreseen(case) / found.growth, ">=0.80"))
    return lines


# ---- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    model: str
    method: str
    way: str
    processes: int
    parts: str
    needed: Process


def learning(method: str, folder: Path, more: list[str]) -> Learn:
    """The training of a method, the reference a folder with a configuration, the reward a model of its size."""
    words = [*COMMON, "--task.start", str(folder), "--task.reward", f"reward-model:{folder}"]
    words += (
        ["--feed.judge.lora-rank", "16", "--feed.judge.micro-batch", "1", "--feed.judge.checkpointing"]
        if method == "d2po"
        else []
    )
    whole = parsed(recipe(f"pairs/{method}"), [*words, *more])
    return next(each for each in whole.inputs().values() if isinstance(each, Learn))


def rows(root: Path, models: list[str]) -> Iterator[Row]:
    for model in models:
        config = CONFIGS[model]
        folder = root / model
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(LLAMA | config))
        for method in METHODS:
            for way, more in (("full", []), ("LoRA", LORA)):
                for processes in RANKS[model]:
                    ways = ("--fit.shard", "--shard") if processes > 1 else ("",)
                    for parts in ways:
                        shard = [parts] if parts == "--fit.shard" else []
                        made = learning(method, folder, [*more, *shard])
                        yield Row(
                            model, method, way, processes, parts, footprint(made, processes, parts == "--shard")
                        )


def line(row: Row) -> str:
    """Of a process, in GB: what it holds all the time, the start, drawing and scoring, an update; the most."""

    def gb(value: float) -> str:
        return f"{value / 1e9:.1f}" if value else ""

    needed, parts = row.needed, row.needed.parts
    others = max((value for name, value in parts.items() if name != "an update"), default=0)
    cells = (needed.always, needed.start, others, parts["an update"])
    names = (row.model, row.method, row.way, str(row.processes), row.parts.removeprefix("--"))
    return f"| {' | '.join([*names, *map(gb, cells), gb(needed.most)])} |"


def table(models: list[str]) -> None:
    print("| model | method | trains | processes | in parts | always | start | new rows | update | most |")
    print("|---|---|---|--:|---|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as root:
        for row in rows(Path(root), models):
            print(line(row), flush=True)


def main() -> None:
    told = options(__doc__ or "", models=tuple(CONFIGS))
    torch.set_num_threads(1)
    if told.side:
        return child(ready(told.case), told.steps)
    lines = [] if told.quick or told.models else measured(told)
    if not told.only:
        table(told.models or list(CONFIGS))
    print("\n".join(lines))
    return None


if __name__ == "__main__":
    sys.exit(main())

"""A round's generation against transformers' `generate`, and a whole round of STaR, on the sums of three digits.

    generation   500 questions × 4 answers of at most 40 tokens, each ended by itself       peer: `generate`
    iteration    one round: 2000 × 2 answers drawn and graded, SFT on the right ones, 1000 × 2 answers to validation
                 questions graded, and 1000 greedy ones

The model is the task's own reference, trained once (`sums/base`, found again in the runs folder). The check: both sides'
answers are right equally often, within 4 standard errors.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch

from common import Side, Work, ratio, run

QUESTIONS, ANSWERS, NEW = 500, 4, 40
CASES = {"sums": None}


@cache
def base() -> Any:
    """The run of the reference, built where it is not there yet."""
    from tiltlm.recipes import recipe
    from tiltlm.run import ensure

    return ensure(recipe("sums/base"), Path(os.environ.get("TILTLM_RUNS", "runs")).resolve())


def problem() -> Any:
    from tiltlm.recipes import preset_of

    return preset_of("sums").task.problem({"base": base()}, 0)


def ours(case: None) -> Work:
    from tiltlm.samplers.ancestral import draw_in_batches
    from tiltlm.seeds import stream

    made, number = problem(), count()
    asked = made.prompts["train"].select(slice(0, QUESTIONS))

    def work() -> list[float]:
        drawn = draw_in_batches(
            made.reference,
            asked,
            n=ANSWERS,
            max_new_tokens=NEW,
            stream=stream(next(number), "bench"),
            batch_size=256,
        )
        return [float(made.target.reward(drawn).mean()), float(drawn.finished.float().mean())]

    return work


def generate(case: None) -> Work:
    from transformers import AutoModelForCausalLM, GenerationConfig

    made, number = problem(), count()
    from tiltlm.train import best_checkpoint

    model = AutoModelForCausalLM.from_pretrained(best_checkpoint(base().folder)).eval()
    asked = made.prompts["train"].select(slice(0, QUESTIONS))
    (end,) = made.reference.eos_ids
    settings = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=NEW, num_return_sequences=ANSWERS,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip

    def work() -> list[float]:
        torch.manual_seed(next(number))
        parts = [
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[:, ids.shape[1] :]
            for ids in asked.ids.split(256 // ANSWERS)
        ]
        right, finished = graded(made, asked, parts, end)
        return [right, finished]

    return work


def graded(made: Any, asked: Any, parts: list[torch.Tensor], end: int) -> tuple[float, float]:
    """(share that is right, share that ended) of what `generate` drew; outside neither side's time worth speaking of."""
    from tiltlm.samples import Samples

    width = max(part.shape[1] for part in parts)
    tokens = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=end) for part in parts])
    ended = (tokens == end).cumsum(1)
    mask = (ended == 0) | ((ended == 1) & (tokens == end))
    index = torch.arange(QUESTIONS).repeat_interleave(ANSWERS)
    finished = (tokens == end).any(1)
    drawn = Samples(asked, index, torch.where(mask, tokens, 0), mask, finished)
    return float(made.target.reward(drawn).mean()), float(finished.float().mean())


def iteration(case: None) -> Work:
    from tiltlm.recipes import preset_of
    from tiltlm.recipes.stages import measured
    from tiltlm.run import ensure

    first = measured(preset_of("sums"), "star").learn()
    while first.before is not None:
        first = first.before
    reference = base().folder

    def work() -> float:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / reference.parent.relative_to(reference.parents[2])
            place.mkdir(parents=True)
            (place / reference.name).symlink_to(reference)
            done = ensure(first, Path(folder))
            from tiltlm.jsonl import read_json

            rows = read_json(done.folder / "report.json")
            return next(row["value"] for row in rows if row["metric"] == "accuracy[greedy]")

    return work


def report(name: str, found: dict[str, Side]) -> list[str]:
    shares = {side: [x[0] for results in found[side].results for x in results] for side in ("ours", "generate")}
    means = {side: sum(own) / len(own) for side, own in shares.items()}
    n = QUESTIONS * ANSWERS * min(len(own) for own in shares.values())
    error = math.sqrt(0.5 / n)  # of a difference of two rates near one half
    print(f"right: ours {means['ours']:.3f}, generate {means['generate']:.3f}, s.e. of the gap {error:.3f}")
    if abs(means["ours"] - means["generate"]) > 4 * error:
        raise SystemExit("the two sides draw from different distributions")
    after = [x for results in found["iteration"].results for x in results]
    print(f"greedy accuracy after one round: {min(after):.3f} to {max(after):.3f}")
    return [
        ratio("rounds-generation", found["generate"].cpu / found["ours"].cpu, ">=1.5"),
        ratio("rounds-iteration-seconds", found["iteration"].cpu, "<=8"),
    ]


if __name__ == "__main__":
    if "--side" not in sys.argv:
        base()
    run(
        sys.modules[__name__],
        {"ours": ours, "generate": generate, "iteration": iteration},
        CASES,
        report,
        rounds=2,
    )

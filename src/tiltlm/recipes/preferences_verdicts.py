"""Data of verdicts (prompt, completion, label): what each stage makes of answers that are wanted or not, one by one.

SFT imitates the wanted ones. The reward model is a classifier of wanted against unwanted (`tiltlm.rewards.verdicts`). KTO
learns from both as they are; methods on pairs or groups learn from the reference's own draws, labelled by that reward
(`--align.source labelled`), or not at all. Wins are counted against wanted answers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tiltlm.data.encoding import Encoder
from tiltlm.models.reward_model import RewardModel
from tiltlm.rewards.verdicts import VerdictRegression, Verdicts, verdict_loss, verdicts
from tiltlm.samples import Samples

Row = dict[str, Any]


def are_verdicts(rows: Sequence[Row]) -> bool:
    """Whether rows are verdicts on single answers."""
    return bool(rows) and "label" in rows[0]


def wanted(rows: Sequence[Row]) -> list[Row]:
    """The rows whose answer is wanted: all of them, where they are no verdicts."""
    return [row for row in rows if row.get("label", True)]


def judged_answers(encoder: Encoder, rows: Sequence[Row]) -> Samples:
    """The rows' answers with reward 1 (wanted) or 0; rows of one prompt share it, so that none is taken for another's."""
    number = {text: k for k, text in enumerate(dict.fromkeys(row["prompt"] for row in rows))}
    index = [number[row["prompt"]] for row in rows]
    samples = encoder.samples(encoder.prompts(list(number)), index, [row["completion"] for row in rows])
    return samples.with_(reward=torch.tensor([float(row["label"]) for row in rows]))


def balance(rows: Sequence[Row], w_good: float, w_bad: float) -> str:
    """How many answers are wanted, and what weights would suit them better, if the paper's rule says so."""
    good = len(wanted(rows))
    bad = len(rows) - good
    said = f"{good} wanted answers, {bad} unwanted"
    if not (good and bad):
        return f"{said}: KTO learns from both kinds, and with one alone its log-ratios only rise or only fall"
    ratio = w_good * good / (w_bad * bad)
    if 1 <= ratio <= 4 / 3:
        return said
    better = f"--kto.w-bad {w_good * good / bad:.3g}" if ratio > 1 else f"--kto.w-good {w_bad * bad / good:.3g}"
    return (
        f"{said}: w_good·wanted / (w_bad·unwanted) is {ratio:.3g}, the paper wants 1 to 4/3: {better} makes it 1"
    )


def verdict_data(model: RewardModel, rows: Sequence[Row]) -> Verdicts:
    """Rows in the reward model's tokens."""
    prompts, completions, good = ([row[name] for row in rows] for name in ("prompt", "completion", "label"))
    return verdicts(model, prompts, completions, good)


@torch.no_grad()
def scores(model: RewardModel, data: Verdicts) -> torch.Tensor:
    """r of every answer, [n]."""
    return torch.cat([model.score(data.select(slice(k, k + 64)).samples) for k in range(0, len(data), 64)])


def verdict_metrics(model: RewardModel, data: Verdicts) -> dict[str, float]:
    """Loss and accuracy on held-out verdicts."""
    reward = scores(model, data).double()
    right = (reward > 0) == data.good
    return {"loss": float(verdict_loss(reward, data.good).mean()), "accuracy": float(right.double().mean())}


OBJECTIVE = VerdictRegression()
"""What the reward model minimises on verdicts."""

"""Preference pairs of the star graph, and the JSONL in which Q#'s experiments keep them.

For each prompt: draw from the reference (T = 1, no top-k) until the first wrong completion; the true answer is
`chosen`, that completion `rejected`, and the right draws before it are counted. One row per prompt, in JSON:

    x                               token ids of the prompt
    y_pred_chosen                   prompt + true answer        y_pred_reject                  prompt + wrong draw
    y_pred_chosen_correct           1.0 per answer token        y_pred_reject_correct          1.0 or 0.0 per token
    y_pred_chosen_completely_correct  1.0                       y_pred_reject_completely_correct  0.0
    n_try                           right draws before it       global_idx                     number of the prompt

If p is the reference's chance of being right, n_try is geometric: P(n_try = k) = p^k (1 − p). Half of the rows
being right says nothing about p: pairs are not calibrated. Prompts never wrong within the cap have no row.
Source: Zhou et al. 2025 (arXiv:2502.20548), star-graph experiments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltlm.jsonl import parsing, reading
from tiltlm.models.base import LanguageModel
from tiltlm.rewards.exact_answer import agreement, same_rows
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.seeds import Stream

KEYS = (
    "x",
    "y_pred_chosen",
    "y_pred_chosen_correct",
    "y_pred_chosen_completely_correct",
    "n_try",
    "y_pred_reject",
    "y_pred_reject_correct",
    "y_pred_reject_completely_correct",
    "global_idx",
)
_MOST_TRIES = 2**20
"""Try k of prompt i is row i·2^20 + k of the stream, so that what it draws depends on neither cap nor batch."""


@dataclass(frozen=True)
class Rollouts:
    """Pairs with what the file says beside them.

    pairs       row i's prompt is prompt i
    n_try       int64 [n]: right draws before the wrong one
    global_idx  int64 [n]: number of the prompt in the data the pairs were made of
    filtered    rows left out on reading because the wrong draw was not as long as the answer
    """

    pairs: Pairs
    n_try: Tensor
    global_idx: Tensor
    filtered: int = 0

    def __post_init__(self) -> None:
        n = (len(self.pairs),)
        if self.n_try.shape != n or self.global_idx.shape != n:
            raise ValueError(
                f"Rollouts of {n[0]} pairs need n_try and global_idx of [{n[0]}]; got "
                f"{list(self.n_try.shape)} and {list(self.global_idx.shape)}"
            )

    def __len__(self) -> int:
        return len(self.pairs)


def _rollouts(
    prompts: Tokens, chosen: Tokens, rejected: Tokens, n_try: Tensor, index: Tensor, filtered: int = 0
) -> Rollouts:
    """Rollouts from one row a prompt."""
    own = torch.arange(len(prompts), device=prompts.device)
    sides = [Samples(prompts, own, side.ids, side.mask) for side in (chosen, rejected)]
    return Rollouts(Pairs(*sides), n_try, index, filtered)


def collect_pairs(
    model: LanguageModel,
    prompts: Tokens,
    answers: Tokens,
    *,
    stream: Stream,
    max_tries: int = 1000,
    batch_size: int = 256,
) -> Rollouts:
    """Draw completions of every prompt until the first one that is not its answer.

    Args: prompts Tokens [P, L]; answers Tokens [P, T]; at most `max_tries` draws a prompt; `batch_size` rows are
    drawn at once (several tries of a prompt together once few prompts are left), which changes no result.
    Returns: Rollouts in the order of the prompts, without those that were right `max_tries` times.
    Raises: ValueError if counts differ or max_tries is not in 1 … 2^20.
    """
    _check_arguments(prompts, answers, max_tries, batch_size)
    answers = answers.to(prompts.device)
    found, width = _Found.none(answers), answers.ids.shape[1]
    pending, tried = torch.arange(len(prompts), device=prompts.device), 0
    while len(pending) and tried < max_tries:
        n = min(max(1, batch_size // len(pending)), max_tries - tried)
        tries = tried + torch.arange(n)
        for part in pending.split(batch_size):
            rows = (part.cpu()[:, None] * _MOST_TRIES + tries).flatten()
            x = prompts.select(part)
            drawn = draw(model, x, n=n, max_new_tokens=width, stream=stream, rows=rows)
            found.note(part, drawn, answers.select(part), tried)
        tried += n
        pending = pending[found.n_try[pending] < 0]
    index = (found.n_try >= 0).nonzero()[:, 0]
    rejected = Tokens(found.ids[index], found.mask[index])
    return _rollouts(prompts.select(index), answers.select(index), rejected, found.n_try[index], index)


def _check_arguments(prompts: Tokens, answers: Tokens, max_tries: int, batch_size: int) -> None:
    if len(prompts) != len(answers):
        raise ValueError(f"every prompt needs its answer: got {len(prompts)} prompts, {len(answers)} answers")
    if not 1 <= max_tries <= _MOST_TRIES or batch_size < 1:
        raise ValueError(
            f"max_tries must lie in 1 … {_MOST_TRIES} and batch_size be 1 or more; got {max_tries}, {batch_size}"
        )


@dataclass
class _Found:
    """Each prompt's first wrong draw (ids, mask [P, T]) and the right ones before it (n_try [P]; −1: none yet)."""

    ids: Tensor
    mask: Tensor
    n_try: Tensor

    @staticmethod
    def none(answers: Tokens) -> _Found:
        n_try = torch.full((len(answers),), -1, device=answers.device)
        return _Found(torch.zeros_like(answers.ids), torch.zeros_like(answers.mask), n_try)

    def note(self, part: Tensor, drawn: Samples, answers: Tokens, tried: int) -> None:
        """Enter what `drawn`, n tries of each prompt in `part` after `tried` earlier ones, has brought."""
        right = same_rows(drawn.completions, answers.select(drawn.prompt_index)).reshape(len(part), -1)
        failed = (~right).any(1).nonzero()[:, 0]
        first = (~right).int().argmax(1)[failed]
        source, place = failed * right.shape[1] + first, part[failed]
        self.n_try[place] = tried + first
        width = drawn.tokens.shape[1]
        self.ids[place, :width], self.mask[place, :width] = drawn.tokens[source], drawn.mask[source]


def write_pairs(path: str | Path, rollouts: Rollouts, *, overwrite: bool = False) -> None:
    """Write one JSON object a line, keys as above. Raises FileExistsError if `path` exists, unless `overwrite`."""
    if Path(path).exists() and not overwrite:
        raise FileExistsError(f"{path} would be overwritten: pass overwrite=True, or choose another place")
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in _rows(rollouts))


def _rows(rollouts: Rollouts) -> Iterator[dict[str, Any]]:
    chosen, rejected = rollouts.pairs.chosen, rollouts.pairs.rejected
    right = (agreement(rejected.completions, chosen.completions)).float().tolist()
    tokens = (side.lists() for side in (chosen.row_prompts, chosen.completions, rejected.completions))
    numbers = (rollouts.n_try.tolist(), rollouts.global_idx.tolist(), right)
    for x, answer, wrong, n_try, index, flags in zip(*tokens, *numbers, strict=True):
        values = (x, x + answer, [1.0] * len(answer), 1.0, n_try, x + wrong, flags[: len(wrong)], 0.0, index)
        yield dict(zip(KEYS, values, strict=True))


def read_pairs(path: str | Path) -> Rollouts:
    """The pairs in a file of rows as above; rows whose wrong draw has another length are left out and counted.

    Raises ValueError naming file and line for a row that is no JSON object with exactly these keys, or whose
    fields contradict each other.
    """
    kept: list[dict[str, Any]] = []
    filtered = 0
    with reading(Path(path)), open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            row = _parsed(line, f"{path}:{number}")
            if len(row["y_pred_reject"]) == len(row["y_pred_chosen"]):
                kept.append(row)
            else:
                filtered += 1
    x = [row["x"] for row in kept]
    sides = [
        Tokens.of([row[name][len(row["x"]) :] for row in kept]) for name in ("y_pred_chosen", "y_pred_reject")
    ]
    n_try, index = (torch.tensor([row[name] for row in kept]).long() for name in ("n_try", "global_idx"))
    return _rollouts(Tokens.of(x), sides[0], sides[1], n_try, index, filtered)


def _parsed(line: str, where: str) -> dict[str, Any]:
    with parsing(where, "every line must be one object"):
        row = json.loads(line.rstrip())
    if not isinstance(row, dict) or set(row) != set(KEYS):
        got = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: expected an object with exactly the keys {', '.join(KEYS)}; got {got}")
    for fault, what in _faults(row):
        if fault:
            raise ValueError(f"{where}: {what}. Correct the row, or take it out")
    return row


def _faults(row: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """What can be wrong with a row's fields, each check relying on those before it."""
    for name in ("x", "y_pred_chosen", "y_pred_reject"):
        fine = isinstance(row[name], list) and all(type(i) is int and i >= 0 for i in row[name])
        yield not fine, f"{name} must be a list of token ids"
    for name in ("n_try", "global_idx"):
        yield type(row[name]) is not int or row[name] < 0, f"{name} must be a count; got {row[name]!r}"
    x, chosen, reject = row["x"], row["y_pred_chosen"], row["y_pred_reject"]
    for name, whole in (("y_pred_chosen", chosen), ("y_pred_reject", reject)):
        yield whole[: len(x)] != x or len(whole) == len(x), f"{name} must be x and a completion behind it"
    yield chosen == reject, "y_pred_reject must not be the right answer"
    expected = {
        "y_pred_chosen_correct": [1.0] * (len(chosen) - len(x)),
        "y_pred_chosen_completely_correct": 1.0,
        "y_pred_reject_completely_correct": 0.0,
    }
    if len(chosen) == len(reject):
        agrees = [float(a == b) for a, b in zip(chosen, reject, strict=True)]
        expected["y_pred_reject_correct"] = agrees[len(x) :]
    for name, value in expected.items():
        yield row[name] != value, f"{name} must be {value}; got {row[name]!r}"

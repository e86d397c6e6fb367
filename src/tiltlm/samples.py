"""What travels between the rooms: `Tokens`, `Conditioned`, `Samples`, `Pairs`. Frozen dataclasses of tensors.

Padding is decided here and nowhere else: ids are always **right-padded**, a mask is a run of True followed by
a run of False, and what stands under False has no meaning (it is set to 0). Length, never a token's id, says
where a row ends: a pad token that equals the end-of-text token is harmless.

Shapes: P distinct prompts, N samples, T completion positions. Log-probabilities are in nats.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiltlm.tensors import load_tensors, save_tensors

A_PASS = 1 << 14
"""Tokens that go through a network at once where nothing is learnt from them: more take memory, and no less time."""


def _expect(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class Tokens:
    """A ragged batch of token sequences: ids int64 [N, L], mask bool [N, L], right-padded."""

    ids: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        _expect(self.ids.ndim == 2, f"Tokens.ids must be [N, L]; got shape {list(self.ids.shape)}")
        _expect(self.ids.dtype == torch.int64, f"Tokens.ids must be int64; got {self.ids.dtype}")
        _expect(
            self.mask.shape == self.ids.shape and self.mask.dtype == torch.bool,
            f"Tokens.mask must be bool {list(self.ids.shape)}; got {self.mask.dtype} {list(self.mask.shape)}",
        )
        _expect(
            bool((self.mask[:, 1:] <= self.mask[:, :-1]).all()),
            "Tokens.mask must be right-padded: True up to the row's length, False after it",
        )

    @staticmethod
    def of(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tokens:
        """Tokens from lists of ids, one list a row (rows may be empty)."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        width = int(lengths.max()) if len(rows) else 0
        mask = torch.arange(width)[None, :] < lengths[:, None]
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        ids[mask] = torch.from_numpy(np.asarray(array("q", chain.from_iterable(rows))))
        return Tokens(ids.to(device), mask.to(device))

    @staticmethod
    def full(ids: Tensor) -> Tokens:
        """Tokens of equal length: every entry of `ids` [N, L] is real."""
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """The rows' lengths, int64 [N]."""
        return self.mask.sum(1)

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def select(self, index: Tensor | slice) -> Tokens:
        """The rows at `index`, in its order."""
        return self.map(lambda x: x[index])

    def same_as(self, other: Tokens) -> bool:
        """Whether both hold the same rows, padding included."""
        return self is other or (torch.equal(self.ids, other.ids) and torch.equal(self.mask, other.mask))

    def map(self, f: Callable[[Tensor], Tensor]) -> Tokens:
        """A copy with `f` applied to every tensor; `f` may move, pick or reorder rows."""
        return Tokens(f(self.ids), f(self.mask))

    def to(self, device: torch.device | str) -> Tokens:
        return self.map(lambda x: x.to(device))

    def lists(self) -> list[list[int]]:
        """The rows as lists of ids, padding left out."""
        lengths = self.lengths.tolist()
        return [row[:length] for row, length in zip(self.ids.tolist(), lengths, strict=True)]

    def cropped(self) -> Tokens:
        """The same rows without the columns at the end that no row uses (a data set's longest row was elsewhere)."""
        width = int(self.lengths.max()) if len(self) else 0
        if width == self.ids.shape[1]:
            return self
        return replace(self, ids=self.ids[:, :width], mask=self.mask[:, :width])

    def followed_by(self, other: Tokens) -> Tokens:
        """Row by row, this batch's tokens with `other`'s right behind them, right-padded to the longest row."""
        other = other.cropped()
        if bool(self.mask.all()):
            ids, mask = torch.cat([self.ids, other.ids], 1), torch.cat([self.mask, other.mask], 1)
            return Tokens(ids, mask)
        width = self.ids.shape[1] + other.ids.shape[1]
        ids = torch.zeros(len(self), width, dtype=torch.int64, device=self.device)
        ids[:, : self.ids.shape[1]] = self.ids
        place = self.lengths[:, None] + torch.arange(other.ids.shape[1], device=self.device)
        row = torch.arange(len(self), device=self.device)[:, None].expand_as(place)
        ids[row, place] = torch.where(other.mask, other.ids, 0)
        lengths = self.lengths + other.lengths
        mask = torch.arange(width, device=self.device)[None, :] < lengths[:, None]
        keep = int(lengths.max()) if len(self) else 0
        return Tokens(torch.where(mask, ids, 0)[:, :keep], mask[:, :keep])


@dataclass(frozen=True)
class Conditioned(Tokens):
    """Prompts that each carry a condition: what the target depends on beside the text before the completion.

    conditions: Tokens [N, C]; infilling: the tokens that must follow. x in pi*(y|x) is prompt *and* condition; a
    reward and a twist may read it, the reference does not see it.
    """

    conditions: Tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect(
            len(self.conditions) == len(self.ids),
            f"Conditioned needs one condition a prompt; got {len(self.conditions)} for {len(self.ids)} prompts",
        )

    def map(self, f: Callable[[Tensor], Tensor]) -> Conditioned:
        return Conditioned(f(self.ids), f(self.mask), self.conditions.map(f))


def conditions_of(prompts: Tokens) -> Tokens:
    """The conditions that `prompts` carry. Raises ValueError if they carry none."""
    if not isinstance(prompts, Conditioned):
        got = type(prompts).__name__
        raise ValueError(f"these prompts carry no condition (they are {got}): make them `Conditioned`")
    return prompts.conditions


def _pad_to(x: Tensor, width: int) -> Tensor:
    """`x` [N, L] widened with zeros to [N, width]."""
    return x if x.shape[1] == width else torch.nn.functional.pad(x, (0, width - x.shape[1]))


def cat_tokens(parts: Sequence[Tokens]) -> Tokens:
    """The rows of all `parts`, one after the other, padded to the widest; conditions stay if all have them."""
    width = max(part.ids.shape[1] for part in parts)
    ids = torch.cat([_pad_to(part.ids, width) for part in parts])
    mask = torch.cat([_pad_to(part.mask, width) for part in parts])
    conditions = [part.conditions for part in parts if isinstance(part, Conditioned)]
    if len(conditions) < len(parts):
        return Tokens(ids, mask)
    return Conditioned(ids, mask, cat_tokens(conditions))


@dataclass(frozen=True)
class Samples:
    """Completions of prompts, with whatever is known about them.

    prompts       Tokens [P, L]: the distinct prompts
    prompt_index  int64 [N]: which prompt each row answers
    tokens, mask  int64, bool [N, T]: the completions, right-padded; an end-of-text token counts as drawn
    finished      bool [N]: ended by itself (end of text, or the task's fixed length), not cut off
    log_q         [N, T]: log-probability of each token under what really drew it (0 under the padding)
    log_ref       [N, T]: the same under the reference
    log_psi       [N, T]: the twist after each token, nats
    reward        [N]: r(x, y)
    log_w         [N]: log importance weight towards a target, up to the caller's constant
    exact_at      float64 [N]: the beta of the target that the row is an exact draw of
    """

    prompts: Tokens
    prompt_index: Tensor
    tokens: Tensor
    mask: Tensor
    finished: Tensor | None = None
    log_q: Tensor | None = None
    log_ref: Tensor | None = None
    log_psi: Tensor | None = None
    reward: Tensor | None = None
    log_w: Tensor | None = None
    exact_at: Tensor | None = None

    def __post_init__(self) -> None:
        n, t = self.completions.ids.shape
        _expect(
            self.prompt_index.shape == (n,),
            f"prompt_index must be [{n}]; got {list(self.prompt_index.shape)}",
        )
        _expect(
            self.prompt_index.dtype == torch.int64, f"prompt_index must be int64; got {self.prompt_index.dtype}"
        )
        if self.finished is not None:
            _expect(self.finished.dtype == torch.bool, f"Samples.finished must be bool; got {self.finished.dtype}")
        if n:
            low, high = int(self.prompt_index.min()), int(self.prompt_index.max())
            _expect(
                low >= 0 and high < len(self.prompts),
                f"prompt_index names prompts {low} to {high}; there are {len(self.prompts)} prompts",
            )
        shapes = {
            "finished": (n,),
            "reward": (n,),
            "log_w": (n,),
            "exact_at": (n,),
            "log_q": (n, t),
            "log_ref": (n, t),
            "log_psi": (n, t),
        }
        for name, value in self.optional().items():
            _expect(
                value.shape == shapes[name],
                f"Samples.{name} must be {list(shapes[name])}; got {list(value.shape)}",
            )

    def optional(self) -> dict[str, Tensor]:
        """The optional fields that are set, by name."""
        names = [f.name for f in fields(self) if f.default is None]
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def completions(self) -> Tokens:
        return Tokens(self.tokens, self.mask)

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def row_prompts(self) -> Tokens:
        """Each row's prompt, Tokens [N, L]."""
        return self.prompts.select(self.prompt_index)

    def sequences(self) -> Tokens:
        """Prompt and completion in one row, right-padded, the completion right behind the prompt's last token."""
        return self.row_prompts.followed_by(self.completions)

    def passes(self) -> list[slice]:
        """The rows in stretches of `A_PASS` tokens at most, padding counted, and of one row at least."""
        longest = int((self.row_prompts.lengths + self.mask.sum(1)).max()) if len(self) else 1
        step = max(1, A_PASS // max(1, longest))
        return [slice(begin, min(begin + step, len(self))) for begin in range(0, len(self), step)]

    def places(self, before: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(row, column, place) of every real completion token; place: where it stands in `sequences()`, int64 [M].

        before: the place of the token in front of it, from which it is predicted. Raises ValueError if there is
        none, because a prompt is empty.
        """
        rows, columns = self.mask.nonzero(as_tuple=True)
        place = self.row_prompts.lengths[rows] + columns - int(before)
        if bool((place < 0).any()):
            row = int(rows[place < 0][0])
            raise ValueError(f"prompt is empty (row {row}): nothing stands before its first token to predict it")
        return rows, columns, place

    def select(self, index: Tensor | slice) -> Samples:
        """The rows at `index`; the prompts stay as they are."""
        picked = {name: value[index] for name, value in self.optional().items()}
        return Samples(self.prompts, self.prompt_index[index], self.tokens[index], self.mask[index], **picked)

    def above(self, other: Samples) -> Samples:
        """These rows, then those of `other`, which answer the same prompts; fields that one of them lacks are dropped."""
        width = max(self.tokens.shape[1], other.tokens.shape[1])
        shared = sorted(set(self.optional()) & set(other.optional()))

        def join(name: str) -> Tensor:
            values = [getattr(part, name) for part in (self, other)]
            return torch.cat([_pad_to(v, width) if v.ndim == 2 else v for v in values])

        names = ["prompt_index", "tokens", "mask", *shared]
        return Samples(self.prompts, **{name: join(name) for name in names})

    def to(self, device: torch.device | str) -> Samples:
        """A copy with every tensor on `device`."""
        known = {name: value.to(device) for name, value in self.optional().items()}
        index, tokens, mask = (x.to(device) for x in (self.prompt_index, self.tokens, self.mask))
        return Samples(self.prompts.to(device), index, tokens, mask, **known)

    def with_(self, **values: Tensor | None) -> Samples:
        """A copy with some fields replaced; shapes are checked again."""
        return replace(self, **values)  # type: ignore[arg-type]

    def save(self, path: str | Path) -> None:
        """Write every tensor to one safetensors file."""
        tensors = {
            "prompts.ids": self.prompts.ids,
            "prompts.mask": self.prompts.mask,
            "prompt_index": self.prompt_index,
            "tokens": self.tokens,
            "mask": self.mask,
            **self.optional(),
        }
        if isinstance(self.prompts, Conditioned):
            tensors["conditions.ids"] = self.prompts.conditions.ids
            tensors["conditions.mask"] = self.prompts.conditions.mask
        save_tensors(tensors, path)

    @staticmethod
    def load(path: str | Path) -> Samples:
        """Read what `save` wrote."""
        tensors = load_tensors(path)
        prompts = Tokens(tensors.pop("prompts.ids"), tensors.pop("prompts.mask"))
        if "conditions.ids" in tensors:
            conditions = Tokens(tensors.pop("conditions.ids"), tensors.pop("conditions.mask"))
            prompts = Conditioned(prompts.ids, prompts.mask, conditions)
        return Samples(prompts, **tensors)


def cat_samples(parts: Sequence[Samples]) -> Samples:
    """All parts' rows in one batch; fields that some part lacks are dropped.

    Prompts are laid side by side, unless all parts hold the very same prompts (one object), which stay as they
    are.
    """
    _expect(len(parts) > 0, "cat_samples needs at least one part")
    prompts, together = parts[0].prompts, all(part.prompts is parts[0].prompts for part in parts)
    offsets = [0]
    for part in parts[:-1]:
        offsets.append(0 if together else offsets[-1] + len(part.prompts))
    width = max(part.tokens.shape[1] for part in parts)
    shared = set.intersection(*(set(part.optional()) for part in parts))

    def join(name: str) -> Tensor:
        values = [getattr(part, name) for part in parts]
        return torch.cat([_pad_to(v, width) if v.ndim == 2 else v for v in values])

    index = torch.cat([part.prompt_index + k for part, k in zip(parts, offsets, strict=True)])
    if not together:
        prompts = cat_tokens([part.prompts for part in parts])
    return Samples(prompts, index, join("tokens"), join("mask"), **{name: join(name) for name in sorted(shared)})


@dataclass(frozen=True)
class Pairs:
    """Preferences: row i of `chosen` was preferred to row i of `rejected`, both answering the same prompt."""

    chosen: Samples
    rejected: Samples

    def __post_init__(self) -> None:
        _expect(
            len(self.chosen) == len(self.rejected),
            f"Pairs need as many rejected rows as chosen ones; got {len(self.rejected)} and {len(self.chosen)}",
        )
        _expect(
            torch.equal(self.chosen.prompt_index, self.rejected.prompt_index)
            and self.chosen.prompts.same_as(self.rejected.prompts),
            "row i of chosen and of rejected must answer the same prompt (same prompts, same prompt_index)",
        )

    def __len__(self) -> int:
        return len(self.chosen)

    def select(self, index: Tensor | slice) -> Pairs:
        return Pairs(self.chosen.select(index), self.rejected.select(index))

    def to(self, device: torch.device | str) -> Pairs:
        return Pairs(self.chosen.to(device), self.rejected.to(device))

    def both(self) -> Samples:
        """Chosen rows, then rejected rows, as one batch over the same prompts: one forward scores both."""
        return self.chosen.above(self.rejected)

"""An enumerable language model, and values in a table: the small worlds in which every claim is checked exactly.

Prompt p (one token, its number) and prefix y_1…y_t index a table of logits; table t has V^t rows per prompt.
Completions end after `horizon` tokens, or at one of `eos_ids` if there are any. Tables are float64 parameters, so an
expected gradient over all completions is exact to machine precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tiltlm.models.base import LanguageModel, State, Values
from tiltlm.samples import Samples, Tokens
from tiltlm.tensors import load_tensors, save_tensors


def _prompt_numbers(prompts: Tokens, n_prompts: int) -> Tensor:
    if prompts.ids.shape[1] != 1 or not 0 <= int(prompts.ids.min()) <= int(prompts.ids.max()) < n_prompts:
        raise ValueError(
            f"a table's prompts are single numbers below {n_prompts}; got ids {prompts.ids.tolist()[:3]} …"
        )
    return prompts.ids[:, 0]


class OnDisk(nn.Module):
    """Tables that write themselves to a folder and read themselves back."""

    def save(self, folder: str | Path) -> None:
        """Write tables.safetensors into `folder`."""
        save_tensors(self.state_dict(), Path(folder) / "tables.safetensors")

    def restore(self, folder: str | Path) -> None:
        """Take the tables that `save` wrote."""
        self.load_state_dict(load_tensors(Path(folder) / "tables.safetensors"))


class TableLM(LanguageModel, OnDisk):
    """p(y_t | prompt, y_<t) = softmax of a row of table t−1; `tables[t]` is [n_prompts, V^t, V], float64."""

    def __init__(self, n_prompts: int, vocab_size: int, horizon: int, eos_ids: Sequence[int] = ()) -> None:
        super().__init__()
        self.n_prompts, self.vocab_size, self.horizon, self.eos_ids = (
            n_prompts,
            vocab_size,
            horizon,
            tuple(eos_ids),
        )
        shapes = [(n_prompts, vocab_size**t, vocab_size) for t in range(horizon)]
        self.tables = nn.ParameterList(torch.zeros(s, dtype=torch.float64) for s in shapes)

    def randomise(self, generator: torch.Generator, scale: float = 1.0) -> TableLM:
        """Draw every logit from N(0, scale²); returns self."""
        for table in self.tables:
            table.data.normal_(0.0, scale, generator=generator)
        return self

    def start(self, prompts: Tokens, capacity: int) -> TableState:
        if capacity > self.horizon:
            raise ValueError(f"this table ends after {self.horizon} tokens; {capacity} were asked for")
        number = _prompt_numbers(prompts, self.n_prompts)
        return TableState(list(self.tables), number, torch.zeros_like(number), 0)


class TableState(State):
    """Where in the tables each row stands: prompt number, prefix code (base V), depth t."""

    def __init__(self, tables: list[Tensor], number: Tensor, code: Tensor, depth: int) -> None:
        self.tables, self.number, self.code, self.depth = tables, number, code, depth

    def logits(self) -> Tensor:
        return self.tables[self.depth][self.number, self.code]

    def append(self, tokens: Tensor) -> None:
        self.code = self.code * self.tables[0].shape[-1] + tokens
        self.depth += 1

    def select(self, index: Tensor) -> None:
        self.number, self.code = self.number[index], self.code[index]


class TableValues(Values, OnDisk):
    """Values of prefixes in tables: `tables[t]` is [n_prompts, V^(t+1), A], the values after t+1 tokens."""

    def __init__(self, n_prompts: int, vocab_size: int, horizon: int, width: int = 1) -> None:
        super().__init__()
        self.n_prompts, self.vocab_size, self.horizon, self.width = n_prompts, vocab_size, horizon, width
        shapes = [(n_prompts, vocab_size ** (t + 1), width) for t in range(horizon)]
        self.tables = nn.ParameterList(torch.zeros(s, dtype=torch.float64) for s in shapes)

    def start(self, prompts: Tokens, capacity: int) -> TableValueState:
        rows = [table.unflatten(1, (-1, self.vocab_size)) for table in self.tables]  # [P, V^t, V, A]
        number = _prompt_numbers(prompts, self.n_prompts)
        return TableValueState(rows, number, torch.zeros_like(number), 0)

    def values(self, samples: Samples) -> Tensor:
        state = self.start(samples.row_prompts, samples.tokens.shape[1])
        columns = []
        for t in range(samples.tokens.shape[1]):
            columns.append(state.peek(samples.tokens[:, t : t + 1])[:, 0])
            state.append(samples.tokens[:, t])
        return torch.where(samples.mask[:, :, None], torch.stack(columns, 1), 0.0)


class TableValueState:
    """Where in the value tables each row stands."""

    def __init__(self, tables: list[Tensor], number: Tensor, code: Tensor, depth: int) -> None:
        self.tables, self.number, self.code, self.depth = tables, number, code, depth

    def peek(self, candidates: Tensor | None) -> Tensor:
        rows = self.tables[self.depth][self.number, self.code]  # [N, V, A]
        if candidates is None:
            return rows
        return rows.gather(1, candidates[:, :, None].expand(-1, -1, rows.shape[-1]))

    def append(self, tokens: Tensor) -> None:
        self.code = self.code * self.tables[0].shape[2] + tokens
        self.depth += 1

    def select(self, index: Tensor) -> None:
        self.number, self.code = self.number[index], self.code[index]


class TableCritic(OnDisk):
    """V of the prefix in front of every token: `tables[t]` is [n_prompts, V^t], from 0."""

    def __init__(self, n_prompts: int, vocab_size: int, horizon: int) -> None:
        super().__init__()
        self.n_prompts, self.vocab_size = n_prompts, vocab_size
        shapes = [(n_prompts, vocab_size**t) for t in range(horizon)]
        self.tables = nn.ParameterList(torch.zeros(s, dtype=torch.float64) for s in shapes)

    def values_before(self, samples: Samples) -> Tensor:
        """[N, T, 1], 0 at padding."""
        number = _prompt_numbers(samples.row_prompts, self.n_prompts)
        code, columns = torch.zeros_like(number), []
        for t in range(samples.tokens.shape[1]):
            columns.append(self.tables[t][number, code])
            code = code * self.vocab_size + samples.tokens[:, t]
        return torch.where(samples.mask, torch.stack(columns, 1), 0.0)[..., None]

"""A file of preference data as token ids: in memory where its rows are few, else in Arrow files beside the runs.

    CACHE/COLUMN-KEY.arrow      a column's ids, row by row; KEY is a hash of the rows, the tokenizer and the lengths

Whatever learns from the same data by the same tokenizer finds the same files. They are written `AT_ONCE` rows at a time,
each part by the `Encoder` that encodes rows in memory. Of several processes the first writes, and all read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tiltlm import ranks
from tiltlm.data.encoding import Encoder
from tiltlm.data.stored import MANY, StoredSamples, open_samples, open_tokens, store_samples, store_tokens
from tiltlm.groups import Groups
from tiltlm.jsonl import Lines
from tiltlm.progress import note
from tiltlm.samples import Pairs, Samples, Tokens

Row = dict[str, Any]

AT_ONCE = 1024
"""Rows that are encoded and written together."""

FORMAT = 1
"""Counts up when the same text is to be written otherwise: what is there is then made anew."""


@dataclass(frozen=True)
class Encoded:
    """The rows of a .jsonl file, {prompt, …} each, as `encoder` encodes them."""

    rows: Lines
    encoder: Encoder
    cache: Path

    @property
    def few(self) -> bool:
        """Whether everything stays in memory."""
        return len(self.rows) <= MANY

    def prompts(self) -> Tokens:
        """Every row's prompt."""
        if self.few:
            return self.encoder.prompts([row["prompt"] for row in self.rows])
        return self._prompts

    def pairs(self) -> Pairs:
        """{prompt, chosen, rejected} a row."""
        if self.few:
            return self.encoder.pairs(list(self.rows))
        return Pairs(self._texts("chosen", lambda row: str(row["chosen"])),
                     self._texts("rejected", lambda row: str(row["rejected"])))  # fmt: skip

    def answers(self, answer: Callable[[Row], str | None]) -> Samples:
        """One completion a row, `answer` of it, the same function every time; rows of which that is None are left out."""
        if self.few:
            found = [(row, answer(row)) for row in self.rows]
            return self.encoder.answers(
                [{**row, "answer": text} for row, text in found if text is not None], "answer"
            )
        return self._texts("answer", answer)

    def groups(self) -> Groups:
        """{prompt, completions, rewards} a row, as many completions in each."""
        if self.few:
            return self.encoder.groups(list(self.rows))
        size = len(next(iter(self.rows))["completions"])

        def make(rows: list[Row], prompts: Tokens, begin: int) -> Samples:
            return self.encoder.grouped(rows, prompts, size, begin)

        return Groups(self._samples("completions", make), size)

    def judged(self) -> Samples:
        """{prompt, completion, label} a row: reward 1 (wanted) or 0; rows of one prompt share it."""
        if self.few:
            return self.encoder.judged(list(self.rows))

        def make(rows: list[Row], prompts: Tokens, begin: int) -> Samples:
            label = torch.tensor([float(row["label"]) for row in rows])
            return self._some(rows, prompts, lambda row: str(row["completion"])).with_(reward=label)

        found, first, number = self._samples("judged", make), list[int](), dict[bytes, int]()
        for k, row in enumerate(self.rows):
            if (text := _digest(row["prompt"])) not in number:
                number[text] = len(first)
                first.append(k)
        index = torch.tensor([number[_digest(row["prompt"])] for row in self.rows])
        return StoredSamples(self._prompts.select(torch.tensor(first)), index, found.done, found.known)

    # ---- in files ---------------------------------------------------------------------------------------------------

    @cached_property
    def _prompts(self) -> Tokens:
        def parts() -> Iterator[Tokens]:
            return (self.encoder.prompts([row["prompt"] for row in part]) for part in self.rows.parts(AT_ONCE))

        return open_tokens(self._file("prompt", lambda path: store_tokens(path, parts())))

    def _texts(self, name: str, answer: Callable[[Row], str | None]) -> StoredSamples:
        return self._samples(name, lambda rows, prompts, _: self._some(rows, prompts, answer))

    def _some(self, rows: list[Row], prompts: Tokens, answer: Callable[[Row], str | None]) -> Samples:
        """The answers of some rows, whose prompts these are."""
        found = [(k, text) for k, text in enumerate(map(answer, rows)) if text is not None]
        return self.encoder.samples(prompts, [k for k, _ in found], [text for _, text in found])

    def _samples(self, name: str, make: Callable[[list[Row], Tokens, int], Samples]) -> StoredSamples:
        """The completions called `name`; make: (rows, their prompts, the first row's number) -> theirs."""
        prompts = self._prompts

        def parts() -> Iterator[tuple[int, Samples]]:
            begin = 0
            for rows in self.rows.parts(AT_ONCE):
                yield begin, make(rows, prompts.select(slice(begin, begin + len(rows))), begin)
                begin += len(rows)

        return open_samples(self._file(name, lambda path: store_samples(path, parts())), prompts)

    def _file(self, name: str, write: Callable[[Path], None]) -> Path:
        """The file of a column; written, if it is not there, by the first of several processes."""
        path = self.cache / f"{name}-{self.key}.arrow"

        def make() -> None:
            note(f"encoding {len(self.rows)} rows of {self.rows.path}: {name}")
            write(path)

        made_once(path, make)
        return path

    @cached_property
    def key(self) -> str:
        """A hash of all that the ids depend on."""
        how = self.encoder
        said = [FORMAT, tokenizer_digest(how.tokenizer), how.eos_ids, how.most, how.most_new, how.turn_id]
        return hashlib.blake2b(json.dumps([*said, digest_of(self.rows.path)]).encode(), digest_size=8).hexdigest()


def made_once(path: Path, make: Callable[[], None]) -> None:
    """Make the file `path`, if it is not there; of several processes the first does, and the others wait."""
    ranks.first_then_others(lambda: None if path.is_file() else make())


def digest_of(path: Path) -> str:
    """A hash of what a file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash of what a tokenizer makes of texts: all that is known of it, and the versions of what runs it."""
    from transformers import PreTrainedTokenizerFast

    said = [version("transformers"), version("tokenizers"), repr(tokenizer)]
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer("")  # or the engine's description would hold how somebody padded last
        said.append(tokenizer.backend_tokenizer.to_str())
    else:
        said += [type(tokenizer).__name__, json.dumps(sorted(tokenizer.get_vocab().items()))]
    return hashlib.blake2b("\n".join(said).encode(), digest_size=16).hexdigest()

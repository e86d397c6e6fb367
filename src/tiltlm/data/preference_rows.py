"""Preference data in: rows as they are found -> plain text in one of four shapes.

| shape | columns |
|---|---|
| a pair | prompt, chosen, rejected; and margin, where the row has one |
| an example | prompt, completion |
| a verdict | prompt, completion, label: whether the answer is wanted |
| a group | prompt, completions, rewards; and finished, where the row says which completions ended by themselves |

Rated answers (prompt, completion, rating) are gathered: those of one prompt in one source are a group. A source's weight
repeats its rows: 2 has each of them twice, 0.5 a random half of them, 1.5 each once and a random half again.

A *format* makes one such row of one found row (`formats.FORMATS`; a function of your own serves as well). It may drop a
row by a rule (`Dropped`, counted by reason) and it refuses a row that does not fit (ValueError; the reader adds where the
row stands). Prompt and completion are separate texts that are simply joined: a completion brings its leading space.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

from tiltlm.data.columns import Kept, Row
from tiltlm.data.formats import Format, format_named
from tiltlm.data.hh import Dropped
from tiltlm.data.mapping import NAMES, mapped, mapping_of
from tiltlm.data.tables import rows_of, weighed
from tiltlm.seeds import Stream, stream


@dataclass(frozen=True)
class Loaded:
    """What was read, and what was not."""

    rows: list[Row]
    dropped: dict[str, int] = field(default_factory=dict)
    """How many rows were dropped, by reason."""

    examples: dict[str, str] = field(default_factory=dict)
    """Where the first row dropped for each reason stands."""

    notes: dict[str, int] = field(default_factory=dict)
    """How many rows were kept but changed, by what was done to them."""

    read: int = 0
    """How many rows were looked at."""


class Found(NamedTuple):
    """What was made of a row, where it stands, and which of its columns are null (they count as missing)."""

    where: str
    made: Kept | Dropped
    nulls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How rows are read (see `read_preferences`)."""

    make: Format
    split: str = "train"
    tokenizer: Any = None
    columns: Mapping[str, str] = field(default_factory=dict)
    encoding: str = ""
    convert: Callable[[Row], Kept | Dropped] | None = None
    keep: Sequence[str] = ()

    def of(self, source: str, counted: Counter[str]) -> Iterator[Found]:
        """What a source's rows become, one after the other; rated answers at its end, as groups."""
        rated: dict[str, list[Found]] = {}
        for where, row in rows_of(source, self.split, self.encoding):
            counted["read"] += 1
            found = self._made(where, row)
            if isinstance(found.made, Kept) and "rating" in found.made.row:
                rated.setdefault(found.made.row["prompt"], []).append(found)
            else:
                yield self._converted(found)
        for answers in rated.values():
            yield self._converted(gathered(answers, self.keep))

    def _made(self, where: str, row: Row) -> Found:
        nulls: tuple[str, ...] = ()
        try:
            row = mapped(row, self.columns)
            nulls = tuple(name for name, value in row.items() if value is None and name in NAMES)
            made = self.make({k: v for k, v in row.items() if v is not None}, self.tokenizer)
            if isinstance(made, Kept):
                made = Kept(made.row | _kept(row, self.keep), made.notes)
            return Found(where, made, nulls)
        except ValueError as error:
            raise ValueError(f"{where}: {said_of(nulls)}{error}") from None

    def _converted(self, found: Found) -> Found:
        if self.convert is None or isinstance(found.made, Dropped):
            return found
        try:
            after = self.convert(found.made.row)
        except ValueError as error:
            raise ValueError(f"{found.where}: {error}") from None
        if isinstance(after, Kept):
            kept = {name: found.made.row[name] for name in self.keep}
            after = Kept(after.row | kept, (*found.made.notes, *after.notes))
        return found._replace(made=after)


def said_of(nulls: Sequence[str]) -> str:
    """Words in front of an error about a row some of whose columns are null."""
    if not nulls:
        return ""
    verb = "is null, read as if it were" if len(nulls) == 1 else "are null, read as if they were"
    return f"column{'s' if len(nulls) > 1 else ''} {', '.join(map(repr, nulls))} {verb} missing: "


def _kept(row: Row, keep: Sequence[str]) -> Row:
    """The columns `keep` of a row, as they are."""
    for name in keep:
        if row.get(name) is None or name in SHAPED:
            has = ", ".join(each for each in row if each not in SHAPED) or "no others"
            raise ValueError(f"there is no further column {name!r} to keep; this row has {has}")
    return {name: row[name] for name in keep}


SHAPED = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "completions",
    "rewards",
    "label",
    "rating",
    "margin",
    "finished",
)
"""The columns of the four shapes."""


def gathered(answers: Sequence[Found], keep: Sequence[str] = ()) -> Found:
    """The group of rated answers to one prompt, where its first one stands; a single answer is none."""
    kept = [each.made for each in answers if isinstance(each.made, Kept)]
    if len(kept) < 2:
        return answers[0]._replace(made=Dropped("fewer than two completions"))
    rows, notes = [each.row for each in kept], dict.fromkeys(note for each in kept for note in each.notes)
    group = {"completions": [row["completion"] for row in rows], "rewards": [row["rating"] for row in rows]}
    more = {name: rows[0][name] for name in keep}
    return answers[0]._replace(made=Kept({"prompt": rows[0]["prompt"], **group, **more}, (*notes, GATHERED)))


GATHERED = "rated answers to one prompt, gathered"


def read_preferences(
    sources: str | Path | Sequence[str | Path],
    format: str | Format = "auto",
    split: str = "train",
    tokenizer: Any = None,
    limit: int | None = None,
    *,
    keep: Sequence[str] = (),
    columns: Sequence[str] = (),
    encoding: str = "",
    convert: Callable[[Row], Kept | Dropped] | None = None,
    own: Stream | None = None,
) -> Loaded:
    """The rows of `sources` (what `rows_of` reads, each with its weight), all of one shape; at most `limit` of them.

    keep: columns that every row brings along as they are found.

    tokenizer: writes messages as text by its chat template, and cuts prompts for `imdb`; else it is not needed.
    columns: names for columns that are called otherwise (`tiltlm.data.mapping`). encoding: of text files that have no
    byte order mark. convert: what becomes of every row made (`as_pairs`, `as_rewards`). own: draws a weight's fraction.
    Raises ValueError naming file:line for a row that does not fit, and FileNotFoundError.
    """
    make, tally = format_named(format) if isinstance(format, str) else format, Tally()
    reading = Reading(make, split, tokenizer, mapping_of(columns), encoding, convert, keep)
    return Loaded(list(preference_rows(sources, reading, tally, limit, own)), **tally.said())


def preference_rows(
    sources: str | Path | Sequence[str | Path],
    reading: Reading,
    tally: Tally,
    limit: int | None = None,
    own: Stream | None = None,
) -> Iterator[Row]:
    """`read_preferences` row by row: none is kept, but for rated answers until their source ends. `tally` has counted all
    of them once the last one came."""
    own, given = own or stream(0, "weights"), 0
    for number, source in enumerate([sources] if isinstance(sources, (str, Path)) else sources):
        name, weight = weighed(source)
        most = None if limit is None or weight < 1 else limit - given
        kept = tally.kept(reading.of(name, tally.counted), most)
        for row in tally.weighted(kept, weight, str(source), own.child(number)):
            given += 1
            if limit is None or given <= limit:
                yield row


@dataclass
class Tally:
    """What is counted while rows are read, and the first row that was kept."""

    counted: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    first: tuple[Row, Found] | None = None

    def said(self) -> dict[str, Any]:
        """What was counted, by the names of `Loaded`."""
        return {
            "dropped": dict(self.dropped), "examples": self.examples, "notes": dict(self.notes),
            "read": self.counted["read"],
        }  # fmt: skip

    def kept(self, found: Iterable[Found], most: int | None) -> Iterator[Row]:
        """The rows that are kept, `most` of them at most; the others are counted by reason."""
        number = 0
        if most is not None and most < 1:
            return
        for each in found:
            if isinstance(each.made, Dropped):
                self.drop(each.made.reason, 1, each.where)
                continue
            row = self.same_shape(each.made.row, each)
            self.notes.update(each.made.notes)
            yield row
            number += 1
            if number == most:
                break

    def same_shape(self, row: Row, found: Found) -> Row:
        """The row, if it has the columns of the first one. Raises ValueError where it has others."""
        self.first = self.first or (row, found)
        more = ("margin", "finished")
        shapes = [", ".join(n for n in one if n in SHAPED and n not in more) for one in (row, self.first[0])]
        if shapes[0] != shapes[1]:
            where, nulls = self.first[1].where, self.first[1].nulls
            null = f" ({where}: {said_of(nulls).removesuffix(': ')})" if nulls else ""
            raise ValueError(
                f"{found.where}: {said_of(found.nulls)}gives {shapes[0]}, but rows before it {shapes[1]}{null}: "
                "read them separately"
            )
        return row

    def drop(self, reason: str, rows: int, where: str) -> None:
        self.dropped[reason] += rows
        self.examples.setdefault(reason, where)

    def weighted(self, rows: Iterable[Row], weight: float, source: str, own: Stream) -> Iterator[Row]:
        """Every row as often as the weight's whole part says, and a random share of them once more for the rest."""
        if weight == 1:
            yield from rows
            return
        with TemporaryFile() as file:  # how many rows there are decides which ones are taken, and some come twice
            count = 0
            for count, row in enumerate(rows, 1):  # noqa: B007
                pickle.dump(row, file)
            share = round(weight % 1 * count)
            some = set(own.permutation(count)[:share].tolist()) if share else set()
            for taken in [None] * int(weight) + [some]:
                file.seek(0)
                for k in range(count):
                    row = pickle.load(file)
                    if taken is None or k in taken:
                        yield row
        total = int(weight) * count + share
        if total < count:
            self.drop("left out by the source's weight", count - total, source)
        elif total > count:
            self.notes["copies by the source's weight"] += total - count

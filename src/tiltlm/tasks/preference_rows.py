"""Preference data in: rows as they are found -> plain text in one of three shapes.

| shape | columns |
|---|---|
| a pair | prompt, chosen, rejected; and margin, where the row has one |
| an example | prompt, completion |
| a group | prompt, completions, rewards; and finished, where the row says which completions ended by themselves |

A *format* makes one such row of one found row (`FORMATS`; a function of your own serves as well). It may drop a row by
a rule (`Dropped`, counted by reason) and it refuses a row that does not fit (ValueError; the reader adds where the
row stands). Prompt and completion are separate texts that are simply joined: a completion brings its leading space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tiltlm.tasks.columns import Kept, Row, example, pair, recognised, text
from tiltlm.tasks.hh import Dropped, split_dialogues
from tiltlm.tasks.tables import rows_of

Format = Callable[[Row, Any], Kept | Dropped]
"""(row, tokenizer or None) -> what is made of it. Raises ValueError for a row that does not fit."""


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


def read_preferences(
    sources: str | Path | Sequence[str | Path],
    format: str | Format = "auto",
    split: str = "train",
    tokenizer: Any = None,
    limit: int | None = None,
    keep: Sequence[str] = (),
) -> Loaded:
    """The rows of `sources` (what `rows_of` reads), all of one shape; at most `limit` of them.

    keep: columns that every row brings along as they are found.

    tokenizer: writes messages as text by its chat template, and cuts prompts for `imdb`; else it is not needed.
    Raises ValueError naming file:line for a row that does not fit, and FileNotFoundError.
    """
    make = format_named(format) if isinstance(format, str) else format
    rows: list[Row] = []
    dropped, notes, examples = Counter[str](), Counter[str](), dict[str, str]()
    for source in [sources] if isinstance(sources, (str, Path)) else sources:
        for where, row in rows_of(source, split):
            if limit is not None and len(rows) >= limit:
                break
            made = _made(make, row, tokenizer, where)
            if isinstance(made, Dropped):
                dropped[made.reason] += 1
                examples.setdefault(made.reason, where)
                continue
            rows.append(_same_shape(made.row, rows, where) | _kept(row, keep, where))
            notes.update(made.notes)
    return Loaded(rows, dict(dropped), examples, dict(notes))


def format_named(name: str) -> Format:
    """The format called `name`; an unknown one raises ValueError with the nearest."""
    if name not in FORMATS:
        near = get_close_matches(name, FORMATS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no format {name!r}.{hint} Known: {', '.join(FORMATS)}")
    return FORMATS[name]


def _made(make: Format, row: Row, tokenizer: Any, where: str) -> Kept | Dropped:
    """What a format makes of a row; columns without a value (parquet and hub tables have them) are not there."""
    try:
        return make({name: value for name, value in row.items() if value is not None}, tokenizer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _same_shape(row: Row, before: Sequence[Row], where: str) -> Row:
    more = ("margin", "finished")
    shapes = [", ".join(name for name in one if name in SHAPED and name not in more) for one in (row, *before[:1])]
    if shapes[0] != shapes[-1]:
        raise ValueError(f"{where}: gives {shapes[0]}, but rows before it {shapes[-1]}: read them separately")
    return row


SHAPED = ("prompt", "chosen", "rejected", "completion", "completions", "rewards", "margin", "finished")
"""The columns of the three shapes."""


def _kept(row: Row, keep: Sequence[str], where: str) -> Row:
    for name in keep:
        if row.get(name) is None or name in SHAPED:
            has = ", ".join(each for each in row if each not in SHAPED) or "no others"
            raise ValueError(f"{where}: there is no further column {name!r} to keep; this row has {has}")
    return {name: row[name] for name in keep}


def _hh(row: Row, tokenizer: Any = None) -> Kept | Dropped:
    """Two dialogues of the HH data (`tiltlm.tasks.hh`)."""
    made = split_dialogues(text(row, "chosen"), text(row, "rejected"))
    if isinstance(made, Dropped):
        return made
    notes = ("later turns left out",) if made.later_turns else ()
    return Kept({"prompt": made.prompt, "chosen": made.chosen, "rejected": made.rejected}, notes)


def _tldr(row: Row, tokenizer: Any = None) -> Kept | Dropped:
    """A Reddit post with its summary, or with two and the number of the better one (in `info`, `summaries`)."""
    if "summaries" not in row:
        return example(_post(row), " " + text(row, "summary").strip())
    info, summaries, choice = (row.get(name) for name in ("info", "summaries", "choice"))
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise ValueError("a comparison has a column info (subreddit, title, post) and two summaries")
    if not all(isinstance(summary, dict) for summary in summaries):
        raise ValueError('each of the summaries is an object like {"text": …}')
    if info.get("post") is None and "article" in info:
        return Dropped("a news article instead of a post")
    if choice is None:
        return Dropped("tie (no choice)")
    if choice not in (0, 1):
        raise ValueError(f"choice is the number of the better summary, 0 or 1; got {choice!r}")
    texts = [" " + text(summary, "text").strip() for summary in summaries]
    return pair(_post(info), texts[int(choice)], texts[1 - int(choice)], row)


def _post(row: Row) -> str:
    subreddit, title, post = (text(row, name) for name in ("subreddit", "title", "post"))
    return f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"


PROMPT_TOKENS = 10


def _imdb(row: Row, tokenizer: Any) -> Kept | Dropped:
    """A review: its first 10 tokens are the prompt. Cut in the text, between tokens: nothing is lost by decoding."""
    if tokenizer is None or not tokenizer.is_fast:
        raise ValueError("format imdb counts tokens: name a (fast) tokenizer, such as gpt2")
    review = text(row, "text").rstrip().replace("<br />", "\n")
    read = tokenizer(review, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = read["offset_mapping"]
    if len(ends) < PROMPT_TOKENS:
        return Dropped("blank response")
    cut = ends[PROMPT_TOKENS - 1][1]
    return example(review[:cut], review[cut:])


HH = ("\n\nHuman: ", "\n\nHumans: ")
"""How a dialogue of the HH data begins."""


def _auto(row: Row, tokenizer: Any = None) -> Kept | Dropped:
    """Whatever the columns say; two texts that begin like HH dialogues are read as such."""
    sides = [row.get(name) for name in ("chosen", "rejected")]
    if "prompt" not in row and all(isinstance(side, str) and side.startswith(HH) for side in sides):
        return _hh(row)
    return recognised(row, tokenizer)


FORMATS: dict[str, Format] = {"auto": _auto, "hh": _hh, "tldr": _tldr, "imdb": _imdb}
"""Formats by name. A new one is a function here; nothing else needs to know."""


def as_rewards(row: Row) -> Kept | Dropped:
    """A pair as the group of its two responses with rewards 1 and 0; a group stays as it is."""
    if "rewards" in row:
        return Kept(row)
    if "chosen" not in row:
        raise ValueError(f"only a pair can be written with rewards; this row gives {', '.join(row)}")
    return Kept({"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "rewards": [1, 0]})


def as_pairs(row: Row) -> Kept | Dropped:
    """A group as the pair of its best and worst completion, their difference as margin; a pair stays as it is."""
    if "chosen" in row:
        return Kept(row)
    if "rewards" not in row:
        raise ValueError(f"a pair needs two responses; this row gives {', '.join(row)}")
    rewards, completions = row["rewards"], row["completions"]
    best, worst = max(rewards), min(rewards)
    if best == worst:
        return Dropped("tie (all rewards are equal)")
    chosen, rejected = (completions[rewards.index(value)] for value in (best, worst))
    return pair(row["prompt"], chosen, rejected, {"margin": best - worst})


def followed_by(make: Format, convert: Callable[[Row], Kept | Dropped]) -> Format:
    """The format that makes a row and then converts it (`as_rewards`, `as_pairs`)."""

    def both(row: Row, tokenizer: Any) -> Kept | Dropped:
        made = make(row, tokenizer)
        if isinstance(made, Dropped):
            return made
        after = convert(made.row)
        return after if isinstance(after, Dropped) else Kept(after.row, (*made.notes, *after.notes))

    return both

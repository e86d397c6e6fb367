"""Formats of preference data by name: one found row -> one row in the project's own columns, or why it is dropped."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from tiltlm.data.columns import Kept, Row, example, pair, recognised, text
from tiltlm.data.hh import Dropped, split_dialogues
from tiltlm.data.layouts import in_known_columns

Format = Callable[[Row, Any], Kept | Dropped]
"""(row, tokenizer or None) -> what is made of it. Raises ValueError for a row that does not fit."""


def format_named(name: str) -> Format:
    """The format called `name`; an unknown one raises ValueError with the nearest."""
    if name not in FORMATS:
        near = get_close_matches(name, FORMATS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no format {name!r}.{hint} Known: {', '.join(FORMATS)}")
    return FORMATS[name]


def _hh(row: Row, tokenizer: Any = None) -> Kept | Dropped:
    """Two dialogues of the HH data (`tiltlm.data.hh`)."""
    made = split_dialogues(text(row, "chosen"), text(row, "rejected"))
    if isinstance(made, Dropped):
        return made
    notes = ("later turns left out",) if made.later_turns else ()
    return Kept({"prompt": made.prompt, "chosen": made.chosen, "rejected": made.rejected}, notes)


def _tldr(row: Row, tokenizer: Any = None) -> Kept | Dropped:
    """A Reddit post with its summary, or with two and the number of the better one (in `info`, `summaries`)."""
    if "summaries" not in row:
        whole = {name: text(row, name) for name in (*HEAD, "post", "summary")}
        return example(_post(whole), " " + whole["summary"].strip())
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
    """The post under its title and subreddit, where they are known."""
    head = [
        f"{name.upper()}: {sign}{text(row, name)}\n" for name, sign in HEAD.items() if row.get(name) is not None
    ]
    return f"{''.join(head)}POST: {text(row, 'post')}\nTL;DR:"


HEAD = {"subreddit": "r/", "title": ""}
TLDR = ("info", "summaries"), ("subreddit", "title", "post", "summary")
"""Columns by which rows of posts and summaries are known."""


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
    """Whatever the columns say; two texts that begin like HH dialogues, and posts with summaries, are read as such."""
    sides = [row.get(name) for name in ("chosen", "rejected")]
    if "prompt" not in row and all(isinstance(side, str) and side.startswith(HH) for side in sides):
        return _hh(row)
    if "prompt" not in row and any(all(name in row for name in columns) for columns in TLDR):
        return _tldr(row)
    return recognised(in_known_columns(row, tokenizer), tokenizer)


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

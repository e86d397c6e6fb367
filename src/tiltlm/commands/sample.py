"""`tiltlm sample MODEL --prompts p.jsonl --out y.jsonl`: completions of every prompt in a file.

Messages are written by the model's chat template, opening the assistant's turn: `prompt` is that text then, and the
messages stay in `messages`. Prompts longer than a run's stages read lose their front, as there.

With --draw.url a server draws (docs/serving_draws.md), and MODEL is what it serves: here it lends its tokenizer and its
ends, and scores the first rows, so that another model is noticed.

Each output line: prompt, completion (text, if there is a tokenizer), completion_ids, log_q (nats, under what was
really drawn from, warping included), finished. Texts of a server that returns no token ids (--draw.text) have log_p
instead, what MODEL itself says of them, and `retokenised`. With --grouped a line holds all completions of a prompt:
`completions`, and lists of the rest. Draw k of prompt i depends on seed, i and k alone: batch size changes nothing, and an
interrupted file is taken up where it stops.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from tiltlm.commands.arguments import settings_from
from tiltlm.commands.models import Decoder, load_decoder
from tiltlm.commands.process import prepare
from tiltlm.data.asked import prompt_rows
from tiltlm.data.chat import asked_in, is_messages
from tiltlm.data.wording import Wording
from tiltlm.device import device_of
from tiltlm.jsonl import in_parts, read_json, whole_lines, write_whole
from tiltlm.progress import note, steps
from tiltlm.rewards.masking import mask
from tiltlm.samplers.ancestral import Warp, Warped, draw
from tiltlm.samplers.server import Server, mismatch, said_of
from tiltlm.samplers.serving import HERE, Drawer, Serving
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.settings import hashed


@dataclass(frozen=True)
class Sample:
    """Draw completions from a model folder, a hub name or a finished run."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder or hub name that transformers loads, or a run folder of this library."""

    prompts: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .txt) or hub data set with a `prompt` in every row: text, messages
    ({role, content}; with `tools`, if there are any), or a list of token ids; `question` and `messages` serve as well, and
    an answer that these end in is left out. Or stories:N, arithmetic:N, of the project's own making."""

    out: Path
    """The .jsonl file to write; if it is there already, it is completed."""

    n: int = 1
    """Completions per prompt."""

    grouped: bool = False
    """One line per prompt, with a list of `completions`: what alignment on groups reads once they have `rewards`."""

    template: str = ""
    """A text with {prompt} in it that is put around prompts of text before the model goes on, or alpaca or tulu (default: a
    run's own, else none). The bare prompt is what is written."""

    columns: tuple[str, str] = ("prompt", "completion")
    """What a line calls the two: `question response`, say."""

    max_new_tokens: int = 64
    """Tokens at most; a completion that has not ended by then is marked finished=false. (A run's are its own.)"""

    temperature: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens (0: all)."""

    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability (1: all)."""

    stop: tuple[str, ...] = ()
    """The tokens that end a completion, by id or text (default: all that the model's own files name: tokenizer,
    generation_config, chat template)."""

    seed: int = 0
    batch_size: int = 64
    """Rows drawn at once; changes speed only."""

    device: str = "cpu"
    """cpu, cuda, cuda:N, mps, or auto: the first of cuda, mps and cpu that is there."""

    dtype: str = "float32"

    draw: Serving = HERE
    """A server that draws in the place of this process, or how this process draws."""


def sample(args: list[str]) -> int:
    """Run the command."""
    settings = settings_from(args, Sample, "sample")
    if settings.n < 1:
        raise ValueError(f"--n must be 1 or more; got {settings.n}")
    warp = Warp(settings.temperature, settings.top_k, settings.top_p)
    if settings.draw.url and warp != Warp():
        raise ValueError(
            "a server's log-probabilities are those of the plain model, whatever it draws with: with --draw.url leave "
            "--temperature, --top-k and --top-p at their defaults"
        )
    prepare()
    device_of(settings.device)
    _same_settings(settings)
    done, per = whole_lines(settings.out), 1 if settings.grouped else settings.n
    count = sum(1 for _ in _asked(settings))
    if done >= count * per:
        note(f"{settings.out} is complete: {done} lines")
        return 0
    decoder = load_decoder(settings.model, settings.device, settings.dtype, settings.stop)
    for _ in _encoded(settings, decoder):  # what cannot be read is said before anything is drawn
        pass
    drawer, at_once = _drawer(settings, decoder, warp), max(1, settings.batch_size // settings.n)
    begin = done // per
    with steps("sample") as on_step:
        for part in in_parts(islice(_encoded(settings, decoder), begin, None), at_once):
            rows, ids = [row for row, _ in part], [ids for _, ids in part]
            lines = list(_lines(settings, decoder, drawer, ids, rows, begin))
            _append(settings, lines[max(0, done - begin * per) :])
            begin += len(part)
            on_step(begin, count, {})
    note(f"{settings.out}: {count * settings.n} completions of {count} prompts")
    return 0


def _asked(settings: Sample) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """(where, row, what is asked) of every prompt; read anew each time, so that none has to be kept."""
    return ((where, row, asked_in(row, where)) for where, row in prompt_rows(settings.prompts))


def _encoded(settings: Sample, decoder: Decoder) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """(a line's columns, the prompt's ids) of every prompt."""
    wording = Wording(settings.template) if settings.template else decoder.wording
    for where, given, prompt in _asked(settings):
        row = _row(decoder, given, decoder.spoken(prompt, where, given))
        yield row, decoder.encode(wording.said(prompt) if isinstance(prompt, str) else row["prompt"], where)


def _row(decoder: Decoder, row: dict[str, Any], prompt: Any) -> dict[str, Any]:
    """A line's columns, with the prompt as it is read: messages stay beside the text that was made of them."""
    said = {"messages": row["prompt"]} if is_messages(row.get("prompt")) else {}
    return {**row, **said, "prompt": prompt}


def _append(settings: Sample, lines: list[str]) -> None:
    """Write lines behind those that are there, and what they were made with beside them. Nothing is written before
    something was drawn."""
    _beside(settings).parent.mkdir(parents=True, exist_ok=True)
    write_whole(_beside(settings), json.dumps(_made_with(settings), indent=1) + "\n")
    with settings.out.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def _lines(
    settings: Sample,
    decoder: Decoder,
    drawer: Drawer,
    ids: list[list[int]],
    rows: list[dict[str, Any]],
    begin: int,
) -> Iterator[str]:
    drawn = drawer(
        Tokens.of(ids, decoder.model.device),
        n=settings.n,
        max_new_tokens=decoder.most_new_tokens or settings.max_new_tokens,
        stream=stream(settings.seed, "sample"),
        rows=torch.arange(begin * settings.n, (begin + len(ids)) * settings.n),
    )
    if begin == 0 and isinstance(drawer, Server) and drawn.log_q is not None:
        with torch.no_grad():
            note(said_of(float(mismatch(decoder.model.log_prob(drawn), drawn).mean()), settings.model))
    found, names = list(_rows(drawn, decoder)), dict(zip(("prompt", "completion"), settings.columns, strict=True))
    for k, given in enumerate(rows):
        mine = found[k * settings.n : (k + 1) * settings.n]
        for row in [_together(mine)] if settings.grouped else mine:
            said = {names.get(name, name): value for name, value in (given | row).items()}
            yield json.dumps(said, ensure_ascii=False) + "\n"


def _drawer(settings: Sample, decoder: Decoder, warp: Warp) -> Drawer:
    """What draws: the model, warped if that was asked for, or the server that serves it."""
    if settings.draw.url:
        return Server.of(settings.draw, decoder.model, decoder.tokenizer)
    model = settings.draw.of(decoder.model)
    return partial(draw, model if warp == Warp() else Warped(model, warp))


def _together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Completions of one prompt as one row of lists."""
    names = {"completion": "completions"}
    return {names.get(name, name): [row[name] for row in rows] for name in rows[0]}


def _rows(drawn: Samples, decoder: Decoder) -> Iterator[dict[str, Any]]:
    assert drawn.finished is not None
    again = drawn.log_q is None
    with torch.no_grad():
        numbers = (decoder.model.log_prob(drawn) if drawn.log_q is None else drawn.log_q).sum(1).tolist()
    for row, number, ended in zip(drawn.completions.lists(), numbers, drawn.finished.tolist(), strict=True):
        text = decoder.decode(row)
        shown = {} if text is None else {"completion": text}
        said = {"log_p": number, "retokenised": True} if again else {"log_q": number}
        yield {**shown, "completion_ids": row, **said, "finished": ended}


def _beside(settings: Sample) -> Path:
    """The file that says what the output was made with."""
    return settings.out.with_name(settings.out.name + ".settings.json")


def _made_with(settings: Sample) -> dict[str, str]:
    named = {name: value for name, value in asdict(settings).items() if name not in ("batch_size", "out", "draw")}
    if settings.draw != HERE:  # which server, and not how fast it is asked
        named |= {f"draw.{name}": value for name, value in hashed(settings.draw).items() if name}
    return {name: mask(str(value)) for name, value in named.items()}


def _same_settings(settings: Sample) -> None:
    """Refuse to complete a file with other settings than it was begun with."""
    now = _made_with(settings)
    if settings.out.exists() and _beside(settings).exists():
        before = read_json(_beside(settings))
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            raise ValueError(
                f"{settings.out} was begun with {changed[0]}={before.get(changed[0])}, not {now[changed[0]]}: "
                "choose another --out, or remove the file to start again"
            )
    elif settings.out.exists() and whole_lines(settings.out):
        raise FileExistsError(f"{settings.out} exists and was not made by this command: choose another --out")

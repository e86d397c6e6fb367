"""Recipes and their runs: a frozen value in, a folder out.

A recipe is a frozen dataclass whose fields are its settings. Its run lives in `ROOT/name/key`, the key a hash
of the settings: the same settings find the same folder, finished or half-way, and go on there. A recipe may
need other recipes' results (`inputs`); `ensure` builds those first, or finds them finished.

A run folder holds config.json (the resolved settings), provenance.json (where the numbers come from), DONE
once it is finished, and whatever the recipe makes: metrics.jsonl, checkpoint-N/, samples.jsonl, report.json.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
import typing
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from os.path import exists
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from rich.console import Console

from tiltlm import ranks
from tiltlm.device import check_devices
from tiltlm.jsonl import write_whole
from tiltlm.lock import alone_in
from tiltlm.models.base import LanguageModel
from tiltlm.models.folders import model_in
from tiltlm.progress import note
from tiltlm.rewards.masking import mask, without_secrets
from tiltlm.ruler.table import read_report, table
from tiltlm.settings import hashed

ROOT = Path("runs")
SEEN_SECONDS = 60
"""How long a process looks for what another one has finished."""
R = TypeVar("R", bound="Recipe")


class Saves(typing.Protocol):
    """What writes itself to a file."""

    def save(self, path: Path, /) -> None: ...


class Recipe:
    """How to make one result. A frozen dataclass; its fields are its settings, nested, and among them `seed`."""

    seed: int
    stage: ClassVar[str] = ""
    gathers: ClassVar[bool] = False
    """Whether the report repeats the rows of the inputs' reports: a comparison."""

    computes: ClassVar[bool] = True
    """Whether networks are asked: a scheduler gives such stages the GPUs, and reading data none."""

    @property
    def together(self) -> bool:
        """Whether several processes (`ranks`) build it side by side: it trains, draws or scores. Else the first builds it
        for all."""
        return False

    @property
    def name(self) -> str:
        """The recipe's name, `task/stage`."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """A short hash of every setting that the result depends on (of a credential in a URL only a digest counts), and of
        the content of the files that settings name."""
        return self.key_given({})

    def key_given(self, known: Mapping[str, str]) -> str:
        """`key`, where the files had the digests `known`; the others are read."""
        text = json.dumps(without_secrets(hashed(self.counted())), sort_keys=True, default=str)
        text += "".join({**digests(self.files()), **known}.get(name, "") for name in self.files())
        return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()

    def counted(self) -> Recipe:
        """This recipe with those settings at their defaults that, beside its others, do not matter."""
        return self

    def inputs(self) -> dict[str, Recipe]:
        """The recipes whose results this one needs, by the name it calls them."""
        return {}

    def build(self, run: Run[Self]) -> None:
        """Make the result in `run.folder`. May be called again on a half-made folder, and goes on there."""
        raise NotImplementedError

    def decoder(self, run: Run[Self]) -> LanguageModel:
        """What `tiltlm sample RUN` draws from. Raises ValueError where there is no such thing."""
        raise ValueError(f"{run.folder} ({self.name}) is no decoder: nothing can be drawn from it")

    def show(self, run: Run[Self]) -> None:
        """Print the finished run's results on standard output: its report as a table, if it has one."""
        report = run.folder / "report.json"
        if report.is_file():
            Console(width=130, highlight=False).print(table(read_report(report), self.name))

    def files(self) -> list[str]:
        """Files that settings name and whose content decides the result."""
        return []

    def check(self) -> None:
        """Look at what the settings name (files, say) before any work; raises if it is not there."""

    def speech(self, run: Run[Self]) -> tuple[Any, int | None]:
        """The tokenizer of this recipe's texts, and the length its completions have; None where there is none."""
        return None, None


@dataclass(frozen=True)
class Run(typing.Generic[R]):
    """A recipe, its folder, and the runs of its inputs."""

    recipe: R
    folder: Path
    inputs: dict[str, Run[Any]]

    @property
    def key(self) -> str:
        """The last part of the folder's name."""
        return self.folder.name

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").is_file()

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as JSON, aside first: a reader never sees half a file. Of several processes the first writes."""
        if ranks.is_first():
            write_whole(self.folder / name, json.dumps(value, indent=1, default=str) + "\n")

    def save(self, name: str, made: Saves) -> None:
        """Write what writes itself to a file. Of several processes the first writes."""
        if ranks.is_first():
            made.save(self.folder / name)

    def write_jsonl(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write rows as JSON lines, aside first. Of several processes the first writes."""
        if ranks.is_first():
            write_whole(self.folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def digests(names: Iterable[str]) -> dict[str, str]:
    """What the files of these names hold, as short hashes; of a folder (a model, data), what the files in it hold; of a
    run that trained a model, what that model's folder holds.

    Those that are not there are left out: a hub's name stands for itself.
    """
    return {name: _digest(model_in(Path(name)) or Path(name)) for name in names if name and exists(name)}


def _digest(path: Path) -> str:
    if path.is_file():
        about = path.stat()
        return _content(path, about.st_size, about.st_mtime_ns)
    inside = [f"{each.name} {_digest(each)}" for each in sorted(path.iterdir()) if each.is_file()]
    return hashlib.blake2b("\n".join(inside).encode(), digest_size=8).hexdigest()


LARGE = 1 << 26
"""Bytes from which a file (a network's weights) is known by its size, its first and its last part alone."""


@cache
def _content(path: Path, size: int, changed: int) -> str:
    """A short hash of a file, read once as long as it does not change."""
    total = hashlib.blake2b(str(size).encode() if size >= LARGE else b"", digest_size=8)
    with path.open("rb") as file:
        total.update(file.read(LARGE))
        if size >= LARGE:
            file.seek(-(1 << 20), 2)
            total.update(file.read())
    return total.hexdigest()


def find(recipe: R, root: Path = ROOT, known: Mapping[str, str] | None = None) -> Run[R]:
    """The run of a recipe under `root`, whether or not anything is there yet.

    known: digests of files as they were when the run was made, for runs that are read again.
    """
    inputs = {name: find(needed, root, known) for name, needed in recipe.inputs().items()}
    return Run(recipe, root / recipe.name / recipe.key_given(known or {}), inputs)


def ensure(recipe: R, root: Path = ROOT, command: str = "") -> Run[R]:
    """The finished run of a recipe: found, or built (its inputs first); `command` is what asked for it."""
    run = find(recipe, root)
    if ranks.from_first(lambda: run.done):
        return run
    check_all(run)
    for needed in run.inputs.values():
        ensure(needed.recipe, root, command)
    with alone_in(run.folder) if ranks.is_first() else nullcontext():
        if not ranks.from_first(lambda: run.done):  # another command may have built it meanwhile
            _build_shared(run, command)
    return run


def _build_shared(run: Run[Any], command: str) -> None:
    """By all processes side by side, or by the first while the others wait."""
    if run.recipe.together:
        _build(run, command)
    else:
        ranks.from_first(lambda: _build(run, command))
    ranks.wait()
    until = time.monotonic() + SEEN_SECONDS
    while not run.done and time.monotonic() < until:
        time.sleep(0.1)  # file systems of several machines show a new file after a while
    if not run.done:
        raise ValueError(
            f"{run.folder} is finished, but process {ranks.number()} does not see it: all processes must share the folder "
            "that runs live in (TILTLM_RUNS)"
        )


def _build(run: Run[Any], command: str) -> None:
    recipe, started, cpu = run.recipe, time.time(), time.process_time()
    note(f"{recipe.name}  ->  {run.folder}")
    begin(run)
    run.write_json("provenance.json", provenance(recipe.seed, command))
    recipe.build(run)
    spent = ranks.gathered([time.process_time() - cpu])
    took = {"seconds": round(time.time() - started, 1), "cpu_seconds": round(sum(spent), 1)}
    several = {"processes": len(spent)} if len(spent) > 1 else {}
    run.write_json("provenance.json", provenance(recipe.seed, command) | took | several)
    if ranks.is_first():
        (run.folder / "DONE").touch()


def check_all(run: Run[Any], here: bool = True) -> None:
    """Look, before any work, at what the settings name of everything that is still to be built for `run`.

    here: whether it is built on this machine, so that its devices have to be there.
    """
    for each in unfinished(run):
        if here:
            check_devices(each.recipe)
        each.recipe.check()


def begin(run: Run[Any]) -> None:
    """Make a run's folder and write down what it is going to be."""
    recipe = run.recipe
    run.folder.mkdir(parents=True, exist_ok=True)
    settings = without_secrets(asdict(recipe))
    run.write_json("config.json", {"recipe": recipe.name, "settings": settings, "files": digests(recipe.files())})


def unfinished(run: Run[Any]) -> list[Run[Any]]:
    """The runs that are still to be built for this one, itself included."""
    if run.done:
        return []
    return [run, *(each for needed in run.inputs.values() for each in unfinished(needed))]


def provenance(seed: int, command: str) -> dict[str, Any]:
    """What one needs to make the numbers again: commit, versions, command, seed."""
    packages = ["tiltlm", "torch", "transformers", "numpy"]
    return {
        "command": mask(command),
        "seed": seed,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit() -> str | None:
    """The commit of the checkout this package runs from, with a + if files differ; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "-C", here, "status", "--porcelain", "."], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")

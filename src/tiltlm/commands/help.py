"""What `tiltlm run TASK/STAGE --help` prints: the settings that people change first; with --help-all, every one."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from tiltlm.commands.kinds import shown, texts_of
from tiltlm.commands.launch.settings import launch_options
from tiltlm.commands.options import Setting, settings_of
from tiltlm.methods import names
from tiltlm.recipes import STAGES, figures, presets, tasks
from tiltlm.rewards.masking import mask
from tiltlm.stages.evaluate import Evaluate

FIRST = (
    "fit.lr", "fit.steps", "fit.epochs", "fit.batch-size", "feed.n", "feed.size", "feed.particles", "feed.draws.n",
    "draws.n", "draws.prompts", "exact.n", "log-z.draws", "ruler.n", "ruler.prompts", "net.weights", "candidates.n",
    "candidates.prompts", "generator.feed.rounds.count", "generator.feed.rounds.n", "generator.fit.lr", "verifier.fit.lr",
    "verifier.method.beta", "seed",
)  # fmt: skip
"""The settings that people change first, beside those that the task shows and the method's own."""

IN_ROUNDS = (
    "count", "n", "start", "reference", "right", "cap", "weigh", "pairs", "rationalize", "accumulate", "samples",
    "valid-samples",
)  # fmt: skip
"""Of a method that learns in rounds: the feed's settings that come first, in the place of those of other sources."""

FEW = 16
"""So many settings are all shown at once."""

WIDTH, INDENT = 112, 36

USAGE = """\
usage: tiltlm {command} TASK/STAGE [--setting value …] [--jobs N | --on slurm | --on ray] [--config FILE]
       [--save-config FILE]

`tiltlm list` shows the tasks and stages; `tiltlm {command} TASK/STAGE --help` the settings of one.
--jobs N builds what a recipe needs N at a time, each in a process of its own, --on slurm and --on ray on a cluster.
--dry-run builds nothing: it says what is to be built, and the memory that each training takes. --shard: several processes
(torchrun) hold a part each of every network."""

FILES = """\
  --config FILE                     settings from a YAML or JSON file (a run's config.json is one); options override it
  --save-config FILE                write these settings to such a file, and run nothing"""

COMMON = f"""\
  --jobs N                          build what is needed N at a time, each in a process of its own
  --on {{local,slurm,ray}}            build as jobs of SLURM (--slurm.partition gpu …) or tasks of Ray; --help-all
  --shard                           several processes (torchrun) hold a part each of every network
  --dry-run [--processes N]         build nothing: what is to be built, and the memory of a process while one trains
{FILES}"""

COMPARED = """\
  --methods A B …                   what is compared (now {methods})
  --fit.lr FLOAT                    of every method that has it; so with all of --fit, --feed and --net
  --METHOD.fit.lr FLOAT             of one method: --{first}.fit.lr 0.001, --{first}.method.… say"""


def short_help(recipe: Any, command: str) -> str:
    """Usage, what the recipe does, its first settings."""
    every = [each for each in settings_of(recipe) if not each.hidden]
    first = every if len(every) <= FEW else [each for each in every if _comes_first(each, recipe)]
    rest = (
        f"--help-all lists all {len(every)} settings."
        if len(first) < len(every)
        else "These are all its settings."
    )
    return "\n".join([*_head(recipe, command), *_lines(first), *_compared(recipe), COMMON, "", rest])


def full_help(recipe: Any, command: str) -> str:
    """Every setting, by groups."""
    groups: dict[str, list[Setting]] = {}
    for each in settings_of(recipe):
        if not each.hidden:
            groups.setdefault(each.flag.rpartition(".")[0], []).append(each)
    parts = [part for name, members in groups.items() for part in (f"{name or 'recipe'}:", *_lines(members), "")]
    where = ["", "where runs are built:", *_lines(launch_options().values())]
    return "\n".join([*_head(recipe, command), *parts, *_compared(recipe), FILES, *where])


def _head(recipe: Any, command: str) -> list[str]:
    return [
        f"usage: tiltlm {command} {recipe.name} [--setting value …]",
        "",
        *textwrap.wrap(about(recipe), WIDTH),
        "",
    ]


def about(recipe: Any) -> str:
    """What a recipe does, in a sentence or two."""
    if recipe.name in figures():
        line = figures()[recipe.name][1]
        return f"{line[0].upper()}{line[1:]}. It stands alone: no task, no training."
    task, _, stage = recipe.name.partition("/")
    line = tasks()[task][1] if task in tasks() else task
    does = (
        names().get(stage)
        or presets().get(stage)
        or STAGES.get(stage)
        or (inspect.getdoc(type(recipe)) or "").partition("\n\n")[0]
    )
    return f"{stage}: {' '.join(does.split()).rstrip('.')}. On {task}: {line.rstrip('.')}."


def _compared(recipe: Any) -> list[str]:
    if not isinstance(recipe, Evaluate):
        return []
    return [COMPARED.format(methods=" ".join(recipe.methods), first=recipe.methods[0])]


def _comes_first(each: Setting, recipe: Any) -> bool:
    group, _, rest = each.flag.partition(".")
    if group == "task":
        shows = getattr(recipe.task, "shows", ())
        return rest in shows or rest == "beta" or ".".join(each.path[1:]) in shows
    if each.flag.startswith("feed.") and getattr(recipe.feed, "source", "") == "rounds":
        return each.flag.removeprefix("feed.rounds.") in IN_ROUNDS
    if each.flag in ("fit.steps", "fit.epochs"):
        return bool(recipe.fit.epochs) == (each.flag == "fit.epochs")
    return group == "method" or each.flag in FIRST or len(each.path) == 1


def _lines(found: Iterable[Setting]) -> list[str]:
    return [line for each in found for line in _entry(each)]


def _entry(each: Setting) -> list[str]:
    """A setting with its kind, its value and what it does."""
    name = f"--{each.flag} {shown(each.kind)}".rstrip()
    if isinstance(each.value, bool):
        group, _, last = each.flag.rpartition(".")
        name += f", --{group}{'.' if group else ''}no-{last}"
    value = mask(" ".join(texts_of(each.value))) or ("''" if isinstance(each.value, str) else "none")
    text = f"{docs(each.owner).get(each.path[-1], '')} ({_shortened(value)})".strip()
    lines = textwrap.wrap(text, WIDTH - INDENT)
    head = (
        [f"  {name:<{INDENT - 2}}{lines[0]}"] if len(name) < INDENT - 3 else [f"  {name}", " " * INDENT + lines[0]]
    )
    return [*head, *(" " * INDENT + line for line in lines[1:])]


def _shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


@cache
def docs(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass, in one line."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if each.__module__.partition(".")[0] not in ("builtins", "typing"):
            found |= _texts_under(each)
    return found


def _texts_under(kind: type) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError):
        return {}
    assert isinstance(tree, ast.ClassDef)
    return dict(_pairs(tree.body))


def _pairs(body: Sequence[ast.stmt]) -> Iterable[tuple[str, str]]:
    for field, below in itertools.pairwise(body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield field.target.id, " ".join(str(below.value.value).split())

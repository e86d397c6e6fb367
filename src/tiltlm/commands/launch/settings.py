"""Where runs are built, and with what: options beside a recipe's own (`--on slurm --slurm.partition gpu`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tiltlm.commands.kinds import bare, converted
from tiltlm.commands.options import Setting, by_flag, changed, near_options
from tiltlm.settings import at_least_one


@dataclass(frozen=True)
class Slurm:
    """What a job asks SLURM for. Empty or 0: nothing is said, and the site's default holds."""

    partition: str = ""
    """The partition (queue); several, separated by commas, where any will do."""

    qos: str = ""
    """Quality of service."""

    account: str = ""
    """The account that pays."""

    time: int = 60
    """Minutes that a job may take. One that needs longer is requeued, and goes on from its checkpoint."""

    gpus: str = ""
    """GPUs of a node, a number or TYPE:NUMBER (a40:1), for stages that ask a network; data stages get none."""

    processes: int = 1
    """Processes of a node that train one model together (one for each GPU); stages that do not train have one."""

    nodes: int = 1
    """Nodes of a job that trains; every one has so many processes."""

    cpus: int = 1
    """Cores of a process. How many of them torch uses is $OMP_NUM_THREADS, as everywhere."""

    mem: str = ""
    """Memory of a node (32G)."""

    parallel: int = 0
    """So many jobs of this command run at a time (0: as many as SLURM lets)."""

    requeue: int = 100
    """How often a job whose time is over goes on in a new one, from its checkpoint (0: never)."""

    warning: int = 120
    """Seconds before the end of its time at which a job is told (SIGUSR1) and writes a checkpoint."""

    setup: tuple[str, ...] = ()
    """Shell lines that a job begins with ("module load cuda")."""

    more: tuple[str, ...] = ()
    """Other options of sbatch, as NAME=VALUE (constraint=a100 exclude=node7)."""

    def __post_init__(self) -> None:
        at_least_one(self, "time", "processes", "nodes", "cpus", "warning")
        if self.parallel < 0 or self.requeue < 0:
            raise ValueError(
                f"--slurm.parallel and --slurm.requeue are 0 or more; got {self.parallel}, {self.requeue}"
            )
        if wrong := [each for each in self.more if not each.partition("=")[2] or each.startswith("-")]:
            raise ValueError(f"--slurm.more wants NAME=VALUE, constraint=a100 say; got {wrong[0]!r}")


@dataclass(frozen=True)
class Ray:
    """What a run asks Ray for."""

    address: str = ""
    """The cluster (auto, ray://HOST:10001); empty: one on this machine, for as long as the command lasts."""

    cpus: float = 1.0
    """Cores of a run."""

    gpus: float = 0.0
    """GPUs of a run whose stage asks a network."""

    retries: int = 3
    """How often a run goes on, from its checkpoint, after its worker died."""

    def __post_init__(self) -> None:
        if min(self.cpus, self.gpus, self.retries) < 0:
            raise ValueError(f"--ray.cpus, --ray.gpus and --ray.retries are 0 or more; got {self}")


@dataclass(frozen=True)
class Launch:
    """Where runs are built."""

    on: Literal["local", "slurm", "ray"] = "local"
    """Here; as jobs of SLURM (`pip install tiltlm[slurm]`); as tasks of Ray (`pip install tiltlm[ray]`)."""

    jobs: int = 1
    """So many runs at a time, each in a process of its own, where they are built here."""

    detach: bool = False
    """Submit to SLURM and return. The same command says how the jobs stand, and shows the results in the end."""

    shard: bool = False
    """Several processes that work together hold a part each of every network, trained or not, and read no more of it. It
    changes memory and time, not the result; with one process nothing."""

    dry_run: bool = False
    """Build nothing: say what is to be built, the memory that each training takes of a process, and what would lower it."""

    processes: int = 0
    """Of a dry run: so many processes train together (0: as many as --slurm.nodes and --slurm.processes say, or torchrun
    started)."""

    slurm: Slurm = field(default_factory=Slurm)
    ray: Ray = field(default_factory=Ray)

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"--jobs wants a number of runs to build side by side, 1 or more; got {self.jobs}")
        if self.jobs > 1 and self.on != "local":
            raise ValueError(
                "--jobs is for runs built here; on SLURM --slurm.parallel says how many run at a time"
            )
        if self.processes < 0 or (self.processes and not self.dry_run):
            raise ValueError(
                "--processes is of a dry run, 1 or more: say --dry-run as well; real ones are started by torchrun or --on"
            )
        if self.detach and self.on != "slurm":
            raise ValueError("--detach leaves jobs to SLURM: say --on slurm as well")


def launch_options() -> dict[str, Setting]:
    """The options of launching, by name."""
    return {flag: each for flag, (each,) in by_flag(Launch()).items()}


def launching(args: Sequence[str]) -> tuple[list[str], Launch]:
    """The arguments without those that say where to build, and what these say. Raises ValueError, in one line, for what
    they cannot mean."""
    known, rest, said = launch_options(), list[str](), dict[tuple[str, ...], object]()
    for name, values, words in _apart(args, known):
        if name in known:
            said[known[name].path] = converted(known[name].kind, values, f"--{name}")
        elif name.startswith(("slurm.", "ray.")):
            near = near_options(name, [each for each in known if each.startswith(name.partition(".")[0])], 1)
            raise ValueError(f"there is no option --{name}.{f' Did you mean --{near[0]}?' if near else ''}")
        else:
            rest += words
    if unused := {path[0] for path in said if len(path) > 1} - {said.get(("on",))}:
        group = unused.pop()
        raise ValueError(f"--{group}.… says what to ask {group} for: say --on {group} as well")
    return rest, changed(Launch(), said)


def _apart(args: Sequence[str], known: dict[str, Setting]) -> Iterator[tuple[str, list[str], list[str]]]:
    """(name, its values, the words as they came); of words that are no option of launching the name alone counts."""
    k = 0
    while k < len(args):
        flag, equals, value = args[k].partition("=")
        name = flag.removeprefix("--").replace("_", "-") if flag.startswith("--") else ""
        after = 0 if equals or name not in known else _takes(known[name], args[k + 1 :])
        words = list(args[k : k + 1 + after])
        yield name, [value] if equals else words[1:], words
        k += len(words)


def _takes(option: Setting, after: Sequence[str]) -> int:
    """How many of the words after its flag are an option's own."""
    values = next((k for k, word in enumerate(after) if word.startswith("--")), len(after))
    if isinstance(option.value, tuple):
        return values
    return 0 if bare(option.kind) is bool else min(values, 1)

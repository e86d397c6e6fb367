"""`tiltlm serve JUDGE --gold NAME`: a judge that learns, behind HTTP; see `judges.service` for what it answers."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from tiltlm.commands.arguments import settings_from
from tiltlm.device import device_of
from tiltlm.jsonl import read_json, write_whole
from tiltlm.judges.base import Gold
from tiltlm.judges.client import TOKEN
from tiltlm.judges.making import is_reward_model, judge_on_texts
from tiltlm.judges.settings import Judging
from tiltlm.lock import alone_in
from tiltlm.rewards.by_name import text_function
from tiltlm.rewards.masking import mask
from tiltlm.rewards.posting import LOCAL
from tiltlm.seeds import stream
from tiltlm.settings import at_least_one


@dataclass(frozen=True)
class Serve:
    """Serve a judge that learns from a trickle of gold verdicts."""

    judge: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="JUDGE")]
    """A reward model's folder, hub name or run; with --fresh or --judge.kind dpo a language model's."""

    judging: Annotated[Judging, tyro.conf.arg(name="judge")] = Judging("reward-model")
    gold: str = ""
    """The gold reward by its name, as `tiltlm score` takes it; empty: none, the judge stays as it is."""

    folder: Path = Path("judge")
    """Where everything is kept; the same command goes on there."""

    port: int = 5007
    """0: any that is free."""

    host: str = "127.0.0.1"
    """Another than this machine's own wants $TILTLM_JUDGE_TOKEN."""

    fresh: bool = False
    """Put a fresh head on the language model named."""

    every: int = 20
    """Requests from checkpoint to checkpoint; after a crash those since the last are learnt again."""

    most_megabytes: int = 16
    """Size of a question, at most."""

    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(self, "every", "most_megabytes")
        if not 0 <= self.port < 65536:
            raise ValueError(f"a port is a number from 0 to 65535; got {self.port}")


def serve(args: list[str]) -> int:
    """Run the command."""
    settings = settings_from(args, Serve, "serve")
    token, gold = os.environ.get(TOKEN, ""), gold_of(settings)
    check(settings, token)
    try:
        import uvicorn

        from tiltlm.judges.service import Served, service
    except ModuleNotFoundError as error:
        raise ValueError(f"serving wants {error.name}: pip install 'tiltlm[serve]'") from None
    with alone_in(settings.folder):
        same_as_before(settings)
        own = stream(settings.seed, "judge")
        judge = judge_on_texts(
            settings.judging, settings.judge, gold, own, settings.folder, device_of(settings.device)
        )
        served = Served(judge, settings.folder, settings.every)
        place = listening_at(settings.host, settings.port)

        def stop() -> None:
            server.should_exit = True

        about = {"judge": settings.judge, "gold": mask(settings.gold)}
        app = service(served, about, stop, token, settings.most_megabytes << 20)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        print(f"{settings.judge} at http://{host}:{place.getsockname()[1]}", flush=True)
        try:
            server.run(sockets=[place])
        finally:
            served.keep()
            counts = judge.now.ledger.counts()
            said = ", ".join(f"{counts[name]} {name}" for name in ("bought", "trained", "tied", "pending"))
            print(f"{judge.now.calls} requests; {said}; {len(judge.purchases)} verdicts paid for", flush=True)
    return 0


def gold_of(settings: Serve) -> Gold | None:
    """The gold reward named. Raises ValueError where it wants what a judge's rows have not, or a missing ceiling."""
    if not settings.gold:
        if settings.judging.relabels or settings.judging.warm:
            raise ValueError("a judge learns from a gold reward: name it with --gold, or say --judge.relabels 0")
        return None
    reward = text_function(settings.gold, str(device_of(settings.device)))
    reward.check_columns((), "a judge's rows have prompts and completions alone")
    if reward.paid and not settings.judging.budget:
        raise ValueError(f"{mask(settings.gold)} costs money: say with --judge.budget how many pairs it may judge")
    ask: Callable[..., Any] = reward
    return lambda prompts, completions: list(ask(prompts, completions))


def check(settings: Serve, token: str) -> None:
    """Raise ValueError for what can be known to fail, or to be unsafe, before any work."""
    how = settings.judging
    if settings.host not in LOCAL and not token:
        raise ValueError(f"at {settings.host} others reach this judge: set ${TOKEN}, which they then must know")
    if how.kind in ("none", "self") and not how.url:
        raise ValueError(f"a judge that is served has a network: --judge.kind reward-model or dpo; got {how.kind}")
    if how.url or how.start or how.monitor:
        raise ValueError(
            "--judge.url, --judge.start and --judge.monitor are a trainer's, of the judge that it asks: leave them out"
        )
    if how.kind == "reward-model" and settings.fresh == is_reward_model(settings.judge):
        raise ValueError(
            f"{settings.judge} is a reward model, and has its head: leave --fresh out"
            if settings.fresh
            else f"{settings.judge} is a language model, without a head that says rewards: --fresh puts one on it"
        )


def same_as_before(settings: Serve) -> None:
    """Raise ValueError where the folder belongs to a judge of other settings; else write them down."""
    place = settings.folder / "serve.json"
    how = {name: value for name, value in asdict(settings.judging).items() if name != "monitor"}
    now = {"judge": settings.judge, "gold": mask(settings.gold), "seed": settings.seed, **how}
    if not place.is_file():
        write_whole(place, json.dumps(now, indent=1) + "\n")
        return
    before = read_json(place)
    other = [name for name in now if before.get(name) != now[name]]
    if other:
        said = ", ".join(f"{name} {before.get(name)!r} (now {now[name]!r})" for name in other)
        raise ValueError(f"{settings.folder} is the folder of a judge with {said}: name another --folder")


def listening_at(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ValueError where the place is taken, or is none of this machine's."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(
            f"{host}:{port} cannot be listened at ({error.strerror}): name another --port (0: any)"
        ) from None

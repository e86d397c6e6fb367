"""A learning judge behind HTTP. One request at a time teaches it; others are scored meanwhile, by a copy of what it was.

    GET  /health    {status, version}, without a token
    GET  /state     ledger, verdicts paid for, version, requests answered, settings, gold
    POST /score     {prompts, completions} -> {scores, version}; /predict is the same
    POST /label     {request, prompts, completions, scores?} -> scores, preferred (null: no verdict), version, ledger
    POST /warm      {request, prompts, completions}: buy the verdicts on all these pairs, and learn
    POST /shutdown  end after what is being answered

A request that comes again with its id gets the answer it got (other rows under that id: status 409). Every answer is on the
disk before it is sent; what was learnt is kept every few requests, and after a crash the judge learns again from the
requests since, to the same weights.
"""

from __future__ import annotations

import hmac
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from tiltlm.judges.base import Conflict
from tiltlm.judges.calls import plain
from tiltlm.judges.client import TOKEN
from tiltlm.judges.discriminator import scores_of
from tiltlm.judges.learning import LearningJudge
from tiltlm.models.folders import checkpoints
from tiltlm.rewards.posting import LOCAL

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Rows(BaseModel):
    """Texts to be scored."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompts: list[str]
    completions: list[str]


class Asked(Rows):
    """Pairs, side by side, and the id that a repeated request is known by."""

    request: Annotated[str, Field(min_length=1, max_length=200)]


class AskedWithScores(Asked):
    """The same, where the caller knows the scores."""

    scores: list[Finite] | None = None


class Served:
    """A judge and its folder: who may teach it when, what it is kept in, and the copy that scores."""

    def __init__(self, judge: LearningJudge, folder: Path, every: int) -> None:
        self.judge, self.folder, self.every = judge, folder, every
        self.teaching, self.scoring = threading.RLock(), threading.Lock()  # tokenizers serve one thread at a time
        found = checkpoints(folder)
        if found:
            judge.restore(found[-1])
        judge.catch_up()
        self._show()

    def teach(self, ask: Callable[[], Any]) -> Any:
        """What `ask` says to the judge, alone; then the copy is brought up to date, and every so often all is kept."""
        with self.teaching:
            answer = ask()
            if self.judge.now.version != self.shown[0]:
                self._show()
            if self.judge.now.calls % self.every == 0:
                self.keep()
            return answer

    def score(self, rows: Rows) -> dict[str, Any]:
        """Scores of one version, whatever is being learnt."""
        if len(rows.prompts) != len(rows.completions):
            raise ValueError(f"{len(rows.prompts)} prompts do not go with {len(rows.completions)} completions")
        version, networks = self.shown  # read once: the two belong together
        with self.scoring:
            return {"scores": scores_of(networks, rows.prompts, rows.completions).mean, "version": version}

    def _show(self) -> None:
        judge = self.judge
        networks = judge.discriminator.snapshot() if judge.discriminator else []
        self.shown: tuple[int, list[Any]] = (judge.now.version, networks)

    def keep(self) -> None:
        """Write a checkpoint, between two requests; the one before it goes once this is whole. Nothing of a judge whose
        training failed: the last checkpoint stays."""
        with self.teaching:
            final = self.folder / f"checkpoint-{self.judge.now.calls}"
            if final.is_dir() or self.judge.broken:
                return
            aside = self.folder / ".checkpoint.tmp"
            shutil.rmtree(aside, ignore_errors=True)
            self.judge.save(aside)
            (aside / "COMPLETE").touch()
            aside.rename(final)
            for old in checkpoints(self.folder)[:-1]:
                shutil.rmtree(old)


def service(
    served: Served, about: dict[str, Any], stop: Callable[[], None], token: str = "", most_bytes: int = 1 << 24
) -> Any:
    """The ASGI application. about: what /state says beside the judge's own numbers; stop: called by /shutdown."""
    app, judge = FastAPI(docs_url=None, redoc_url=None), served.judge

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "version": served.shown[0]}

    @app.get("/state")
    def state() -> dict[str, Any]:
        with served.teaching:  # between two requests the numbers belong together
            now = judge.now
            numbers = {"ledger": now.ledger.counts(), "paid": len(judge.purchases), "version": now.version}
            return {**numbers, "requests": now.calls, "settings": asdict(judge.settings), **about}

    @app.post("/score")
    @app.post("/predict")
    def score(rows: Rows) -> dict[str, Any]:
        return served.score(rows)

    @app.post("/label")
    def label(rows: AskedWithScores) -> dict[str, Any]:
        def ask() -> Any:
            return judge.label(rows.request, rows.prompts, rows.completions, scores=rows.scores)

        return plain(served.teach(ask))

    @app.post("/warm")
    def warm(rows: Asked) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            judge.warm(rows.request, rows.prompts, rows.completions)
            return {"ledger": judge.now.ledger.counts(), "version": judge.now.version}

        return served.teach(ask)

    @app.post("/shutdown")
    def shutdown() -> dict[str, str]:
        stop()
        return {"status": "stopping"}

    for kind, status in ((Conflict, 409), (ValueError, 400), (FloatingPointError, 409)):
        app.add_exception_handler(kind, _said(status))
    app.add_exception_handler(RequestValidationError, _misformed)
    return Guard(app, token, most_bytes)


def _said(status: int) -> Callable[[Request, Exception], JSONResponse]:
    return lambda request, error: JSONResponse({"error": str(error)}, status)


def _misformed(request: Request, error: Exception) -> JSONResponse:
    """Where in the question what is wrong, without repeating the question."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(each) for each in first["loc"])
    return JSONResponse({"error": f"{where}: {first['msg']}"}, 422)


class Guard:
    """In front of the application: who has not the token, or sends too much, does not get to it; nor do pages of other
    sites, which a browser on this machine would let ask here."""

    def __init__(self, app: Any, token: str, most_bytes: int) -> None:
        self.app, self.token, self.most_bytes = app, token, most_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        why = foreign(headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin"), bool(self.token))
        if why is not None:
            await _refuse(send, 403, why)
            return
        if self.token and scope["path"] != "/health" and not _equal(given, f"Bearer {self.token}".encode()):
            await _refuse(
                send, 401, "this judge wants a token: set $TILTLM_JUDGE_TOKEN to what it was started with"
            )
            return
        body = await self._body(receive)
        if body is None:
            await _refuse(
                send, 413, f"a question holds {self.most_bytes} bytes at most: ask about fewer rows at once"
            )
            return
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return parts.pop() if parts else await receive()

        await self.app(scope, replay, send)

    async def _body(self, receive: Any) -> bytes | None:
        """All of a question; None where it is too long."""
        found = bytearray()
        while True:
            message = await receive()
            found += message.get("body", b"")
            if len(found) > self.most_bytes:
                return None
            if not message.get("more_body"):
                return bytes(found)


def foreign(host: str, origin: bytes | None, token: bool) -> str | None:
    """Why a request may be a web page's, or None. host, origin: its headers; token: whether requests must show one.

    A page may ask any address, and says by Origin where it is from. One whose name was made to point at this machine (DNS
    rebinding) is of one origin with it; then Host is that name.
    """
    if not token and _name_in(f"//{host}") not in LOCAL:
        return f"without a token this judge answers to {', '.join(LOCAL)}; got the host {host!r}: set ${TOKEN}"
    if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
        return "pages of other sites may not ask this judge"
    return None


def _name_in(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _equal(given: bytes, wanted: bytes) -> bool:
    """In a time that does not tell how much of it is right."""
    return hmac.compare_digest(given, wanted)


async def _refuse(send: Any, status: int, why: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": why}).encode()})

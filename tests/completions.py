"""A small server of completions for tests: a tiny CausalLM of ours behind /v1/completions, in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import uvicorn
from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse

from tiltlm.models.base import without_end
from tiltlm.models.causal import CausalLM
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Tokens
from tiltlm.seeds import Stream


@dataclass
class Completions:
    """Serves `model` as `name`; `with` it, it listens at `url`.

    ids, logprobs: whether it says them. busy: so many answers of 503 come first, for every request id. slow: seconds
    that it waits before an answer. context: tokens of prompt and completion. held: it keeps its cache of prefixes.
    strict: as transformers' server it refuses fields that it does not know. also: further models that it lists. asked:
    every body; tokens: every authorization; followed: every call for new weights, as (path, body).
    """

    model: CausalLM
    name: str = "tiny"
    ids: bool = True
    logprobs: bool = True
    busy: int = 0
    slow: float = 0.0
    context: int = 1 << 20
    strict: bool = False
    held: bool = False
    also: tuple[str, ...] = ()
    asked: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    followed: list[tuple[str, Any]] = field(default_factory=list)

    def __enter__(self) -> Completions:
        self._tries: Counter[str] = Counter()
        self._one = threading.Lock()
        self._server = uvicorn.Server(uvicorn.Config(self._app(), port=0, log_level="error"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _app(self) -> Any:
        app = FastAPI()

        @app.get("/v1/models")
        def models() -> Any:
            return {"data": [{"id": name} for name in (self.name, *self.also)]}

        @app.post("/v1/completions")
        def completions(request: Request, body: dict[str, Any] = Body()) -> Any:  # noqa: B008
            time.sleep(self.slow)
            with self._one:
                self.tokens.append(request.headers.get("authorization", ""))
                self.asked.append(body)
                if body["model"] not in (self.name, *self.also):
                    return JSONResponse(
                        {"error": {"message": f"The model `{body['model']}` does not exist."}}, 404
                    )
                if self.strict and "return_token_ids" in body:
                    return JSONResponse({"detail": "Unexpected fields in the request"}, 422)
                self._tries[str(body.get("request_id"))] += 1
                if self._tries[str(body.get("request_id"))] <= self.busy:
                    return JSONResponse({"error": "busy"}, 503)
                return {"choices": [self._choice(body)]}

        @app.post("/collective_rpc")
        def collective_rpc(body: dict[str, Any] = Body()) -> Any:  # noqa: B008
            with self._one:
                self.followed.append(("collective_rpc", body))
                self.model.restore(body["kwargs"]["weights_path"])
            return {"results": [None]}

        @app.post("/reset_prefix_cache")
        def reset() -> Any:
            self.followed.append(("reset_prefix_cache", None))
            return {"success": not self.held}

        return app

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        text = isinstance(body["prompt"], str)
        prompt = self.model.tokenizer(body["prompt"])["input_ids"] if text else body["prompt"]
        most = min(body["max_tokens"], self.context - len(prompt))
        found = draw(self.model, Tokens.of([prompt]), max_new_tokens=most, stream=Stream(body["seed"]))
        assert found.log_q is not None and found.finished is not None
        (ids,), ended = found.completions.lists(), bool(found.finished[0]) and bool(self.model.eos_ids)
        said = {} if not self.ids else {"token_ids": ids, "prompt_token_ids": prompt}
        if self.logprobs:
            said["logprobs"] = {"token_logprobs": found.log_q[0].tolist()}
        tokenizer = getattr(self.model, "tokenizer", None)
        written = "" if tokenizer is None else tokenizer.decode(without_end(ids, self.model.eos_ids))
        return {"text": written, "finish_reason": "stop" if ended else "length", **said}


def shaken(model: CausalLM, seed: int = 0) -> CausalLM:
    """`model` with other weights: far enough from uniform for tests to see."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model

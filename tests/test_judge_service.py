"""`tiltlm serve`: a real server process, asked, killed and started again; it answers what a judge in this process does."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from command import environment, tiltlm
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.judges.client import TOKEN, RemoteJudge
from tiltlm.judges.learning import LearningJudge
from tiltlm.judges.making import judge_on_texts
from tiltlm.judges.settings import Judging
from tiltlm.models.causal import CausalLM
from tiltlm.rewards.posting import Posting
from tiltlm.seeds import stream

pytest.importorskip("fastapi", reason="pip install 'tiltlm[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'tiltlm[serve]'")

from tiltlm.judges.service import Served, service

HOW = Judging("reward-model", window=32, relabels=6, budget=40, replay=4, epochs=2, lr=1e-3, most_tokens=48)
OPTIONS = ["--fresh", "--judge.window", "32", "--judge.relabels", "6", "--judge.budget", "40", "--judge.replay", "4",
           "--judge.epochs", "2", "--judge.lr", "1e-3", "--judge.most-tokens", "48", "--every", "3"]  # fmt: skip
SECRET = "a secret of this test"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small language model and a gold reward: how many e's a completion has."""
    folder = tmp_path_factory.mktemp("serve")
    tokenizer = train_tokenizer(stories(100, stream(0, "test-judges")), 300)
    size = {"vocab_size": len(tokenizer), "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64}
    model = CausalLM.from_config(GPT2Config(**size, bos_token_id=0, eos_token_id=0), seed=3)
    assert isinstance(model.model, GPT2LMHeadModel)
    model.tokenizer = tokenizer
    model.save(folder / "body")
    (folder / "gold.py").write_text(
        "def es(prompts, completions):\n    return [y.count('e') for y in completions]\n"
    )
    return folder


def es(prompts: Any, completions: Any) -> list[float]:
    return [float(y.count("e")) for y in completions]


def rows(step: int, n: int = 8) -> tuple[list[str], list[str]]:
    texts = stories(n, stream(step, "rows"))
    return [f"Story {k // 2}:" for k in range(n)], [" " + text[: 20 + 3 * k] for k, text in enumerate(texts)]


@dataclass
class Server:
    """The program in a process of its own; `with` it, it listens."""

    place: Path
    options: list[str] = field(default_factory=list)
    token: str = ""

    def __enter__(self) -> Server:
        program = [
            sys.executable,
            "-m",
            "tiltlm.cli",
            "serve",
            "body",
            "--gold",
            "gold.py:es",
            "--port",
            "0",
            *OPTIONS,
        ]
        source = str(Path(__file__).resolve().parents[1] / "src")
        env = environment() | {"PYTHONPATH": source} | ({TOKEN: self.token} if self.token else {})
        self.process = subprocess.Popen(
            [*program, *self.options], cwd=self.place, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )  # fmt: skip
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        assert " at http://127.0.0.1:" in first, self.process.communicate(timeout=10)
        self.url = first.split()[-1]
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, what: str, body: Any = None, **options: Any) -> httpx2.Response:
        with httpx2.Client(timeout=60) as client:
            if body is None:
                return client.get(f"{self.url}/{what}", **options)
            return client.post(f"{self.url}/{what}", json=body, **options)


def in_process(place: Path, folder: Path) -> LearningJudge:
    return judge_on_texts(HOW, place / "body", es, stream(0, "judge"), folder)


def test_it_answers_as_a_judge_in_the_process_whatever_happens_to_it(place, tmp_path):
    """Bit for bit: scores, verdicts, versions, ledger. Killed (kill -9) after seven requests, between two checkpoints, and
    started again it goes on; repeated requests get what they got; other rows under an old id are refused."""
    mine = in_process(place, tmp_path / "mine")
    folder = ["--folder", str(tmp_path / "served")]
    mine.warm("warm", *rows(100))
    answers = []
    with Server(place, folder) as server:
        judge = RemoteJudge(server.url)
        assert server.ask("health").json() == {"status": "ok", "version": 0}
        judge.warm("warm", *rows(100))
        for step in range(6):
            answers.append(repr(judge.label(f"step-{step}", *rows(step))))
            assert answers[-1] == repr(mine.label(f"step-{step}", *rows(step)))
        assert judge.score(*rows(50)) == mine.score(*rows(50))
        before = server.ask("state").json()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
    with Server(place, folder) as server:
        judge = RemoteJudge(server.url)
        assert server.ask("state").json() == before and before["requests"] == 7
        assert [repr(judge.label(f"step-{k}", *rows(k))) for k in range(6)] == answers
        assert server.ask("state").json() == before
        with pytest.raises(ValueError, match=r"409.*was asked before with other rows"):
            judge.label("step-3", *rows(4))
        for step in range(6, 16):
            assert repr(judge.label(f"step-{step}", *rows(step))) == repr(mine.label(f"step-{step}", *rows(step)))
        own = [0.5, 0.25] * 4
        assert repr(judge.label("own", *rows(60), scores=own)) == repr(mine.label("own", *rows(60), scores=own))
        found = server.ask("predict", dict(zip(("prompts", "completions"), rows(50), strict=True))).json()
        assert found == {"scores": mine.score(*rows(50)), "version": mine.now.version} and mine.now.version > 3
        state = server.ask("state").json()
        assert (
            state["ledger"] == mine.now.ledger.counts()
            and state["paid"] == state["ledger"]["bought"] == 4 + 17 * 8 * 6 // 32
        )
        server.process.send_signal(signal.SIGTERM)
        out, err = server.process.communicate(timeout=30)
        assert server.process.returncode == 143 and "18 requests; 29 bought" in out and "Traceback" not in err
    assert [path.name for path in (tmp_path / "served").glob("checkpoint-*")] == ["checkpoint-18"]


def test_what_it_refuses(place, tmp_path):
    """No token, too much, what is no question; scores while it learns are of one version; /shutdown ends it."""
    prompts, completions = rows(0)
    question = {"prompts": prompts, "completions": completions}
    with Server(place, ["--folder", str(tmp_path), "--most-megabytes", "1"], token=SECRET) as server:
        known = {"headers": {"Authorization": f"Bearer {SECRET}"}}
        assert server.ask("health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer another"}):
            refused = server.ask("score", question, headers=headers)
            assert refused.status_code == 401 and TOKEN in refused.json()["error"]
        assert server.ask("score", question, **known).status_code == 200
        large = {"prompts": ["x" * 600_000] * 2, "completions": ["y"] * 2}
        assert server.ask("score", large, **known).status_code == 413
        asked = {"request": "a", **question}
        for bad, status in (
            ({"request": "a"}, 422), (asked | {"more": 1}, 422), (asked | {"prompts": [1]}, 422),
            (asked | {"request": ""}, 422),
            (asked | {"scores": [0.0]}, 400), ({**asked, "prompts": prompts[:3], "completions": completions[:3]}, 400),
            ({**asked, "prompts": [str(k) for k in range(8)]}, 400),
        ):  # fmt: skip
            found = server.ask("label", bad, **known)
            assert found.status_code == status and found.json()["error"], bad
        nan = '{"request": "a", "prompts": ["x", "x"], "completions": ["y", "z"], "scores": [NaN, 1.0]}'
        with httpx2.Client() as client:
            headers = known["headers"] | {"Content-Type": "application/json"}
            assert client.post(f"{server.url}/label", content=nan, headers=headers).status_code == 422
        assert server.ask("state", **known).json()["requests"] == 0
        one_version_each(server, question, known)
        assert server.ask("shutdown", {}, **known).status_code == 200
        assert server.process.wait(30) == 0


def one_version_each(server: Server, question: Any, known: Any) -> None:
    """While requests teach the judge, every score that is asked is of the version that it names."""
    seen: dict[int, list[float]] = {}
    torn: list[Any] = []
    done = threading.Event()

    def score() -> None:
        while not done.is_set():
            found = server.ask("score", question, **known).json()
            if seen.setdefault(found["version"], found["scores"]) != found["scores"]:
                torn.append(found)

    others = [threading.Thread(target=score) for _ in range(3)]
    for each in others:
        each.start()
    for step in range(12):
        prompts, completions = rows(step)
        body = {"request": f"step-{step}", "prompts": prompts, "completions": completions}
        assert server.ask("label", body, **known).status_code == 200
    done.set()
    for each in others:
        each.join()
    assert not torn and len(seen) >= 2 and len({tuple(scores) for scores in seen.values()}) == len(seen)


# ---- in this process: what is not a matter of processes ---------------------------------------------------------------


def asked(app: Any, method: str, what: str, body: Any = None, **headers: str) -> httpx2.Response:
    """The answer of an application in this process."""

    async def ask() -> httpx2.Response:
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app, raise_app_exceptions=False), base_url="http://127.0.0.1:5007"
        ) as client:
            return await client.request(method, f"/{what}", json=body, headers=headers)

    return asyncio.run(ask())


def served(place: Path, folder: Path, **how: Any) -> Served:
    judge = judge_on_texts(replace(HOW, **how), place / "body", es, stream(0, "judge"), folder)
    return Served(judge, folder, 3)


OWN = "127.0.0.1:5007"


@pytest.mark.parametrize(
    ("token", "host", "origin", "status"),
    [
        ("", OWN, None, 200), ("", "localhost:5007", None, 200), ("", "[::1]:5007", None, 200),
        ("", OWN, f"http://{OWN}", 200),
        ("", OWN, "http://example.org", 403), ("", OWN, "null", 403), ("", OWN, "http://127.0.0.1:8000", 403),
        ("", "example.org:5007", None, 403), ("", "example.org:5007", "http://example.org:5007", 403),
        ("", "127.0.0.1.example.org", None, 403), ("", "[::1", None, 403), ("", "", None, 403),
        (SECRET, "judge.example.org", None, 200), (SECRET, "judge.example.org", "https://judge.example.org", 200),
        (SECRET, "judge.example.org", "https://example.org", 403),
    ],
)  # fmt: skip
def test_pages_of_other_sites_cannot_end_it(place, tmp_path, token, host, origin, status):
    """A page names its own site in Origin; one whose name was made to point here names it in Host."""
    ended: list[int] = []
    app = service(served(place, tmp_path), {}, lambda: ended.append(1), token)
    headers = {"Host": host} | ({"Origin": origin} if origin else {})
    found = asked(app, "POST", "shutdown", Authorization=f"Bearer {token}", **headers)
    assert found.status_code == status and ended == [1] * (status == 200)
    assert status == 200 or found.json()["error"]


def test_a_training_that_diverges_is_an_error_at_once(place, tmp_path, monkeypatch):
    """Asked again it would fail again: the trainer is told the first time."""
    one = served(place, tmp_path)

    def diverges(*args: Any) -> None:
        raise FloatingPointError("the loss of row 3 is nan: nothing was updated")

    monkeypatch.setattr(one.judge.discriminator, "train", diverges)
    app = service(one, {}, lambda: None)
    prompts, completions = rows(0)
    question = {"request": "a", "prompts": prompts, "completions": completions}
    for said in ("loss of row 3 is nan", "failed before: FloatingPointError: the loss of row 3 is nan"):
        found = asked(app, "POST", "warm", question)
        assert found.status_code == 409 and said in found.json()["error"]
        told = httpx2.Response(found.status_code, content=found.content)
        transport = httpx2.MockTransport(lambda request, told=told: told)
        with httpx2.Client(transport=transport) as client, pytest.raises(ValueError, match=r"409.*row 3 is nan"):
            Posting(f"http://{OWN}/warm", tries=2, pause=60).ask(client, question)


def test_what_is_said_of_the_ledger_is_of_one_moment(place, tmp_path, monkeypatch):
    """/state waits for the request that teaches; /warm tells its own ledger, whatever was asked right after."""
    one = served(place, tmp_path)
    app, states = service(one, {}, lambda: None), []
    with one.teaching:
        other = threading.Thread(target=lambda: states.append(asked(app, "GET", "state").json()))
        other.start()
        other.join(0.5)
        assert not states
        one.judge.warm("first", *rows(1))
    other.join(30)
    assert states[0]["ledger"]["bought"] == 4 == states[0]["paid"]
    teach = one.teach

    def then_another(ask: Any) -> Any:
        answer = teach(ask)
        teach(lambda: one.judge.warm("between", *rows(3)))
        return answer

    monkeypatch.setattr(one, "teach", then_another)
    prompts, completions = rows(2)
    found = asked(app, "POST", "warm", {"request": "second", "prompts": prompts, "completions": completions})
    assert found.json()["ledger"]["bought"] == 8 and one.judge.now.ledger.bought == 12


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["body", "--gold", "gold.py:es", "--fresh", "--host", "0.0.0.0"], f"set ${TOKEN}"),
        (["body", "--gold", "gold.py:es"], "--fresh puts one on it"),
        (["body", "--fresh"], "name it with --gold"),
        (["body", "--fresh", "--gold", "exact-answer"], "takes the column 'answer'"),
        (["body", "--fresh", "--gold", "gold.py:es", "--judge.kind", "self"], "has a network"),
        (["body", "--fresh", "--gold", "gold.py:es", "--judge.monitor"], "are a trainer's"),
        (["body", "--fresh", "--gold", "gold.py:es", "--every", "0"], "every of Serve must be 1 or more"),
    ],
)
def test_what_is_refused_before_any_work(place, monkeypatch, args, said):
    monkeypatch.delenv(TOKEN, raising=False)
    done = tiltlm("serve", *args, cwd=place, check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_the_folder_of_another_judge_is_refused(place, tmp_path):
    (tmp_path / "serve.json").write_text('{"judge": "body", "gold": "gold.py:es", "seed": 5}')
    args = ["serve", "body", "--gold", "gold.py:es", "--folder", str(tmp_path), *OPTIONS]
    done = tiltlm(*args, cwd=place, check=False)
    assert done.returncode == 2 and "seed 5 (now 0)" in done.stderr and "another --folder" in done.stderr


def test_a_judge_that_is_not_there_is_asked_again_then_an_error(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    judge = RemoteJudge("http://127.0.0.1:9", tries=3, pause=0.01)
    with pytest.raises(ValueError, match="did not answer 3 times"):
        judge.label("a", ["x", "x"], ["y", "z"])
    monkeypatch.setenv(TOKEN, SECRET)
    with pytest.raises(ValueError, match=r"\$TILTLM_JUDGE_TOKEN is not sent in the clear"):
        RemoteJudge("http://example.org").score(["x"], ["y"])


def test_ids_may_be_a_runs_own(place, tmp_path, monkeypatch):
    """Two runs at one judge: what they call their requests is told apart."""
    asked = []
    found = {"scores": [0.0, 1.0], "preferred": [None], "version": 0, "ledger": {"bought": 0}}

    def ask(self, client, question):
        asked.append(question["request"])
        return found

    monkeypatch.setattr("tiltlm.rewards.posting.Posting.ask", ask)
    for called in ("a/", "b/"):
        answer = RemoteJudge("http://127.0.0.1:9", called).label("step-1", ["x", "x"], ["y", "z"])
    assert asked == ["a/step-1", "b/step-1"] and math.isnan(answer.preferred[0])

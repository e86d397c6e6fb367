"""Rewards by name: a real HTTP server, models in folders, and files of completions in groups."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from transformers import BertConfig, BertForSequenceClassification

from command import tiltlm
from tiltlm.rewards.by_name import text_function
from tiltlm.rewards.endpoint import Endpoint
from tiltlm.seeds import stream
from tiltlm.tasks.stories import stories, train_tokenizer


class Handler(BaseHTTPRequestHandler):
    """Answers with the lengths of completions; the first `busy` requests are turned away."""

    seen: list[dict[str, Any]]
    busy = 0
    answer: bytes | None = None
    status = 503

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append(body | {"token": self.headers.get("Authorization")})
        if type(self).busy > 0:
            type(self).busy -= 1
            self.send_error(type(self).status)
            return
        found = {"rewards": [len(text) for text in body["completions"]]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(type(self).answer or json.dumps(found).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Handler]]]:
    kind = type("Own", (Handler,), {"seen": []})
    found = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}/score", kind
    found.shutdown()
    found.server_close()


def test_an_endpoint_is_asked_in_batches_and_with_the_token(server, monkeypatch):
    url, kind = server
    monkeypatch.setenv("TILTLM_REWARD_TOKEN", "secret")
    assert Endpoint(url, batch_size=2)(["x"] * 5, ["a", "bb", "", "dddd", "é"]) == [1, 2, 0, 4, 1]
    assert [len(each["prompts"]) for each in kind.seen] == [2, 2, 1]
    assert {each["token"] for each in kind.seen} == {"Bearer secret"}


def test_a_busy_server_is_asked_again_and_one_that_refuses_is_not(server):
    url, kind = server
    kind.busy = 2
    assert Endpoint(url, pause=0.01)(["x"], ["abc"]) == [3]
    assert len(kind.seen) == 3
    kind.busy = 9
    with pytest.raises(ValueError, match="answered 503"):
        Endpoint(url, pause=0.01, tries=3)(["x"], ["abc"])
    assert len(kind.seen) == 6
    kind.status = 403
    with pytest.raises(ValueError, match="answered 403"):
        Endpoint(url, pause=0.01)(["x"], ["abc"])
    assert len(kind.seen) == 7


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b'{"rewards": [1]}', r"\[2 numbers\]}; got 1 of them"),
        (b'{"scores": [1, 2]}', r"must answer {\"rewards\": \[2 numbers\]}"),
        (b"<html>", "did not answer in JSON"),
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(server, answer, message):
    url, kind = server
    kind.answer = answer
    with pytest.raises(ValueError, match=message):
        Endpoint(url)(["x", "x"], ["a", "b"])


def test_a_redirect_is_not_followed_and_a_token_not_sent_in_the_clear(server, monkeypatch):
    url, kind = server
    kind.busy, kind.status = 1, 302
    monkeypatch.setenv("TILTLM_REWARD_TOKEN", "secret")
    with pytest.raises(ValueError, match="answered 302"):
        Endpoint(url)(["x"], ["a"])
    assert len(kind.seen) == 1
    with pytest.raises(ValueError, match="not sent in the clear"):
        Endpoint("http://example.org/score")(["x"], ["a"])


def test_nobody_there_is_said_so():
    with pytest.raises(ValueError, match="did not answer 2 times"):
        Endpoint("http://127.0.0.1:9/score", pause=0.01, tries=2, timeout=1.0)(["x"], ["a"])


def test_log_odds_are_those_of_the_class(tmp_path):
    """log P − log(1 − P) of the probability that `classifier:` takes the log of; the command, end to end."""
    tokenizer = train_tokenizer(stories(50, stream(0, "log-odds")), 300)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(tmp_path / "bert")
    asked, said = ["A dog", "A cat"], [" ran.", " slept."]
    log_p = text_function(f"classifier:{tmp_path / 'bert'}:1")(asked, said)
    odds = text_function(f"log-odds:{tmp_path / 'bert'}:1")(asked, said)
    for value, got in zip(log_p, odds, strict=True):
        assert abs(got - (value - math.log(1 - math.exp(value)))) < 1e-5 and abs(got - value) > 1e-3


def test_an_unknown_name_is_answered_with_what_there_is():
    with pytest.raises(ValueError, match="Did you mean reward-model:MODEL"):
        text_function("reward-modl:gpt2")
    with pytest.raises(ValueError, match="no folder or hub name"):
        text_function("reward-model:nowhere/at-all")


# ---- the command --------------------------------------------------------------------------------------------


def test_a_file_of_groups_gets_a_list_of_rewards(server, tmp_path):
    """Lines of one completion and lines of several, by an endpoint and by a function of one's own."""
    rows = [{"prompt": "x", "completions": ["a", "bb"]}, {"prompt": "y", "completion": "ccc"}]
    source = tmp_path / "y.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiltlm("score", server[0], "y.jsonl", "--out", "s.jsonl", cwd=tmp_path)
    found = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert found == [rows[0] | {"rewards": [1, 2]}, rows[1] | {"reward": 3}]
    (tmp_path / "own.py").write_text(
        "def n(prompts, completions):\n    return [len(y) - 9 for y in completions]\n"
    )
    tiltlm("score", "own.py:n", "y.jsonl", "--out", "t.jsonl", cwd=tmp_path)
    found = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [row.get("rewards") or row.get("reward") for row in found] == [[-8, -7], -6]
    assert source.read_text().count("\n") == 2 and "rewards" not in source.read_text()


def test_a_bad_reward_is_named_by_its_line(tmp_path):
    rows = [{"prompt": "x", "completions": ["a", "b"]}, {"prompt": "x", "completions": ["bad"]}]
    (tmp_path / "y.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    function = (
        "def f(prompts, completions):\n    return [float('inf') if y == 'bad' else 0 for y in completions]\n"
    )
    (tmp_path / "own.py").write_text(function)
    done = tiltlm("score", "own.py:f", "y.jsonl", "--out", "s.jsonl", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "own.py:f gave y.jsonl:2 ('bad') the reward inf" in done.stderr
    assert not (tmp_path / "s.jsonl").exists()

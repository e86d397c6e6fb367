"""Rewards by name: a real HTTP server, models in folders, and files of completions in groups."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import BertConfig, BertForSequenceClassification

from command import tiltlm
from http_server import answering
from tiltlm.commands.run import parse
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.rewards.by_name import of_texts, text_function
from tiltlm.rewards.endpoint import Endpoint
from tiltlm.seeds import stream


class Handler(BaseHTTPRequestHandler):
    """Answers with the lengths of completions; the first `busy` requests are turned away."""

    seen: list[dict[str, Any]]
    busy = 0
    answer: bytes | None = None
    drip = 0.0
    """Seconds between bytes of an answer that never ends."""
    status = 503
    headers_said: ClassVar[dict[str, str]] = {}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append(body | {"token": self.headers.get("Authorization")})
        if type(self).busy > 0:
            type(self).busy -= 1
            self.send_response(type(self).status)
            for name, value in type(self).headers_said.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(f"no: {self.path} {self.headers.get('Authorization')}".encode())
            return
        found = {"rewards": [len(text) for text in body["completions"]]}
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while type(self).drip:
                self.wfile.write(b" ")
                time.sleep(type(self).drip)
            self.wfile.write(type(self).answer or json.dumps(found).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Handler]]]:
    kind = type("Own", (Handler,), {"seen": []})
    with answering(kind) as url:
        yield f"{url}/score", kind


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
        (b"<html>", "did not answer in JSON: '<html>'"),
        (b"[" * 100_000, "did not answer in JSON"),
        (b"[1, 2]", r"must answer .*; got \[1, 2\]"),
        (b'{"rewards": [1, 2], "note": "' + b"x" * (1 << 22) + b'"}', "answered more than 4194304 bytes"),
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


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b'{"rewards": [1, NaN]}', r"gave row 1 \('b'\) the reward nan"),
        (b'{"rewards": [Infinity, 1]}', r"gave row 0 \('a'\) the reward inf"),
        (b'{"rewards": [1, null]}', r"gave row 1 \('b'\) the reward None"),
        (b'{"rewards": [1, "2"]}', r"gave row 1 \('b'\) the reward '2' \(str\), no number"),
        (b'{"rewards": [1, [2]]}', r"gave row 1 \('b'\) the reward \[2\] \(list\), no number"),
    ],
)
def test_an_answer_of_no_numbers_is_named_by_its_row(server, answer, said):
    url, kind = server
    kind.answer = answer
    with pytest.raises(ValueError, match=said):
        text_function(url)(["x", "x"], ["a", "b"])


def test_an_answer_that_never_ends_is_given_up(server):
    """Byte after byte within every read's time, and no end: the whole request has a time too."""
    url, kind = server
    kind.drip = 0.02
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"did not answer 2 times: the answer was not whole after 0\.2 seconds"):
        Endpoint(url, pause=0.01, tries=2, timeout=0.2)(["x"], ["a"])
    assert len(kind.seen) == 2 and time.monotonic() - begun < 20
    kind.drip = 0.0


def test_a_redirect_takes_nothing_along(server):
    url, kind = server
    kind.busy, kind.status, kind.headers_said = 1, 307, {"Location": url}
    with pytest.raises(ValueError, match="answered 307"):
        Endpoint(url)(["x"], ["a"])
    assert len(kind.seen) == 1


# ---- credentials --------------------------------------------------------------------------------------------

SECRETS = ("hunter2", "aGFubjpodW50ZXIy", "k3y-of-mine")


def with_secrets(url: str) -> str:
    return url.replace("://", "://hann:hunter2@") + "?model=7b&key=k3y-of-mine"


def unseen(text: str) -> bool:
    return not any(secret in text for secret in SECRETS)


def test_a_password_goes_as_basic_authentication_before_the_token(server, monkeypatch):
    url, kind = server
    monkeypatch.setenv("TILTLM_REWARD_TOKEN", "other")
    assert Endpoint(with_secrets(url))(["x"], ["abc"]) == [3]
    assert kind.seen[0]["token"] == "Basic aGFubjpodW50ZXIy"
    with pytest.raises(ValueError, match="a password is not sent in the clear"):
        text_function("http://hann:hunter2@example.org/score")


def test_no_error_and_no_log_repeats_a_credential(server, caplog):
    url, kind = server
    whole = with_secrets(url)
    errors = []
    with caplog.at_level(logging.DEBUG):
        for busy, status in ((1, 403), (9, 503), (1, 302)):
            kind.busy, kind.status = busy, status
            with pytest.raises(ValueError, match=f"{status}") as found:
                Endpoint(whole, pause=0.01, tries=2)(["x"], ["a"])
            errors.append(str(found.value))
        kind.busy, kind.answer = 0, f"<html>{whole}".encode()
        with pytest.raises(ValueError, match="did not answer in JSON") as found:
            Endpoint(whole)(["x"], ["a"])
        with pytest.raises(ValueError, match="did not answer 1 times") as gone:
            Endpoint("http://hann:hunter2@127.0.0.1:9/?key=k3y-of-mine", tries=1)(["x"], ["a"])
        with pytest.raises(ValueError, match="is no URL that can be asked") as odd:
            text_function("https://hann:hunter2/k3y-of-mine@host:port/")
    errors += [str(found.value), str(gone.value), str(odd.value)]
    assert all(unseen(text) for text in errors), errors
    assert unseen(caplog.text) and "/score?model=7b&key=***" in errors[0]


def test_a_url_read_back_from_a_run_is_not_asked(server):
    from tiltlm.rewards.masking import mask

    with pytest.raises(ValueError, match="was stored without its credentials: give the whole URL again"):
        text_function(mask(with_secrets(server[0])))
    assert not server[1].seen


def test_score_prints_no_credential(server, tmp_path):
    (tmp_path / "y.jsonl").write_text('{"prompt": "x", "completion": "abc"}\n')
    whole = with_secrets(server[0])
    done = tiltlm("score", f"{whole} + 0*exact-answer", "y.jsonl", "--out", "s.jsonl", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "takes the column 'answer'" in done.stderr
    (tmp_path / "y.jsonl").write_text('{"prompt": "x", "completion": "abc", "answer": "abc"}\n')
    done = tiltlm("score", f"{whole} + 2*exact-answer", "y.jsonl", "--out", "s.jsonl", cwd=tmp_path)
    written = (tmp_path / "s.jsonl").read_text()
    assert json.loads(written)["reward"] == 5.0 and unseen(written + done.stderr + done.stdout)


def everything_in(folder: Path) -> str:
    return "".join(path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file())


SMALL = ["--task.own", "60", "--task.valid-rows", "8", "--task.test-rows", "8", "--task.most-tokens", "64"]
SMALL += [
    "--task.new-tokens",
    "8",
    "--task.base.steps",
    "3",
    "--task.base.warmup",
    "1",
    "--task.sft.batch-size",
    "24",
]
SMALL += ["--task.sft.evaluations", "0", "--draws.n", "2", "--draws.prompts", "8"]


@pytest.mark.parametrize("jobs", [[], ["--jobs", "2"]])
def test_a_run_writes_no_credential_and_is_found_again(server, tmp_path, jobs):
    """config.json, provenance.json, reports, progress, --jobs' processes, the report page; another key is another run."""
    whole = with_secrets(server[0])
    tiltlm("run", "dialogues/generate", *SMALL, cwd=tmp_path)  # so that --jobs has one process to start
    args = ["run", "dialogues/label", *SMALL, *jobs, "--task.reward"]
    done = tiltlm(*args, f"{whole} - {server[0]}", cwd=tmp_path)
    folder = tmp_path / done.stdout.splitlines()[-1]
    asked = len(server[1].seen)
    tiltlm("report", str(folder), "--out", "page.html", cwd=tmp_path)
    assert asked and unseen(everything_in(tmp_path) + done.stdout + done.stderr)
    assert (
        "***@127.0.0.1" in (folder / "config.json").read_text()
        and "***@" in (folder / "provenance.json").read_text()
    )
    again = tiltlm(*args, f"{whole} - {server[0]}", cwd=tmp_path)
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1] and len(server[1].seen) == asked
    assert {row["metric"] for row in json.loads((folder / "report.json").read_text())} >= {
        "reward",
        f"reward[{server[0]}]",
    }


def test_another_key_is_another_run():
    base = parse(["dialogues/label", "--task.reward", "https://host/score?key=one"], "run").recipe
    other = parse(["dialogues/label", "--task.reward", "https://host/score?key=two"], "run").recipe
    assert base.key != other.key and base.inputs()["generate"].key == other.inputs()["generate"].key


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


def test_a_folder_alone_is_told_the_reward_it_may_be(tmp_path):
    with pytest.raises(
        ValueError, match=f"It is a folder: reward-model:{tmp_path} is the reward of the model or run"
    ):
        of_texts(str(tmp_path))

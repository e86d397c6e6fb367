"""A hub that does not answer is noticed at once, and said; one that answers is asked."""

from __future__ import annotations

import socket
from http.server import BaseHTTPRequestHandler

import datasets
import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from http_server import answering
from tiltlm.data.tables import rows_of
from tiltlm.models.ends import tokenizer_of
from tiltlm.models.hub import config_of, pretrained
from tiltlm.models.reachable import hub_for, silence


class Refusing(BaseHTTPRequestHandler):
    """A hub that has nothing, and says so."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Lets the hub be asked at an address, for half a second, beside an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    silence.cache_clear()
    yield lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)
    silence.cache_clear()


@pytest.fixture(params=["nobody listens", "nobody answers"])
def silent(request, ask):
    """What is said of a port that is closed, and of one that takes connections and is silent."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        ask(url)
        if request.param == "nobody listens":
            taken.close()
        yield url


def test_a_silent_hub_is_a_mistake_that_says_so(silent):
    """The library's own attempts would take half a minute for a closed port and seven minutes for a silent one, a file."""
    reads = [
        lambda: config_of("no/such"),
        lambda: pretrained(AutoTokenizer, "no/such"),
        lambda: list(rows_of("no/such", "test")),
    ]
    for read in reads:
        with pytest.raises(ValueError, match=rf"'no/such' is no .* cannot be reached: {silent}"):
            read()
    assert tokenizer_of("no/such") is None
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE, "it stays off"


def test_a_hub_that_answers_is_asked_and_a_folder_or_an_offline_process_asks_none(ask, tmp_path, monkeypatch):
    ask("http://127.0.0.1:1")
    with hub_for(str(tmp_path)) as why:
        assert why == "" and not constants.HF_HUB_OFFLINE
    with hub_for("no/such") as why:
        assert "refused" in why and constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    silence.cache_clear()
    with answering(Refusing) as url:
        ask(url)
        with hub_for("no/such") as why:
            assert why == "" and not constants.HF_HUB_OFFLINE
    silence.cache_clear()
    ask("http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub_for("no/such") as why:
        assert why == "" and constants.HF_HUB_OFFLINE

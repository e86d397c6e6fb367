"""Credentials in URLs: masked wherever something is written or printed, and still told apart."""

from __future__ import annotations

import pytest

from tiltlm.rewards.masking import is_masked, mask, secrets_in, without_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host/score", "https://host/score"),
        ("https://ann:hunter2@host:8000/score", "https://***@host:8000/score"),
        ("https://s3cr3t@host", "https://***@host"),
        ("https://ann:p@ss@host/x", "https://***@host/x"),
        ("https://ann:p/a?s#s@host/x", "https://***@host/x"),
        ("https://host/@ann/score?model=7b", "https://host/@ann/score?model=7b"),
        ("https://[::1]:80/score", "https://[::1]:80/score"),
        ("HTTPS://ann:x@host", "HTTPS://***@host"),
        ("a.py:f + 0.5*https://ann:x@host/s - b.py:g", "a.py:f + 0.5*https://***@host/s - b.py:g"),
        ("--task.reward=https://ann:x@host/s", "--task.reward=https://***@host/s"),
        ("no url: ann:hunter2@host", "no url: ann:hunter2@host"),
    ],
)
def test_who_asks_is_not_shown(url, shown):
    assert mask(url) == shown == mask(shown)


@pytest.mark.parametrize(
    "name",
    ["key", "api_key", "apiKey", "X-API-Key", "access_token", "SIG", "password", "client_secret", "auth", "%6Bey"],
)
@pytest.mark.parametrize(
    "form", ["https://h/s?{}=hunter2", "https://h/s?a=1&{}=hunter2&b=2", "https://h/s#{}=hunter2"]
)
def test_a_query_value_that_sounds_like_a_credential_leaves_a_digest(name, form):
    url = form.format(name)
    shown = mask(url)
    assert "hunter2" not in shown and shown.replace("***", "").startswith(url.partition("hunter2")[0])
    assert (
        shown.endswith(url.partition("hunter2")[2])
        and mask(shown) == shown
        and is_masked(shown)
        and not is_masked(url)
    )
    assert mask(url.replace("hunter2", "hunter3")) != shown  # two settings stay two
    assert "hunter2" in secrets_in(url)


def test_settings_are_masked_at_any_depth_and_others_stay():
    given = {
        "task": {"reward": "https://u:p@h/?key=1", "beta": 0.5},
        "names": ("https://t@h", "x"),
        "n": [None, 3, True],
    }
    found = without_secrets(given)
    assert found["task"]["reward"].startswith("https://***@h/?key=***") and found["task"]["beta"] == 0.5
    assert found["names"] == ("https://***@h", "x") and found["n"] == [None, 3, True]


def test_secrets_are_known_as_written_and_decoded():
    assert set(secrets_in("https://ann:p%40ss@h/?a=1&token=t%2Bt")) == {
        "ann:p%40ss", "ann:p@ss", "ann", "p%40ss", "p@ss", "t%2Bt", "t+t", "YW5uOnBAc3M=",
    }  # fmt: skip

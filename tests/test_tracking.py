"""Trackers see what the jsonl files hold, and nobody sees anything unless asked to."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from families import build
from tiltlm import tracking
from tiltlm.experience import Offline
from tiltlm.fit import Fit
from tiltlm.policies.sft import SFT
from tiltlm.run import Recipe, Run
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.stages.training import train
from tiltlm.tracking import tracker


@dataclass(frozen=True)
class Small(Recipe):
    """A recipe with nested settings."""

    how: Fit = Fit(lr=1e-2, steps=5, batch_size=2, evaluations=3, checkpoints=2)
    seed: int = 0
    stage: ClassVar[str] = "sft"

    @property
    def name(self) -> str:
        return "toy/sft"


def trained(folder: Path) -> None:
    """Five steps, evaluated before the first, every two, and at the end."""
    model, recipe = build("gpt2"), Small()
    done = Tokens.of([[1, 2], [3], [4, 5, 6]])
    rows = Samples(Tokens.of([[7]]), torch.zeros(3, dtype=torch.int64), done.ids, done.mask)
    watch = recipe.how.watching(lambda: {"nll": -model.log_prob(rows).sum().item()})
    experience, root = Offline(rows, 2, stream(0, "test")), stream(0, "test-tracking")
    where = Run(recipe, folder, {})
    train(where, model, SFT(), experience, recipe.how, torch.device("cpu"), root, watch=watch)


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tensorboard_s_event_files_hold_the_numbers_of_the_jsonl_files(tmp_path, monkeypatch):
    """A tracker counts the steps done; metrics.jsonl calls the first step 0."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TILTLM_TRACK", " tensorboard,")
    trained(tmp_path)
    events = reading.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()

    def curve(name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in events.Scalars(name)]

    metrics, evals = lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "evals.jsonl")
    assert curve("train/loss") == [(k + 1, pytest.approx(line["loss"])) for k, line in enumerate(metrics)]
    assert curve("eval/nll") == [
        (step, pytest.approx(line["nll"])) for step, line in zip([0, 2, 4, 5], evals, strict=True)
    ]
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "toy/sft" in text and '"evaluations": 3' in text


def test_without_the_variable_nothing_is_opened_and_the_files_are_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.delenv("TILTLM_TRACK", raising=False)
    monkeypatch.setattr(tracking, "OPENERS", {})
    trained(tmp_path)
    written = ["checkpoint-2", "checkpoint-4", "checkpoint-5", "evals.jsonl", "metrics.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written


def test_every_named_tracker_gets_everything_and_is_closed_when_training_breaks_off(tmp_path, monkeypatch):
    seen: list[object] = []

    def opener(name: str):
        return lambda *arguments: (lambda *sent: seen.append((name, *sent)), lambda: seen.append(f"{name} closed"))

    monkeypatch.setattr(tracking, "OPENERS", {"a": opener("a"), "b": opener("b"), "c": opener("c")})
    monkeypatch.setenv("TILTLM_TRACK", "a,b")
    with pytest.raises(KeyboardInterrupt), tracker("name", tmp_path, {}) as track:
        track.under("train")(3, {"loss": 1.0})
        raise KeyboardInterrupt
    assert seen == [("a", 3, {"train/loss": 1.0}), ("b", 3, {"train/loss": 1.0}), "a closed", "b closed"]


def test_unknown_and_missing_trackers_are_said_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TILTLM_TRACK", "tensorboard,wandbb")
    with pytest.raises(ValueError, match="names wandbb; known are tensorboard, wandb, trackio"):
        tracker("name", tmp_path, {})
    for name, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")):
        monkeypatch.setenv("TILTLM_TRACK", name)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=rf"{name}, which is not installed: pip install 'tiltlm\[track\]'"):
            tracker("name", tmp_path, {})


def test_wandb_takes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TILTLM_TRACK", "wandb")
    trained(tmp_path)
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = written.read_bytes()
    assert b"train/loss" in content and b"eval/nll" in content


def test_trackio_takes_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    monkeypatch.setenv("TILTLM_TRACK", "trackio")
    trained(tmp_path)
    assert any((tmp_path / "trackio").rglob("*.db"))
    assert capsys.readouterr().out == ""  # where results go, and nothing else

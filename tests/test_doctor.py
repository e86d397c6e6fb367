"""`tiltlm doctor`: a table that says what a model is, and an exit status that says whether it can be used."""

from __future__ import annotations

import pytest
from transformers import BertConfig, BertLMHeadModel

import every_family
from tiltlm.cli import main
from tiltlm.models import selftest


@pytest.fixture
def said(capfd, monkeypatch):
    """Runs doctor; gives exit status and the table's rows."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: str) -> tuple[int, dict[str, str]]:
        status = main(["doctor", *map(str, args)])
        lines = [line.split("│", 1) for line in capfd.readouterr().out.splitlines() if "│" in line]
        return status, {name.strip(): text.strip() for name, text in lines if name.strip()}

    return run


def test_a_capped_windowed_model_is_described(said, tmp_path):
    every_family.build("gemma2").save_pretrained(tmp_path)
    status, rows = said(tmp_path, "--batch", "10", "--length", "100")
    assert status == 0 and rows["usable"] == "yes"
    assert rows["head"] == "linear, without bias, soft cap 20"
    assert rows["positions"] == "at most 128 tokens a row; attention window of 6"
    assert rows["cache"] == "right" and rows["adapters"] == "LoRA on q_proj, v_proj"
    assert rows["vocabulary"].startswith("61 tokens")
    # 2 layers × keys and values × 2 heads × 8 numbers × 4 bytes = 256 bytes a token; 1000 tokens
    assert rows["memory"].endswith("256 kB of cache for 10 rows of 100 tokens")


def test_a_model_without_a_cache_is_usable_and_says_what_that_costs(said, tmp_path):
    every_family.build("mamba2").save_pretrained(tmp_path)
    status, rows = said(tmp_path)
    assert status == 0 and rows["cache"].startswith("none, full forward passes (slower): its cache")
    assert rows["memory"].endswith("no cache to keep") and "in_proj" in rows["adapters"]


def test_the_test_is_run_anew_whatever_was_found_before(said, tmp_path, monkeypatch):
    every_family.build("llama").save_pretrained(tmp_path)
    assert said(tmp_path)[1]["padding"].startswith("right-padded")
    monkeypatch.setattr(selftest._Test, "scoring", lambda self: self.equal(self.states([1]), 1 + self.states([1])))
    status, rows = said(tmp_path)
    assert status == 2 and rows["usable"].startswith("no: rows of a batch change each other")


def test_a_model_that_cannot_be_used_is_status_2_with_its_reason(said, tmp_path):
    config = BertConfig(
        vocab_size=23, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    status, rows = said(tmp_path)
    assert status == 2 and "it is not causal" in rows["usable"] and "BertLMHeadModel" in rows["usable"]
    assert said(tmp_path / "nothing")[0] == 2


def test_it_is_in_the_overview_and_has_help(capsys):
    assert main([]) == 0 and "tiltlm doctor MODEL" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--help"])
    assert end.value.code == 0 and "--batch" in capsys.readouterr().out


def test_memory_is_not_asked_of_fewer_rows_than_one(capsys):
    assert main(["doctor", "anything", "--batch", "-3"]) == 2
    assert "--batch and --length are numbers of rows and tokens" in capsys.readouterr().err

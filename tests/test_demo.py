"""The demo, run whole: a model is trained from nothing and every method shows what it should. Minutes, once."""

from __future__ import annotations

import json

import pytest

from tiltlm import cli


@pytest.mark.slow
def test_the_demo_shows_what_it_promises(tmp_path, capsys):
    """The safe bounds of docs/log.md: closed forms for Q#, chance for REINFORCE and RPO, lost arms for DPO."""
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 0
    rows = json.loads((tmp_path / "demo" / "report.json").read_text())
    got = {(row["method"], row["metric"]): row for row in rows}

    def value(method: str, metric: str) -> float:
        return got[method, metric]["value"]

    assert 0.42 <= value("reference", "accuracy") <= 0.58 and value("reference", "valid_rate") > 0.95
    assert value("q-sharp", "accuracy") >= 0.93
    assert abs(value("q-sharp (beta 1)", "accuracy") - 0.731) <= 0.06
    assert abs(value("q-sharp (beta 1)", "kl_to_reference") - 0.111) <= 0.02
    assert abs(value("q-sharp", "kl_to_reference") - 0.693) <= 0.12
    assert 0.40 <= value("reinforce", "accuracy") <= 0.62 and 0.40 <= value("rpo", "accuracy") <= 0.62
    assert value("dpo", "valid_rate") < 0.75
    distance = {name: value(name, "kl_to_target") for name in ("q-sharp", "cd", "reference", "rpo", "dpo")}
    assert max(distance["q-sharp"], distance["cd"]) < 0.5 < min(distance["reference"], distance["rpo"])
    assert distance["dpo"] > distance["reference"]
    assert value("optimum (exact)", "objective_gap") == 0
    assert (tmp_path / "demo" / "frontier.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "frontier.png" in printed and "q-sharp (p_left 0.5, beta 0.1)" in printed

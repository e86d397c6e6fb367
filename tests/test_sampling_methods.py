"""Decoders as methods: names, refusals, the folder that they share, and what the ruler's tables say of bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tiltlm import methods
from tiltlm.decoders.best_of_n import BestOf
from tiltlm.decoders.rejection import Rejection
from tiltlm.decoders.smc import SMCDecoding
from tiltlm.method import Learner
from tiltlm.problem import Facts
from tiltlm.recipes.preset import Preset
from tiltlm.recipes.stages import stage_of
from tiltlm.ruler.compare import paired
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.ruler.table import HEADINGS, table
from tiltlm.seeds import stream
from tiltlm.stages.cells import default_cell
from tiltlm.stages.measure import Measure
from tiltlm.twists.ctl import CTL
from toy import Toy

NAMES = ("best-of-n", "reference", "rejection", "smc", "smc-ctl")


def test_every_decoder_has_a_name_and_a_line():
    assert set(NAMES) <= set(methods.catalogue()["decoders"])
    for name in NAMES:
        assert methods.method(name).trains == "nothing" and methods.method(name).fed == "nothing"


@pytest.mark.parametrize("settings", [{"particles": 0}, {"threshold": 1.5}])
def test_settings_that_make_no_sense_are_refused_at_birth(settings):
    with pytest.raises(ValueError, match="particles must be"):
        SMCDecoding(**settings)
    with pytest.raises(ValueError, match="n of BestOf"):
        BestOf(0)


def test_smc_with_a_twist_shares_ctls_training():
    preset = Preset(Toy())
    ctl, smc = (stage_of(preset, name) for name in ("ctl", "smc-ctl"))
    assert isinstance(ctl, Measure) and isinstance(smc, Measure)
    learns = ctl.learn(), smc.learn()
    assert learns[0] is not None and learns[1] is not None
    assert learns[0].name == learns[1].name and learns[0].key == learns[1].key
    assert isinstance(smc.method.trained(), CTL) and stage_of(preset, "smc").learn() is None  # type: ignore[attr-defined]


def test_what_is_no_language_model_says_so():
    problem = Toy().problem({}, 0)
    for method in (BestOf(), Rejection(), SMCDecoding()):
        with pytest.raises(ValueError, match="no language model"):
            method.decoder(problem, Learner(None))


def test_cells_refuse_with_a_reason():
    assert "upper bound" in (default_cell(Rejection(), Facts(1.0)).why_not(Facts(1.0)) or "")
    for method in (BestOf(), SMCDecoding(), SMCDecoding(twist=CTL())):
        assert default_cell(method, Facts(1.0)).why_not(Facts(1.0)) is None


@pytest.mark.parametrize("method", [BestOf(3), Rejection(), SMCDecoding(5)])
def test_draws_are_n_of_every_prompt_side_by_side(method):
    problem = Toy().problem({}, 0)
    prompts = problem.prompts["test"]
    drawn = method.draw(problem, Learner(None, policy=problem.reference), prompts, 4, stream(0))
    assert drawn.prompt_index.tolist() == [k for k in range(len(prompts)) for _ in range(4)]
    assert torch.equal(drawn.reward, problem.target.reward(drawn))


def test_an_upper_bound_has_no_lower_end_and_its_column():
    z = LogZ(1.0, 0.1)
    x = torch.tensor([0.5, 0.7, 0.9] * 10, dtype=torch.float64)
    measured = Measurement({"reward": x, "kl_to_target_at_most": x, "objective_at_least": x}, z, 0.5)
    rows = {row["metric"]: row for row in measured.rows("", "m", 0)}
    most, least = rows["kl_to_target_at_most"], rows["objective_at_least"]
    assert most["low"] is None and most["stderr"] == pytest.approx(math.hypot(float(x.std()) / math.sqrt(30), 0.1))
    assert most["high"] > 0.7 + 1.96 * 0.1 and "gap" not in most
    assert least["high"] is None and least["low"] < 0.7
    shown = [column.header for column in table(list(rows.values())).columns]
    assert shown == ["method", r"E\[r]", HEADINGS["kl_to_target_at_most"], HEADINGS["objective_at_least"]]


def test_without_a_two_sided_log_z_there_is_no_upper_bound():
    problem = Toy().problem({}, 0)
    ruler = Ruler(problem.target, problem.prompts["test"], problem.width, stream(0), n=2)
    half = LogZ.of_bounds(torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4]), "b")
    for log_z, known in ((None, False), (replace(half, upper=None), False), (half, True)):
        values = SMCDecoding(4).measured(problem, Learner(None), replace(ruler, log_z=log_z))[0].values
        assert ("kl_to_target_at_most" in values) == known


def test_what_is_known_by_log_z_alone_is_not_compared_without_it():
    z, x = LogZ(1.0, 0.1), torch.rand(20, dtype=torch.float64)
    plain = Measurement({"reward": x, "kl_to_reference": x, "log_w": x, "kl_to_target": 1 - x}, z)
    exact = Measurement(
        {"reward": x + 1, "kl_to_reference": x, "kl_to_target": torch.zeros(20)},
        z,
        shares={"kl_to_reference": -1.0},
    )
    assert [each.metric for each in paired(plain, exact)] == ["reward"]
    assert {each.metric for each in paired(exact, exact)} == {"reward", "kl_to_reference"}

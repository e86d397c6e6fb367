"""A real pretrained model against an answer sheet made by other code: enumeration first, then what the ruler estimates.

The sheet: log p of the token that comes 1, 2, 3 after the prompt, over a vocabulary of 512 (log Z of infilling), and log Z,
E[r] and both KLs of two tokens tilted by r = the number of them that contain the letter b.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltlm.exact import Solution, log_next_tokens, solve
from tiltlm.models.causal import CausalLM
from tiltlm.rewards.continuation import Continuation
from tiltlm.ruler.bounds import bound_repeats, log_z_of
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.measure import Ruler
from tiltlm.samplers.rejection import reject
from tiltlm.samplers.smc import SMC, smc
from tiltlm.samples import Conditioned, Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.target import Target

ROOT = stream(5, "stories-oracle")


@pytest.fixture(scope="module")
def sheet(shared_data) -> dict[str, Any]:
    return json.loads((shared_data / "oracles" / "stories260K_exact.json").read_text())


@pytest.fixture(scope="module")
def reference(shared_data) -> CausalLM:
    return CausalLM.load(shared_data / "models" / "stories260K", eos_ids=()).requires_grad_(False)


@pytest.fixture(scope="module")
def prompt(sheet) -> Tokens:
    return Tokens.of([sheet["prompt_ids"]])


@pytest.fixture(scope="module")
def letter_b(shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    pieces = tokenizer.convert_ids_to_tokens(list(range(512)))
    has = torch.tensor([float(k >= 259 and "b" in piece) for k, piece in enumerate(pieces)])

    def reward(samples: Samples) -> Tensor:
        return (has[samples.tokens] * samples.mask).sum(1)

    return reward


@pytest.fixture(scope="module")
def solutions(sheet, reference, prompt, letter_b) -> dict[float, Solution]:
    """One enumeration; the other temperatures re-tilt it."""
    first = solve(Target(reference, letter_b, 1.0), prompt, 2)
    found = {}
    for entry in sheet["tilted"]["results"]:
        beta = entry["beta"]
        tilted = first.log_ref.double() + first.reward.double() / beta
        log_z = tilted.logsumexp(1)
        found[beta] = Solution(first.samples, first.log_ref, first.reward, tilted - log_z[:, None], log_z, beta)
    torch.testing.assert_close(found[1.0].log_z, first.log_z.double())
    return found


def test_log_p_of_the_tokens_ahead(sheet, reference, prompt):
    want = sheet["infilling"]
    for ahead in (0, 1, 2):
        found = log_next_tokens(reference, prompt, ahead).double()
        expected = torch.tensor(want[f"logp_next_{ahead + 1}"], dtype=torch.float64)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_log_z_reward_and_both_kls_by_enumeration(sheet, solutions):
    for entry in sheet["tilted"]["results"]:
        s = solutions[entry["beta"]]
        reference = s.log_ref.double()
        found = {
            "logZ": s.log_z[0],
            "E_q_reward": (s.log_pi_star.exp() * s.reward).sum(),
            "KL_q_p": s.kl_from_target(reference)[0],
            "KL_p_q": s.kl_to_target(reference)[0],
        }
        for name, value in found.items():
            assert abs(float(value) - entry[name]) < 1e-4, (name, entry["beta"])


def test_the_ruler_covers_log_z_and_both_kls(sheet, reference, prompt, letter_b):
    """At every temperature: importance sampling's log Z, and the reference's two KLs, within 4 of their own errors."""
    for entry in sheet["tilted"]["results"]:
        target, own = Target(reference, letter_b, entry["beta"]), ROOT.child(entry["beta"])
        found = smc(target, None, prompt, SMC(4000, 0.0), max_new_tokens=2, stream=own.child("log-z"))
        log_z = LogZ.of_importance(found.samples.log_w, "draws of the reference")
        assert 0 < log_z.stderr < 0.1 and abs(log_z.value - entry["logZ"]) < 4 * log_z.stderr
        exact = reject(
            target, prompt, n=1000, max_new_tokens=2, stream=own.child("exact"), r_max=2.0, batch_size=4000
        )
        ruler = Ruler(target, prompt, 2, own.child("ruler"), n=2000, log_z=log_z, exact=exact)
        rows = {row["metric"]: row for row in ruler.measure(reference)[0].rows("", "", 0)}
        for metric, name in (("kl_to_target", "KL_p_q"), ("kl_from_target", "KL_q_p")):
            row = rows[metric]
            assert 0 < row["stderr"] < 0.15 and abs(row["value"] - entry[name]) < 4 * row["stderr"], (
                metric,
                entry,
            )


def test_bounds_bracket_log_z(sheet, reference, prompt, letter_b):
    entry = next(entry for entry in sheet["tilted"]["results"] if entry["beta"] == 0.5)
    target = Target(reference, letter_b, 0.5)
    exact = reject(target, prompt, n=400, max_new_tokens=2, stream=ROOT.child("pins"), r_max=2.0, batch_size=2000)
    bounds = bound_repeats(
        target, None, prompt, exact, ks=(2, 16), repeats=400, max_new_tokens=2, stream=ROOT.child("bounds"),
        estimators=("iwae", "smc"), proposals=("reference",),
    )  # fmt: skip
    rows = {(row["k"], row["estimator"], row["side"]): row for row in bounds.rows()}
    for k in (2, 16):
        low, high = rows[k, "iwae", "lower"], rows[k, "iwae", "upper"]
        assert low["value"] - 4 * low["stderr"] < entry["logZ"] < high["value"] + 4 * high["stderr"]
    gaps = [rows[k, "iwae", "upper"]["value"] - rows[k, "iwae", "lower"]["value"] for k in (2, 16)]
    assert gaps[0] > gaps[1] > 0
    low, high = log_z_of(bounds).interval
    assert low < entry["logZ"] < high


def test_infilling_s_log_z_is_the_marginal_of_what_must_follow(sheet, reference, prompt):
    """Two free tokens, then one: Ẑ over conditions is the oracle's probability, within 4 standard errors."""
    follow = sorted(range(512), key=lambda v: -sheet["infilling"]["logp_next_3"][v])[:3]
    many = Conditioned(prompt.ids.repeat(3, 1), prompt.mask.repeat(3, 1), Tokens.of([[v] for v in follow]))
    target = Target(reference, Continuation(reference), 1.0)
    found = smc(target, None, many, SMC(3000, 0.0), max_new_tokens=2, stream=ROOT.child("infill"))
    weights = found.samples.log_w.double().exp().reshape(3, 3000)
    want = torch.tensor([sheet["infilling"]["logp_next_3"][v] for v in follow], dtype=torch.float64).exp()
    assert ((weights.mean(1) - want).abs() < 4 * weights.std(1) / 3000**0.5).all()

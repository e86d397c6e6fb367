"""Worlds small enough to be listed: a problem whose answers are all sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tiltlm.device import device_of
from tiltlm.exact import Solution, kl, solve
from tiltlm.models.base import LanguageModel
from tiltlm.models.table import TableLM
from tiltlm.problem import Check, Facts, Problem
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.samples import Tokens
from tiltlm.seeds import Stream
from tiltlm.target import Reward, Target


def enumerated(
    reference: TableLM, reward: Reward, facts: Facts, own: Stream, device: str, checks: Mapping[str, Check]
) -> Problem:
    """The problem of a table and its reward, at the temperature of its facts; its prompt is number 0."""
    place = device_of(device, "--task.device")
    target = Target(reference.to(place).requires_grad_(False), reward, facts.beta)
    prompt = Tokens.of([[0]], place)

    def solved(prompts: Tokens, beta: float = facts.beta) -> Solution:
        return solve(replace(target, beta=beta), prompts, reference.horizon)

    def log_z(prompts: Tokens, beta: float) -> Tensor:
        return solved(prompts, beta).log_z

    def expected_reward(q: LanguageModel, prompts: Tokens) -> Tensor:
        found = solved(prompts)
        return (found.density(q).exp() * found.reward).sum(1)

    def further(q: LanguageModel, prompts: Tokens) -> dict[str, Tensor]:
        found = solved(prompts)
        return {"kl_from_target": found.kl_from_target(found.density(q))}

    def optimum(ruler: Ruler) -> Measurement:
        found = solved(ruler.prompts, ruler.target.beta)
        reward, far = (found.log_pi_star.exp() * found.reward).sum(1), kl(found.log_pi_star, found.log_ref)
        nothing = {n: torch.zeros_like(far) for n in ("kl_to_target", "kl_from_target", "objective_gap")}
        return Measurement(ruler.distances(reward, far) | nothing)

    return Problem(
        target, {"train": prompt, "test": prompt}, reference.horizon, own, facts, log_z=log_z,
        solve=solved, checks=checks, expected_reward=expected_reward, further=further, optimum=optimum,
    )  # fmt: skip

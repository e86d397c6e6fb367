"""Rejection: exact draws of pi*, so there is nothing left to measure but what pi* itself is worth, and its price.

    KL(q‖pi*) = KL(pi*‖q) = 0,     KL(q‖pi_ref) = E_pi*[r]/beta − log Z,     J = beta·log Z

Where no log Z is known the last two are left out. `tries` is how many draws of the reference one exact draw took.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tiltlm import ranks
from tiltlm.decoders.sampler import Sampler
from tiltlm.method import Learner, Method
from tiltlm.problem import Facts, Problem
from tiltlm.ruler.estimate import per_prompt
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.samplers.rejection import Search, search
from tiltlm.samplers.scenes import joined
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.settings import at_least_one


@dataclass(frozen=True)
class Rejection(Sampler):
    """Draw from the reference until a draw is kept."""

    max_tries: float = 1e7
    """Refuse if a prompt's search would take more draws of the reference than this."""

    batch_size: int = 1000
    """Draws of the reference at once; `tries` counts whole batches."""

    optimum: ClassVar[str] = "pi* itself"

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size", "max_tries")

    def why_not(self, facts: Facts) -> str | None:
        if facts.conditioned:
            return "every condition comes with an exact draw by construction: there is nothing to search for"
        return facts.no_exact_draws()

    def draw(
        self, problem: Problem, learner: Learner, prompts: Tokens, n: int, stream: Stream, batch_size: int = 512
    ) -> Samples:
        return self.searched(problem, prompts, n, stream)[0]

    def searched(self, problem: Problem, prompts: Tokens, n: int, stream: Stream) -> tuple[Samples, list[float]]:
        """`n` exact draws of every prompt, and the draws of the reference that one took, a prompt each (none where the
        task has a way of its own)."""
        why = self.why_not(problem.facts)
        if why is not None:
            raise ValueError(why)
        if problem.exact is not None:
            exact = problem.exact
            return ranks.from_first(lambda: exact(prompts, n, stream)), []
        most = problem.facts.r_max
        assert most is not None

        def part(begin: int, end: int) -> list[Search]:
            return [
                search(
                    problem.target, prompts.select(slice(k, k + 1)), n=n, max_new_tokens=problem.width, stream=stream,
                    r_max=most, batch_size=self.batch_size, max_tries=self.max_tries, pilot=len(prompts) == 1, number=k,
                )
                for k in range(begin, end)
            ]  # fmt: skip

        found = ranks.in_shares(len(prompts), part)
        kept = [each.kept.select(slice(0, n)) for each in found if each.kept is not None]
        samples = kept[0] if len(prompts) == 1 else joined(kept, prompts)
        return samples, [each.tries / each.accepted for each in found]

    def measured(self, problem: Problem, learner: Learner, ruler: Ruler) -> tuple[Measurement, Samples]:
        samples, tries = self.searched(problem, ruler.prompts, ruler.n, ruler.stream)
        assert samples.reward is not None
        reward = samples.reward.double()
        if len(ruler.prompts) > 1:
            reward = per_prompt(reward, samples.prompt_index, len(ruler.prompts))
        beta = problem.beta
        values = ruler.verdicts(samples) | {"reward": reward}
        values |= {name: torch.zeros_like(reward) for name in ("kl_to_target", "kl_from_target", "objective_gap")}
        log_z, shares = ruler.known_log_z(), {}
        if log_z is not None:
            values["kl_to_reference"] = reward / beta - log_z
            values["objective"] = torch.zeros_like(reward) + beta * log_z
            shares = {"kl_to_reference": -1.0, "objective": beta} if isinstance(ruler.log_z, LogZ) else {}
        if tries:
            values["tries"] = torch.tensor(tries, dtype=torch.float64)
        return ruler.measurement(values, shares), samples


NAMES: dict[str, str] = {"rejection": "exact draws of pi*, where the reward has a bound"}
METHODS: dict[str, Method] = {"rejection": Rejection()}

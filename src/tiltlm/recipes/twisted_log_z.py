"""The one log Z of a comparison, how it is found, and what it has to agree with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tiltlm.exact import log_next_tokens
from tiltlm.jsonl import read_json
from tiltlm.progress import note, steps
from tiltlm.recipes.twisted_lab import Lab
from tiltlm.recipes.twisted_settings import LogZSettings
from tiltlm.recipes.twisted_stages import Exact, Scored
from tiltlm.recipes.twisted_twists import CTLTwist
from tiltlm.ruler.agreement import refuse_disagreement
from tiltlm.ruler.bounds import bound_repeats, log_z_of
from tiltlm.ruler.estimate import Estimate, mean
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.stopping import bounds_to_width, weights_to_width
from tiltlm.run import Recipe, Run
from tiltlm.samplers.rejection import Search
from tiltlm.samplers.smc import SMC, smc
from tiltlm.tensors import save_tensors

FEW_KEPT = 100
"""Draws that rejection would have kept, from which weighted draws may contradict exact ones."""


STOPPED = (
    "drawing stopped where the certificate was narrow enough, which an estimate may not: read the certificate"
)


@dataclass(frozen=True)
class CommonLogZ(CTLTwist):
    """The one log Z that every method of a comparison is held to; if by bounds, then with CTL's twist."""

    log_z: LogZSettings = LogZSettings()
    stage: ClassVar[str] = "log-z"

    def inputs(self) -> dict[str, Recipe]:
        needed = Scored.inputs(self) | {"exact": self.up(Exact)}
        return needed | ({"twist": self.up(CTLTwist)} if self.log_z.by == "bounds" else {})

    def build(self, run: Run[Any]) -> None:
        how = {"reference": self.by_reference, "enumeration": self.by_enumeration, "bounds": self.by_bounds}
        how["rejection"] = self.by_rejection
        how[self.log_z.by](run, self.lab(run))

    def check(self) -> None:
        super().check()
        infill = self.goal.reward == "infill"
        if infill and self.log_z.by == "reference":
            raise ValueError(
                "infill: every condition has a log Z of its own; take --log-z.by bounds or enumeration"
            )
        if infill and (self.log_z.by == "rejection" or self.log_z.width):
            raise ValueError(
                "infill: exact draws come by construction, one a condition: no rejection, and no width"
            )
        if self.log_z.by == "rejection" and self.exact.stored:
            raise ValueError(
                "log Z by rejection wants exact draws that are searched for here: leave --exact.stored out"
            )
        if self.log_z.by == "enumeration" and not (infill and self.goal.condition_tokens == 1):
            raise ValueError("enumeration sums over the gap: infill with one token to follow")
        if self.log_z.by == "bounds" and not infill and self.stage == CommonLogZ.stage:
            self.refuse_few(self.log_z.repeats, "log-z.repeats")
        if self.log_z.width and self.log_z.by == "reference" and self.log_w_max is None:
            raise ValueError(
                "--log-z.width wants a certificate, and that a bound of the reward: name it (--goal.r-max)"
            )

    @property
    def log_w_max(self) -> float | None:
        """What no weight of a draw of the reference exceeds, as a logarithm; None where the reward states no bound."""
        most = self.goal.most
        return most / self.goal.beta if math.isfinite(most) else None

    def by_reference(self, run: Run[Any], lab: Lab) -> None:
        s, most = self.log_z, self.log_z.draws * (self.log_z.limit if self.log_z.width else 1)

        def more(k: int) -> Tensor:
            own, settings = lab.stream.child("log-z", k), SMC(min(s.batch_size, most - k), threshold=0)
            found = smc(lab.target, None, lab.prompt, settings, max_new_tokens=lab.width, stream=own)
            assert found.samples.log_w is not None
            return found.samples.log_w

        w_max = self.log_w_max
        with steps(self.name) as on_step:
            if s.width and w_max is not None:
                log_w = weights_to_width(more, width=s.width, limit=most, log_w_max=w_max, on_width=on_step)
            else:
                parts = []
                for k in range(0, most, s.batch_size):
                    parts.append(more(k))
                    on_step(min(k + s.batch_size, most), most, {})
                log_w = torch.cat(parts)
        self.agree(run, log_w, w_max)
        self.tell(run, LogZ.of_importance(log_w, "draws of the reference", w_max))

    def agree(self, run: Run[Any], log_w: Tensor, w_max: float | None) -> None:
        """Raise ValueError where the exact draws' mean reward is not the weighted one, if that is well known."""
        exact, log_w = self.exact_of(run), log_w.double()
        if exact.reward is None or w_max is None or float((log_w - w_max).exp().sum()) < FEW_KEPT:
            return
        reward, weight = log_w * self.goal.beta, log_w.softmax(0)
        value = float((weight * reward).sum())
        stderr = float(((weight * (reward - value)) ** 2).sum().sqrt())
        spread = float((weight * (reward - value) ** 2).sum().sqrt())
        refuse_disagreement(mean(exact.reward), Estimate(value, stderr, len(log_w)), spread)

    def by_rejection(self, run: Run[Any], lab: Lab) -> None:
        found = Search.load(run.inputs["exact"].folder / "search.safetensors")
        self.tell(run, LogZ.of_acceptance(found.accepted, found.tries, self.goal.bound() / self.goal.beta))

    def tell(self, run: Run[Any], found: LogZ) -> None:
        """Write the log Z down; say so where it is known less well than was asked for."""
        if self.log_z.width:
            found = replace(found, doubt=found.doubt or STOPPED)
        run.write_json("log_z.json", found.to_json())
        low, high = found.certificate or (0.0, 0.0)
        if self.log_z.width and high - low > self.log_z.width:
            note(
                f"{self.name}: the certificate is {high - low:.3f} nats wide at the limit, not {self.log_z.width:g}: raise "
                "--log-z.limit (and --exact.n, one for every upper bound), or --log-z.particles"
            )

    def by_enumeration(self, run: Run[Any], lab: Lab) -> None:
        with steps(self.name) as on_step:
            log_p = log_next_tokens(lab.reference, lab.prompt, lab.width, on_step=on_step)
        save_tensors({"log_z": log_p.double()}, run.folder / "log_z_of_token.safetensors")
        expected = float((log_p.exp() * log_p).sum())
        run.write_json("log_z.json", LogZ.exact(expected).to_json())

    def by_bounds(self, run: Run[Any], lab: Lab) -> None:
        s, exact = self.log_z, self.exact_of(run).to(lab.device)
        twist: Any = run.inputs["twist"].recipe.twist_of(run.inputs["twist"])
        prompts, repeats = lab.prompt, s.repeats
        if lab.conditioned:  # every condition has the one exact draw that it was split off
            exact = lab.first(exact, s.conditions)
            prompts, repeats = exact.prompts, 1
        common: dict[str, Any] = {"max_new_tokens": lab.width, "stream": lab.stream.child("log-z")}
        common["batch_size"] = s.batch_size
        with steps(self.name) as on_step:
            if s.width and not lab.conditioned:
                bounds = bounds_to_width(
                    lab.target, twist, prompts, exact, width=s.width, k=max(s.particles), batch=repeats,
                    limit=repeats * s.limit, on_width=on_step, **common,
                )  # fmt: skip
            else:
                bounds = bound_repeats(
                    lab.target, twist, prompts, exact, ks=s.particles, repeats=repeats, on_step=on_step, **common
                )
        run.write_json("bounds.json", bounds.rows())
        self.tell(run, log_z_of(bounds))

    def show(self, run: Run[Any]) -> None:
        print(LogZ.from_json(read_json(run.folder / "log_z.json")))

"""The one log Z of a comparison, how it is found, and what it has to agree with. Over several prompts: one of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tiltlm import ranks
from tiltlm.exact import log_next_tokens
from tiltlm.jsonl import read_json
from tiltlm.problem import Facts, Problem
from tiltlm.progress import OnStep, note, steps
from tiltlm.ruler.agreement import refuse_disagreement
from tiltlm.ruler.bounds import bound_repeats, log_z_of
from tiltlm.ruler.estimate import Estimate, mean
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.stopping import bounds_to_width, weights_to_width
from tiltlm.run import Recipe, Run
from tiltlm.samplers.listing import listed
from tiltlm.samplers.rejection import Search
from tiltlm.samplers.smc import SMC, smc, smc_in_batches
from tiltlm.samples import Samples, conditions_of
from tiltlm.settings import ADDED, at_least_one
from tiltlm.stages.cells import Cell
from tiltlm.stages.exact import Exact, ExactSettings, exact_of
from tiltlm.stages.learn import Learn
from tiltlm.stages.task import OfTask, Task
from tiltlm.tensors import load_tensors, save_tensors

FEW_KEPT = 100
"""Draws that rejection would have kept, from which weighted draws may contradict exact ones."""

STOPPED = (
    "drawing stopped where the certificate was narrow enough, which an estimate may not: read the certificate"
)

By = Literal["none", "reference", "enumeration", "bounds", "rejection", "listing"]


@dataclass(frozen=True)
class LogZSettings:
    """How the common log Z is found, once for all methods."""

    by: By = "reference"
    """reference: long importance runs of the reference. rejection: how many of its tries the search for exact draws kept.
    enumeration: infill, every gap (short ones). bounds: SMC bounds with CTL's twist. listing: several prompts, every likely
    completion is listed, and what is left bounds log Z. none: J and lower bounds of KL(q‖pi*) alone."""

    draws: int = 40_000
    """By the reference: draws, of several prompts of each."""

    particles: tuple[int, ...] = (32, 500)
    repeats: int = 20
    """Pairs of bounds; of several prompts one each instead."""

    prompts: int = 100
    """Several prompts or conditions: on how many of the test split log Z is known."""

    width: float = 0.0
    """Draw on until the certificate of log Z is at most so many nats wide (0: `draws` or `repeats`, and no more)."""

    limit: int = 50
    """With a width: at most so many times `draws` or `repeats`."""

    batch_size: int = field(default=2000, metadata=ADDED)
    """Draws at once; each batch of draws of the reference has random numbers of its own."""

    floor: float = field(default=0.01, metadata=ADDED)
    """By listing: how likely a completion must be."""

    def __post_init__(self) -> None:
        at_least_one(self, "draws", "particles", "repeats", "prompts", "batch_size", "limit")
        if not self.width >= 0 or (self.width and self.by not in ("reference", "bounds")):
            raise ValueError(
                f"a width of log Z's certificate goes with --log-z.by reference or bounds and is positive; got "
                f"{self.width} by {self.by}"
            )


@dataclass(frozen=True)
class CommonLogZ(OfTask):
    """The one log Z that every method of a comparison is held to."""

    task: Task
    log_z: LogZSettings = LogZSettings()
    exact: ExactSettings = ExactSettings()
    twist: Cell | None = None
    """CTL's settings, for the twist of bounds."""

    seed: int = 0
    stage: ClassVar[str] = "log-z"
    shared: ClassVar[bool] = True

    def counted(self) -> CommonLogZ:
        exact = self.exact if self.exact_wanted else ExactSettings()
        return replace(self, exact=exact, twist=self.twist if self.log_z.by == "bounds" else None)

    def files(self) -> list[str]:
        return [*super().files(), *(self.exact.files() if self.exact_wanted else ())]

    def inputs(self) -> dict[str, Recipe]:
        needed = self.needs()
        if self.exact_wanted:
            needed["exact"] = Exact(self.task, self.exact, seed=self.seed)
        if self.log_z.by == "bounds" and self.twist is not None:
            needed["twist"] = Learn.of(self.task, self.twist, "ctl", self.exact, self.seed)
        return needed

    @property
    def exact_wanted(self) -> bool:
        """Whether exact draws are among the inputs: to bound by, to count, or to hold the weighted draws against."""
        if self.log_z.by in ("bounds", "rejection"):
            return True
        facts: Facts = self.task.facts()
        return facts.measured != "several" and facts.no_exact_draws() is None

    def check(self) -> None:
        super().check()
        s, facts = self.log_z, self.task.facts()
        if s.by == "none":
            raise ValueError("--log-z.by none: there is no log Z to find; name how (reference, bounds, rejection)")
        if facts.conditioned and s.by == "reference":
            raise ValueError(
                "infill: every condition has a log Z of its own; take --log-z.by bounds or enumeration"
            )
        if facts.conditioned and (s.by == "rejection" or s.width):
            raise ValueError(
                "infill: exact draws come by construction, one a condition: no rejection, and no width"
            )
        if s.by == "rejection" and self.exact.stored:
            raise ValueError(
                "log Z by rejection wants exact draws that are searched for here: leave --exact.stored out"
            )
        if facts.measured == "several" and (s.by == "rejection" or s.width):
            raise ValueError("over several prompts log Z comes by reference or bounds: no rejection, and no width")
        if s.by == "listing" and (facts.measured != "several" or facts.r_max is None):
            raise ValueError(
                f"a listing is of several prompts, and bounds what is left by the most that a reward can be "
                f"({facts.bound_at}): --log-z.by reference"
            )
        if s.by == "enumeration" and not (facts.conditioned and getattr(self.task, "condition_tokens", 0) == 1):
            raise ValueError("enumeration sums over the gap: infill with one token to follow")
        if s.by == "bounds" and facts.measured == "one":
            Exact(self.task, self.exact, seed=self.seed).refuse_few(s.repeats, "log-z.repeats")
        if s.width and s.by == "reference" and facts.r_max is None:
            raise ValueError(
                f"--log-z.width wants a certificate, and that a bound of the reward: name it ({facts.bound_at})"
            )

    def build(self, run: Run[Any]) -> None:
        problem = self.problem(run)
        if self.log_z.by == "reference" and problem.facts.measured == "several":
            self.by_prompt(run, problem)
            return
        how = {"reference": self.by_reference, "enumeration": self.by_enumeration, "bounds": self.by_bounds}
        how |= {"rejection": self.by_rejection, "listing": self.by_listing}
        how[self.log_z.by](run, problem)

    @property
    def together(self) -> bool:
        to_width = self.log_z.by == "reference" and self.log_z.width > 0  # batch after batch, as many as it takes
        return super().together and not to_width and self.log_z.by not in ("enumeration", "rejection")

    def log_w_max(self, problem: Problem) -> float | None:
        """What no weight of a draw of the reference exceeds, as a logarithm; None where the reward states no bound."""
        most = problem.facts.r_max
        return None if most is None else most / problem.beta

    def by_reference(self, run: Run[Any], problem: Problem) -> None:
        s, most = self.log_z, self.log_z.draws * (self.log_z.limit if self.log_z.width else 1)

        def more(k: int) -> Tensor:
            own, settings = problem.stream.child("log-z", k), SMC(min(s.batch_size, most - k), threshold=0)
            prompts = problem.prompts["test"]
            found = smc(problem.target, None, prompts, settings, max_new_tokens=problem.width, stream=own)
            assert found.samples.log_w is not None
            return found.samples.log_w

        w_max = self.log_w_max(problem)
        with steps(self.name) as on_step:
            if s.width and w_max is not None:
                log_w = weights_to_width(more, width=s.width, limit=most, log_w_max=w_max, on_width=on_step)
            else:
                log_w = torch.cat(shares(range(0, most, s.batch_size), more, on_step))
        self.agree(run, problem, log_w, w_max)
        self.tell(run, LogZ.of_importance(log_w, "draws of the reference", w_max))

    def by_prompt(self, run: Run[Any], problem: Problem) -> None:
        """One importance run of the reference for every test prompt."""
        s = self.log_z
        prompts = problem.prompts["test"].select(slice(0, s.prompts))

        def of_prompt(k: int) -> Tensor:
            found = smc_in_batches(
                problem.target, None, prompts.select(slice(k, k + 1)), SMC(s.draws, threshold=0),
                max_new_tokens=problem.width, stream=problem.stream.child("log-z", k), batch_size=max(s.draws, 1),
            )  # fmt: skip
            assert found.samples.log_w is not None
            return found.samples.log_w.cpu()

        with steps(self.name) as on_step:
            parts = shares(range(len(prompts)), of_prompt, on_step)
        self.tell(run, LogZ.of_runs(torch.stack(parts), f"{s.draws} draws of the reference a prompt"))

    def by_listing(self, run: Run[Any], problem: Problem) -> None:
        """Σ p·exp(r/beta) of what is listed, from below; as much as the rest could add, from above."""
        s, w_max = self.log_z, self.log_w_max(problem)
        assert w_max is not None
        prompts = problem.prompts["test"].select(slice(0, s.prompts))
        at_once = max(1, int(s.batch_size * s.floor))

        def ends_from(k: int) -> Tensor:
            samples, log_p = listed(
                problem.reference, prompts.select(slice(k, k + at_once)), problem.width, s.floor
            )
            log_w = log_p + problem.target.reward(samples).double() / problem.beta
            return ends_of_listing(samples, log_p, log_w, w_max).cpu()

        with steps(self.name) as on_step:
            ends = shares(range(0, len(prompts), at_once), ends_from, on_step)
        low, high = torch.cat(ends, 1)
        self.tell(run, LogZ.of_listing(low, high, f"completions of probability {s.floor:g} and more listed"))

    def agree(self, run: Run[Any], problem: Problem, log_w: Tensor, w_max: float | None) -> None:
        """Raise ValueError where the exact draws' mean reward is not the weighted one, if that is well known."""
        if "exact" not in run.inputs:
            return
        exact, log_w = exact_of(run), log_w.double()
        if exact.reward is None or w_max is None or float((log_w - w_max).exp().sum()) < FEW_KEPT:
            return
        reward, weight = log_w * problem.beta, log_w.softmax(0)
        value = float((weight * reward).sum())
        stderr = float(((weight * (reward - value)) ** 2).sum().sqrt())
        spread = float((weight * (reward - value) ** 2).sum().sqrt())
        refuse_disagreement(mean(exact.reward), Estimate(value, stderr, len(log_w)), spread)

    def by_rejection(self, run: Run[Any], problem: Problem) -> None:
        found, w_max = Search.load(run.inputs["exact"].folder / "search.safetensors"), self.log_w_max(problem)
        assert w_max is not None
        self.tell(run, LogZ.of_acceptance(found.accepted, found.tries, w_max))

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

    def by_enumeration(self, run: Run[Any], problem: Problem) -> None:
        with steps(self.name) as on_step:
            log_p = log_next_tokens(problem.reference, problem.prompts["test"], problem.width, on_step=on_step)
        save_tensors({"log_z": log_p.double()}, run.folder / "log_z_of_token.safetensors")
        expected = float((log_p.exp() * log_p).sum())
        run.write_json("log_z.json", LogZ.exact(expected).to_json())

    def by_bounds(self, run: Run[Any], problem: Problem) -> None:
        s, exact = self.log_z, exact_of(run).to(problem.device)
        kept = run.inputs["twist"]
        twist: Any = kept.recipe.decoder(kept).twist
        prompts, repeats = problem.prompts["test"], s.repeats
        if problem.facts.measured != "one":  # every prompt has an exact draw of its own
            exact = first_prompts(exact, s.prompts)
            prompts, repeats = exact.prompts, 1
        common: dict[str, Any] = {"max_new_tokens": problem.width, "stream": problem.stream.child("log-z")}
        common["batch_size"] = s.batch_size
        with steps(self.name) as on_step:
            if s.width and problem.facts.measured == "one":
                bounds = bounds_to_width(
                    problem.target, twist, prompts, exact, width=s.width, k=max(s.particles), batch=repeats,
                    limit=repeats * s.limit, on_width=on_step, **common,
                )  # fmt: skip
            else:
                bounds = bound_repeats(
                    problem.target,
                    twist,
                    prompts,
                    exact,
                    ks=s.particles,
                    repeats=repeats,
                    on_step=on_step,
                    **common,
                )
        run.write_json("bounds.json", bounds.rows())
        self.tell(run, log_z_of(bounds))

    def show(self, run: Run[Any]) -> None:
        print(LogZ.from_json(read_json(run.folder / "log_z.json")))


def shares(keys: range, make: Callable[[int], Tensor], on_step: OnStep) -> list[Tensor]:
    """`make` of every key, each process its part of them."""

    def part(begin: int, end: int) -> list[Tensor]:
        found = []
        for done, k in enumerate(keys[begin:end], 1):
            found.append(make(k))
            on_step(done, end - begin, {})
        return found

    return ranks.in_shares(len(keys), part)


def ends_of_listing(samples: Samples, log_p: Tensor, log_w: Tensor, log_w_max: float) -> Tensor:
    """Lower and upper ends of each prompt's log Z, [2, P], of listed completions: log_w = log p + r/beta, [N].

    Raises ValueError for a prompt of which nothing is listed.
    """
    rows = [samples.prompt_index == k for k in range(len(samples.prompts))]
    if any(not bool(own.any()) for own in rows):
        raise ValueError("a prompt has no completion that is likely enough to be listed: lower --log-z.floor")
    listed_p, least = (torch.stack([x[own].logsumexp(0) for own in rows]) for x in (log_p, log_w))
    rest = (1 - listed_p.exp()).clamp_min(0).log() + log_w_max
    return torch.stack([least, torch.logaddexp(least, rest)])


def first_prompts(exact: Samples, n: int) -> Samples:
    """Exact draws of the first `n` prompts."""
    few = min(n, len(exact.prompts))
    kept = exact.select((exact.prompt_index < few).nonzero()[:, 0])
    return replace(kept, prompts=exact.prompts.select(slice(0, few)))


def log_z_found(run: Run[Any], exact: Samples | None) -> LogZ | Tensor:
    """The common log Z of the stage `log-z` among a run's inputs; per condition where it was enumerated."""
    folder = run.inputs["log_z"].folder
    if (folder / "log_z_of_token.safetensors").is_file():
        assert exact is not None
        table = load_tensors(folder / "log_z_of_token.safetensors")["log_z"]
        return table[conditions_of(exact.prompts).ids[:, 0].cpu()]
    return LogZ.from_json(read_json(folder / "log_z.json"))


def known(by: By, facts: Facts) -> bool:
    """Whether a comparison has a log Z that a stage finds (else it is computed, or not known at all)."""
    return by != "none" and not facts.log_z

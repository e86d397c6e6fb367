"""Where GRPO and its relatives end on the line of two hills, solved exactly: the policy has one logit an outcome, so pi*
is in the class, and what a method misses is its loss's doing alone.

With g(y) = E[A | y], the advantage of y among G − 1 further draws of the policy p itself, the expected gradient in the
logit of y on policy is

    no pull                −p·g                                  the best outcome gains on all others: it alone is left
    pull in the reward     −p·g, g that of R = r − beta·h        zero where all R are equal: pi*
    k3 in the loss         −p·g + beta·(p − pi_ref)              zero where p = beta·pi_ref/(λ − g), λ making it sum to 1

Without std g = (1 − 1/G)·(r − E_p[r]), so the last is argmax of E_p[r] − b·KL(pi_ref‖p), b = beta·G/(G − 1). With it g
depends on p, and the two are solved together. Groups of two and of infinitely many draws are exact: all pairs, and
(r − E_p[r]) over p's own standard deviation. Groups of another size are drawn: `groups` of them in each of `rounds` rounds,
whose advantages are averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from tiltlm.clipped import EPSILON
from tiltlm.objective import positive
from tiltlm.ruler.plots import COLORS
from tiltlm.ruler.table import read_report, table
from tiltlm.run import Run
from tiltlm.seeds import Stream, stream
from tiltlm.stages.modes_solve import World, report
from tiltlm.stages.task import OfTask

HEADINGS = {
    "objective_gap": "J lost",
    "kl_to_target": "KL(p‖pi*)",
    "kl_from_target": "KL(pi*‖p)",
    "reward": "E[r]",
    "mean": "mean",
    "width": "width",
}

Advantage = Callable[[Tensor, int], Tensor]
"""(p [points], round) -> g [points]."""


# ---- g --------------------------------------------------------------------------------------------------------


def among(reward: Tensor, others: Tensor, weight: Tensor) -> Tensor:
    """E[A | y] with std, [points]: every outcome beside G − 1 others, their rewards [M, G − 1] and weights [M].

    With gap = r − (the others' mean): r − mean = (1 − 1/G)·gap, and the group's squares are the others' + (1 − 1/G)·gap².
    """
    rest = others.shape[1]
    mean = others.mean(1, keepdim=True)
    gap, shrink = reward - mean, rest / (rest + 1)
    variance = ((others - mean).square().sum(1, keepdim=True) + shrink * gap.square()) / rest
    return weight @ (shrink * gap / (variance.sqrt() + EPSILON))


def without_std(reward: Tensor, size: int | None) -> Advantage:
    """(1 − 1/G)·(r − E_p[r]); size None: G without end."""
    shrink = 1.0 if size is None else 1 - 1 / size
    return lambda p, k: shrink * (reward - (p * reward).sum())


def with_std(reward: Tensor, size: int | None, groups: int, own: Stream) -> Advantage:
    """The same over the group's standard deviation: exact for G = 2 and without end, of drawn groups otherwise."""

    def whole(p: Tensor, k: int) -> Tensor:
        centred = reward - (p * reward).sum()
        return centred / (p * centred.square()).sum().sqrt()

    def drawn(p: Tensor, k: int) -> Tensor:
        assert size is not None
        picked = torch.multinomial(p, groups * (size - 1), replacement=True, generator=own.child(k).generator())
        others = reward[picked].reshape(groups, size - 1)
        return among(reward, others, torch.full((groups,), 1 / groups, dtype=p.dtype))

    if size is None:
        return whole
    return (lambda p, k: among(reward, reward[:, None], p)) if size == 2 else drawn


# ---- ends -----------------------------------------------------------------------------------------------------


def forward_pulled(p_ref: Tensor, g: Tensor, beta: float) -> Tensor:
    """argmax_p of Σ p·g − beta·KL(pi_ref‖p): beta·pi_ref/(λ − g), [points]; λ by bisection between its bounds."""
    below = g.max() - g
    low, high = beta * p_ref[below.argmin()], torch.tensor(beta, dtype=g.dtype)
    for _ in range(100):
        middle = (low + high) / 2
        enough = (beta * p_ref / (middle + below)).sum() > 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    p = beta * p_ref / (high + below)
    return p / p.sum()


def end_of_k3(p_ref: Tensor, advantage: Advantage, beta: float, rounds: int, averaged: bool) -> Tensor:
    """p = beta·pi_ref/(λ − g) with g that of p itself: by rounds, g averaged over all of them or taken half and half."""
    p, g = p_ref, torch.zeros_like(p_ref)
    for k in range(rounds):
        share = 1 / (k + 1) ** 0.7 if averaged else 0.5 if k else 1.0
        g = (1 - share) * g + share * advantage(p, k)
        p = forward_pulled(p_ref, g, beta)
    return p


def end_of_return(world: World, size: int) -> Tensor:
    """Where the expected advantage of R vanishes: from the reference, natural gradient steps of g/(beta·(1 − 1/G))."""
    log_ref, reward = world.solution.log_ref[0], world.solution.reward[0]
    log_p = log_ref
    for k in range(3):  # one is enough, the others stay where they are
        returns = reward - world.beta * (log_p - log_ref)
        step = without_std(returns, size)(log_p.exp(), k) / (world.beta * (1 - 1 / size))
        log_p = (log_p + step).log_softmax(0)
    return log_p.exp()


@dataclass(frozen=True)
class End:
    """A line of the table: a method (with its group size where that matters), and where it ends, [points]."""

    method: str
    p: Tensor


# ---- the stage ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clipped(OfTask):
    """RLOO, GRPO, Dr. GRPO and DAPO to their ends, at several temperatures."""

    task: Any
    """The line: a `tasks.modes.Modes`."""

    also: tuple[float, ...] = (1.0, 0.3)
    """Further temperatures, beside the task's."""

    size: int = 8
    """G of the groups that are drawn; 2 and infinitely many are worked out as well."""

    groups: int = 512
    """Groups of that size a round."""

    rounds: int = 200
    seed: int = 0
    stage: ClassVar[str] = "clipped"

    def __post_init__(self) -> None:
        positive(groups=self.groups, rounds=self.rounds, **{f"also {value:g}": value for value in self.also})
        if self.size < 3:
            raise ValueError(
                f"groups that are drawn have 3 rows or more (2 is exact, and always there); got {self.size}"
            )

    def betas(self) -> list[float]:
        return sorted({self.task.beta, *self.also}, reverse=True)

    def build(self, run: Run[Any]) -> None:
        head = {"recipe": self.name, "stderr": None, "n": 1, "seed": self.seed}
        ends = {beta: self.ends(self.world(beta)) for beta in self.betas()}
        rows = []
        for beta, found in ends.items():
            for end in found:
                numbers = self.world(beta).measure(end.p.log())
                finite = {name: value for name, value in numbers.items() if isfinite(value)}
                rows += [{**head, **row} for row in report(f"beta {beta:g}: {end.method}", finite)]
        run.write_json("report.json", rows)
        draw_picture({beta: (self.world(beta), found) for beta, found in ends.items()}, run.folder / "clipped.png")

    def world(self, beta: float) -> World:
        return World(self.task.points, beta, self.task.second)

    def ends(self, world: World) -> list[End]:
        """Every line of one temperature."""
        p_ref, reward = world.solution.log_ref[0].exp(), world.solution.reward[0]
        found = [End("pi*", world.solution.log_pi_star[0].exp())]
        found += [End(name, end_of_return(world, self.size)) for name in ("rloo", "dr-grpo-kl")]
        for size in (2, self.size, None):
            p = end_of_k3(p_ref, without_std(reward, size), world.beta, 1, averaged=False)
            found.append(End(f"grpo, std off, G {named(size)}", p))
        for size in (2, self.size, None):
            own = stream(self.seed, "modes-clipped", world.beta)
            advantage, drawn = with_std(reward, size, self.groups, own), size == self.size
            p = end_of_k3(p_ref, advantage, world.beta, self.rounds, averaged=drawn)
            found.append(End(f"grpo, G {named(size)}", p))
        best = torch.nn.functional.one_hot(reward.argmax(), len(reward)).to(reward)
        return [*found, End("dapo", best)]

    def show(self, run: Run[Any]) -> None:
        rows = read_report(run.folder / "report.json")
        out = Console(width=130, highlight=False)
        out.print(table(rows, "two hills: where each method ends, a dash standing for infinity", HEADINGS))
        out.print(f"picture: {run.folder / 'clipped.png'}", soft_wrap=True)


def named(size: int | None) -> str:
    return "∞" if size is None else str(size)


def draw_picture(found: dict[float, tuple[World, list[End]]], path: Path) -> None:
    """pi*, and the ends of GRPO with and without std in groups that are drawn, in logs: one panel a temperature."""
    figure = Figure(figsize=(11, 3.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (beta, (world, ends)) in zip(panels, found.items(), strict=True):
        curves = {end.method: end.p for end in ends}
        axes.fill_between(world.y, curves["pi*"], color="0.85", label="pi*, rloo, dr-grpo-kl")
        drawn = [end.method for end in ends if end.method.startswith("grpo")]
        for name, color, line in ((drawn[1], COLORS[0], "-"), (drawn[4], COLORS[1], "--")):
            axes.plot(world.y, curves[name], label=name, color=color, linestyle=line)
        axes.plot(world.y[curves["dapo"].argmax()], 1.0, "o", color="0.3", label="dapo", clip_on=False)
        axes.set(xlabel="outcome y", yscale="log", ylim=(1e-7, 1))
        axes.set_title(f"beta {beta:g}", loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("probability")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    figure.savefig(path)

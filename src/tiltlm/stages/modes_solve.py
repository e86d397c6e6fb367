"""Where forward and reverse KL part ways: two hills of reward and a policy class that can stand on one, solved exactly.

Outcomes y are places on a line, the reference is uniform, and pi* has a mode on each of two hills of unequal height:

    r(y) = exp(−(y + 2)²/2) + second·exp(−(y − 2)²/2),     pi*(y) ∝ exp(r(y)/beta)

*full*: one logit an outcome, so pi* is in the class.  *small*: log pi = −(y − m)²/(2s²) + const, of mean m and log s.

One group that holds every outcome once is the whole population. In it softmax(beta_pi·h) is pi tempered,
pi_b ∝ pi^beta_pi (the uniform reference cancels), and with beta_r = beta/beta_pi softmax(r/beta_r) is pi* tempered,
pi*_b ∝ pi*^beta_pi. So what is minimised, exactly, is

    exo_rw:  KL(pi_b‖pi*_b)          dpo_rw:  KL(pi*_b‖pi_b) + H(pi*_b)

and for beta_pi = 1 these are KL(pi‖pi*) and KL(pi*‖pi) + H(pi*). With beta_pi ≠ 1 only a policy class that holds pi* is
sure to end where these do. Tempering a normal gives a normal of width s/sqrt(beta_pi), so in the small class dpo_rw takes
over the mean of pi*_b, and its width times sqrt(beta_pi) (but for the ends of the line); linear in the natural parameters
but for log Z, it has one minimum. exo_rw has one for each hill and may have more: the best of several starts is kept,
`minima` counts them, and gradient descent from near the reference need not end at the best.

A group of K draws from the reference gives another loss, since q and p are normalised among the K: it asks for pi* as
well where the class holds it, but where it does not, a group without a draw on a hill counts as much as one with. Those
rows minimise the mean loss of `groups` drawn groups; all else is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from tiltlm.data.line import line, places
from tiltlm.exact import Solution, solve
from tiltlm.objective import positive
from tiltlm.policies.dpo_rw import dpo_rw_loss
from tiltlm.policies.exo_rw import exo_rw_loss
from tiltlm.ruler.plots import COLORS
from tiltlm.ruler.table import read_report, table
from tiltlm.run import Run
from tiltlm.samples import Tokens
from tiltlm.seeds import stream
from tiltlm.stages.task import OfTask
from tiltlm.target import Target

LOSSES = {"exo-rw": exo_rw_loss, "dpo-rw": dpo_rw_loss}

HEADINGS = {
    "kl_to_target": "KL(pi‖pi*)",
    "kl_from_target": "KL(pi*‖pi)",
    "reward": "E[r]",
    "objective": "J",
    "objective_gap": "J(pi*) − J",
    "mean": "mean",
    "width": "width",
}

UNITS = {"kl_to_target": "nats", "kl_from_target": "nats", "mean": "place", "width": "place", "minima": "count"}
"""Units of the report's rows; the others are in units of reward."""


@dataclass(frozen=True)
class World:
    """The line, its reward and the answer sheet; log-densities over the outcomes are [points], rewards too."""

    points: int
    beta: float
    second: float

    @cached_property
    def y(self) -> Tensor:
        return places(self.points)

    @cached_property
    def solution(self) -> Solution:
        return solve(Target(*line(self.points, self.second), self.beta), Tokens.of([[0]]), horizon=1)

    def normal(self, theta: Tensor) -> Tensor:
        """The small class: theta = (mean, log width)."""
        return (-(((self.y - theta[0]) / theta[1].exp()) ** 2) / 2).log_softmax(0)

    def measure(self, log_p: Tensor) -> dict[str, float]:
        """The report's numbers of one policy, by sums over the line."""
        s, p = self.solution, log_p.exp()
        mean = (p * self.y).sum()
        numbers = {
            "kl_to_target": s.kl_to_target(log_p),
            "kl_from_target": s.kl_from_target(log_p),
            "reward": (p * s.reward).sum(),
            "objective": s.objective(log_p[None]),
            "objective_gap": s.v_star() - s.objective(log_p[None]),
            "mean": mean,
            "width": (p * (self.y - mean) ** 2).sum().sqrt(),
        }
        # Twelve digits: the rest is rounding, and + 0.0 makes −0.0 a plain zero.
        return {name: round(float(value), 12) + 0.0 for name, value in numbers.items()}


@dataclass(frozen=True)
class PolicyClass:
    """Parameters -> log pi [points], and the parameters to start from."""

    log_p: Callable[[Tensor], Tensor]
    starts: tuple[Tensor, ...]


def policy_classes(world: World) -> dict[str, PolicyClass]:
    """The class that holds pi*, from the reference; the class that does not, from three places and two widths."""
    corners = tuple(torch.tensor([m, w], dtype=torch.float64) for m in (-2.0, 0.0, 2.0) for w in (-1.0, 0.7))
    return {
        "full": PolicyClass(lambda theta: theta.log_softmax(0), (torch.zeros_like(world.y),)),
        "small": PolicyClass(world.normal, corners),
    }


ROUNDING = 1e-13
"""What a loss may seem to rise by, its sums being rounded."""


def descend(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 300) -> tuple[float, Tensor]:
    """Newton's method to a minimum: the loss there, and where. Raises RuntimeError where it does not get there.

    Curvatures enter by size alone, so that every step leads down; it is halved until it leads down far enough.
    """
    theta, value = start, loss(start)
    for _ in range(steps):
        slope = torch.func.grad(loss)(theta)
        if slope.abs().max() < 1e-9:
            return value.item(), theta
        curvature, axes = torch.linalg.eigh(torch.func.jacrev(torch.func.grad(loss))(theta))
        step = axes @ ((axes.T @ slope) / curvature.abs().clamp_min(1e-12))
        size, drop = 1.0, slope @ step / 10000
        while size > 1e-9 and not loss(theta - size * step) <= value - size * drop + ROUNDING:
            size /= 2
        theta = theta - size * step
        value = loss(theta)
    raise RuntimeError(f"no minimum after {steps} Newton steps from {start.tolist()[:2]}: a larger beta is easier")


def minima(loss: Callable[[Tensor], Tensor], starts: Sequence[Tensor]) -> list[tuple[float, Tensor]]:
    """The different minima that the starts lead to, best first."""
    found = sorted((descend(loss, start) for start in starts), key=lambda each: each[0])
    return [each for k, each in enumerate(found) if k == 0 or each[0] - found[k - 1][0] > 1e-6]


@dataclass(frozen=True)
class Case:
    """One line of the table: which class, which loss, which temperatures, which groups."""

    members: str
    loss: str
    beta_pi: float
    size: int | None = None
    """Draws a group; None: every outcome once."""

    @property
    def method(self) -> str:
        size = "" if self.size is None else f", K {self.size}"
        return f"{self.members}: {self.loss}, beta_pi {self.beta_pi:g}{size}"


@dataclass(frozen=True)
class Solve(OfTask):
    """exo-rw and dpo-rw, each in the class that holds pi* and in the one that does not."""

    task: Any
    """The line: a `tasks.modes.Modes`; beta_r = beta/beta_pi."""

    beta_pi: float = 1.0
    """The losses' exponent of the policy; at 1 they are the two KLs themselves."""

    also: tuple[float, ...] = (0.5,)
    """Further values of beta_pi, at the same beta; 0.5 is the paper's."""

    sizes: tuple[int, ...] = (2, 4, 16)
    """K: also solve the small class on groups of K draws from the reference (at `beta_pi`)."""

    groups: int = 4096
    """How many such groups."""

    seed: int = 0
    stage: ClassVar[str] = "solve"

    def __post_init__(self) -> None:
        positive(beta_pi=self.beta_pi, groups=self.groups)
        positive(**{f"also {value:g}": value for value in self.also})
        if any(size < 2 for size in self.sizes):
            raise ValueError(f"a group has two draws at least; got {self.sizes}")

    @property
    def world(self) -> World:
        return World(self.task.points, self.task.beta, self.task.second)

    def build(self, run: Run[Any]) -> None:
        world = self.world
        head = {"recipe": self.name, "stderr": None, "n": 1, "seed": self.seed}
        rows = [{**head, **row} for row in report("pi*", world.measure(world.solution.log_pi_star[0]))]
        curves: dict[Case, Tensor] = {}
        for case in self.cases():
            found = self.fit(world, case)
            curves[case] = policy_classes(world)[case.members].log_p(found[0][1])
            numbers = world.measure(curves[case])
            if case.members == "small" and case.size is None:
                numbers["minima"] = len(found)
            rows += [{**head, **row} for row in report(case.method, numbers)]
        run.write_json("report.json", rows)
        draw_picture(world, {c: log_p for c, log_p in curves.items() if c.size is None}, run.folder / "modes.png")

    def cases(self) -> Iterator[Case]:
        """The whole population at every beta_pi, then the small class on groups of K."""
        for members in ("full", "small"):
            for beta_pi in dict.fromkeys((self.beta_pi, *self.also)):
                yield from (Case(members, loss, beta_pi) for loss in LOSSES)
        for size in self.sizes:
            yield from (Case("small", loss, self.beta_pi, size) for loss in LOSSES)

    def fit(self, world: World, case: Case) -> list[tuple[float, Tensor]]:
        """The minima of one case, best first."""
        members, s, draws = policy_classes(world)[case.members], world.solution, self.population(case.size)

        def loss(theta: Tensor) -> Tensor:
            h = members.log_p(theta) - s.log_ref[0]
            beta_r = self.task.beta / case.beta_pi
            return LOSSES[case.loss](h[draws], s.reward[0, draws], beta_r, case.beta_pi).mean()

        return minima(loss, members.starts)

    def population(self, size: int | None) -> Tensor:
        """Outcomes by number, [G, K]: each once, or groups drawn from the uniform reference."""
        if size is None:
            return torch.arange(self.task.points)[None]
        generator = stream(self.seed, "modes-groups", size).generator()
        return torch.randint(self.task.points, (self.groups, size), generator=generator)

    def show(self, run: Run[Any]) -> None:
        rows = read_report(run.folder / "report.json")
        out = Console(width=130, highlight=False)
        out.print(
            table(rows, f"two hills, pi* ∝ exp(r/{self.task.beta:g}): full and small policy class", HEADINGS)
        )
        several = [f"{r['method']} ({r['value']})" for r in rows if r["metric"] == "minima" and r["value"] > 1]
        if several:
            out.print("several minima were found, the best is shown: " + "; ".join(several))
        out.print(f"picture: {run.folder / 'modes.png'}", soft_wrap=True)


def report(method: str, numbers: dict[str, float]) -> list[dict[str, Any]]:
    """Report rows without head."""
    return [
        {"method": method, "metric": m, "value": v, "unit": UNITS.get(m, "reward")} for m, v in numbers.items()
    ]


def draw_picture(world: World, curves: dict[Case, Tensor], path: Path) -> None:
    """pi* and what both losses end at (the first beta_pi): the small class left, the full one right."""
    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    styles: dict[str, Any] = {
        "exo-rw": {"color": COLORS[0], "linewidth": 2.6},
        "dpo-rw": {"color": COLORS[1], "linestyle": "--"},
    }
    panels = ((left, "small", "small class: a normal"), (right, "full", "full class: any policy"))
    for axes, members, title in panels:
        axes.fill_between(world.y, world.solution.log_pi_star[0].exp(), color="0.85", label="pi*")
        for name, style in styles.items():
            log_p = next(p for case, p in curves.items() if (case.members, case.loss) == (members, name))
            axes.plot(world.y, log_p.exp(), label=name, **style)
        axes.set(xlabel="outcome y", ylim=(0, None))
        axes.set_title(title, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("probability")
    right.legend(frameon=False)
    figure.savefig(path)

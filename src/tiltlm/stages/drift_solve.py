"""STaR where every rationale is right equally often: neutral drift, as in the model of Wright and Fisher.

Rationales and answers of `data/letters.py`; every draw has a label of its own. One iteration (Zelikman et al. 2022,
arXiv:2203.14465, without rationalisation) draws rationales from pi and keeps those whose answer is right; pi becomes their
empirical distribution, which is maximum likelihood in a table. Every rationale is kept with the same chance, so the n that
are kept are n draws of pi itself:

    E pi_{t+1}(z) = pi_t(z),     E[1 − Σ_z pi_{t+1}(z)²] = (1 − 1/n)·(1 − Σ_z pi_t(z)²)

Nothing is learnt, and diversity dies out; which rationale is left at last is chance, each in proportion to pi_0. With a
fixed number of draws n is binomial, and the factor is its mean: of 1 − 1/n, and 1 where none was kept (pi stays).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from tiltlm.data.letters import LETTERS, RATIONALES, UNSURE, answers
from tiltlm.ruler.plots import COLORS
from tiltlm.ruler.table import read_report, table
from tiltlm.run import Recipe, Run
from tiltlm.seeds import stream
from tiltlm.settings import at_least_one
from tiltlm.stages.reporting import Row, estimate, row


def diversity(pi: Tensor) -> Tensor:
    """1 − Σ pi²: the chance that two draws differ, [...]."""
    return 1 - (pi**2).sum(-1)


def frequencies(drawn: Tensor, kept: Tensor, pi: Tensor) -> Tensor:
    """The empirical distribution of the draws [R, N] that were kept; that of before where none was. [R, 5]."""
    counts = torch.zeros_like(pi).scatter_add(1, drawn, kept.to(pi))
    total = counts.sum(1, keepdim=True)
    return torch.where(total > 0, counts / total.clamp_min(1), pi)


def of_accepted(pi: Tensor, p: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """An iteration that goes on until n are kept: they are draws of pi times the chance to be right. [R, 5] -> [R, 5]."""
    drawn = torch.multinomial(pi * p.mean(1), n, replacement=True, generator=generator)
    return frequencies(drawn, torch.ones_like(drawn), pi)


def of_drawn(pi: Tensor, p: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """An iteration of n draws, each with an answer and a label. [R, 5] -> [R, 5]."""
    drawn = torch.multinomial(pi, n, replacement=True, generator=generator)
    answer = torch.multinomial(p[drawn].flatten(0, 1), 1, generator=generator).reshape(drawn.shape)
    label = torch.randint(LETTERS, drawn.shape, generator=generator)
    return frequencies(drawn, answer == label, pi)


def factor_of_drawn(n: int, success: float = 1 / LETTERS) -> float:
    """E[1 − 1/m; m > 0] + P(m = 0), m binomial(n, success)."""
    m = torch.arange(n + 1, dtype=torch.float64)
    chance = torch.distributions.Binomial(n, torch.tensor(success, dtype=torch.float64)).log_prob(m).exp()
    return float(chance[0] + (chance[1:] * (1 - 1 / m[1:])).sum())


STEPS = {"accepted": of_accepted, "drawn": of_drawn}


@dataclass(frozen=True)
class Drift(Recipe):
    """STaR on a question whose answer is chance: diversity by its exact recursion, and simulated."""

    accepted: int = 20
    """Rationales that an iteration goes on to, where it stops at so many right ones."""

    drawn: int = 80
    """Rationales that an iteration draws, where it keeps the right ones."""

    iterations: int = 40
    """How many are simulated."""

    shown: tuple[int, ...] = (0, 1, 5, 10)
    """Iterations of the table."""

    runs: int = 1000
    """Simulations."""

    epsilon: float = 0.1
    """How often a rationale that names a letter is followed by another one; it changes nothing here."""

    seed: int = 0
    stage: ClassVar[str] = "solve"

    def __post_init__(self) -> None:
        at_least_one(self, "accepted", "drawn", "iterations")
        if self.runs < 2:
            raise ValueError(f"a spread needs two runs at least; got runs {self.runs}")
        if not all(0 <= each <= self.iterations for each in self.shown):
            raise ValueError(f"shown are iterations, 0 to {self.iterations}; got {self.shown}")
        answers(self.epsilon)  # refused here, before any work

    @property
    def name(self) -> str:
        return f"drift/{self.stage}"

    def build(self, run: Run[Any]) -> None:
        paths = {kind: self.simulated(kind) for kind in STEPS}
        run.write_json("report.json", list(self.rows(paths)))
        self.draw_picture(paths, run.folder / "drift.png")

    def size(self, kind: str) -> int:
        return self.accepted if kind == "accepted" else self.drawn

    def factor(self, kind: str) -> float:
        """What an iteration multiplies the expected diversity by."""
        return 1 - 1 / self.accepted if kind == "accepted" else factor_of_drawn(self.drawn)

    def exact(self, kind: str, iteration: int) -> float:
        """The expected diversity after so many iterations from the uniform reference."""
        return (1 - 1 / RATIONALES) * self.factor(kind) ** iteration

    def simulated(self, kind: str) -> Tensor:
        """pi after every iteration of every run, [iterations + 1, runs, 5]."""
        generator = stream(self.seed, "drift", kind).generator()
        p, pi = answers(self.epsilon), torch.full((self.runs, RATIONALES), 1 / RATIONALES, dtype=torch.float64)
        paths = [pi]
        for _ in range(self.iterations):
            paths.append(STEPS[kind](paths[-1], p, self.size(kind), generator))
        return torch.stack(paths)

    def rows(self, paths: dict[str, Tensor]) -> Iterator[Row]:
        """Diversity at the shown iterations, both ways; what z* has at the last, and how many runs have one left."""
        for kind, pi in paths.items():
            head = f"{self.size(kind)} {kind}"
            for t in self.shown:
                yield row(self, f"{head}, exact", f"diversity/{t}", self.exact(kind, t), unit="probability")
            yield row(self, f"{head}, exact", "p_unsure", 1 / RATIONALES, unit="probability")
            for t in self.shown:
                yield estimate(self, f"{head}, simulated", f"diversity/{t}", diversity(pi[t]), "probability")
            last = pi[-1]
            yield estimate(self, f"{head}, simulated", "p_unsure", last[:, UNSURE], "probability")
            alone = (last.amax(1) == 1).double()
            yield estimate(self, f"{head}, simulated", "one_left", alone, "rate")

    def show(self, run: Run[Any]) -> None:
        headings = {f"diversity/{t}": f"iteration {t}" for t in self.shown}
        headings |= {"p_unsure": f"P(z*), it. {self.iterations}", "one_left": f"one left, it. {self.iterations}"}
        rows = read_report(run.folder / "report.json")
        out = Console(width=130, highlight=False)
        out.print(table(rows, "1 − Σ pi², by iterations of STaR; every rationale is right 1 time in 4", headings))
        out.print(f"picture: {run.folder / 'drift.png'}", soft_wrap=True)

    def draw_picture(self, paths: dict[str, Tensor], path: Path) -> None:
        """Diversity, exact and simulated; and the share of z* in a few runs."""
        figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
        left, right = figure.subplots(1, 2)
        at = range(self.iterations + 1)
        for k, (kind, pi) in enumerate(paths.items()):
            label = f"{self.size(kind)} {kind}"
            left.plot(at, [self.exact(kind, t) for t in at], color=COLORS[k], label=f"{label}, exact")
            mean = diversity(pi).mean(1)
            left.plot(at, mean, "o", color=COLORS[k], markersize=3, label=f"{label}, simulated")
        for one in range(min(10, self.runs)):
            right.plot(at, paths["accepted"][:, one, UNSURE], color=COLORS[one % 8], linewidth=1)
        left.set(xlabel="iteration", ylabel="1 − Σ pi²", ylim=(0, 1))
        right.set(xlabel="iteration", ylabel="pi(z*)", ylim=(-0.02, 1.02))
        right.set_title(f"ten runs, {self.accepted} accepted", loc="left", fontsize=11)
        left.legend(frameon=False, fontsize=8)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path)

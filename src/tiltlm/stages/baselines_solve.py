"""Which baselines of quiet-STaR (Zelikman et al. 2024, arXiv:2403.09629) are unbiased: every tuple of K draws is listed.

K rationales z_1…z_K ~ pi are drawn for one y, R_k = log p(y|z_k), and the gradient of J = E_pi log p(y|z) is estimated by

    g = (1/K) Σ_k (R_k − b_k) ∇log pi(z_k)

    none                       b = 0                                     E g = ∇J
    mean of the others         b_k = mean of R_i, i ≠ k                  E g = ∇J
    log-mean of the others     b_k = log mean of exp R_i, i ≠ k          E g = ∇J
    mean of all                b = mean of R                             E g = (K − 1)/K · ∇J
    log-mean of all            b = log mean of exp R, the paper's        E g = ∇J − ∇L_K/K,  L_K = E log (1/K) Σ_k p(y|z_k)
    mean of all, clamped       max(R_k − mean of R, 0), the code's       no gradient of anything simple

The last lines: a b that all K share takes away E[b · (1/K) Σ_k ∇log pi(z_k)] = ∇E[b]/K. The last one drops what would push
worse rationales down. pi is a softmax of normal logits over a few rationales, p(y|z) uniform on (0, 1), both by `seed`;
gradients are in the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from tiltlm.policies.reinforce import leave_one_out
from tiltlm.ruler.plots import COLORS, MARKERS
from tiltlm.ruler.table import read_report, table
from tiltlm.run import Recipe, Run
from tiltlm.seeds import stream
from tiltlm.settings import at_least_one
from tiltlm.stages.reporting import Row, row

HEADINGS = {
    "length": "along ∇J",
    "cosine": "cosine to ∇J",
    "spread": "spread",
    "apart": "from its formula",
    "cosine_median": "median cosine",
    "cosine_least": "least cosine",
}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def others(returns: Tensor) -> Tensor:
    """Mean over the other draws of a tuple, [M, K]."""
    tuples, k = returns.shape
    return leave_one_out(returns.flatten(), torch.arange(tuples).repeat_interleave(k)).reshape(tuples, k)


BASELINES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda r: r,
    "mean of the others": lambda r: r - others(r),
    "log-mean of the others": lambda r: r - others(r.exp()).log(),
    "mean of all": lambda r: r - r.mean(1, keepdim=True),
    "log-mean of all": lambda r: r - r.exp().mean(1, keepdim=True).log(),
    "mean of all, clamped": lambda r: (r - r.mean(1, keepdim=True)).clamp_min(0),
}
"""What each makes of the returns of every tuple, [M, K] -> advantages [M, K]."""


@dataclass(frozen=True)
class World:
    """Logits of pi [S], and log p(y|z) [S]."""

    logits: Tensor
    log_p: Tensor

    @staticmethod
    def random(rationales: int, seed: int, number: int = 0) -> World:
        generator = stream(seed, "baselines", number).generator()
        logits = torch.randn(rationales, dtype=torch.float64, generator=generator)
        return World(logits, torch.rand(rationales, dtype=torch.float64, generator=generator).log())

    def tuples(self, k: int) -> tuple[Tensor, Tensor]:
        """Every tuple of k draws [S^k, k], and log p(y|z) of each."""
        drawn = torch.cartesian_prod(*[torch.arange(len(self.log_p))] * k).reshape(-1, k)
        return drawn, self.log_p[drawn]

    def log_mean(self, logits: Tensor, k: int) -> Tensor:
        """L_K = E log (1/K) Σ_k p(y|z_k)."""
        drawn, returns = self.tuples(k)
        return logits.log_softmax(0)[drawn].sum(1).exp() @ returns.exp().mean(1).log()

    def slope(self) -> Tensor:
        """∇J of J = E_pi log p(y|z), [S]."""
        pi = self.logits.softmax(0)
        return pi * (self.log_p - pi @ self.log_p)

    def estimates(self, baseline: str, k: int) -> tuple[Tensor, Tensor]:
        """g of every tuple [M, S], and its probability [M]."""
        drawn, returns = self.tuples(k)
        pi = self.logits.softmax(0)
        score = torch.eye(len(pi), dtype=torch.float64)[drawn] - pi  # ∇log pi(z_k), [M, K, S]
        return (BASELINES[baseline](returns)[..., None] * score).mean(1), pi[drawn].prod(1)

    def formula(self, baseline: str, k: int) -> Tensor | None:
        """E g as the docstring has it; None where it has none."""
        if baseline == "mean of all, clamped":
            return None
        if baseline == "mean of all":
            return self.slope() * (k - 1) / k
        if baseline == "log-mean of all":
            logits = self.logits.clone().requires_grad_()
            (further,) = torch.autograd.grad(self.log_mean(logits, k), logits)
            return self.slope() - further / k
        return self.slope()

    def cosine(self, baseline: str, k: int) -> float:
        """Of the angle between E g and ∇J."""
        g, p = self.estimates(baseline, k)
        return float(cosine(p @ g, self.slope()))

    def measure(self, baseline: str, k: int) -> dict[str, float]:
        """E g beside ∇J: how far along it (1: all of it), the cosine, and the estimate's spread in lengths of ∇J."""
        (g, p), slope = self.estimates(baseline, k), self.slope()
        mean, size = p @ g, slope.norm()
        numbers = {
            "length": mean @ slope / size**2,
            "cosine": cosine(mean, slope),
            "spread": (p @ ((g - mean) ** 2).sum(1)).sqrt() / size,
        }
        formula = self.formula(baseline, k)
        if formula is not None:
            numbers["apart"] = (mean - formula).norm() / size
        return {name: float(x) for name, x in numbers.items()}


@dataclass(frozen=True)
class Baselines(Recipe):
    """The expected gradient under every baseline, by enumeration of all tuples of K draws."""

    rationales: int = 5
    """How many there are to draw."""

    sizes: tuple[int, ...] = (2, 3, 4)
    """K, draws for one y."""

    worlds: int = 100
    """Random policies and likelihoods whose cosines' median and minimum are taken; the other numbers are of the first."""

    seed: int = 0
    stage: ClassVar[str] = "solve"

    def __post_init__(self) -> None:
        at_least_one(self, "worlds")
        if self.rationales < 2 or not self.sizes or min(self.sizes) < 2:
            raise ValueError(
                f"two rationales and two draws at least; got rationales {self.rationales}, sizes {self.sizes}"
            )
        if self.rationales ** max(self.sizes) > 100_000:
            raise ValueError(
                f"{self.rationales}^{max(self.sizes)} tuples are too many to be listed: fewer rationales or sizes"
            )

    @property
    def name(self) -> str:
        return f"baselines/{self.stage}"

    def build(self, run: Run[Any]) -> None:
        rows = list(self.measured())
        run.write_json("report.json", rows)
        draw_picture(rows, self.sizes, run.folder / "baselines.png")

    def measured(self) -> Iterator[Row]:
        """The numbers of the first world, and the median and least cosine of all."""
        worlds = [World.random(self.rationales, self.seed, number) for number in range(self.worlds)]
        for baseline in BASELINES:
            for k in self.sizes:
                numbers = worlds[0].measure(baseline, k)
                cosines = [world.cosine(baseline, k) for world in worlds]
                numbers |= {"cosine_median": median(cosines), "cosine_least": min(cosines)}
                for metric, x in numbers.items():
                    yield row(self, f"{baseline}, K {k}", metric, x, unit="lengths of ∇J")

    def show(self, run: Run[Any]) -> None:
        rows = read_report(run.folder / "report.json")
        out = Console(width=130, highlight=False)
        out.print(table(rows, "E g beside ∇J, every tuple of K draws", HEADINGS))
        out.print(f"median and least cosine: of {self.worlds} random policies; the others: of the first")
        out.print(f"picture: {run.folder / 'baselines.png'}", soft_wrap=True)


def draw_picture(rows: list[Row], sizes: tuple[int, ...], path: Path) -> None:
    """How much of ∇J is left, and at what angle, against K."""
    figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
    value = {(each["method"], each["metric"]): each["value"] for each in rows}
    for axes, metric in zip(figure.subplots(1, 2), ("length", "cosine_median"), strict=True):
        for k, name in enumerate(BASELINES):
            found = [value[f"{name}, K {size}", metric] for size in sizes]
            axes.plot(sizes, found, color=COLORS[k], marker=MARKERS[k], markersize=8 - k, label=name)
        axes.set(xlabel="K", xticks=sizes, ylabel=HEADINGS[metric])
        axes.spines[["top", "right"]].set_visible(False)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)

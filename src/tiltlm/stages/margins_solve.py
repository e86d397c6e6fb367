"""One pair in a table, always labelled alike: DPO's margin grows without bound, IPO's stops.

y_c is preferred to y_r every time, and their logits are free. Along the gradient flow of time t (gradient descent: t is the
number of steps times the rate) the margin m = h(y_c) − h(y_r), 0 at first, follows

    DPO   m' = 2·beta·σ(−beta·m)     =>  beta·m + exp(beta·m) = 1 + 2·beta²·t,   m ≈ log(2·beta²·t)/beta
    IPO   m' = 4·(1/(2·beta) − m)    =>  m = (1 − exp(−4t))/(2·beta)

(m' is −2·dL/dm: the logits of y_c and y_r move by the same, one up and one down.) So DPO never stops, and IPO stops at
1/(2·beta).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure
from rich.console import Console

from tiltlm.objective import positive
from tiltlm.ruler.plots import COLORS
from tiltlm.ruler.table import read_report, table
from tiltlm.run import Recipe, Run
from tiltlm.stages.reporting import row


def dpo_margin(beta: float, t: float) -> float:
    """m of DPO at time t, nats: the root of x + exp(x) = 1 + 2·beta²·t by Newton's method, which falls to it from above."""
    right = 1 + 2 * beta**2 * t
    x = math.log(right)
    while (step := (x + math.exp(x) - right) / (1 + math.exp(x))) > 1e-15 * max(1.0, x):
        x -= step
    return x / beta


def ipo_margin(beta: float, t: float) -> float:
    """m of IPO at time t, nats."""
    return -math.expm1(-4 * t) / (2 * beta)


MARGINS: dict[str, Callable[[float, float], float]] = {"dpo": dpo_margin, "ipo": ipo_margin}


@dataclass(frozen=True)
class Margins(Recipe):
    """The margin of one pair under DPO and IPO, along their gradient flows."""

    betas: tuple[float, ...] = (0.1, 0.5)
    """beta_pi of both losses."""

    times: tuple[float, ...] = (1.0, 1e2, 1e4, 1e6, 1e8)
    """Steps times learning rate."""

    seed: int = 0
    stage: ClassVar[str] = "solve"

    def __post_init__(self) -> None:
        positive(**{f"betas {x:g}": x for x in self.betas}, **{f"times {x:g}": x for x in self.times})
        if not self.betas or not self.times:
            raise ValueError("betas and times want one number at least")

    @property
    def name(self) -> str:
        return f"margins/{self.stage}"

    def build(self, run: Run[Any]) -> None:
        rows = [
            row(self, f"{name}, beta_pi {beta:g}", f"margin/{t:g}", margin(beta, t), unit="nats")
            for beta in self.betas
            for name, margin in MARGINS.items()
            for t in self.times
        ]
        run.write_json("report.json", rows)
        self.draw_picture(run.folder / "margins.png")

    def show(self, run: Run[Any]) -> None:
        headings = {f"margin/{t:g}": f"t {t:g}" for t in self.times}
        out = Console(width=130, highlight=False)
        rows = read_report(run.folder / "report.json")
        out.print(table(rows, "h(y_c) − h(y_r) of one pair, after t = steps × rate", headings))
        out.print("; ".join(f"beta_pi {beta:g}: 1/(2 beta_pi) = {1 / (2 * beta):g}" for beta in self.betas))
        out.print(f"picture: {run.folder / 'margins.png'}", soft_wrap=True)

    def draw_picture(self, path: Path) -> None:
        """Margins against time."""
        figure = Figure(figsize=(7.2, 3.8), dpi=110, layout="constrained")
        axes = figure.subplots()
        low, high = math.log10(min(self.times)) - 2, math.log10(max(self.times))
        at = [10 ** (low + (high - low) * k / 200) for k in range(201)]
        for k, beta in enumerate(self.betas):
            for (name, margin), style in zip(MARGINS.items(), ("-", "--"), strict=True):
                label = f"{name}, beta_pi {beta:g}"
                axes.plot(at, [margin(beta, t) for t in at], style, color=COLORS[k % len(COLORS)], label=label)
        axes.set(xscale="log", xlabel="steps × learning rate", ylabel="margin, nats")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(path)

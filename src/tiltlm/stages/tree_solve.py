"""The paper's two-branch tree (Q#, Fig. 4), solved exactly: Q# reaches V*, CD does not.

At the root, left (probability p_left) pays 0.1 for sure; right pays 1 with probability 0.05, else 0. CD sees
only the mean 0.05 of the right branch; Q# sees its chance of 1. The claim checked is J(Q#) = V* ≥ J(any), not
"Q# has lower KL", which counts the root's choice alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tiltlm.data.tree import ATOMS, tree
from tiltlm.exact import Solution, kl, solve
from tiltlm.models.table import TableValues
from tiltlm.ruler.table import read_report
from tiltlm.run import Recipe, Run
from tiltlm.samplers.guided import Guided
from tiltlm.samples import Tokens
from tiltlm.target import Target
from tiltlm.twists.cd import CD
from tiltlm.twists.q_sharp import QSharp
from tiltlm.twists.value import Rule, ValueTwist


@dataclass(frozen=True)
class Solve(Recipe):
    """Q# and CD on the tree, at every (p_left, beta) of the paper's discussion."""

    cases: tuple[tuple[float, float], ...] = ((0.5, 1.0), (0.5, 0.3), (0.5, 0.1), (0.5, 0.02), (0.1, 0.1))
    called: tyro.conf.Suppress[str] = "tree"
    """The name of the task that it is about."""

    seed: int = 0
    stage: ClassVar[str] = "solve"

    @property
    def name(self) -> str:
        return f"{self.called}/{self.stage}"

    def build(self, run: Run[Any]) -> None:
        rows = [row for p_left, beta in self.cases for row in solve_case(p_left, beta)]
        head = {"recipe": self.name, "stderr": 0.0, "n": 1, "seed": self.seed}
        run.write_json("report.json", [{**head, **row} for row in rows])

    def show(self, run: Run[Any]) -> None:
        show(read_report(run.folder / "report.json"))


def exact_values(solution: Solution) -> TableValues:
    """The exact law of the reward after each prefix, as the logits of a histogram over ATOMS."""
    values = TableValues(1, 2, 2, width=len(ATOMS)).requires_grad_(False)
    p = solution.log_ref.exp()[0]  # completions LL, LR, RL, RR
    law = torch.stack([p * (solution.reward[0] == atom) for atom in ATOMS], -1)
    values.tables[1].copy_(law.log()[None])
    values.tables[0].copy_(law.unflatten(0, (2, 2)).sum(1).log()[None])
    return values


def solve_case(p_left: float, beta: float) -> list[dict[str, Any]]:
    """P(right), E[r], KL to the reference and J of both decoders, and V*; report rows without head."""
    reference, reward = tree(p_left)
    solution = solve(Target(reference, reward, beta), Tokens.of([[0]]), horizon=2)
    values = exact_values(solution)
    rules: dict[str, Rule] = {"q-sharp": QSharp(beta), "cd": CD(beta)}
    rows = []
    for name, rule in rules.items():
        log_q = solution.density(Guided(reference, ValueTwist(values, rule, ATOMS)))
        numbers = {
            "p_right": (log_q.exp()[0, 2:].sum(), "rate"),
            "reward": ((log_q.exp() * solution.reward).sum(), "reward"),
            "kl_to_reference": (kl(log_q, solution.log_ref).sum(), "nats"),
            "objective": (solution.objective(log_q).sum(), "reward"),
            "v_star": (solution.v_star().sum(), "reward"),
        }
        method = f"{name} (p_left {p_left:g}, beta {beta:g})"
        rows += [{"method": method, "metric": m, "value": float(v), "unit": u} for m, (v, u) in numbers.items()]
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table on standard output."""
    metrics = {
        "p_right": "P(right)",
        "reward": "E[r]",
        "kl_to_reference": "KL(q‖ref)",
        "objective": "J",
        "v_star": "V*",
    }
    out = Table(
        title="the two-branch tree, solved exactly", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD
    )
    out.add_column("method")
    for heading in metrics.values():
        out.add_column(escape(heading), justify="right")
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["metric"]: row["value"] for row in rows if row["method"] == method}
        out.add_row(method, *(f"{found[m]:.5f}" for m in metrics))
    Console(width=110, highlight=False).print(out)

"""Rationales for an answer that is chance, under every objective: the numbers of `stages/aleatoric.py`, tables, picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from tiltlm.data.letters import LETTERS, RATIONALES, UNSURE, answers
from tiltlm.objective import positive
from tiltlm.ruler.plots import COLORS
from tiltlm.ruler.table import read_report, table
from tiltlm.run import Recipe, Run
from tiltlm.seeds import stream
from tiltlm.settings import at_least_one
from tiltlm.stages.aleatoric import (
    UNIFORM,
    code_change,
    deviation,
    em_step,
    information,
    learnt,
    log_likelihood,
    log_odds,
    matched,
    mean_of_tilts,
    one_pair_each,
    preferences,
    ranking,
    slope,
    solved,
)
from tiltlm.stages.reporting import Row, estimate, row

FIX = "log E_y[p(y|z)]"
STYLES = {"E_y[r]": "-", "E_y[exp(r/beta)]": "--", FIX: ":"}
"""The tilts, and how they are drawn."""


def at(beta: float) -> str:
    """The metric that holds P(z*) at a temperature."""
    return f"p_unsure/{beta:g}"


@dataclass(frozen=True)
class Aleatoric(Recipe):
    """Rationales for an answer that is chance: which of them each objective asks for, exactly."""

    epsilons: tuple[float, ...] = (0.0, 0.01, 0.1)
    """How often a rationale that names a letter is followed by another one; the first also for what has no other."""

    betas: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0, 10.0)
    """Temperatures of the tilted policies."""

    beta_pi: float = 0.1
    """DPO's beta."""

    steps: int = 30
    """Of gradient descent on DPO."""

    questions: int = 1000
    """Each with one pair to learn from, and one held out."""

    seed: int = 0
    stage: ClassVar[str] = "solve"

    def __post_init__(self) -> None:
        at_least_one(self, "questions")
        positive(beta_pi=self.beta_pi, steps=self.steps, **{f"betas {beta:g}": beta for beta in self.betas})
        if not self.epsilons or not self.betas:
            raise ValueError("epsilons and betas want one number at least")
        for epsilon in self.epsilons:
            answers(epsilon)  # refused here, before any work

    @property
    def name(self) -> str:
        return f"aleatoric/{self.stage}"

    def build(self, run: Run[Any]) -> None:
        rows = [*self.tilted(), *self.matching(), *self.closed_form(), *self.bits(), *self.labels(), *self.pairs()]
        run.write_json("report.json", rows)
        draw_picture(self.epsilons, self.betas, run.folder / "aleatoric.png")

    def tilted(self) -> Iterator[Row]:
        """P(z*) of the tilted policies at every temperature."""
        for tilt in STYLES:
            for epsilon in self.epsilons:
                for beta in self.betas:
                    p_unsure = float(tilted(tilt, answers(epsilon), beta)[UNSURE])
                    yield row(self, f"{tilt}, eps {epsilon:g}", at(beta), p_unsure, unit="probability")

    def matching(self) -> Iterator[Row]:
        """Matched policies; the README's log-odds; policies that the likelihood does not tell apart."""
        for epsilon in self.epsilons:
            each = matched(answers(epsilon))
            yield from self._policy(f"matched, y = A, eps {epsilon:g}", each[0])
            yield from self._policy(f"matched, every y, eps {epsilon:g}", each.mean(0))
        p, head = answers(self.epsilons[0]), f"eps {self.epsilons[0]:g}"
        weight = matched(p)[0]
        for name, pi in (("matched", weight), ("nearly sure", nearly_sure(weight))):
            odds = {"log_odds": log_odds(weight, pi)}
            yield from self._policy(f"log-odds, y = A, {name}, {head}", pi, odds)
        for name, pi in standing().items():
            likelihood = {"log_likelihood": log_likelihood(pi, p)}
            yield from self._policy(f"one EM step from {name}, {head}", em_step(pi, p), likelihood)

    def _policy(self, method: str, pi: Tensor, further: Mapping[str, float] | None = None) -> Iterator[Row]:
        numbers = {"p_a": float(pi[0]), "p_b": float(pi[1]), "p_unsure": float(pi[UNSURE])}
        for metric, x in numbers.items():
            yield row(self, method, metric, x, unit="probability")
        for metric, x in (further or {}).items():
            yield row(self, method, metric, x, unit="nats")

    def closed_form(self) -> Iterator[Row]:
        """J against its closed form, where every reward is finite."""
        generator = stream(self.seed, "aleatoric").generator()
        for epsilon in self.epsilons:
            for beta in self.betas if epsilon > 0 else ():
                far = deviation(solved(answers(epsilon).log().mean(1), beta), generator)
                yield row(self, f"J, eps {epsilon:g}, beta {beta:g}", "deviation", far, unit="reward")

    def bits(self) -> Iterator[Row]:
        """Mutual information, and code length by each kind of rationale; what is infinite is left out."""
        pi = UNIFORM.exp()
        for epsilon in self.epsilons:
            p = answers(epsilon)
            numbers = {
                "information": information(pi, p),
                "true_information": information(pi, torch.full_like(p, 1 / LETTERS)),
                "code_change": code_change(pi, p),
                "code_change_letters": code_change(standing()["letters alone"], p),
                "code_change_unsure": code_change(standing()["z* alone"], p),
            }
            for metric, x in numbers.items():
                if math.isfinite(x):
                    yield row(self, f"eps {epsilon:g}", metric, x, unit="bits")

    def labels(self) -> Iterator[Row]:
        """DPO on every label, and on one."""
        p = answers(self.epsilons[0])
        fresh = preferences(p, range(LETTERS))
        for name, wins in (("every label", fresh), ("one label", preferences(p, [0]))):
            log_pi, method = learnt(wins, self.beta_pi, self.steps), f"{name}, eps {self.epsilons[0]:g}"
            numbers = {
                "slope": (slope(UNIFORM, wins, self.beta_pi).norm(), "nats"),
                "margin": (log_pi[0] - log_pi[1], "nats"),
                "train_ranking": (ranking(log_pi, wins), "probability"),
                "fresh_ranking": (ranking(log_pi, fresh), "probability"),
            }
            for metric, (x, unit) in numbers.items():
                yield row(self, method, metric, float(x), unit=unit)

    def pairs(self) -> Iterator[Row]:
        """DPO on finite data: a pair of every question, and another one of each held out."""
        p, generator = answers(self.epsilons[0]), stream(self.seed, "aleatoric", "pairs").generator()
        train, held_out = (one_pair_each(p, self.questions, generator) for _ in range(2))
        log_pi, method = learnt(train, self.beta_pi, self.steps), f"one pair each, eps {self.epsilons[0]:g}"
        for metric, wins in (("train_ranking", train), ("fresh_ranking", held_out)):
            yield estimate(self, method, metric, ranking(log_pi, wins), "rate")

    def show(self, run: Run[Any]) -> None:
        rows = read_report(run.folder / "report.json")
        out = Console(width=130, highlight=False)
        for title, headings in self.tables().items():
            out.print(table([each for each in rows if each["metric"] in headings], title, headings))
        far = [each["value"] for each in rows if each["metric"] == "deviation"]
        if far:
            out.print(f"J(pi) = beta·(log Z − KL(pi‖pi*)): largest deviation over 1000 pi a case {max(far):.0e}")
        if 0.0 in self.epsilons:
            out.print(r"eps 0: E_y\[r] of a rationale that names a letter, and what its code saves, are −∞")
        out.print(f"picture: {run.folder / 'aleatoric.png'}", soft_wrap=True)

    def tables(self) -> dict[str, dict[str, str]]:
        """Title -> metric -> what stands over it."""
        odds = {"log_odds": "log-odds", "log_likelihood": "log-likelihood"}
        return {
            "P(z*), by what pi_ref is tilted with": {at(beta): f"beta {beta:g}" for beta in self.betas},
            "matching one sample or the mean over y, and EM": {
                "p_a": "P(it is A)", "p_b": "P(it is B)", "p_unsure": "P(z*)", **odds,
            },
            "bits": {
                "information": "model's I(z;y)", "true_information": "true I(z;y)", "code_change": "code saved",
                "code_change_letters": "by a letter", "code_change_unsure": "by z*",
            },
            f"DPO, beta_pi {self.beta_pi:g}, {self.steps} steps": {
                "slope": "gradient at pi_ref", "margin": "h(A) − h(B)", "train_ranking": "ranked right",
                "fresh_ranking": "on fresh labels",
            },
        }  # fmt: skip


def tilted(tilt: str, p: Tensor, beta: float) -> Tensor:
    """The policy [5] that one of `STYLES` asks for."""
    if tilt == "E_y[exp(r/beta)]":
        return mean_of_tilts(p, beta)
    reward = p.log().mean(1) if tilt == "E_y[r]" else p.mean(1).log()
    return solved(reward, beta).log_pi_star[0].exp()


def nearly_sure(pi: Tensor, left: float = 1e-6) -> Tensor:
    """pi but for `left` moved to the first rationale."""
    first = torch.nn.functional.one_hot(torch.tensor(0), RATIONALES).double()
    return (1 - left) * first + left * pi


def standing() -> dict[str, Tensor]:
    """Three policies that the marginal likelihood does not tell apart."""
    unsure = torch.nn.functional.one_hot(torch.tensor(UNSURE), RATIONALES).double()
    return {"uniform": UNIFORM.exp(), "letters alone": (1 - unsure) / LETTERS, "z* alone": unsure}


def draw_picture(epsilons: tuple[float, ...], betas: tuple[float, ...], path: Path) -> None:
    """P(z*) against the temperature, one line a tilt and epsilon (the README's fix: the same for all)."""
    figure = Figure(figsize=(7.2, 4.0), dpi=110, layout="constrained")
    axes = figure.subplots()
    at = torch.logspace(math.log10(min(betas)), math.log10(max(betas)), 50).tolist()
    for tilt, style in STYLES.items():
        for k, epsilon in enumerate(epsilons if tilt != FIX else epsilons[:1]):
            color, label = (
                ("0.4", f"{tilt}, every eps")
                if tilt == FIX
                else (COLORS[k % len(COLORS)], f"{tilt}, eps {epsilon:g}")
            )
            p_unsure = [float(tilted(tilt, answers(epsilon), beta)[UNSURE]) for beta in at]
            axes.plot(at, p_unsure, style, color=color, label=label)
    axes.set(xscale="log", xlabel="beta", ylabel="P(z*)", ylim=(-0.02, 1.02))
    axes.set_title("how likely is the rationale that names no letter?", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)

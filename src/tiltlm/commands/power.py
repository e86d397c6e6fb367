"""`tiltlm power --questions N`: what a comparison of two accuracies can show, before anything is run."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from tiltlm.commands.arguments import settings_from
from tiltlm.ruler.power import discordance_of_samples, least_difference, questions_needed

USUAL = (0.1, 0.2, 0.3)
"""Discordances that are shown where none is named."""


@dataclass(frozen=True)
class Power:
    """The smallest difference of two accuracies that is shown four times in five (two-sided, 5%), and how many questions a
    wished difference needs."""

    questions: int
    """How many questions both models are asked."""

    discordance: float | None = None
    """The share of questions that one model answers right and the other does not."""

    samples: int = 0
    """Sampled answers a question, averaged (avg@K); wants --disagreement in place of --discordance."""

    disagreement: float = 0.0
    """E[p(1 − p)] over questions, p a model's chance of a right answer: half the share of questions on which two samples of
    one model disagree."""

    difference: float = 0.01
    """The wished difference (0.01: one point)."""


def power(args: list[str]) -> int:
    """Run the command."""
    settings = settings_from(args, Power, "power")
    out = Table(
        title=f"{settings.questions:,} questions; two-sided, 5%; shown four times in five", title_justify="left",
        header_style="bold", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    headings = (
        "discordance",
        "least difference, points",
        f"questions to show {100 * settings.difference:g} points",
    )
    for heading in headings:
        out.add_column(heading, justify="right")
    for d in _discordances(settings):
        least, needed = least_difference(settings.questions, d), questions_needed(settings.difference, d)
        out.add_row(f"{d:.3g}", f"{100 * least:.2f}", f"{needed:,}")
    Console(width=110, highlight=False).print(out)
    if settings.samples:
        print(
            "Both models with the same chance on every question; where chances differ, so do answers, and least is more."
        )
    return 0


def _discordances(settings: Power) -> tuple[float, ...]:
    if bool(settings.samples) != bool(settings.disagreement):
        raise ValueError(
            "--samples K and --disagreement E[p(1 − p)] belong together: --samples 4 --disagreement 0.11, say"
        )
    if settings.samples and settings.discordance is not None:
        raise ValueError("--discordance is of one answer a question, --samples of averages: leave one of them out")
    if settings.samples:
        return (discordance_of_samples(settings.disagreement, settings.samples),)
    return USUAL if settings.discordance is None else (settings.discordance,)

"""Pictures of what the ruler measured, from the rows that are stored with the runs: nothing is measured again.

Every function writes one PNG and returns its path. Colours are Okabe and Ito's, which colour-blind readers tell apart;
shape and line style say the same again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiltlm.ruler.agreement import possible
from tiltlm.ruler.table import reach

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = "osD^vP*X"
ESTIMATORS = {"iwae": "importance sampling", "smc": "SMC, every step", "smc-ess": "SMC, when ESS halves"}


def _axes(title: str, xlabel: str, ylabel: str, size: tuple[float, float] = (7.6, 4.4)) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Figure, path: str | Path) -> Path:
    figure.savefig(path)
    return Path(path)


def _reaches(rows: Rows) -> list[list[float]]:
    """Error bars of several rows: how far their 95% intervals go below, and above."""
    ends = [reach(row) for row in rows]
    return [[end[k][0] for end in ends] for k in (0, 1)]


def bounds_plot(rows: Rows, path: str | Path, title: str = "log Z between its bounds") -> Path:
    """Lower and upper bounds of log Z against particles: one colour an estimator, dashed for the reference proposal."""
    figure, axes = _axes(title, "particles K", "bound of log Z, nats")
    series = dict.fromkeys((row["estimator"], row["proposal"]) for row in rows)
    for estimator, proposal in series:
        color = COLORS[list(ESTIMATORS).index(estimator)]
        for side in ("lower", "upper"):
            own = [r for r in rows if (r["estimator"], r["proposal"], r["side"]) == (estimator, proposal, side)]
            own.sort(key=lambda r: r["k"])
            axes.errorbar(
                [r["k"] for r in own], [r["value"] for r in own], yerr=_reaches(own),
                color=color, marker="^" if side == "lower" else "v", markersize=5, capsize=2, elinewidth=1,
                linestyle="-" if proposal == "twist" else "--",
                label=f"{ESTIMATORS[estimator]}, {proposal} proposal" if side == "lower" else None,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return _save(figure, path)


def kl_bars(rows: Rows, path: str | Path, title: str = "how far from pi*") -> Path:
    """Both KLs of every method, with 95% intervals; methods in the order of KL(q‖pi*).

    An estimate below 0 is drawn below 0; one that lies there beyond chance raises ValueError.
    """
    names = {"kl_to_target": "KL(q‖pi*)", "kl_from_target": "KL(pi*‖q)"}
    found = {(r["method"], r["metric"]): r for r in rows if r["metric"] in names}
    methods = list(dict.fromkeys(m for m, _ in found))
    methods.sort(key=lambda m: found[m, "kl_to_target"]["value"] if (m, "kl_to_target") in found else 1e9)
    figure, axes = _axes(title, "nats", "", (7.6, 0.9 + 0.42 * max(1, len(methods))))
    for k, (metric, label) in enumerate(names.items()):
        own = [(i, found[m, metric]) for i, m in enumerate(methods) if (m, metric) in found]
        values = [possible(r)["value"] for _, r in own]
        at = [i + (k - 0.5) * 0.36 for i, _ in own]
        axes.barh(
            at,
            values,
            0.34,
            xerr=_reaches([r for _, r in own]),
            color=COLORS[k],
            label=label,
            error_kw={"elinewidth": 1},
        )
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, loc="upper right")
    return _save(figure, path)


def ess_plot(trace: Mapping[str, Any], path: str | Path, title: str = "effective sample size") -> Path:
    """ESS before every step of an SMC run; a mark where the particles were resampled."""
    figure, axes = _axes(title, "tokens drawn", f"ESS of {trace['particles']} particles")
    ess, resampled = np.array(trace["ess"]), np.array(trace["resampled"], dtype=bool)
    axes.plot(ess, color=COLORS[0], linewidth=1.5)
    axes.plot(
        np.flatnonzero(resampled), ess[resampled], "o", color=COLORS[1], markersize=5, label="resampled here"
    )
    axes.set_ylim(0, trace["particles"] * 1.05)
    if resampled.any():
        axes.legend(frameon=False)
    return _save(figure, path)


def genealogy_plot(trace: Mapping[str, Any], path: str | Path, title: str = "particle genealogy") -> Path:
    """Every particle's line to its parent, step by step; lineages that reach the end dark, the others pale."""
    from matplotlib.collections import LineCollection

    ancestors = np.array(trace["ancestors"])  # [T, K]
    steps, k = ancestors.shape
    figure, axes = _axes(
        title, "tokens drawn", "particle", (min(12.0, 4 + 0.12 * steps), min(7.0, 2.2 + 0.06 * k))
    )
    alive = np.zeros((steps, k), dtype=bool)  # which particle of step t has a descendant at the end
    now = np.ones(k, dtype=bool)
    for t in range(steps - 1, -1, -1):
        alive[t] = now
        before = np.zeros(k, dtype=bool)
        before[ancestors[t][now]] = True
        now = before
    lines: dict[bool, list[list[tuple[float, float]]]] = {False: [], True: []}
    for t in range(1, steps):
        for slot in range(k):
            lines[bool(alive[t, slot])].append([(t, float(ancestors[t, slot])), (t + 1, float(slot))])
    for kept, color, width in ((False, "0.8", 0.6), (True, COLORS[0], 1.0)):
        axes.add_collection(LineCollection(lines[kept], colors=color, linewidths=width, zorder=1 + kept))
    axes.set_xlim(1, steps)
    axes.set_ylim(-1, k)
    axes.grid(visible=False)
    survivors = len(np.unique(_roots(ancestors)))
    axes.set_title(f"{title}: {survivors} of {k} first tokens have descendants", loc="left", fontsize=11)
    return _save(figure, path)


def _roots(ancestors: np.ndarray) -> np.ndarray:
    """Of every final particle, the slot of its first token."""
    now = np.arange(ancestors.shape[1])
    for t in range(len(ancestors) - 1, 0, -1):
        now = ancestors[t][now]
    return now


def curve_plot(rows: Rows, metric: str, path: str | Path, title: str = "") -> Path:
    """A metric at checkpoints against updates, one line a method (seeds apart)."""
    figure, axes = _axes(title or metric, "updates", "nats")
    own = [row for row in rows if row["metric"] == metric]
    methods = list(dict.fromkeys(row["method"] for row in own))
    for method, seed in dict.fromkeys((row["method"], row.get("seed", 0)) for row in own):
        line = sorted(
            (r for r in own if (r["method"], r.get("seed", 0)) == (method, seed)), key=lambda r: r["step"]
        )
        k = methods.index(method)
        first = seed == next(r.get("seed", 0) for r in own if r["method"] == method)
        axes.errorbar(
            [r["step"] for r in line], [r["value"] for r in line], yerr=_reaches(line),
            color=COLORS[k % 8], marker=MARKERS[k % 8], markersize=4, capsize=2, label=method if first else None,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False)
    return _save(figure, path)


def budget_plot(rows: Rows, path: str | Path, title: str = "against labels bought") -> Path:
    """Reward and J against labels, and how often the judge is right against updates; bands: one s.e. over seeds."""
    from matplotlib.figure import Figure

    found = {(r["method"], r["metric"], r["updates"]): r for r in rows}
    methods = list(dict.fromkeys(r["method"] for r in rows))
    panels = [
        ("reward", "labels", "gold reward"),
        ("objective", "labels", "J"),
        ("judge_accuracy", "updates", "judge right"),
    ]
    panels = [panel for panel in panels if any(r["metric"] == panel[0] for r in rows)]
    figure = Figure(figsize=(4.4 * len(panels), 4.2), dpi=130, layout="constrained")
    for axes, (metric, against, label) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for k, method in enumerate(methods):
            own = [r for r in rows if (r["method"], r["metric"]) == (method, metric)]
            own.sort(key=lambda r: r["updates"])
            at = [
                r["updates"] if against == "updates" else found[method, "labels", r["updates"]]["value"]
                for r in own
            ]
            y, error = (np.array([r[name] or 0.0 for r in own]) for name in ("value", "stderr"))
            alike = len(set(at)) == 1 < len(own)  # all labels were bought before the first step: where it ends
            at, y, error = (at[-1:], y[-1:], error[-1:]) if alike else (at, y, error)
            color = COLORS[k % len(COLORS)]
            axes.plot(
                at, y, color=color, marker=MARKERS[k % len(MARKERS)], markersize=3.5, linewidth=1.3, label=method
            )
            axes.fill_between(at, y - error, y + error, color=color, alpha=0.15, linewidth=0)
        axes.set(xlabel=against if against == "updates" else "labels bought", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return _save(figure, path)


ACCURACIES = {
    "accuracy[greedy]": "greedy, validation", "reward": "E[r], test", "train_accuracy": "drawn, training",
    "accuracy[greedy, always right]": "greedy, of those that were always right",
}  # fmt: skip
DISTANCES = {"kl_to_reference": "KL(q‖ref)", "kl_to_target": "KL(q‖pi*)", "kl_from_target": "KL(pi*‖q)"}


def rounds_plot(rows: Rows, path: str | Path, title: str = "") -> Path:
    """Over rounds: accuracies; distances to reference and target; of how many prompts all answers were right, some, none.

    Rows have a `round`; what a round learnt from (training draws, shares) stands where the policy stood that drew it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 3.7), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    left, middle, right = figure.subplots(1, 3)
    before = {"train_accuracy", "always_right", "sometimes_right", "never_right"}

    def line(axes: Axes, metric: str, label: str, k: int) -> None:
        own = sorted((r for r in rows if r["metric"] == metric), key=lambda r: r["round"])
        if not own:
            return
        x = [r["round"] - (metric in before) for r in own]
        y = [r["value"] for r in own]
        axes.errorbar(
            x, y, _reaches(own), marker=MARKERS[k], color=COLORS[k], markersize=5, capsize=2, label=label
        )

    for k, (metric, label) in enumerate(ACCURACIES.items()):
        line(left, metric, label, k)
    left.set(title="right answers", ylim=(-0.03, 1.03))
    for k, (metric, label) in enumerate(DISTANCES.items()):
        line(middle, metric, label, k)
    middle.set(title="distances, nats")
    floor = {int(r["round"]): 0.0 for r in rows if r["metric"] == "always_right"}
    for k, (metric, label) in enumerate(
        (("always_right", "always"), ("sometimes_right", "some"), ("never_right", "never"))
    ):
        own = {int(r["round"]): r["value"] for r in rows if r["metric"] == metric}
        x = sorted(own)
        right.bar(
            [r - 1 for r in x],
            [own[r] for r in x],
            bottom=[floor[r] for r in x],
            color=COLORS[(2, 4, 1)[k]],
            label=label,
        )
        floor = {r: floor[r] + own[r] for r in x}
    right.set(title="training prompts, by their answers right")
    for axes in (left, middle, right):
        axes.set_xlabel("rounds")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(
                frameon=axes is right, framealpha=0.9, fontsize=8, loc="lower right" if axes is right else "best"
            )
    return _save(figure, path)


def of_draws_plot(rows: Rows, path: str | Path, title: str = "") -> Path:
    """Right answers against the number of draws that one is chosen of, a line for every way to choose; rows have `draws`
    and `chosen`."""
    figure, axes = _axes(title, "draws of a question", "right")
    for k, chosen in enumerate(dict.fromkeys(row["chosen"] for row in rows)):
        own = sorted((row for row in rows if row["chosen"] == chosen), key=lambda row: row["draws"])
        axes.errorbar(
            [row["draws"] for row in own], [row["value"] for row in own], yerr=_reaches(own), color=COLORS[k],
            marker=MARKERS[k], markersize=5, capsize=2, elinewidth=1, label=chosen,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False)
    return _save(figure, path)

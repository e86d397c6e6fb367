"""The frontier: expected reward against KL to the reference, with the exact optimum's curve drawn through it.

No decoder can lie above the curve of pi* over all beta: for its KL, pi* has the greatest reward there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiltlm.ruler.agreement import possible
from tiltlm.ruler.log_z import BinaryTarget
from tiltlm.ruler.table import reach


def binary_curve(log_p: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(pi*‖pi_ref), E_pi*[r]) averaged over prompts, for every beta; log_p [P] as in `BinaryTarget`."""
    targets = [BinaryTarget(log_p, float(beta)) for beta in betas]
    kl = torch.stack([t.kl_to_reference.mean() for t in targets])
    return kl.cpu(), torch.stack([t.success.mean() for t in targets]).cpu()


ENOUGH = 100
"""Draws that rejection would have kept, from which a point of the curve is drawn: Z is then known to some 10%."""


def tilted_curve(reward: Tensor, betas: Tensor, r_max: float) -> tuple[Tensor, Tensor]:
    """(KL(pi*‖pi_ref), E_pi*[r]) by importance weights of rewards [N] of plain draws, for every beta that N draws can
    tell: Σ exp((r − r_max)/beta), the draws that rejection would keep of them, is 100 at least.

    KL(pi*‖pi_ref) = E_pi*[r]/beta − log Z. r_max: the reward's upper bound. The draws' own effective sample size would
    not do: it is largest where the draws that matter were never met, and the curve would then run *below* what methods
    reach.
    """
    reward, points = reward.double().cpu(), []
    if bool((reward > r_max + 1e-5 * max(1.0, abs(r_max))).any()):
        raise ValueError(
            f"r_max is {r_max}, but a draw has r = {reward.max().item():.6g}; state the reward's upper bound"
        )
    for beta in betas.tolist():
        log_w = reward / beta
        if float((log_w - r_max / beta).exp().sum()) < ENOUGH:
            continue
        log_z = log_w.logsumexp(0) - math.log(len(reward))
        expected = (log_w.softmax(0) * reward).sum()
        points.append(torch.stack([expected / beta - log_z, expected]))
    kl, value = torch.stack(points, 1) if points else torch.zeros(2, 0, dtype=torch.float64)
    return kl, value


MARKERS = "osD^vP*X<>"


def frontier_plot(
    rows: Sequence[Mapping[str, Any]],
    curve: tuple[Tensor, Tensor] | None,
    path: str | Path,
    title: str = "",
    label: str = "optimum, every beta (exact)",
    ways: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Draw every method of the report `rows` (their reward and kl_to_reference, with error bars); writes a PNG.

    A method measured at several temperatures, "name" and "name (beta …)", keeps one colour; the further ones are hollow.
    The KL axis is a square root, because near the reference reward grows like the root of the KL. ways: the same two
    metrics at checkpoints (`updates`), drawn as a thin line for each method.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.0), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    if curve is not None:
        axes.plot(curve[0], curve[1], color="0.25", linewidth=1.5, zorder=1, label=label)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    families = list(dict.fromkeys(name.split(" (beta")[0] for name in methods))
    for name in methods:
        point = _point(rows, name)
        if point is not None:
            family = families.index(name.split(" (beta")[0])
            _way(axes, [row for row in ways if row["method"] == name], f"C{family % 10}")
            _mark(axes, name, family, *point)
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
    axes.set_xlim(left=0)
    axes.set_xticks([0, 0.02, 0.1, 0.25, 0.5, 1, 2, 4, 8], ["0", "0.02", "0.1", "0.25", "0.5", "1", "2", "4", "8"])
    far = [] if curve is None else curve[0].tolist()
    axes.set_xlim(0, 1.3 * max([*far, *(_reach(rows, name) for name in methods)], default=0.0) or 1.0)
    axes.set(xlabel="KL(q ‖ reference), nats (square-root scale)", ylabel="expected reward E[r]")
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside right center")
    figure.savefig(path)
    return Path(path)


def _mark(axes: Any, name: str, k: int, kl: Mapping[str, Any], reward: Mapping[str, Any]) -> None:
    """One method's point; later methods are smaller, so that points on top of each other all show."""
    color = f"C{k % 10}"
    axes.errorbar(
        kl["value"], reward["value"], xerr=reach(kl), yerr=reach(reward), fmt=MARKERS[k % len(MARKERS)], capsize=2,
        color=color, markerfacecolor="white" if "(beta" in name else color, markersize=max(12 - k, 6), label=name,
        elinewidth=1, zorder=3 + k, clip_on=False,
    )  # fmt: skip


def _way(axes: Any, rows: Sequence[Mapping[str, Any]], color: str) -> None:
    """A method's checkpoints, in the order of updates, as small dots on a thin line."""
    found = [_point([row for row in rows if row["updates"] == at], rows[0]["method"]) for at in _updates(rows)]
    places = [(kl["value"], reward["value"]) for kl, reward in (point for point in found if point is not None)]
    if places:
        axes.plot(
            *zip(*places, strict=True), color=color, linewidth=0.8, marker=".", markersize=4, alpha=0.6, zorder=2
        )


def _updates(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted({row["updates"] for row in rows})


def _reach(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    point = _point(rows, name)
    return 0.0 if point is None else point[0]["value"] + float(reach(point[0])[1][0])


def _point(rows: Sequence[Mapping[str, Any]], method: str) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    found = {row["metric"]: possible(row) for row in rows if row["method"] == method}
    if "reward" not in found or "kl_to_reference" not in found:
        return None
    return found["kl_to_reference"], found["reward"]

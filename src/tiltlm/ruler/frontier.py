"""The frontier: expected reward against KL to the reference, with the exact optimum's curve drawn through it.

No decoder can lie above the curve of pi* over all beta: for its KL, pi* has the greatest reward there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltlm.ruler.log_z import BinaryTarget


def binary_curve(log_p: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(pi*‖pi_ref), E_pi*[r]) averaged over prompts, for every beta; log_p [P] as in `BinaryTarget`."""
    targets = [BinaryTarget(log_p, float(beta)) for beta in betas]
    kl = torch.stack([t.kl_to_reference.mean() for t in targets])
    return kl, torch.stack([t.success.mean() for t in targets])


def frontier_plot(
    rows: Sequence[Mapping[str, Any]], curve: tuple[Tensor, Tensor], path: str | Path, title: str = ""
) -> Path:
    """Draw every method of the report `rows` (their reward and kl_to_reference, with error bars); writes a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.0), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(curve[0], curve[1], color="0.35", zorder=1, label="optimum pi*, every beta (exact)")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    points = [(name, _point(rows, name)) for name in methods]
    drawn = [(name, point) for name, point in points if point is not None]
    for k, (name, (kl, reward)) in enumerate(drawn):
        axes.errorbar(
            kl["value"], reward["value"], xerr=_bar(kl), yerr=_bar(reward), fmt="osD^vP*X<>"[k % 10], capsize=3,
            color=f"C{k % 10}", markersize=7, label=name, zorder=2,
        )  # fmt: skip
    axes.set_xlabel("KL(q ‖ reference), nats")
    axes.set_ylabel("expected reward E[r]")
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)
    return Path(path)


def _point(rows: Sequence[Mapping[str, Any]], method: str) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    found = {row["metric"]: row for row in rows if row["method"] == method}
    if "reward" not in found or "kl_to_reference" not in found:
        return None
    return found["kl_to_reference"], found["reward"]


def _bar(row: Mapping[str, Any]) -> float:
    """1.96 standard errors; 0 where there is none."""
    return 1.96 * row["stderr"] if row["stderr"] > 0 else 0.0

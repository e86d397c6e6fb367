"""The table, the picture and the files that `star-graph/evaluate` ends in."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from tiltlm.data.star_graph_tokens import AnswerKey
from tiltlm.exact import log_density
from tiltlm.models.base import LanguageModel
from tiltlm.recipes.star_graph_lab import Lab
from tiltlm.recipes.star_graph_settings import Test
from tiltlm.ruler.frontier import binary_curve, frontier_plot
from tiltlm.ruler.log_z import BinaryTarget
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.ruler.table import read_report, table
from tiltlm.run import Run
from tiltlm.samples import Samples


def write_report(
    run: Run[Any], lab: Lab, reference: LanguageModel, beta: float, test: Test, methods: list[str]
) -> None:
    """report.json, frontier.png and results_deg_D_path_L.json."""
    ruler = lab.ruler(reference, beta, test)
    _, key = lab.prompts("test", test.graphs)
    log_arms = arm_log_probs(reference, ruler, key, test)
    seed, name = run.recipe.seed, run.recipe.name
    measured, _ = ruler.measure(reference)
    rows = measured.rows(name, "reference", seed)
    for method in methods:
        rows += read_report(run.inputs[method].folder / "report.json")
    rows += optimum(ruler, log_arms).rows(name, "optimum (exact)", seed)
    run.write_json("report.json", rows)
    run.write_json(f"results_deg_{lab.world.degree}_path_{lab.world.path_length}.json", results(rows, beta))
    curve = binary_curve(log_arms[:, 0], torch.logspace(-1.7, 2, 120))
    frontier_plot(rows, curve, run.folder / "frontier.png", title_of(lab))


def title_of(lab: Lab) -> str:
    return f"star graph G({lab.world.degree},{lab.world.path_length}), seed {lab.seed}"


def show_report(run: Run[Any], lab: Lab, beta: float) -> None:
    """Print the table of the target's beta, the one of the other temperatures, and where the picture is."""
    rows: list[dict[str, Any]] = read_report(run.folder / "report.json")
    title, out = title_of(lab), Console(width=130, highlight=False)
    other = [row for row in rows if "(beta" in row["method"]]
    out.print(table([row for row in rows if row not in other], f"{title}: pi* ∝ pi_ref · exp(r/{beta:g})"))
    if other:
        out.print(table(other, "the same value model at other temperatures, each against its own pi*"))
    out.print("KL and log Z in nats; ± is one standard error over test graphs.")
    out.print(f"picture: {run.folder / 'frontier.png'}", soft_wrap=True)


def arm_log_probs(reference: LanguageModel, ruler: Ruler, key: AnswerKey, test: Test) -> Tensor:
    """log pi_ref of every arm of every test graph, [P, d], the right one first; exact."""
    arms = key.arms.to(ruler.prompts.device)
    right = (arms == key.answers.ids.to(arms.device)[:, None]).all(2)
    order = right.to(torch.int64).sort(dim=1, descending=True, stable=True).indices
    n, degree, width = arms.shape
    rows = arms.gather(1, order[:, :, None].expand(-1, -1, width)).reshape(-1, width)
    index = torch.arange(n, device=arms.device).repeat_interleave(degree)
    samples = Samples(ruler.prompts, index, rows, torch.ones_like(rows, dtype=torch.bool))
    return log_density(reference, samples, test.batch_size).reshape(n, degree)


def optimum(ruler: Ruler, log_arms: Tensor) -> Measurement:
    """pi* itself, computed: its accuracy, valid arms, reward and divergences, per test graph."""
    star = BinaryTarget(log_arms[:, 0], ruler.target.beta)
    wrong_arms = (log_arms[:, 1:].double().logsumexp(1) - star.log_z).exp() if log_arms.shape[1] > 1 else 0.0
    values = {"accuracy": star.success, "valid_rate": star.success + wrong_arms}
    distances = ruler.distances(star.success, star.kl_to_reference)
    exact_zero = torch.zeros_like(star.log_z)
    return Measurement(values | distances | {"kl_to_target": exact_zero, "objective_gap": exact_zero})


def results(rows: list[dict[str, Any]], beta: float) -> dict[str, float]:
    """Exact match in percent under the original's names: pretrain, q# (0.1), cd (0.1), reinforce, dpo, rpo."""
    names = {"reference": "pretrain", "q-sharp": f"q# ({beta:g})", "cd": f"cd ({beta:g})"}
    accuracy = [row for row in rows if row["metric"] == "accuracy" and "(" not in row["method"]]
    return {names.get(row["method"], row["method"]): round(100 * row["value"], 2) for row in accuracy}

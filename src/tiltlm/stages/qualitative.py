"""Samples of one SMC run by weight, its ESS trace and its genealogy, with CTL's twist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tiltlm.jsonl import read_rows
from tiltlm.problem import Problem
from tiltlm.ruler.plots import ess_plot, genealogy_plot
from tiltlm.run import Recipe, Run
from tiltlm.samplers.smc import SMC, Particles, smc
from tiltlm.samples import Tokens
from tiltlm.settings import at_least_one
from tiltlm.stages.cells import Cell
from tiltlm.stages.exact import ExactSettings
from tiltlm.stages.learn import Learn
from tiltlm.stages.task import OfTask, Task
from tiltlm.twists.objective import by_prompt


@dataclass(frozen=True)
class Shown:
    """The run that is shown."""

    particles: int = 64
    threshold: float = 0.0
    """Resample when ESS ≤ threshold · particles (0: never, as in the original's notebook)."""

    prompts: int = 3
    """Several prompts or conditions: how many."""

    def __post_init__(self) -> None:
        at_least_one(self, "particles", "prompts")


@dataclass(frozen=True)
class Qualitative(OfTask):
    """Samples of one SMC run by weight, ESS trace, genealogy."""

    task: Task
    twist: Cell
    """CTL's settings."""

    shown: Shown = Shown()
    exact: ExactSettings = ExactSettings()
    seed: int = 0
    stage: ClassVar[str] = "qualitative"

    def inputs(self) -> dict[str, Recipe]:
        return self.needs() | {"twist": Learn.of(self.task, self.twist, "ctl", self.exact, self.seed)}

    def build(self, run: Run[Any]) -> None:
        problem, s, kept = self.problem(run), self.shown, run.inputs["twist"]
        settings, own = SMC(s.particles, s.threshold), problem.stream.child("qualitative")
        twist: Any = kept.recipe.decoder(kept).twist
        found = smc(
            problem.target, twist, self.prompts(problem), settings, max_new_tokens=problem.width, stream=own
        )
        assert found.samples.log_w is not None
        weight = by_prompt(found.samples.log_w, found.samples)  # every prompt's particles among themselves
        order = (weight - 2 * found.samples.prompt_index).argsort(descending=True)
        rows, weights = problem.rows(found.samples.select(order)), weight[order].tolist()
        run.write_jsonl("samples.jsonl", [{**r, "weight": w} for r, w in zip(rows, weights, strict=True)])
        trace = trace_of(found, problem)
        run.write_json("trace.json", trace)
        ess_plot(trace, run.folder / "ess.png")
        genealogy_plot(trace, run.folder / "genealogy.png")

    def prompts(self, problem: Problem) -> Tokens:
        """The prompts that are answered, or fresh conditions."""
        if problem.fresh is not None:
            return problem.fresh(self.shown.prompts, problem.stream.child("conditions", "shown"))[0]
        return problem.prompts["test"].select(slice(0, self.shown.prompts))

    def show(self, run: Run[Any]) -> None:
        best: dict[Any, list[dict[str, Any]]] = {}
        for row in read_rows(run.folder / "samples.jsonl"):
            best.setdefault((str(row.get("prompt")), row.get("must follow")), []).append(row)
        for row in (row for own in best.values() for row in own[:10]):
            follow = f"  [{row['must follow']}]" if "must follow" in row else ""
            print(f"{row['weight']:.3f}  r {row['reward']:7.3f}  …{row['completion']!r}{follow}")


def trace_of(found: Particles, problem: Problem) -> dict[str, Any]:
    """The first prompt's part of an SMC run, as JSON: what the trace and genealogy pictures are drawn from."""
    k = len(found.samples) // len(found.log_z)
    samples, trace = found.samples.select(slice(0, k)), found.trace
    assert samples.log_w is not None
    return {
        "prompt": problem.rows(samples.select(slice(0, 1)))[0]["prompt"],
        "particles": k,
        "ess": trace.ess[:, 0].tolist(),
        "resampled": trace.resampled[:, 0].tolist(),
        "log_z": trace.log_z[:, 0].tolist(),
        "ancestors": trace.ancestors[:, 0].tolist(),
        "pieces": [pieces(row, problem) for row in samples.tokens.tolist()],
        "log_w": samples.log_w.tolist(),
    }


def pieces(ids: list[int], problem: Problem) -> list[str]:
    """Tokens as a reader sees them; their numbers where there is no tokenizer."""
    if problem.tokenizer is None:
        return [str(i) for i in ids]
    found: list[str] = problem.tokenizer.convert_ids_to_tokens(ids)
    return found

"""What a twisted-SMC comparison ends in: the KL table, bounds against particles, the frontier, samples by weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from rich.console import Console

from tiltlm.jsonl import read_json, read_rows
from tiltlm.models.base import LanguageModel
from tiltlm.progress import steps
from tiltlm.recipes.twisted_lab import Lab
from tiltlm.recipes.twisted_methods import (
    DPG,
    DPO,
    MEASURED,
    PPO,
    RL,
    RPO,
    SFT,
    SIXO,
    Fudge,
    QSharp,
    Reinforce,
)
from tiltlm.recipes.twisted_settings import Bounds, Frontier, Reach, Show
from tiltlm.recipes.twisted_stages import Exact, Scored
from tiltlm.recipes.twisted_twists import CTLTwist
from tiltlm.ruler.bounds import Bounds as Found
from tiltlm.ruler.bounds import bound_repeats, log_z_of
from tiltlm.ruler.certificate import runs_for
from tiltlm.ruler.frontier import frontier_plot, tilted_curve
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.plots import bounds_plot, curve_plot, ess_plot, genealogy_plot, kl_bars
from tiltlm.ruler.table import read_report, table
from tiltlm.run import Recipe, Run
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samplers.smc import SMC, Particles, smc
from tiltlm.samples import Samples
from tiltlm.tensors import load_tensors, save_tensors
from tiltlm.twists.objective import by_prompt


@dataclass(frozen=True)
class Evaluate(QSharp, RL, SIXO, Fudge, DPG, PPO, SFT, Reinforce, DPO, RPO):
    """Every method against one target: a table, and bars of both KLs."""

    methods: tuple[str, ...] = ("untrained", "ctl", "rl", "sixo", "fudge", "dpg", "ppo", "q-sharp", "cd")
    stage: ClassVar[str] = "evaluate"
    gathers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        unknown = set(self.methods) - set(MEASURED)
        if unknown:
            raise ValueError(f"unknown methods {sorted(unknown)}; there are {', '.join(MEASURED)}")

    def inputs(self) -> dict[str, Recipe]:
        shared: dict[str, Recipe] = {"log_z": self.common_log_z()}
        return shared | {name: self.up(MEASURED[name]) for name in self.methods}

    def decoder(self, run: Run[Any], folder: Any = None) -> LanguageModel:
        raise ValueError(f"{run.folder} compares methods and draws nothing itself: name the run of one of them")

    def build(self, run: Run[Any]) -> None:
        rows = []
        for name in self.methods:
            rows += read_report(run.inputs[name].folder / "report.json")
        run.write_json("report.json", rows)
        kl_bars(rows, run.folder / "kl.png", f"{self.family}, seed {self.seed}: how far from pi*")
        curves = [run.inputs[name].folder / "curve.json" for name in self.methods]
        points = [row for path in curves if path.is_file() for row in read_json(path)]
        if points:
            run.write_json("curve.json", points)
            for metric, words in (("kl_to_target", "KL(q‖pi*)"), ("kl_from_target", "KL(pi*‖q)")):
                curve_plot(points, metric, run.folder / f"curve_{metric}.png", f"{words} against updates")

    def show(self, run: Run[Any]) -> None:
        out = Console(width=130, highlight=False)
        out.print(table(read_report(run.folder / "report.json"), f"{self.family}, seed {self.seed}"))
        print(LogZ.from_json(read_json(run.inputs["log_z"].folder / "log_z.json")))
        print("KLs in nats; ± is one standard error, log Z's own included.")


@dataclass(frozen=True)
class BoundsFigure(CTLTwist):
    """Bounds of log Z against the number of particles, with CTL's twist."""

    bounds: Bounds = Bounds()
    stage: ClassVar[str] = "bounds"

    def check(self) -> None:
        super().check()
        refuse_conditions(self)
        self.refuse_few(self.bounds.repeats, "bounds.repeats")

    def inputs(self) -> dict[str, Recipe]:
        return Scored.inputs(self) | {"exact": self.up(Exact), "twist": self.up(CTLTwist)}

    def build(self, run: Run[Any]) -> None:
        lab, s = self.lab(run), self.bounds
        kept = run.inputs["twist"]
        exact = self.exact_of(run).to(lab.device)
        with steps(self.name) as on_step:
            found = bound_repeats(
                lab.target,
                kept.recipe.twist_of(kept),
                lab.prompt,
                exact,
                ks=s.particles,
                repeats=s.repeats,
                max_new_tokens=lab.width,
                stream=lab.stream.child("bounds"),
                estimators=s.estimators,
                proposals=s.proposals,
                on_step=on_step,
            )
        save_tensors(found.tensors(), run.folder / "bounds.safetensors")
        log_z_of(found)  # raises where lower and upper bounds contradict each other
        run.write_json("bounds.json", found.rows())
        run.write_json("report.json", bound_report(found, self))
        bounds_plot(found.rows(), run.folder / "bounds.png", f"{self.family}: log Z between its bounds")

    def show(self, run: Run[Any]) -> None:
        rows = read_json(run.folder / "bounds.json")
        show_bounds(rows)
        print(log_z_of(Found.of_tensors(load_tensors(run.folder / "bounds.safetensors"))))
        print(f"picture: {run.folder / 'bounds.png'}")


def refuse_conditions(recipe: Scored) -> None:
    """Raise ValueError for infilling."""
    if recipe.goal.reward == "infill":
        raise ValueError(
            f"{recipe.stage}: in infilling each condition has one exact draw, and bounds of one log Z want several"
        )


def bound_report(found: Found, recipe: Recipe) -> list[dict[str, Any]]:
    """Report rows: each bound as a metric of its method, e.g. smc-ess, 64 particles."""
    rows = []
    for row in found.rows():
        method = f"{row['estimator']}, {row['proposal']} proposal, {row['k']} particles"
        head = {"recipe": recipe.name, "method": method, "metric": f"log_z_{row['side']}", "seed": recipe.seed}
        numbers = {"value": row["value"], "stderr": row["stderr"], "n": row["repeats"], "unit": "nats"}
        ends = {"low": row["low"], "high": row["high"], "interval": "Student's t", "certified": row["certified"]}
        rows.append({**head, **numbers, **ends})
    return rows


def show_bounds(rows: list[dict[str, Any]]) -> None:
    """Lower and upper bounds side by side."""
    flat = []
    for row in rows:
        method = f"{row['estimator']}, {row['proposal']} proposal, {row['k']} particles"
        flat.append({**row, "method": method, "metric": row["side"]})
    headings = {"lower": "log Z, lower bound", "upper": "upper bound"}
    Console(width=130, highlight=False).print(table(flat, "bounds of log Z (nats)", headings))


@dataclass(frozen=True)
class FrontierFigure(QSharp, RL, SIXO, Fudge, DPG, PPO, SFT, Reinforce, DPO, RPO):
    """Reward against KL to the reference over temperatures: a method trained and measured at each."""

    frontier: Frontier = Frontier()
    stage: ClassVar[str] = "frontier"
    gathers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        unknown = set(self.frontier.methods) - set(MEASURED)
        if unknown:
            raise ValueError(f"unknown methods {sorted(unknown)}; there are {', '.join(MEASURED)}")

    def inputs(self) -> dict[str, Recipe]:
        needed: dict[str, Recipe] = {}
        for beta in self.frontier.betas:
            # no exact draws: at a small beta they may be out of reach, and reward against KL wants none
            goal, test = replace(self.goal, beta=beta), replace(self.test, absolute=False)
            own = replace(self, goal=goal, test=test)
            for name in self.frontier.methods:
                needed[f"{name} (beta {beta:.4g})"] = own.up(MEASURED[name])
        return needed

    def decoder(self, run: Run[Any], folder: Any = None) -> LanguageModel:
        raise ValueError(f"{run.folder} compares methods and draws nothing itself: name the run of one of them")

    def build(self, run: Run[Any]) -> None:
        rows = []
        for label, kept in run.inputs.items():
            own = read_report(kept.folder / "report.json")
            rows += [{**row, "method": label, "beta": kept.recipe.goal.beta} for row in own]
        run.write_json("report.json", rows)
        curve = self.curve_of_optimum(next(iter(run.inputs.values())))
        run.write_json(
            "optimum.json", [{"kl_to_reference": kl, "reward": r} for kl, r in zip(*curve, strict=True)]
        )
        title = f"{self.family}: reward against KL to the reference"
        tensors = torch.tensor(curve[0]), torch.tensor(curve[1])
        frontier_plot(rows, tensors, run.folder / "frontier.png", title, "optimum, by importance sampling")

    def curve_of_optimum(self, kept: Run[Any]) -> tuple[list[float], list[float]]:
        """pi*'s own frontier as far as plain draws can tell; empty for infilling, where every condition has another, and
        where the reward has no upper bound: nothing then tells what the draws missed."""
        lab = kept.recipe.lab(kept)
        if lab.conditioned or math.isinf(self.goal.most):
            return [], []
        n, own = self.log_z.draws, lab.stream.child("frontier")
        drawn = draw_in_batches(
            lab.reference, lab.prompt, n=n, max_new_tokens=lab.width, stream=own, batch_size=self.log_z.batch_size
        )
        betas = torch.logspace(2, -2, 60) * max(self.frontier.betas)
        kl, reward = tilted_curve(lab.target.reward(drawn), betas, self.goal.most)
        return kl.tolist(), reward.tolist()


@dataclass(frozen=True)
class Qualitative(CTLTwist):
    """Samples of one SMC run by weight, its ESS trace and its genealogy, with CTL's twist."""

    shown: Show = Show()
    stage: ClassVar[str] = "qualitative"

    def inputs(self) -> dict[str, Recipe]:
        return Scored.inputs(self) | {"twist": self.up(CTLTwist)}

    def build(self, run: Run[Any]) -> None:
        lab, s, kept = self.lab(run), self.shown, run.inputs["twist"]
        prompts = lab.conditions(s.conditions, "shown")[0] if lab.conditioned else lab.prompt
        settings = SMC(s.particles, s.threshold)
        own = lab.stream.child("qualitative")
        twist = kept.recipe.twist_of(kept)
        found = smc(lab.target, twist, prompts, settings, max_new_tokens=lab.width, stream=own)
        assert found.samples.log_w is not None
        weight = by_prompt(found.samples.log_w, found.samples)  # every condition's particles among themselves
        order = (weight - 2 * found.samples.prompt_index).argsort(descending=True)
        best, weights = found.samples.select(order), weight[order]
        rows = list(lab.readable(best))
        run.write_jsonl("samples.jsonl", [{**r, "weight": w} for r, w in zip(rows, weights.tolist(), strict=True)])
        trace = trace_of(found, lab)
        run.write_json("trace.json", trace)
        ess_plot(trace, run.folder / "ess.png")
        genealogy_plot(trace, run.folder / "genealogy.png")

    def show(self, run: Run[Any]) -> None:
        rows = list(read_rows(run.folder / "samples.jsonl"))
        best: dict[Any, list[dict[str, Any]]] = {}
        for row in rows:
            best.setdefault(row.get("must follow"), []).append(row)
        for row in (row for own in best.values() for row in own[:10]):
            follow = f"  [{row['must follow']}]" if "must follow" in row else ""
            print(f"{row['weight']:.3f}  r {row['reward']:7.3f}  …{row['completion']!r}{follow}")


def trace_of(found: Particles, lab: Lab) -> dict[str, Any]:
    """The first prompt's part of an SMC run, as JSON: what the trace and genealogy pictures are drawn from."""
    k = len(found.samples) // len(found.log_z)
    samples, trace = found.samples.select(slice(0, k)), found.trace
    assert samples.log_w is not None
    pieces = [lab.tokenizer.convert_ids_to_tokens(row) for row in samples.tokens.tolist()]
    return {
        "prompt": lab.tokenizer.decode(samples.prompts.lists()[0], skip_special_tokens=True),
        "particles": k,
        "ess": trace.ess[:, 0].tolist(),
        "resampled": trace.resampled[:, 0].tolist(),
        "log_z": trace.log_z[:, 0].tolist(),
        "ancestors": trace.ancestors[:, 0].tolist(),
        "pieces": pieces,
        "log_w": samples.log_w.tolist(),
    }


@dataclass(frozen=True)
class ReachFigure(CTLTwist):
    """How far a certified interval for log Z reaches: longer and longer completions, a CTL twist for each."""

    reach: Reach = Reach()
    stage: ClassVar[str] = "reach"

    def check(self) -> None:
        super().check()
        refuse_conditions(self)
        self.refuse_few(self.reach.repeats, "reach.repeats")

    def at(self, length: int) -> ReachFigure:
        """This recipe at another length."""
        return replace(self, language=replace(self.language, new_tokens=length))

    def inputs(self) -> dict[str, Recipe]:
        needed: dict[str, Recipe] = Scored.inputs(self)
        for length in self.reach.lengths:
            needed |= {
                f"twist {length}": self.at(length).up(CTLTwist),
                f"exact {length}": self.at(length).up(Exact),
            }
        return needed

    def build(self, run: Run[Any]) -> None:
        rows, s = [], self.reach
        for length in s.lengths:
            kept, stored = run.inputs[f"twist {length}"], run.inputs[f"exact {length}"]
            lab = stored.recipe.lab(stored)
            exact = Samples.load(stored.folder / "exact.safetensors").to(lab.device)
            with steps(f"{self.name} {length}") as on_step:
                found = bound_repeats(
                    lab.target,
                    kept.recipe.twist_of(kept),
                    lab.prompt,
                    exact,
                    ks=s.particles,
                    repeats=s.repeats,
                    max_new_tokens=length,
                    stream=lab.stream.child("reach"),
                    estimators=("iwae", "smc-ess"),
                    batch_size=2000,
                    on_step=on_step,
                )
            rows += [{**row, "length": length} for row in found.rows()]
            save_tensors(found.tensors(), run.folder / f"bounds_{length}.safetensors")
            log_z_of(found)  # raises where lower and upper bounds contradict each other
        run.write_json("bounds_by_length.json", rows)
        run.write_json("report.json", [self.row(row) for row in rows] + self.certificates(rows))

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        method = f"{row['length']} tokens, {row['estimator']}, {row['k']} particles"
        head = {"recipe": self.name, "method": method, "metric": f"log_z_{row['side']}", "seed": self.seed}
        ends = {"low": row["low"], "high": row["high"], "interval": "Student's t"}
        return {
            **head,
            "value": row["value"],
            "stderr": row["stderr"],
            "n": row["repeats"],
            "unit": "nats",
            **ends,
        }

    def certificates(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Report rows: of every method the certificate's ends and width, and the runs that `reach.width` takes."""
        sides: dict[str, dict[str, dict[str, Any]]] = {}
        for row in rows:
            sides.setdefault(self.row(row)["method"], {})[row["side"]] = row
        out = []
        for method, both in sides.items():
            low, high = both["lower"], both["upper"]
            runs = runs_for(self.reach.width, max(0.0, high["value"] - low["value"]))
            found = {"certified_low": low["certified"], "certified_high": high["certified"]}
            found["certified_width"] = high["certified"] - low["certified"]
            found |= {} if math.isinf(runs) else {"runs": runs}
            head = {"recipe": self.name, "method": method, "seed": self.seed, "stderr": None, "n": low["repeats"]}
            units = {"runs": "rows"}
            out += [{**head, "metric": m, "value": v, "unit": units.get(m, "nats")} for m, v in found.items()]
        return out

    def show(self, run: Run[Any]) -> None:
        rows = read_report(run.folder / "report.json")
        headings = {
            "log_z_lower": "log Z, lower bound",
            "log_z_upper": "upper bound",
            "certified_low": "certified from",
        }
        headings |= {"certified_high": "to", "certified_width": "width", "runs": f"runs for {self.reach.width:g}"}
        Console(width=130, highlight=False).print(
            table(rows, f"{self.family}: how far log Z is certified", headings)
        )

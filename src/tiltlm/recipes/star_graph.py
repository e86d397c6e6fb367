"""Star graphs (Q#, arXiv:2502.20548, §3.1): pre-train, roll out, guide by value, or train a policy.

A recipe extends what it depends on: `Base` has the settings of pre-training, `Rollouts(Base)` adds those of
drawing, and so on, so that one flag (`--world.degree 5`) means the same everywhere. `tiltlm run` builds what
is missing on the way.

Families: `star-graph` is the *walker*, a controlled variant for a laptop CPU whose base model walks a uniformly
random arm (it is not the paper's base, which learns a short cut). `star-graph-g25`, `-g55`, `-g38` carry the
paper's settings and want a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tiltlm.engine import Optim
from tiltlm.models.base import LanguageModel
from tiltlm.recipes.fitting import Fit
from tiltlm.recipes.star_graph_policies import (
    DPO,
    RPO,
    DPOPolicy,
    Measured,
    Reinforce,
    ReinforcePolicy,
    RPOPolicy,
)
from tiltlm.recipes.star_graph_report import show_report, write_report
from tiltlm.recipes.star_graph_settings import (
    Goal,
    Guide,
    Network,
    RolloutSettings,
    Test,
    ValueSettings,
    World,
)
from tiltlm.recipes.star_graph_stages import CD, Base, Classifier, Fudge, Graphs, QSharp, Rollouts
from tiltlm.run import Recipe, Run
from tiltlm.train import Pace

FAMILIES: dict[str, str] = {
    "star-graph": "the walker on G(2,3): a small model from scratch, minutes on a laptop",
    "star-graph-g25": "G(2,5), N=50, GPT-2 small, the paper's settings (wants a GPU)",
    "star-graph-g55": "G(5,5), N=50, GPT-2 small, the paper's settings (wants a GPU)",
    "star-graph-g38": "G(3,8), N=50, GPT-2 medium, the paper's settings (wants a GPU)",
}

STAGES: dict[str, str] = {
    "graphs": "write the graphs as text files, in the original's format",
    "base": "pre-train the reference on paths",
    "rollouts": "draw labelled completions and chosen/rejected pairs from the base",
    "classifier": "learn the reward-to-go at every prefix: one value for Q#, CD and FUDGE",
    "q-sharp": "decode with log E[exp(r/beta)]: ends at pi*",
    "cd": "decode with E[r]/beta: below pi* by Jensen",
    "fudge": "decode with log P(success): the limit beta -> 0",
    "reinforce-policy": "train: policy gradient on own samples, no pull to the reference",
    "reinforce": "measure that policy",
    "dpo-policy": "train: direct preference optimisation on right/wrong pairs",
    "dpo": "measure that policy",
    "rpo-policy": "train: DPO plus the likelihood of the right answer",
    "rpo": "measure that policy",
    "evaluate": "every method against one target: a table and a picture",
}


METHODS: dict[str, type[QSharp] | type[Measured]] = {
    kind.stage: kind for kind in (QSharp, CD, Fudge, Reinforce, DPO, RPO)
}


@dataclass(frozen=True)
class Evaluate(QSharp, DPO, RPO, Reinforce):
    """Every method against the same target, with the reference and the exact optimum: one table, one picture."""

    methods: tuple[str, ...] = ("reinforce", "dpo", "rpo", "cd", "fudge", "q-sharp")
    stage: ClassVar[str] = "evaluate"
    gathers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if {"q-sharp", "cd", "fudge"} & set(self.methods):
            super().__post_init__()
        unknown = set(self.methods) - set(METHODS)
        if unknown:
            raise ValueError(f"unknown methods {sorted(unknown)}; there are {', '.join(METHODS)}")

    def inputs(self) -> dict[str, Recipe]:
        needed: dict[str, Recipe] = {name: self.up(METHODS[name]) for name in self.methods}
        return {"base": self.up(Base), **needed}

    def decoder(self, run: Run[Any], beta: float | None = None) -> LanguageModel:
        raise ValueError(f"{run.folder} compares methods and draws nothing itself: name the run of one of them")

    def build(self, run: Run[Any]) -> None:
        write_report(run, self.lab(), self.reference(run), self.target.beta, self.test, list(self.methods))

    def show(self, run: Run[Any]) -> None:
        show_report(run, self.lab(), self.target.beta)


GROUNDWORK: tuple[type[Recipe], ...] = (Graphs, Base, Rollouts, Classifier)
POLICIES: tuple[type[Recipe], ...] = (ReinforcePolicy, DPOPolicy, RPOPolicy)
EVERY: tuple[type[Recipe], ...] = (*GROUNDWORK, *POLICIES, *METHODS.values(), Evaluate)
KINDS = {kind.stage: kind for kind in EVERY}


def paper(kind: type[Recipe], family: str, world: World, network: str) -> Recipe:
    """A stage with the paper's settings (Appendix C, and the original README where the paper is silent)."""
    adam = Optim(weight_decay=0.1)
    steps = 200_000 // 256
    policy = Fit(replace(adam, lr=1e-4), Pace(steps=10 * steps, warmup=steps), batch_size=256)
    settings: dict[str, Any] = {
        "family": family,
        "seed": 1337,
        "world": world,
        "network": Network(name=network, tokenizer=network, device="auto"),
        "base": Fit(replace(adam, lr=2.5e-4), Pace(steps=30 * steps, warmup=234), batch_size=256),
        "rollouts": RolloutSettings(n=0),
        "value": ValueSettings(data="pairs", start="pretrained", lm_weight=0.0, fit=policy),
        "target": Goal(beta=0.1),
        "guide": Guide(top_k=10, also=()),
        "test": Test(graphs=20_000),
        "dpo_fit": policy,
        "rpo_fit": policy,
        "reinforce_fit": replace(policy, optim=replace(adam, lr=1e-5)),
    }
    return kind(**{name: value for name, value in settings.items() if name in kind.__dataclass_fields__})


def _papers_world(degree: int, path_length: int) -> World:
    return World(degree, path_length, 50, pretrain=200_000, posttrain=200_000, test=20_000, imitate="goal")


def recipe(name: str) -> Recipe:
    """The recipe called `family/stage`."""
    family, stage = name.split("/")
    kind = KINDS[stage]
    if family == "star-graph":
        return kind(family=family)
    presets = {
        "star-graph-g25": (_papers_world(2, 5), "gpt2"),
        "star-graph-g55": (_papers_world(5, 5), "gpt2"),
        "star-graph-g38": (_papers_world(3, 8), "gpt2-medium"),
    }
    return paper(kind, family, *presets[family])

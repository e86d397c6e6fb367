"""Star graphs (Q#, Zhou et al. 2025, arXiv:2502.20548, §3.1): the papers' settings, and a variant for a laptop.

`star-graph` is the *walker*: a small model from scratch that walks a uniformly random arm (it is not the paper's base,
which learns a short cut). `star-graph-g25`, `-g55`, `-g38` carry the paper's settings (Appendix C, and the original README
where the paper is silent) and want a GPU. The paper's results are bar charts without numbers.
"""

from __future__ import annotations

from dataclasses import replace

from tiltlm.data.star_graph_world import World
from tiltlm.feeds import Feed
from tiltlm.fit import Fit
from tiltlm.nets import Net
from tiltlm.policies.dpo import DPO
from tiltlm.policies.reinforce import Reinforce
from tiltlm.policies.rpo import RPO
from tiltlm.recipes.preset import Preset
from tiltlm.stages.cells import Cell
from tiltlm.stages.measure import RulerSettings
from tiltlm.stages.star_graph import RolloutSettings
from tiltlm.stages.star_graph_bench import Network
from tiltlm.tasks.star_graph import StarGraph
from tiltlm.twists.cd import CD
from tiltlm.twists.fudge import Fudge
from tiltlm.twists.q_sharp import QSharp
from tiltlm.twists.value import Decode, ValueLearning

TASKS: dict[str, str] = {
    "star-graph": "the walker on G(2,3): a small model from scratch, minutes on a laptop",
    "star-graph-g25": "G(2,5), N=50, GPT-2 small, the paper's settings (wants a GPU)",
    "star-graph-g55": "G(5,5), N=50, GPT-2 small, the paper's settings (wants a GPU)",
    "star-graph-g38": "G(3,8), N=50, GPT-2 medium, the paper's settings (wants a GPU)",
}

METHODS = ("reference", "reinforce", "dpo", "rpo", "cd", "fudge-value", "q-sharp")
ONE = Feed(n=1)
"""REINFORCE draws one completion of each graph in a step (at temperature 1: the original's top_k=1 never explores)."""


def cells(
    policy: Fit, reinforce: Fit, value: Fit, learning: ValueLearning, net: Net, decode: Decode
) -> dict[str, Cell]:
    """Three policies, and three rules over one value."""
    return {
        "reinforce": Cell(Reinforce("batch_mean", beta=0.0), ONE, reinforce),
        "dpo": Cell(DPO(beta=0.1), Feed(), policy),
        "rpo": Cell(RPO(beta=0.1, alpha=1.0), Feed(), policy),
        "q-sharp": Cell(QSharp(value=learning, decode=decode), Feed(), value, net),
        "cd": Cell(CD(value=learning, decode=decode), Feed(), value, net),
        "fudge-value": Cell(Fudge(value=learning, decode=decode), Feed(), value, net),
    }


# ---- the walker -------------------------------------------------------------------------------------------------------

POLICY = Fit(lr=3e-4, betas=(0.9, 0.98), weight_decay=0.01, steps=400, warmup=40)
VALUE = Fit(
    lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01, steps=4000, warmup=30, until=0.05, watch=("value_loss/2",),
    batch_size=128,
)  # fmt: skip
WALKER = cells(
    POLICY, POLICY, VALUE, ValueLearning(lm_weight=1.0, watch_positions=True), Net(judges="last"), Decode(top_k=4)
)

# ---- the paper --------------------------------------------------------------------------------------------------------

STEPS = 200_000 // 256
"""An epoch."""

PAPER_POLICY = Fit(lr=1e-4, weight_decay=0.1, steps=10 * STEPS, warmup=STEPS, batch_size=256)
PAPER_BASE = Fit(lr=2.5e-4, weight_decay=0.1, steps=30 * STEPS, warmup=234, batch_size=256)
PAPER = cells(
    PAPER_POLICY, replace(PAPER_POLICY, lr=1e-5), PAPER_POLICY, ValueLearning(watch_positions=True),
    Net(judges="last", start="untrained"), Decode(top_k=10),
)  # fmt: skip


def paper(name: str, degree: int, path_length: int, network: str) -> Preset:
    """G(degree, path_length) with the paper's settings."""
    world = World(degree, path_length, 50, pretrain=200_000, posttrain=200_000, test=20_000, imitate="goal")
    task = StarGraph(
        world, Network(name=network, tokenizer=network), PAPER_BASE, rollouts=RolloutSettings(n=0), values="pairs",
        device="auto", name=name,
    )  # fmt: skip
    return Preset(task, PAPER, RulerSettings(prompts=20_000, n=1, batch_size=512), methods=METHODS, seed=1337)


def preset(name: str) -> Preset:
    """The task called `name` with its settings."""
    ruler = RulerSettings(prompts=1000, n=1, batch_size=512, also=(0.3, 1.0))
    return {
        "star-graph": lambda: Preset(StarGraph(), WALKER, ruler, methods=METHODS),
        "star-graph-g25": lambda: paper(name, 2, 5, "gpt2"),
        "star-graph-g55": lambda: paper(name, 5, 5, "gpt2"),
        "star-graph-g38": lambda: paper(name, 3, 8, "gpt2-medium"),
    }[name]()

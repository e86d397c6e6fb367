"""D2PO (Singhal et al. 2024, arXiv:2405.01511): the policy's own pairs, judged by a gold reward that costs, or by a model
that learns it from few gold labels.

`-small` tasks run on a laptop CPU: with the 260K stories model where the data folder has it, else with a model that the
project trains itself. The target's beta is a product: the loss's beta_pi, 0.05, times the temperature of labels, 1.
"""

from __future__ import annotations

from dataclasses import replace

from tiltlm.feeds import Feed
from tiltlm.fit import Fit
from tiltlm.judges.settings import Judging
from tiltlm.policies.d2po import D2PO
from tiltlm.policies.opo import OPO
from tiltlm.policies.ppo import PPO
from tiltlm.policies.reinforce import Reinforce
from tiltlm.recipes.preset import Preset
from tiltlm.stages.cells import Cell
from tiltlm.stages.log_z import LogZSettings
from tiltlm.stages.measure import RulerSettings
from tiltlm.tasks.language import Language, found
from tiltlm.tasks.mine import Mine

TASKS: dict[str, str] = {
    "words-small": "stories that collect twenty words, 48 tokens: a reward that counts each once",
}

METHODS = ("reference", "rloo", "ppo")
"""What a comparison takes where none are named."""

BETA = 0.05

WORDS = (
    "big", "play", "friends", "mom", "house", "park", "outside", "toys", "tree", "friend", "little", "happy", "box", "toy",
    "sun", "ball", "dog", "cat", "shiny", "bird",
)  # fmt: skip
"""Of 48 tokens of the stories model, 1.8 of them are there on average."""

RULER = RulerSettings(n=4, batch_size=200, absolute=False)
"""Where the reward has a bound, but beta is so small that exact draws are out of reach."""

SMALL = Fit(lr=2e-4, steps=100, batch_size=32, decay="none", clip=0.0)


JUDGE = Judging("reward-model", budget=500, warm=128, warm_epochs=4, window=64, relabels=8, replay=32, lr=1e-3)
"""A judge for a laptop: 4 of 16 pairs a step after a warm-up, learning every second step."""


def preset(name: str) -> Preset:
    """The settings of a task of this system."""
    made = PRESETS[name]()
    return replace(made, task=replace(made.task, name=name), log_z=LogZSettings(by="none"), methods=METHODS)  # type: ignore[type-var]


def words_small() -> Preset:
    """Collecting words of children's stories."""
    task = Mine(stories(48), "stories:800", test_rows=100, reward=f"bagofwords:{','.join(WORDS)}", beta=BETA)
    return Preset(task, cells(SMALL), RULER)


def stories(new_tokens: int) -> Language:
    """The stories model."""
    return Language(found("models", "stories260K"), new_tokens=new_tokens)


PRESETS = {"words-small": words_small}


def cells(fit: Fit) -> dict[str, Cell]:
    """Policies on their own draws, two of each prompt, as many rows a step as the pairs have."""
    return {
        "rloo": Cell(Reinforce("leave_one_out", None), Feed(n=2), fit),
        "ppo": Cell(PPO(), Feed(n=2), fit),
        "d2po": Cell(D2PO(beta_pi=0.05), Feed(n=1, judge=JUDGE), replace(fit, batch_size=fit.batch_size // 2)),
        "opo": Cell(OPO(beta_pi=0.05), Feed(n=1), replace(fit, batch_size=fit.batch_size // 2)),
    }

"""D2PO (Singhal et al. 2024, arXiv:2405.01511): the policy's own pairs, judged by a gold reward that costs, or by a model
that learns it from few gold labels.

Tasks without a suffix carry the published settings and hub models (they want a GPU). `-small` ones run on a laptop CPU and
need nothing from the hub: with the 260K stories model where the data folder has it, else with models that the project
trains itself. The target's beta is a product: the loss's beta_pi, 0.05, times the temperature of labels, 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tiltlm.feeds import Draws, Feed
from tiltlm.fit import Fit
from tiltlm.judges.settings import Judging, Select
from tiltlm.nets import Net
from tiltlm.policies.d2po import D2PO
from tiltlm.policies.dpo import DPO
from tiltlm.policies.opo import OPO
from tiltlm.policies.ppo import PPO
from tiltlm.policies.reinforce import Reinforce
from tiltlm.recipes import exo
from tiltlm.recipes.preset import Preset
from tiltlm.stages.cells import Cell
from tiltlm.stages.log_z import LogZSettings
from tiltlm.stages.measure import RulerSettings
from tiltlm.stages.reference import FIT
from tiltlm.tasks.distilled import Distilled
from tiltlm.tasks.language import Language, found
from tiltlm.tasks.mine import Mine

TASKS: dict[str, str] = {
    "words-small": "stories that collect twenty words, 48 tokens: each counts once",
    "nouns-small": "stories with many distinct nouns, 48 tokens",
    "distill-small": "stories that a larger model finds likelier than a smaller one, both trained here, 48 tokens",
    "math-small": "arithmetic worked out step by step by a model trained here on solutions some of which are wrong",
    "ultra-small": "own dialogues, a reward model trained on their preferences: D2PO's settings, nothing to download",
    "words": "OPT-125m collects thirty words, 48 tokens: the published settings (wants a GPU)",
    "nouns": "OPT-125m, many distinct nouns, 48 tokens: the published settings (wants a GPU)",
    "distill": "OPT-125m, text that OPT-1.3b finds likelier, 48 tokens: the published settings (wants a GPU)",
    "math": "OPT-1.3b works arithmetic out step by step, 73 tokens: the published settings (wants a GPU)",
    "ultra": "Tulu-2-7B, UltraFeedback's prompts, Eurus-RM-7b, 254 tokens: the published settings (wants a GPU)",
}

PRESETS: dict[str, str] = {
    "opo-gold": "every pair of the policy's own draws labelled by the gold reward (words-small)",
    "opo-gold-hard": "the same, its labels hard",
    "d2po-random": "D2PO that buys labels of random pairs",
    "d2po-first": "D2PO that buys the first pairs of a window",
    "d2po-pool": "D2PO that buys out of a pool of all pairs so far",
    "opo-static": "a judge that learns before the first step, and from nothing later",
    "d2po-static": "the same, and the verdicts it bought label the policy's pairs",
    "dpo-offline": "DPO on as many labelled pairs of the reference's draws",
}

METHODS = ("reference", "opo", "d2po", "rloo", "ppo", "dpo")
"""What a comparison takes where none are named."""

BETA = 0.05

WORDS = (
    "big", "play", "friends", "mom", "house", "park", "outside", "toys", "tree", "friend", "little", "happy", "box", "toy",
    "sun", "ball", "dog", "cat", "shiny", "bird",
)  # fmt: skip
"""1.6 of them stand in 48 tokens of the stories model, on average."""


@dataclass(frozen=True)
class Published:
    """A row of the original's table of settings."""

    texts: int
    """Of a process and step; there are two processes, and two texts make a pair."""

    passes: int
    """Over every batch of draws."""

    window: int
    """Texts of the judge's window, over both processes."""

    relabels: int
    """Gold labels bought of a window."""

    epochs: int
    """Of the judge over what was bought."""

    select: Select
    """Which pairs are bought: those of the smallest margin, or random ones."""

    budget: int
    """Labels that the original's results go up to."""


PUBLISHED = {
    "words": Published(8, 4, 64, 5, 8, "min-margin", 4000),
    "nouns": Published(8, 4, 60, 5, 8, "min-margin", 1000),
    "distill": Published(32, 1, 320, 5, 3, "random", 2000),
    "math": Published(32, 1, 2048, 256, 4, "min-margin", 2000),
    "ultra": Published(32, 1, 32, 4, 3, "min-margin", 3000),
}

RULER = RulerSettings(n=4, batch_size=200, absolute=False)
"""Where a reward has a bound, beta is so small that exact draws are out of reach."""

WHOLE = Net()

SMALL = Fit(lr=2e-4, steps=100, batch_size=32, decay="none", clip=0.0)


JUDGE = Judging("reward-model", budget=500, warm=128, warm_epochs=4, window=64, relabels=8, replay=32, lr=1e-3)
"""A judge for a laptop: 4 of 16 pairs a step after a warm-up, learning every second step."""


def preset(name: str) -> Preset:
    """The settings of a task of this system."""
    made = SMALLER[name]() if name in SMALLER else published(name)
    return replace(made, task=replace(made.task, name=name), log_z=LogZSettings(by="none"), methods=METHODS)  # type: ignore[type-var]


# ---- a laptop's CPU ---------------------------------------------------------------------------------------------


def stories() -> Language:
    """The stories model."""
    return Language(found("models", "stories260K"), new_tokens=48)


def small_cells() -> dict[str, Cell]:
    """Soft labels, the whole network."""
    return cells(SMALL, OPO(beta_pi=BETA), PPO(), JUDGE)


def words_small() -> Preset:
    """Collecting words of children's stories."""
    made = story_task(f"bagofwords:{','.join(WORDS)}")
    return replace(made, variants=compared(made.cells))


def compared(found: Mapping[str, Cell]) -> dict[str, Cell]:
    """What the figure of labels compares: every pair labelled by gold, a judge that learns from some (and what it buys,
    and when), one that learnt before the first step alone and buys labels of the policy's pairs from then on, one that
    bought and learnt all before it, and pairs of the reference alone."""
    live = replace(JUDGE, monitor=True)
    judges = {
        "d2po": live,
        "d2po-random": replace(live, select="random"),
        "d2po-first": replace(live, allocation="first"),
        "d2po-pool": replace(live, allocation="pool"),
        "d2po-static": replace(live, epochs=0),
        "opo-static": replace(live, warm=live.budget, relabels=0, monitor=True),
    }
    d2po, dpo = found["d2po"], found["dpo"]
    offline = replace(dpo.feed, draws=replace(dpo.feed.draws, prompts=JUDGE.budget))
    return {
        "opo-gold": found["opo"],
        "opo-gold-hard": replace(found["opo"], method=replace(found["opo"].method, labels="hard")),
        **{name: replace(d2po, feed=replace(d2po.feed, judge=judge)) for name, judge in judges.items()},
        "dpo-offline": replace(dpo, feed=offline),
    }


def nouns_small() -> Preset:
    """Distinct nouns, told by the built-in lexicon."""
    return story_task("unique_nns:lexicon")


def story_task(reward: str) -> Preset:
    """Going on from the openings of stories."""
    return Preset(Mine(stories(), "stories:800", test_rows=100, reward=reward, beta=BETA), small_cells(), RULER)


def distill_small() -> Preset:
    """Two models of the project's own, two layers against five."""
    return Preset(
        Distilled(Language(new_tokens=48, layers=2, fit=replace(FIT, steps=200)), beta=BETA), small_cells(), RULER
    )


def math_small() -> Preset:
    """Arithmetic, one token a character; the longest solution has 36."""
    language = Language(new_tokens=40, stop=("0",), text="arithmetic", stories=30000, fit=replace(FIT, steps=2500))
    return Preset(Mine(language, "arithmetic:1200", test_rows=200, reward="math", beta=BETA), small_cells(), RULER)


def ultra_small() -> Preset:
    """The dialogues of preference alignment: as there, the gold reward is a model of preferences."""
    return Preset(replace(exo.dialogues().task, beta=BETA, beta_pi=BETA), small_cells(), replace(RULER, n=1))  # type: ignore[type-var]


SMALLER = {
    "words-small": words_small, "nouns-small": nouns_small, "distill-small": distill_small, "math-small": math_small,
    "ultra-small": ultra_small,
}  # fmt: skip


# ---- published --------------------------------------------------------------------------------------------------

ULTRA = "HuggingFaceH4/ultrafeedback_binarized[train_prefs]", "HuggingFaceH4/ultrafeedback_binarized[test_prefs]"

OPT = Language("facebook/opt-125m", new_tokens=48, stop=("2",), device="auto")

TARGETS: Mapping[str, Mine] = {
    "words": Mine(OPT, *ULTRA, reward="bagofwords", beta=BETA, template="alpaca"),
    "nouns": Mine(OPT, *ULTRA, reward="unique_nns", beta=BETA, template="alpaca"),
    "distill": Mine(OPT, *ULTRA, reward="contrastivedistill", beta=BETA),
    "math": Mine(
        replace(OPT, model="facebook/opt-1.3b", new_tokens=73), "arithmetic:10200", test_rows=200, reward="math-legacy",
        beta=BETA,
    ),
    "ultra": Mine(
        replace(OPT, model="allenai/tulu-2-7b", new_tokens=254), *ULTRA, reward="eurusrm", beta=BETA, template="tulu"
    ),
}  # fmt: skip


def published(name: str) -> Preset:
    """Hard labels, a constant rate, no clipping, adapters of rank 16, 2000 steps; a checkpoint to measure every hundred."""
    row = PUBLISHED[name]
    fit = Fit(
        lr=5e-5, steps=2000, batch_size=2 * row.texts, decay="none", clip=0.0, precision="bfloat16", micro_batch=8,
        checkpoints=20,
    )  # fmt: skip
    ruler = RulerSettings(prompts=200, n=1, batch_size=32, absolute=False, checkpoints=20)
    judge = Judging(
        "reward-model", budget=row.budget, window=row.window, relabels=row.relabels, select=row.select,
        allocation="first", epochs=row.epochs, lora_rank=8,
    )  # fmt: skip
    opo, ppo = OPO("hard", beta_pi=BETA, passes=row.passes), PPO(passes=row.passes)
    return Preset(TARGETS[name], cells(fit, opo, ppo, judge, Net(policy="lora", lora_rank=16)), ruler)


def cells(fit: Fit, opo: OPO, ppo: PPO, judge: Judging, net: Net = WHOLE) -> dict[str, Cell]:
    """Policies on their own draws, two of each prompt, as many rows a step as the pairs have; DPO on stored pairs, twice
    over, as the original's baseline."""
    pairs = replace(fit, batch_size=fit.batch_size // 2)
    offline = replace(fit, steps=Fit().steps, epochs=2.0, warmup=min(100, fit.steps // 10))
    return {
        "opo": Cell(opo, Feed(n=1), pairs, net),
        "d2po": Cell(D2PO(opo.labels, beta_pi=BETA, passes=opo.passes), Feed(n=1, judge=judge), pairs, net),
        "rloo": Cell(Reinforce("leave_one_out", None), Feed(n=2), fit, net),
        "ppo": Cell(ppo, Feed(n=2), fit, net),
        "dpo": Cell(DPO(BETA), Feed("stored", Draws(2)), offline, net),
    }

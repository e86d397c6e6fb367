"""Twisted SMC (Zhao et al. 2024, arXiv:2404.17546): one target, every road to it, both KLs and bounds on log Z.

Tasks without a suffix carry the published settings and hub models (they want a GPU); `-small` ones and `animals` run on a
laptop CPU, with the 260K-parameter stories model where the data folder has it, else a model the project trains itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tiltlm.feeds import AnyFeed, Feed, TwistFeed
from tiltlm.fit import Fit
from tiltlm.nets import Net
from tiltlm.policies.dpo import DPO
from tiltlm.policies.ppo import PPO
from tiltlm.policies.reinforce import Reinforce
from tiltlm.policies.rpo import RPO
from tiltlm.policies.sft import SFT
from tiltlm.recipes.preset import Preset
from tiltlm.rewards.classifier import SENTIMENT, TOXICITY
from tiltlm.stages.cells import Cell
from tiltlm.stages.classifier import ClassifierSettings
from tiltlm.stages.exact import ExactSettings
from tiltlm.stages.log_z import LogZSettings
from tiltlm.stages.measure import RulerSettings
from tiltlm.stages.qualitative import Shown
from tiltlm.tasks.classified import Classified
from tiltlm.tasks.continuation import Continuation
from tiltlm.tasks.infill import Infill
from tiltlm.tasks.language import Language, found
from tiltlm.tasks.words import Words
from tiltlm.twists.cd import CD
from tiltlm.twists.ctl import CTL
from tiltlm.twists.dpg import DPG
from tiltlm.twists.fudge import FudgeLearning
from tiltlm.twists.q_sharp import QSharp
from tiltlm.twists.sixo import SIXO
from tiltlm.twists.soft_q import SoftQ

TASKS: dict[str, str] = {
    "animals": "stories with animals in them, 12 tokens, beta 1",
    "sentiment-small": "text that a small classifier calls negative, 10 tokens",
    "toxicity-small": "text that a small classifier calls toxic, 12 tokens",
    "continuation": "stories that a given text can follow, 12 tokens: here a full stop",
    "infill2-small": "fill a gap of 2 tokens before one that must follow; log Z exact",
    "infill15-small": "fill a gap of 15 tokens before ten that must follow",
    "threshold-small": "text beyond a threshold of the small toxicity classifier: the bounds figure",
    "long-small": "200 tokens with animals in them: samples by weight",
    "toxicity": "TinyStories-33M, ToxicityModel, 20 tokens: the published settings (wants a GPU)",
    "sentiment": "GPT-2 medium, amazon-review classifier, 1 star, 10 tokens: the published settings (wants a GPU)",
    "infill15": "TinyStories-33M, gap of 15 before 10 tokens: the published settings (wants a GPU)",
    "infill2": "TinyStories-33M, gap of 2 before 1 token: the published settings (wants a GPU)",
    "threshold": "TinyStories-33M, toxicity score below -5, 10 tokens: the bounds figure (wants a GPU)",
    "long": "TinyStories-33M, toxic stories of 200 tokens, beta 0.1 (wants a GPU)",
}

COMPARED = ("reference", "ctl", "rl", "sixo", "fudge", "dpg", "ppo", "q-sharp", "cd")


SMALL = {"ctl": 1e-3, "rl": 1e-3, "sixo": 1e-3, "fudge": 1e-3, "dpg": 1e-3, "ppo": 1e-3}
RATES = {
    "toxicity": {"ctl": 1e-4, "rl": 3e-5, "sixo": 3e-5, "fudge": 1e-4, "dpg": 3e-5, "ppo": 1e-6},
    "sentiment": {"ctl": 1e-4, "rl": 1e-4, "sixo": 1e-4, "fudge": 1e-3, "dpg": 1e-4, "ppo": 1e-5},
    "infill15": {"ctl": 3e-6, "rl": 3e-5, "sixo": 1e-4, "fudge": 1e-6, "dpg": 1e-4, "ppo": 3e-5},
    "infill2": {"ctl": 1e-4, "rl": 1e-4, "sixo": 1e-4, "fudge": 1e-4, "dpg": 1e-4, "ppo": 3e-5},
}
"""Learning rates of the published table and the original's commands."""

PLAIN = Net()
MLP = Net(mlp_layers=2)
FROZEN = Net(body="frozen")
FROZEN_MLP = Net(body="frozen", mlp_layers=2)


def fit(lr: float, steps: int, batch_size: int = 64) -> Fit:
    """A constant rate, no clipping, no decay, as published."""
    every = 64 if steps <= 2048 else 500
    return Fit(lr=lr, clip=0.0, steps=steps, decay="none", batch_size=batch_size, checkpoint_every=every)


def twists(rates: Mapping[str, float], steps: int, net: Net = PLAIN) -> dict[str, Cell]:
    """Twists and values at the same number of updates."""
    value = Cell(QSharp(), Feed(), fit(rates["rl"], steps, 100), net)
    return {
        "ctl": Cell(CTL(), TwistFeed(), fit(rates["ctl"], steps), net),
        "rl": Cell(SoftQ(), TwistFeed(), fit(rates["rl"], steps), net),
        "sixo": Cell(SIXO(), TwistFeed(), fit(rates["sixo"], steps), net),
        "fudge": Cell(FudgeLearning(), TwistFeed(), fit(rates["fudge"], steps), net),
        "dpg": Cell(DPG(), TwistFeed(), fit(rates["dpg"], steps), net),
        "q-sharp": value,
        "cd": replace(value, method=CD()),
    }


def ppo(rates: Mapping[str, float], steps: int, net: Net = PLAIN) -> dict[str, Cell]:
    """PPO: the twist's network as the policy's head."""
    return {"ppo": Cell(PPO(), Feed(), fit(rates["ppo"], steps, 100), replace(net, policy="head"))}


POLICY = Fit(lr=1e-4, steps=128, batch_size=100, checkpoint_every=64)
POLICIES = {
    "sft": Cell(SFT(), Feed(), POLICY),
    "rloo": Cell(Reinforce("leave_one_out", None), Feed(), POLICY),
    "dpo": Cell(DPO(), Feed(), POLICY),
    "rpo": Cell(RPO(), Feed(), POLICY),
}
"""Policies on this target."""


def conditioned(plain: Mapping[str, Cell], ctl: TwistFeed) -> dict[str, Cell]:
    """The same for infilling: CTL with several draws of a condition, all others with a hundred conditions of one draw."""
    exact, one = TwistFeed(particles=1, prompts=100, positives="exact"), Feed(n=1)
    feeds: dict[str, AnyFeed] = {
        "ctl": ctl, "rl": exact, "sixo": exact, "fudge": replace(exact, prefixes=True), "dpg": exact, "ppo": one,
        "q-sharp": one, "cd": one,
    }  # fmt: skip
    return {name: replace(cell, feed=feeds[name]) for name, cell in plain.items()}


def preset(name: str) -> Preset:
    """The settings of a task of this system."""
    if name.endswith("-small") or name in ("animals", "continuation"):
        return small(name, Language(model=found("models", "stories260K")))
    if name.startswith("infill"):
        return infill(name)
    return published(name)


def small(name: str, language: Language) -> Preset:
    """What a laptop's CPU does in minutes."""
    plain = twists(SMALL, 128) | ppo(SMALL, 128) | POLICIES
    if name == "animals":
        return Preset(Words(language, name=name), plain, methods=COMPARED)
    if name == "continuation":
        return Preset(Continuation(language, ".", name=name), plain, methods=COMPARED)
    if name == "long-small":
        ctl = Cell(CTL(), TwistFeed(particles=32), fit(1e-3, 256))
        return Preset(
            Words(replace(language, new_tokens=200), name=name), plain | {"ctl": ctl}, exact=ExactSettings(n=20),
            figures={"qualitative": Shown(particles=32, threshold=0.5)}, methods=COMPARED,
        )  # fmt: skip
    if name.startswith("infill"):
        return small_infill(name, language)
    return Preset(small_classified(name, language), plain, methods=COMPARED)


def small_infill(name: str, language: Language) -> Preset:
    """Gaps of 2 tokens before one, or of 15 before ten."""
    short = name == "infill2-small"
    ctl = TwistFeed(particles=10, prompts=10, positives="exact") if short else TwistFeed(4, 25, "exact")
    plain = twists(SMALL, 512, MLP) | ppo(SMALL, 128, MLP)  # PPO: four updates a step, as many as the others
    return Preset(
        Infill(replace(language, new_tokens=2 if short else 15), condition_tokens=1 if short else 10, name=name),
        conditioned(plain, ctl),
        RulerSettings(n=20, prompts=300 if short else 50),
        log_z=LogZSettings(by="enumeration" if short else "bounds"),
        methods=COMPARED,
    )


def small_classified(name: str, language: Language) -> Classified:
    """Tweets called toxic, film reviews called negative; the project's own sentences where these are not there."""
    if name == "sentiment-small":
        data = found("sentiment", "sst2.csv")
        named = (
            ClassifierSettings(data=(data,), classes=("1=positive", "0=negative"))
            if data
            else ClassifierSettings()
        )
        return Classified(replace(language, new_tokens=10), label="negative", classify=named, name=name)
    data = found("toxicity", "davidson_tweets.csv")
    rude = ClassifierSettings(sentences="toxicity")
    if data:
        rude = replace(rude, data=(data,), label="class", classes=("0=toxic", "1=toxic", "2=civil"))
    if name == "threshold-small":
        return Classified(replace(language, new_tokens=10), label="toxic", threshold=1.0, classify=rude, name=name)
    return Classified(language, label="toxic", classify=rude, name=name)


TINY = Language(model="roneneldan/TinyStories-33M", new_tokens=20, device="auto")
TOXIC = Classified(TINY, classifier=TOXICITY, label="0")


def published(name: str) -> Preset:
    """The published settings of classifiers' targets (appendix §4, and the original's commands)."""
    if name == "toxicity":
        whole = {"ppo": Cell(PPO(), Feed(), fit(1e-6, 4096, 100))}
        plain = twists(RATES[name], 4096) | whole | POLICIES
        return Preset(replace(TOXIC, name=name), plain, methods=COMPARED, expected=EXPECTED[name])
    if name == "sentiment":
        language = Language("gpt2-medium", "I bought this", new_tokens=10, device="auto")
        plain = twists(RATES[name], 4096, FROZEN_MLP) | ppo(RATES[name], 4096, FROZEN_MLP) | POLICIES
        task = Classified(language, classifier=SENTIMENT, label="0", name=name)
        return Preset(task, plain, methods=COMPARED, expected=EXPECTED[name])
    if name == "threshold":
        ctl = {"ctl": Cell(CTL(), TwistFeed(particles=1000), fit(1e-4, 5000), FROZEN_MLP)}
        plain = twists(SMALL, 256, FROZEN_MLP) | ppo(SMALL, 256, FROZEN_MLP) | POLICIES
        task = replace(TOXIC, language=replace(TINY, new_tokens=10), threshold=5.0, name=name)
        return Preset(task, plain | ctl, methods=COMPARED)
    ctl = {"ctl": Cell(CTL(), TwistFeed(particles=32), fit(3e-4, 2500), FROZEN)}
    plain = twists(SMALL, 256, FROZEN) | ppo(SMALL, 256, FROZEN) | POLICIES
    task = replace(TOXIC, language=replace(TINY, new_tokens=200), beta=0.1, name=name)
    return Preset(task, plain | ctl, figures={"qualitative": Shown(particles=32)}, methods=COMPARED)


def infill(name: str) -> Preset:
    """The published settings of infilling."""
    long = name == "infill15"
    steps, rates = 6000 if long else 16384, RATES[name]
    ctl = TwistFeed(4, 25, "csmc") if long else TwistFeed(10, 10, "csmc")
    return Preset(
        Infill(replace(TINY, new_tokens=15 if long else 2), condition_tokens=10 if long else 1, name=name),
        conditioned(twists(rates, steps, MLP) | ppo(rates, steps, MLP), ctl),
        RulerSettings(n=20, prompts=100),
        log_z=LogZSettings(by="bounds"),
        methods=COMPARED,
        expected=EXPECTED[name],
    )


EXPECTED: dict[str, dict[tuple[str, str], float]] = {
    "toxicity": {
        ("ctl", "kl_to_target"): 1.11, ("ctl", "kl_from_target"): 1.07,
        ("rl", "kl_to_target"): 1.52, ("rl", "kl_from_target"): 1.42,
        ("sixo", "kl_to_target"): 1.71, ("sixo", "kl_from_target"): 1.98,
        ("fudge", "kl_to_target"): 3.24, ("fudge", "kl_from_target"): 2.00,
        ("dpg", "kl_to_target"): 1.09, ("dpg", "kl_from_target"): 1.12,
        ("ppo", "kl_to_target"): 0.98, ("ppo", "kl_from_target"): 1.32,
    },
    "sentiment": {
        ("ctl", "kl_to_target"): 0.55, ("ctl", "kl_from_target"): 0.47,
        ("rl", "kl_to_target"): 0.94, ("rl", "kl_from_target"): 0.81,
        ("sixo", "kl_to_target"): 0.73, ("sixo", "kl_from_target"): 0.59,
        ("fudge", "kl_to_target"): 1.01, ("fudge", "kl_from_target"): 0.77,
        ("dpg", "kl_to_target"): 0.72, ("dpg", "kl_from_target"): 0.57,
        ("ppo", "kl_to_target"): 1.04, ("ppo", "kl_from_target"): 0.87,
    },
    "infill15": {
        ("ctl", "kl_to_target"): 23.93, ("ctl", "kl_from_target"): 8.87,
        ("rl", "kl_to_target"): 31.35, ("rl", "kl_from_target"): 14.96,
        ("sixo", "kl_to_target"): 20.34, ("sixo", "kl_from_target"): 7.43,
        ("fudge", "kl_to_target"): 60.93, ("fudge", "kl_from_target"): 19.85,
        ("dpg", "kl_to_target"): 13.27, ("dpg", "kl_from_target"): 4.90,
        ("ppo", "kl_to_target"): 19.37, ("ppo", "kl_from_target"): 14.07,
    },
    "infill2": {
        ("ctl", "kl_to_target"): 0.47, ("ctl", "kl_from_target"): 0.25,
        ("rl", "kl_to_target"): 0.42, ("rl", "kl_from_target"): 0.15,
        ("sixo", "kl_to_target"): 0.47, ("sixo", "kl_from_target"): 0.25,
        ("fudge", "kl_to_target"): 2.62, ("fudge", "kl_from_target"): 0.90,
        ("dpg", "kl_to_target"): 0.16, ("dpg", "kl_from_target"): 0.14,
        ("ppo", "kl_to_target"): 0.52, ("ppo", "kl_from_target"): 1.09,
    },
}  # fmt: skip
"""The paper's table: means over five seeds, nats. It is one epoch before the end of the published commands."""

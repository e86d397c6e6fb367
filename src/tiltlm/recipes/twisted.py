"""Twisted SMC (Zhao et al. 2024, arXiv:2404.17546): one target, every road to it, both KLs and bounds on log Z.

Families without a suffix carry the published settings and hub models (they want a GPU); `-small` ones run on a laptop
CPU, with the 260K-parameter stories model where the data folder has it, else a model the project trains itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tiltlm.engine import Optim
from tiltlm.recipes.fitting import Fit
from tiltlm.recipes.twisted_methods import (
    CD,
    CTL,
    DPG,
    DPO,
    PPO,
    RL,
    RPO,
    SFT,
    SIXO,
    CommonLogZ,
    Fudge,
    QSharp,
    Reinforce,
    Untrained,
)
from tiltlm.recipes.twisted_policies import DPOPolicy, PPOPolicy, ReinforcePolicy, RPOPolicy, SFTPolicy
from tiltlm.recipes.twisted_report import BoundsFigure, Evaluate, FrontierFigure, Qualitative, ReachFigure
from tiltlm.recipes.twisted_settings import (
    ClassifierSettings,
    ExactSettings,
    Goal,
    Language,
    Learn,
    LearnCTL,
    LearnFudge,
    LearnPPO,
    LearnSoftQ,
    LearnValue,
    LogZSettings,
    Show,
    Test,
    Twist,
    found,
)
from tiltlm.recipes.twisted_stages import Classifier, Exact, Reference
from tiltlm.recipes.twisted_twists import CTLTwist, DPGTwist, FudgeTwist, RLTwist, SIXOTwist, Value
from tiltlm.rewards.classifier import SENTIMENT, TOXICITY
from tiltlm.run import Recipe
from tiltlm.train import Pace

FAMILIES: dict[str, str] = {
    "animals-small": "stories with animals in them, 12 tokens, beta 1",
    "sentiment-small": "text that a small classifier calls negative, 10 tokens",
    "toxicity-small": "text that a small classifier calls toxic, 12 tokens",
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

STAGES: dict[str, str] = {
    "reference": "train the small stories model (only where none is named)",
    "classifier": "train the text classifier that the reward asks (only where none is named)",
    "exact": "exact draws of pi*: rejection, or by construction for infilling",
    "log-z": "the one log Z of the comparison",
    "ctl-twist": "train a twist by contrastive twist learning",
    "rl-twist": "train a twist by soft Q learning",
    "sixo-twist": "train a twist by density-ratio estimation",
    "fudge-twist": "train a twist by classification of reference draws",
    "dpg-twist": "train a twist by distributional policy gradient",
    "ppo-policy": "train a policy by PPO",
    "value": "learn the law of the reward: one value for Q# and CD",
    "sft-policy": "train a policy by maximum likelihood of exact draws",
    "reinforce-policy": "train a policy by REINFORCE with a pull of beta",
    "dpo-policy": "train a policy by DPO on drawn pairs",
    "rpo-policy": "train a policy by RPO on drawn pairs",
    "untrained": "measure the reference itself",
    "ctl": "measure CTL's twist: both KLs",
    "rl": "measure soft Q's twist",
    "sixo": "measure SIXO's twist",
    "fudge": "measure FUDGE's twist",
    "dpg": "measure DPG's twist",
    "ppo": "measure PPO's policy",
    "q-sharp": "measure Q#'s guided decoding",
    "cd": "measure CD's guided decoding",
    "sft": "measure SFT's policy",
    "reinforce": "measure REINFORCE's policy",
    "dpo": "measure DPO's policy",
    "rpo": "measure RPO's policy",
    "evaluate": "every method against one target: the KL table",
    "bounds": "bounds of log Z against the number of particles",
    "frontier": "reward against KL to the reference over temperatures",
    "qualitative": "samples of one SMC run by weight, ESS trace, genealogy",
    "reach": "certified intervals of log Z at 20, 50, 100 and 200 tokens",
}

KINDS: dict[str, type[Recipe]] = {
    kind.stage: kind
    for kind in (
        Reference, Classifier, Exact, CommonLogZ, CTLTwist, RLTwist, SIXOTwist, FudgeTwist, DPGTwist, PPOPolicy, Value,
        SFTPolicy, ReinforcePolicy, DPOPolicy, RPOPolicy, Untrained, CTL, RL, SIXO, Fudge, DPG, PPO, QSharp, CD, SFT,
        Reinforce, DPO, RPO, Evaluate, BoundsFigure, FrontierFigure, Qualitative, ReachFigure,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Learning rates of the published table (§ and README commands)."""

    ctl: float
    rl: float
    sixo: float
    fudge: float
    dpg: float
    ppo: float


def learn(kind: Any, lr: float, steps: int, **settings: Any) -> Any:
    """One method's settings: a constant rate, no clipping, no decay, as published."""
    batch = 100 if kind in (LearnPPO, LearnValue) else Fit().batch_size
    every = 64 if steps <= 2048 else 500
    how = Fit(Optim(lr=lr, clip=0.0), Pace(steps=steps, decay="none"), batch_size=batch, checkpoint_every=every)
    return kind(fit=how, **settings)


def methods(
    rates: Rates,
    steps: int,
    infill: tuple[int, int] | None = None,
    full: bool = False,
    ctl_positives: str = "exact",
) -> dict[str, Any]:
    """All methods' settings at the same number of updates; infill: CTL's conditions per step and particles each."""
    same = {"conditions": 100, "particles": 1} if infill else {}
    exact = {**same, "positives": "exact"} if infill else {}
    ctl = {"conditions": infill[0], "particles": infill[1], "positives": ctl_positives} if infill else {}
    return {
        "ctl": learn(LearnCTL, rates.ctl, steps, **ctl),
        "rl": learn(LearnSoftQ, rates.rl, steps, **exact),
        "sixo": learn(Learn, rates.sixo, steps, **exact),
        "fudge": learn(LearnFudge, rates.fudge, steps, **exact, **({"prefixes": True} if infill else {})),
        "dpg": learn(Learn, rates.dpg, steps, **exact),
        "ppo": learn(LearnPPO, rates.ppo, steps, policy="full" if full else "head"),
        "value": learn(LearnValue, rates.rl, steps, **({"conditions": 100} if infill else {})),
    }


SMALL = Rates(1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3)
WORDS = (-5.0067, -0.6931, -0.0067, 0.0)
"""The rewards there are for 0, 1, 2 and more animals."""

NEGATIVE_LOGS = (-20.0, -16.0, -13.0, -11.0, -9.5, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0)


def small(family: str) -> dict[str, Any]:
    """The settings of a `-small` family."""
    stories = found("models", "stories260K")
    language = Language(model=stories)
    settings: dict[str, Any] = {"language": language, **methods(SMALL, 128)}
    if family in ("animals", "long"):
        settings["value"] = replace(settings["value"], atoms=WORDS)
    if family == "long":
        settings["language"] = replace(language, new_tokens=200)
        settings |= {"ctl": learn(LearnCTL, 1e-3, 256, particles=32), "shown": Show(particles=32, threshold=0.5)}
        settings["exact"] = ExactSettings(n=20)
    if family in ("sentiment", "toxicity", "threshold"):
        settings |= small_classifier(family, language)
    if family in ("infill2", "infill15"):
        width, follow = (2, 1) if family == "infill2" else (15, 10)
        settings |= methods(SMALL, 512, (10, 10) if follow == 1 else (25, 4))
        settings["ppo"] = learn(LearnPPO, SMALL.ppo, 128)  # four updates a step: as many as the others
        settings["value"] = replace(settings["value"], atoms=NEGATIVE_LOGS)
        settings |= {
            "language": replace(language, new_tokens=width),
            "goal": Goal(reward="infill", condition_tokens=follow),
            "net": Twist(mlp_layers=2),
            "log_z": LogZSettings(by="enumeration" if follow == 1 else "bounds"),
            "exact": ExactSettings(n=2000),
            "test": Test(n=20, conditions=300 if follow == 1 else 50),
        }
    return settings


def small_classifier(family: str, language: Language) -> dict[str, Any]:
    """Language, goal and classifier of the small text-classifier targets."""
    if family == "sentiment":
        data = found("sentiment", "sst2.csv")
        classify = ClassifierSettings(
            data=(data,) if data else (), classes=("1=positive", "0=negative") if data else ()
        )
        goal, width = Goal(reward="classifier", label="negative"), 10
    else:
        data = found("toxicity", "davidson_tweets.csv")
        rude = ("0=toxic", "1=toxic", "2=civil")
        classify = ClassifierSettings(data=(data,) if data else (), label="class", classes=rude if data else ())
        goal, width = Goal(reward="classifier", label="toxic"), 12
    if family == "threshold":
        goal, width = replace(goal, threshold=1.0), 10
    return {"language": replace(language, new_tokens=width), "classify": classify, "goal": goal}


TINY = Language(model="roneneldan/TinyStories-33M", new_tokens=20, device="auto")


def published(family: str) -> dict[str, Any]:
    """The published settings (§4 of the paper's appendix and the README's commands); their hub models."""
    toxic = Goal(reward="classifier", classifier=TOXICITY, label="0")
    if family == "toxicity":
        rates = Rates(1e-4, 3e-5, 3e-5, 1e-4, 3e-5, 1e-6)
        return {"language": TINY, "goal": toxic, **methods(rates, 4096, full=True)}
    if family == "sentiment":
        language = Language("gpt2-medium", "I bought this", new_tokens=10, device="auto")
        goal = Goal(reward="classifier", classifier=SENTIMENT, label="0")
        net = Twist(body="frozen", mlp_layers=2)
        return {
            "language": language,
            "goal": goal,
            "net": net,
            **methods(Rates(1e-4, 1e-4, 1e-4, 1e-3, 1e-4, 1e-5), 4096),
        }
    if family in ("infill15", "infill2"):
        long = family == "infill15"
        rates = Rates(3e-6, 3e-5, 1e-4, 1e-6, 1e-4, 3e-5) if long else Rates(1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 3e-5)
        sizes = (25, 4) if long else (10, 10)
        how = methods(rates, 6000 if long else 16384, sizes, ctl_positives="csmc")
        return {
            "language": replace(TINY, new_tokens=15 if long else 2),
            "goal": Goal(reward="infill", condition_tokens=10 if long else 1),
            "net": Twist(mlp_layers=2), "log_z": LogZSettings(by="bounds"), "test": Test(n=20, conditions=100), **how,
        }  # fmt: skip
    if family == "threshold":
        goal, net = replace(toxic, threshold=5.0), Twist(body="frozen", mlp_layers=2)
        ctl = learn(LearnCTL, 1e-4, 5000, particles=1000)
        return {"language": replace(TINY, new_tokens=10), "goal": goal, "net": net, "ctl": ctl}
    goal, ctl = replace(toxic, beta=0.1), learn(LearnCTL, 3e-4, 2500, particles=32)
    net = Twist(body="frozen")
    return {
        "language": replace(TINY, new_tokens=200),
        "goal": goal,
        "net": net,
        "ctl": ctl,
        "shown": Show(particles=32),
    }


def recipe(name: str) -> Recipe:
    """The recipe called `family/stage`."""
    family, stage = name.split("/")
    kind = KINDS[stage]
    settings = small(family.removesuffix("-small")) if family.endswith("-small") else published(family)
    known = {field: value for field, value in settings.items() if field in kind.__dataclass_fields__}
    return kind(family=family, **known)

"""tiltlm: state pi* ∝ pi_ref · exp(r / beta), reach it by any road, measure in nats how close you came.

>>> import tiltlm as tl
>>> task = tl.Problem.of("gpt2", reward=lambda prompts, completions: [float("dog" in y) for y in completions],
...                      prompts=["I bought this"], beta=0.5, max_new_tokens=24)        # doctest: +SKIP
>>> guided = tl.learn(task, tl.CTL(), steps=200)                                       # doctest: +SKIP
>>> tl.measure(task, {"reference": task.reference, "guided": guided, "best of 8": tl.BestOf(8)})    # doctest: +SKIP

The public names are those of `__all__`; what they stand for is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tiltlm.api.generating import generate_with
    from tiltlm.api.learning import Learnt, learn
    from tiltlm.api.measuring import compare, measure, report
    from tiltlm.decoders.best_of_n import BestOf
    from tiltlm.decoders.ready import Ready
    from tiltlm.decoders.reference import Reference
    from tiltlm.decoders.rejection import Rejection
    from tiltlm.decoders.smc import SMCDecoding
    from tiltlm.feeds import Draws, Feed, TwistFeed
    from tiltlm.fit import Fit
    from tiltlm.groups import Groups
    from tiltlm.models.causal import CausalLM
    from tiltlm.models.classifier import TextClassifier
    from tiltlm.models.reward_model import RewardModel
    from tiltlm.models.table import TableLM
    from tiltlm.nets import Net
    from tiltlm.policies.a_star_po import AStarPO
    from tiltlm.policies.apo import APO
    from tiltlm.policies.cdpo import CDPO
    from tiltlm.policies.cispo import CISPO
    from tiltlm.policies.d2po import D2PO
    from tiltlm.policies.dapo import DAPO
    from tiltlm.policies.dpo import DPO
    from tiltlm.policies.dpo_rw import DpoRw
    from tiltlm.policies.dr_grpo import DrGRPO
    from tiltlm.policies.exo_pref import ExoPref
    from tiltlm.policies.exo_rw import ExoRw
    from tiltlm.policies.grpo import GRPO
    from tiltlm.policies.gspo import GSPO
    from tiltlm.policies.hinge import Hinge
    from tiltlm.policies.ipo import IPO
    from tiltlm.policies.kto import KTO
    from tiltlm.policies.log_variance import LogVariance
    from tiltlm.policies.online_exo import OnlineDpoRw, OnlineExo
    from tiltlm.policies.online_ipo import OnlineIPO
    from tiltlm.policies.opo import OPO
    from tiltlm.policies.orpo import ORPO
    from tiltlm.policies.ppo import PPO
    from tiltlm.policies.rebel import REBEL
    from tiltlm.policies.reinforce import Reinforce
    from tiltlm.policies.robust_dpo import RobustDPO
    from tiltlm.policies.rpo import RPO
    from tiltlm.policies.sft import SFT
    from tiltlm.policies.simpo import SimPO
    from tiltlm.policies.trajectory_balance import LearntTrajectoryBalance, TrajectoryBalance
    from tiltlm.problem import Facts, Problem
    from tiltlm.rewards.by_name import TextReward
    from tiltlm.rewards.classifier import (
        ClassProbability,
        LogOdds,
        Threshold,
    )
    from tiltlm.rewards.continuation import Continuation
    from tiltlm.rewards.exact_answer import ExactAnswer
    from tiltlm.rewards.words import WordHits
    from tiltlm.ruler.log_z import LogZ
    from tiltlm.ruler.measure import Measurement, Ruler
    from tiltlm.ruler.notebook import Differences, Table
    from tiltlm.samplers.ancestral import draw
    from tiltlm.samplers.best_of import best_of
    from tiltlm.samplers.guided import Guided
    from tiltlm.samplers.particles import SMC
    from tiltlm.samplers.rejection import reject
    from tiltlm.samplers.serving import Serving
    from tiltlm.samplers.smc import smc
    from tiltlm.samples import Conditioned, Pairs, Samples, Tokens
    from tiltlm.seeds import Stream, stream
    from tiltlm.target import Target
    from tiltlm.twists.cd import CD
    from tiltlm.twists.ctl import CTL
    from tiltlm.twists.dpg import DPG
    from tiltlm.twists.fudge import Fudge, FudgeLearning
    from tiltlm.twists.learned import LearnedTwist
    from tiltlm.twists.mixture import Mixture
    from tiltlm.twists.q_sharp import QSharp
    from tiltlm.twists.sixo import SIXO
    from tiltlm.twists.soft_q import SoftQ

_HOMES = {
    "api.generating": "generate_with",
    "api.learning": "Learnt learn",
    "api.measuring": "compare measure report",
    "decoders.best_of_n": "BestOf",
    "decoders.ready": "Ready",
    "decoders.reference": "Reference",
    "decoders.rejection": "Rejection",
    "decoders.smc": "SMCDecoding",
    "feeds": "Draws Feed TwistFeed",
    "fit": "Fit",
    "groups": "Groups",
    "models.causal": "CausalLM",
    "models.classifier": "TextClassifier",
    "models.reward_model": "RewardModel",
    "models.table": "TableLM",
    "nets": "Net",
    "policies.a_star_po": "AStarPO",
    "policies.apo": "APO",
    "policies.cdpo": "CDPO",
    "policies.cispo": "CISPO",
    "policies.d2po": "D2PO",
    "policies.dapo": "DAPO",
    "policies.dpo": "DPO",
    "policies.dpo_rw": "DpoRw",
    "policies.dr_grpo": "DrGRPO",
    "policies.exo_pref": "ExoPref",
    "policies.exo_rw": "ExoRw",
    "policies.grpo": "GRPO",
    "policies.gspo": "GSPO",
    "policies.hinge": "Hinge",
    "policies.ipo": "IPO",
    "policies.kto": "KTO",
    "policies.log_variance": "LogVariance",
    "policies.online_exo": "OnlineDpoRw OnlineExo",
    "policies.online_ipo": "OnlineIPO",
    "policies.opo": "OPO",
    "policies.orpo": "ORPO",
    "policies.ppo": "PPO",
    "policies.rebel": "REBEL",
    "policies.reinforce": "Reinforce",
    "policies.robust_dpo": "RobustDPO",
    "policies.rpo": "RPO",
    "policies.sft": "SFT",
    "policies.simpo": "SimPO",
    "policies.trajectory_balance": "LearntTrajectoryBalance TrajectoryBalance",
    "problem": "Facts Problem",
    "rewards.by_name": "TextReward",
    "rewards.classifier": "ClassProbability LogOdds Threshold",
    "rewards.continuation": "Continuation",
    "rewards.exact_answer": "ExactAnswer",
    "rewards.words": "WordHits",
    "ruler.log_z": "LogZ",
    "ruler.measure": "Measurement Ruler",
    "ruler.notebook": "Differences Table",
    "samplers.ancestral": "draw",
    "samplers.best_of": "best_of",
    "samplers.guided": "Guided",
    "samplers.particles": "SMC",
    "samplers.rejection": "reject",
    "samplers.serving": "Serving",
    "samplers.smc": "smc",
    "samples": "Conditioned Pairs Samples Tokens",
    "seeds": "Stream stream",
    "target": "Target",
    "twists.cd": "CD",
    "twists.ctl": "CTL",
    "twists.dpg": "DPG",
    "twists.fudge": "Fudge FudgeLearning",
    "twists.learned": "LearnedTwist",
    "twists.mixture": "Mixture",
    "twists.q_sharp": "QSharp",
    "twists.sixo": "SIXO",
    "twists.soft_q": "SoftQ",
}
"""module -> its public names."""

_PLACES = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [  # noqa: RUF022
    "APO", "AStarPO", "best_of", "BestOf", "CausalLM", "CD", "CDPO", "CISPO", "ClassProbability", "compare",
    "Conditioned", "Continuation", "CTL", "D2PO", "DAPO", "Differences", "DPG", "DPO", "DpoRw", "draw",
    "Draws", "DrGRPO", "ExactAnswer", "ExoPref", "ExoRw", "Facts", "Feed", "Fit", "Fudge", "FudgeLearning",
    "generate_with",
    "Groups", "GRPO", "GSPO", "Guided", "Hinge", "IPO", "KTO", "learn", "LearnedTwist", "Learnt",
    "LearntTrajectoryBalance", "LogOdds", "LogVariance", "LogZ", "measure", "Measurement", "Mixture", "Net",
    "OnlineDpoRw", "OnlineExo", "OnlineIPO", "OPO", "ORPO", "Pairs", "PPO", "Problem", "QSharp", "Ready",
    "REBEL", "Reference", "Reinforce", "reject", "Rejection", "report", "RewardModel", "RobustDPO", "RPO",
    "Ruler", "Samples", "Serving", "SFT", "SimPO", "SIXO", "SMC", "smc", "SMCDecoding", "SoftQ", "Stream", "stream",
    "Table", "TableLM", "Target", "TextClassifier", "TextReward", "Threshold", "Tokens", "TrajectoryBalance",
    "TwistFeed", "WordHits",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The public name, from the module that it lives in."""
    if name not in _PLACES:
        raise AttributeError(f"module 'tiltlm' has no public name {name!r}{_hint(name)}")
    found = getattr(importlib.import_module(f"tiltlm.{_PLACES[name]}"), name)
    globals()[name] = found  # asked for once
    return found


def _hint(name: str) -> str:
    from tiltlm.mistakes import nearest

    return nearest(name, _PLACES).replace(" Did", ". Did", 1)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

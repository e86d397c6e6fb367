"""Text that a classifier gives a label: r = log P(label | prompt and completion), or which side of a threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import tyro

from tiltlm.device import device_of
from tiltlm.models.causal import CausalLM
from tiltlm.models.classifier import TextClassifier, class_called, classifier_config, labels_of
from tiltlm.objective import positive
from tiltlm.problem import Facts, without_ends
from tiltlm.rewards.classifier import FLOOR, ClassProbability, LogOdds, Threshold
from tiltlm.run import Recipe, Run
from tiltlm.stages.classifier import Classifier, ClassifierSettings
from tiltlm.stages.reference import Reference
from tiltlm.target import Reward
from tiltlm.tasks.language import Flat, Language, OfLanguage
from tiltlm.train import best_checkpoint

ATOMS = (-8.0, -6.0, -5.0, -4.0, -3.0, -2.5, -2.0, -1.5, -1.0, -0.7, -0.4, -0.2, -0.1, 0.0)
"""What a law of log-probabilities is over; others count as the nearest."""


@dataclass(frozen=True)
class Classified(OfLanguage):
    """Text that a classifier gives a label."""

    language: Flat = Language()
    classifier: str = ""
    """A sequence-classification model (hub name, folder or run); empty: the one that the stage `classifier` trains."""

    label: str = ""
    """The class whose log-probability is the reward: its name or number."""

    threshold: float | None = None
    """Reward the side of this score instead: log 1[log-odds of the label > threshold], floored at log 1e-16."""

    above: bool = True
    """Which side of the threshold."""

    classify: ClassifierSettings = ClassifierSettings()
    """The classifier that is trained here, where none is named."""

    beta: float = 1.0
    """Divides the reward: smaller leans harder on it. (The original's --beta_temp is 1/beta.)"""

    r_max: float = 0.0
    """An upper bound of the reward, for exact draws by rejection."""

    name: tyro.conf.Suppress[str] = "classified"

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"the threshold is a log-odds, a number; got {self.threshold}")

    def facts(self) -> Facts:
        atoms = ATOMS if self.threshold is None else (FLOOR, 0.0)
        return Facts(self.beta, r_max=self.r_max, atoms=atoms)

    def needs(self, seed: int) -> dict[str, Recipe]:
        needed = super().needs(seed)
        return needed if self.classifier else needed | {"classifier": self.trained(seed)}

    def stages(self, seed: int) -> dict[str, Recipe]:
        return super().stages(seed) | {"classifier": self.trained(seed)}

    def trained(self, seed: int) -> Classifier:
        """The stage that trains the classifier."""
        lm = self.language
        model = "" if self.classify.body else lm.model
        own = not (model or self.classify.body)  # else nothing of the own model matters
        base = lm.base(self.name, seed) if own else Reference()
        return Classifier(self.classify, model, base, lm.device, self.name, seed)

    def files(self) -> list[str]:
        own = () if self.classifier else (*self.classify.data, self.classify.body)
        return [*super().files(), self.classifier, *own]

    def check(self) -> None:
        super().check()
        if not self.label:
            raise ValueError("classifier: name the class whose log-probability is the reward, --task.label NAME")
        if not self.classifier:
            self.classify.check()
        known = labels_of(classifier_config(self.classifier)) if self.classifier else self.classify.names()
        class_called(self.label, known)

    def untilted(self) -> Self:
        plain = replace(self, label="", threshold=None, above=True, beta=1.0, r_max=0.0)
        return replace(plain, classifier="", classify=ClassifierSettings())

    def judged(self, reference: CausalLM, runs: Mapping[str, Run[Any]]) -> Reward:
        place: str | Path = self.classifier or best_checkpoint(runs["classifier"].folder)
        classifier = TextClassifier.load(place, device=device_of(self.language.device, "--task.device"))
        own = ClassProbability(classifier, reference.tokenizer, self.label)
        reward: Reward = own
        if self.threshold is not None:
            reward = Threshold(LogOdds(own), self.threshold, above=self.above)
        return without_ends(reward, reference.eos_ids)

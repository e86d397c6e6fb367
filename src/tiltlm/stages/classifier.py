"""A text classifier trained on labelled text; its class probabilities are a reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import tyro
from torch import Tensor

from tiltlm.data.labelled_text import classes_of, read_labelled
from tiltlm.data.stories import labelled
from tiltlm.device import device_of
from tiltlm.experience import Offline
from tiltlm.fit import Fit
from tiltlm.models.classifier import TextClassifier
from tiltlm.models.hub import config_of
from tiltlm.rewards.classifier import ClassifierLearning, Labelled
from tiltlm.ruler.estimate import mean
from tiltlm.ruler.intervals import of_rate
from tiltlm.run import Recipe, Run
from tiltlm.seeds import Stream, stream
from tiltlm.settings import SPEED, at_least_one
from tiltlm.stages.reference import Reference, refuse_evaluations
from tiltlm.stages.reporting import Row, row
from tiltlm.stages.training import train
from tiltlm.train import best_checkpoint

OWN_CLASSES: dict[str, list[str]] = {"toxicity": ["kind", "toxic"], "sentiment": ["negative", "positive"]}
"""The classes of the project's own sentences."""

OWN_SENTENCES = 4000
"""How many there are."""

Rows = list[tuple[str, int]]


@dataclass(frozen=True)
class ClassifierSettings:
    """A text classifier trained here: on what, and from what."""

    data: tuple[str, ...] = ()
    """csv or jsonl files of labelled text; empty: sentences of the project's own making."""

    sentences: Literal["sentiment", "toxicity"] = "sentiment"
    """Without data: which sentences."""

    text: str = "text"
    """The column that holds the text."""

    label: str = "label"
    """The column that holds the label."""

    classes: tuple[str, ...] = ()
    """label=class, one a label; labels not named are left out. Empty: labels are classes."""

    body: str = ""
    """A causal LM to start from (folder or hub name); empty: the reference."""

    held_out: float = 0.2
    """Part of the rows that accuracy is measured on."""

    most_tokens: int = 64
    """Texts are cut here, while training."""

    fit: Fit = Fit(lr=1e-3, weight_decay=0.01, steps=300, warmup=30, batch_size=32)

    def __post_init__(self) -> None:
        at_least_one(self, "most_tokens")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a part of the rows, between 0 and 1; got {self.held_out}")

    def names(self) -> list[str]:
        """The classes that the classifier will have, before it is trained."""
        if not self.data:
            return OWN_CLASSES[self.sentences]
        changed = tuple(Path(name).stat().st_mtime_ns for name in self.data)
        return _classes_in(self.data, self.text, self.label, self.classes, changed)

    def rows(self, own: Stream) -> tuple[Rows, list[str]]:
        """(text, class) of every row, and the classes' names."""
        if self.data:
            return read_labelled(self.data, self.text, self.label, classes_of(self.classes))
        return labelled(OWN_SENTENCES, own.child("sentences"), self.sentences), OWN_CLASSES[self.sentences]

    def check(self) -> None:
        """Raise FileNotFoundError or ValueError for what is not there."""
        missing = [name for name in self.data if not Path(name).is_file()]
        if missing:
            raise FileNotFoundError(f"{missing[0]}: no such file (--task.classify.data)")
        if self.body:
            config_of(self.body)
        refuse_evaluations("classifier", self.fit)


@cache
def _classes_in(
    data: tuple[str, ...], text: str, label: str, classes: tuple[str, ...], changed: tuple[int, ...]
) -> list[str]:
    return read_labelled(data, text, label, classes_of(classes))[1]


@dataclass(frozen=True)
class Classifier(Recipe):
    """Train a text classifier on labelled text."""

    classify: ClassifierSettings = ClassifierSettings()
    model: str = ""
    """What it starts from where `classify.body` names nothing; empty: the project's own small model."""

    base: Reference = Reference()
    device: str = field(default="cpu", metadata=SPEED)
    task: tyro.conf.Suppress[str] = ""
    """The name of the task that it is for."""

    seed: int = 0
    stage: ClassVar[str] = "classifier"
    together: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{self.task}/{self.stage}"

    @property
    def body(self) -> str:
        """The model it starts from; empty: the stage `base`."""
        return self.classify.body or self.model

    def inputs(self) -> dict[str, Recipe]:
        return {} if self.body else {"base": self.base}

    def files(self) -> list[str]:
        return [*self.classify.data, self.body]

    def check(self) -> None:
        self.classify.check()

    def build(self, run: Run[Any]) -> None:
        """Fit on the settings' files (or sentences of our own), and report accuracy on rows held out."""
        s, own, device = self.classify, stream(self.seed, "twisted", "classifier"), device_of(self.device)
        rows, names = s.rows(own)
        body = self.body or best_checkpoint(run.inputs["base"].folder)
        model = TextClassifier.from_body(body, names, seed=self.seed, device=device)
        model.most_tokens = min(model.most_tokens, s.most_tokens)
        order = own.child("split").permutation(len(rows)).tolist()
        held = max(1, int(s.held_out * len(rows)))
        test, kept = ([rows[k] for k in part] for part in (order[:held], order[held:]))
        ids, mask = model.encode([text for text, _ in kept])
        data = Labelled(ids, mask, torch.tensor([label for _, label in kept], device=device))
        how = s.fit.of(len(data))
        train(run, model, ClassifierLearning(), Offline(data, how.batch_size, own.child("data")), how, device, own)
        run.write_json("report.json", self.accuracy(model.eval(), test))

    def accuracy(self, model: TextClassifier, test: Rows) -> list[Row]:
        """Report rows of the held-out rows: accuracy, loss, and the accuracy of always naming the commonest class."""
        log_p = model.log_probs([text for text, _ in test])
        label = torch.tensor([label for _, label in test], device=log_p.device)
        hits = (log_p.argmax(1) == label).double()
        share = float(torch.bincount(label).max() / len(label))
        return [
            self.row("accuracy", hits, "rate", **of_rate(hits).entries()),
            self.row("loss", -log_p.gather(1, label[:, None])[:, 0].double(), "nats"),
            row(self, "always the commonest class", "accuracy", share, None, len(label), "rate"),
        ]

    def row(self, metric: str, x: Tensor, unit: str, **more: Any) -> Row:
        e = mean(x)
        return row(self, "classifier", metric, e.value, e.stderr, e.n, unit, **more)

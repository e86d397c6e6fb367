"""The small models the twisted-SMC recipes train themselves: a stories model, and text classifiers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from tiltlm.data.labelled_text import classes_of, read_labelled
from tiltlm.data.stories import labelled, stories
from tiltlm.device import device_of
from tiltlm.experience import Offline
from tiltlm.models.classifier import TextClassifier
from tiltlm.recipes.fitting import fit
from tiltlm.recipes.own_model import train_own_model
from tiltlm.recipes.twisted_settings import ClassifierSettings, Language
from tiltlm.rewards.classifier import ClassifierLearning, Labelled
from tiltlm.ruler.estimate import mean
from tiltlm.ruler.intervals import of_rate
from tiltlm.run import Run
from tiltlm.seeds import Stream, stream

WIDTH = 96
"""Tokens of a story that the own model is trained on."""


def train_reference(run: Run[Any], language: Language, seed: int) -> None:
    """The own model on stories of the project's own making."""
    own = stream(seed, "twisted", "reference")
    texts = stories(language.stories, own.child("stories"))
    train_own_model(run, texts, language.fit, own, language.device, WIDTH)


def train_classifier(
    run: Run[Any], settings: ClassifierSettings, body: str | Path, device_name: str, seed: int, family: str
) -> None:
    """Fit a classifier on the settings' files (or sentences of our own), and report accuracy on rows held out."""
    own, device = stream(seed, "twisted", "classifier"), device_of(device_name)
    rows, names = _labelled_rows(settings, own, family)
    model = TextClassifier.from_body(body, names, seed=seed).to(device)
    model.most_tokens = min(model.most_tokens, settings.most_tokens)
    order = own.child("split").permutation(len(rows)).tolist()
    held = max(1, int(settings.held_out * len(rows)))
    test, train = ([rows[k] for k in part] for part in (order[:held], order[held:]))
    ids, mask = model.encode([text for text, _ in train])
    data = Labelled(ids, mask, torch.tensor([label for _, label in train], device=device))
    experience = Offline(data, settings.fit.batch_size, own.child("data"))
    fit(run, model, ClassifierLearning(), experience, settings.fit, device=device, stream=own)
    run.write_json("report.json", _accuracy(run, model.eval(), test, seed))


def _labelled_rows(
    settings: ClassifierSettings, own: Stream, family: str
) -> tuple[list[tuple[str, int]], list[str]]:
    if settings.data:
        return read_labelled(settings.data, settings.text, settings.label, classes_of(settings.classes))
    kind = _sentences_of(family)
    return labelled(4000, own.child("sentences"), kind), OWN_CLASSES[kind]


Sentences = Literal["sentiment", "toxicity"]
OWN_CLASSES: dict[Sentences, list[str]] = {"toxicity": ["kind", "toxic"], "sentiment": ["negative", "positive"]}
"""The classes of the project's own sentences."""


def _sentences_of(family: str) -> Sentences:
    return "toxicity" if family.startswith(("toxicity", "threshold", "long")) else "sentiment"


def classes_known(settings: ClassifierSettings, family: str) -> list[str]:
    """The classes that the classifier will have, before it is trained."""
    if not settings.data:
        return OWN_CLASSES[_sentences_of(family)]
    changed = tuple(Path(name).stat().st_mtime_ns for name in settings.data)
    return _classes_in(settings.data, settings.text, settings.label, settings.classes, changed)


@cache
def _classes_in(
    data: tuple[str, ...], text: str, label: str, classes: tuple[str, ...], changed: tuple[int, ...]
) -> list[str]:
    return read_labelled(data, text, label, classes_of(classes))[1]


def _accuracy(
    run: Run[Any], model: TextClassifier, test: list[tuple[str, int]], seed: int
) -> list[dict[str, Any]]:
    log_p = model.log_probs([text for text, _ in test])
    label = torch.tensor([label for _, label in test], device=log_p.device)
    share = torch.bincount(label).max() / len(label)
    head = {"recipe": run.recipe.name, "seed": seed, "unit": "rate"}
    hits = (log_p.argmax(1) == label).double()
    right = mean(hits)
    loss = mean(-log_p.gather(1, label[:, None])[:, 0].double())
    return [
        {**head, "method": "classifier", "metric": "accuracy", "value": right.value, "stderr": right.stderr, "n": right.n,
         **of_rate(hits).entries()},
        {**head, "method": "classifier", "metric": "loss", "value": loss.value, "stderr": loss.stderr, "n": loss.n,
         "unit": "nats"},
        {**head, "method": "always the commonest class", "metric": "accuracy", "value": float(share), "stderr": None,
         "n": len(label)},
    ]  # fmt: skip

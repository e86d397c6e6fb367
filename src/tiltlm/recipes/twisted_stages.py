"""The twisted-SMC stages that every method needs: reference, classifier, exact draws of pi*."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tiltlm.models.classifier import class_called, classifier_config, labels_of
from tiltlm.models.hub import config_of
from tiltlm.progress import note, steps
from tiltlm.recipes.fitting import Fit, refuse_evaluations
from tiltlm.recipes.own_model import OWN_TOKENS
from tiltlm.recipes.twisted_lab import Lab
from tiltlm.recipes.twisted_settings import (
    ClassifierSettings,
    ExactSettings,
    Goal,
    Language,
)
from tiltlm.recipes.twisted_text import classes_known, train_classifier, train_reference
from tiltlm.rewards.by_name import files_of, text_function
from tiltlm.run import OldRecipe, Recipe, Run
from tiltlm.samplers.exact_draws import confirm, marked
from tiltlm.samplers.rejection import reject
from tiltlm.samples import Samples
from tiltlm.train import checkpoints


@dataclass(frozen=True)
class Reference(OldRecipe):
    """A small stories model of the project's own making (only where no model is named)."""

    language: Language = Language()
    stage: ClassVar[str] = "reference"

    def files(self) -> list[str]:
        return [self.language.model]

    def check(self) -> None:
        if self.language.model and self.stage == Reference.stage:
            raise ValueError(f"the reference is {self.language.model}: there is nothing to train")
        limit = (
            config_of(self.language.model).to_dict()
            if self.language.model
            else {"max_position_embeddings": OWN_TOKENS}
        )
        most = limit.get("max_position_embeddings") or math.inf
        if self.language.new_tokens >= most:
            raise ValueError(
                f"the reference holds {most} tokens: lower --language.new-tokens, now {self.language.new_tokens}"
            )
        for how in self.fits():
            refuse_evaluations(self.name, how)

    def fits(self) -> list[Fit]:
        """How this stage trains: it has no held-out data that it could evaluate on."""
        return [self.language.fit]

    def build(self, run: Run[Any]) -> None:
        train_reference(run, self.language, self.seed)

    def model_of(self, run: Run[Any]) -> str | Path:
        """Folder or hub name of the reference."""
        if self.language.model:
            return self.language.model
        return checkpoints(run.inputs.get("reference", run).folder)[-1]

    def needed(self) -> dict[str, Recipe]:
        """The stage `reference`, where the model is the project's own."""
        return {} if self.language.model else {"reference": self.up(Reference)}


@dataclass(frozen=True)
class Classifier(Reference):
    """Train a text classifier on labelled text; its class probabilities are a reward."""

    classify: ClassifierSettings = ClassifierSettings()
    stage: ClassVar[str] = "classifier"

    def inputs(self) -> dict[str, Recipe]:
        return {} if self.classify.body else self.needed()

    def check(self) -> None:
        super().check()
        missing = [name for name in self.classify.data if not Path(name).is_file()]
        if missing:
            raise FileNotFoundError(f"{missing[0]}: no such file (--classify.data)")
        if self.classify.body:
            config_of(self.classify.body)

    def files(self) -> list[str]:
        return [*super().files(), *self.classify.data, self.classify.body]

    def fits(self) -> list[Fit]:
        return [self.classify.fit]

    def classes(self) -> list[str]:
        """The classes of the classifier that is trained here."""
        return classes_known(self.classify, self.family)

    def build(self, run: Run[Any]) -> None:
        body = self.classify.body or self.model_of(run)
        train_classifier(run, self.classify, body, self.language.device, self.seed, self.family)


@dataclass(frozen=True)
class Scored(Classifier):
    """What all stages with a target share."""

    goal: Goal = Goal()

    def inputs(self) -> dict[str, Recipe]:
        return self.needed() | self.judge()

    def files(self) -> list[str]:
        own = files_of(self.goal.file) if self.goal.reward == "file" else []
        return [*super().files(), *own, self.goal.classifier]

    def check(self) -> None:
        super().check()
        if self.goal.reward == "infill" and self.language.stop:
            raise ValueError("infill: gap and what follows have a fixed length each; leave --language.stop out")
        if self.goal.reward == "file":
            no_rows = "this recipe has one prompt and no rows with columns: give it a default, or use the recipes on pairs"
            text_function(self.goal.file).check_columns((), no_rows)
        if self.goal.reward == "classifier" and self.goal.label != "condition":
            named = self.goal.classifier
            class_called(self.goal.label, labels_of(classifier_config(named)) if named else self.classes())

    def judge(self) -> dict[str, Recipe]:
        """The stage `classifier`, where the goal wants one and names none."""
        own = self.goal.reward == "classifier" and not self.goal.classifier
        return {"classifier": self.up(Classifier)} if own else {}

    def lab(self, run: Run[Any]) -> Lab:
        classifier: str | Path = self.goal.classifier
        if "classifier" in run.inputs:
            classifier = checkpoints(run.inputs["classifier"].folder)[-1]
        return Lab(self.language, self.goal, self.seed, self.model_of(run), classifier)

    def speech(self, run: Run[Any]) -> tuple[Any, int | None]:
        return self.lab(run).tokenizer, self.language.new_tokens


@dataclass(frozen=True)
class Exact(Scored):
    """Exact draws of pi*: by rejection, or by construction for infilling."""

    exact: ExactSettings = ExactSettings()
    stage: ClassVar[str] = "exact"

    def check(self) -> None:
        super().check()
        if self.exact.stored and not Path(self.exact.stored).is_file():
            raise FileNotFoundError(f"{self.exact.stored}: no such file (--exact.stored)")
        if self.stage == Exact.stage and not self.exact.stored and self.goal.reward != "infill":
            self.goal.bound()

    def draws(self) -> int:
        """How many exact draws there will be."""
        return len(Samples.load(self.exact.stored)) if self.exact.stored else self.exact.n

    def refuse_few(self, repeats: int, setting: str) -> None:
        """Raise ValueError where upper bounds want more exact draws than there will be: each wants one of its own."""
        if repeats > self.draws():
            raise ValueError(
                f"{repeats} upper bounds (--{setting}) want as many exact draws, and there are {self.draws()}: raise "
                f"--exact.n to {repeats}, or lower --{setting}"
            )

    def build(self, run: Run[Any]) -> None:
        lab = self.lab(run)
        if self.exact.stored:
            samples = self.stored(lab)
        elif lab.conditioned:
            samples = lab.conditions(self.exact.n, "exact")[1]
        else:
            samples = self.search(run, lab)
        samples.save(run.folder / "exact.safetensors")
        run.write_jsonl("samples.jsonl", list(lab.readable(samples.select(slice(0, 200)))))

    def files(self) -> list[str]:
        return super().files() + ([self.exact.stored] if self.exact.stored else [])

    def stored(self, lab: Lab) -> Samples:
        """The draws of the file that the settings name. Raises ValueError if they are of another target or prompt."""
        samples = Samples.load(self.exact.stored)
        length = samples.tokens.shape[1]
        same = lab.conditioned or samples.prompts.lists() == lab.prompt.lists()
        if not same or length != lab.width:
            raise ValueError(
                f"{self.exact.stored} holds draws of {length} tokens, the settings want {lab.width}; and its prompt is "
                f"{'the same' if same else 'another one'}"
            )
        samples = samples.to(lab.device)
        confirm(lab.target, samples, rewards=len(samples))
        return samples if samples.exact_at is not None else marked(samples, lab.goal.beta)

    def search(self, run: Run[Any], lab: Lab) -> Samples:
        s, path = self.exact, run.folder / "search.safetensors"
        with steps(self.name) as on_try:
            return reject(
                lab.target,
                lab.prompt,
                n=s.n,
                max_new_tokens=lab.width,
                stream=lab.stream.child("exact" if self.exact.purpose == "measuring" else "training"),
                r_max=self.goal.bound(),
                batch_size=s.batch_size,
                max_tries=s.max_tries,
                path=path,
                on_try=on_try,
                tell=note,
            )

    def exact_of(self, run: Run[Any]) -> Samples:
        """The stored exact draws: of the stage `exact` among the inputs."""
        return Samples.load(run.inputs["exact"].folder / "exact.safetensors")

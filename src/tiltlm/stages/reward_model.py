"""A reward model from the data: Bradley–Terry on pairs, a classifier of wanted against unwanted on verdicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
import tyro

from tiltlm import ranks
from tiltlm.experience import Offline
from tiltlm.fit import Fit
from tiltlm.models.hub import config_of
from tiltlm.models.reward_model import RewardModel
from tiltlm.objective import Objective
from tiltlm.problem import SPLITS
from tiltlm.progress import note
from tiltlm.rewards.bradley_terry import BradleyTerry, Comparisons, ahead, comparisons
from tiltlm.rewards.verdicts import VerdictRegression, Verdicts, verdict_loss, verdicts
from tiltlm.ruler.judge import AHEAD, AHEAD_OF_COMMONER, COMMONER, MODEL, RULE, doubt
from tiltlm.ruler.table import read_report
from tiltlm.run import Recipe, Run
from tiltlm.seeds import stream
from tiltlm.settings import ADDED
from tiltlm.sharded import at_rest
from tiltlm.stages.base import begun, reading
from tiltlm.stages.data import Rows, are_verdicts, rows_of, wanted
from tiltlm.stages.reporting import estimate, row
from tiltlm.stages.sft import FIT
from tiltlm.stages.task import OfTask
from tiltlm.stages.training import train
from tiltlm.train import best_checkpoint


@dataclass(frozen=True)
class Judge:
    """The reward model."""

    fit: Annotated[Fit, tyro.conf.arg(name="")] = FIT
    body: str = ""
    """A model to put the head on (hub name, folder or run); empty: `start`, or else `model`."""

    margin: float = 0.0
    """Times a pair's own `margin` (where the data has one) is what its rewards should differ by at least."""

    center: float = 0.0
    """Weight of (r_c + r_r)², which holds rewards near 0."""

    prefoverpref: float = field(default=0.0, metadata=ADDED)
    """Weight of the preferences over preferences: of two pairs in a batch, the one of the larger margin is to be further
    apart. Compares margins, so judge.margin must be above 0."""

    def __post_init__(self) -> None:
        if self.margin < 0 or self.center < 0 or self.prefoverpref < 0:
            raise ValueError(f"margin, center and prefoverpref of the judge must not be negative; got {self}")
        if self.prefoverpref and not self.margin:
            raise ValueError("judge.prefoverpref compares the margins of pairs: say judge.margin too, 1 say")


@dataclass(frozen=True)
class TrainJudge(OfTask):
    """Train a reward model on the preferences; report it beside the rule that the longer response wins."""

    task: Any
    seed: int = 0
    stage: ClassVar[str] = "reward-model"
    together: ClassVar[bool] = True

    def counted(self) -> TrainJudge:
        return TrainJudge(self.task.only("dataset", "reader", "base", "judge"), self.seed)

    def inputs(self) -> dict[str, Recipe]:
        return begun(self.task, self.seed)

    def check(self) -> None:
        super().check()
        if self.task.judge.body:
            config_of(self.task.judge.body)
        found = self.task.columns()
        if found and not {"chosen", "label"} & set(found):
            raise ValueError(wanting(found))

    def build(self, run: Run[Any]) -> None:
        read, judge = reading(self.task, run.inputs), self.task.judge
        most = self.task.reader.most_tokens
        model = RewardModel.from_body(
            judge.body or read.model, seed=self.seed, most_tokens=most, device=read.device
        )
        rows = {split: rows_of(run.inputs["data"], split) for split in SPLITS}
        if are_verdicts(rows["train"]):
            answers = {split: self.verdicts(model, some) for split, some in rows.items()}
            loss: Objective = VerdictRegression()
            self.learn(run, model, loss, answers["train"], lambda: verdict_metrics(model, answers["valid"]))
            run.write_json("report.json", self.verdict_accuracies(model.eval(), answers["test"], rows["train"]))
        else:
            pairs = {split: self.comparisons(model, some) for split, some in rows.items()}
            loss = BradleyTerry(judge.center, judge.prefoverpref)
            self.learn(run, model, loss, pairs["train"], lambda: judged(model, pairs["valid"]))
            run.write_json("report.json", self.accuracies(model.eval(), pairs["test"], rows["test"]))

    def learn(self, run: Run[Any], model: RewardModel, objective: Objective, data: Any,
              measure: Callable[[], dict[str, float]]) -> None:  # fmt: skip
        """Train the model on the data, and leave it at its best."""
        own, how = stream(self.seed, "preferences"), self.task.judge.fit.of(len(data))
        experience = Offline(data, how.batch_size, own.child("reward-model", "data"))
        watch = how.watching(measure, best="loss")
        train(run, model, objective, experience, how, next(model.parameters()).device, own, watch=watch)
        with at_rest(model):
            model.restore(best_checkpoint(run.folder))

    def verdicts(self, model: RewardModel, rows: Rows) -> Verdicts:
        """Rows of verdicts in the reward model's tokens."""
        if self.task.judge.margin or self.task.judge.center:  # and so prefoverpref, which wants a margin
            raise ValueError(
                "judge.margin and judge.center are about pairs; the data holds verdicts on single answers"
            )
        prompts, completions, good = ([each[name] for each in rows] for name in ("prompt", "completion", "label"))
        return verdicts(model, prompts, completions, good)

    def comparisons(self, model: RewardModel, rows: Rows) -> Comparisons:
        """Pairs in the reward model's tokens."""
        if "chosen" not in rows[0]:
            raise ValueError(wanting(rows[0]))
        margin = [self.task.judge.margin * float(each.get("margin", 0.0)) for each in rows]
        prompts, chosen, rejected = ([each[name] for each in rows] for name in ("prompt", "chosen", "rejected"))
        return comparisons(model, prompts, chosen, rejected, margin)

    def verdict_accuracies(self, model: RewardModel, test: Verdicts, trained_on: Rows) -> Rows:
        """Accuracy on the test split, that of always saying the commoner verdict of the training data, the difference."""
        right = ((scores(model, test) > 0) == test.good).double().cpu()
        common = (test.good.cpu() == (2 * len(wanted(trained_on)) > len(trained_on))).double()
        return [
            estimate(self, MODEL, "accuracy", right),
            estimate(self, COMMONER, "accuracy", common),
            estimate(self, AHEAD_OF_COMMONER, "accuracy", right - common),
            row(self, MODEL, "loss", verdict_metrics(model, test)["loss"], None, len(test), "nats"),
        ]

    def accuracies(self, model: RewardModel, test: Comparisons, rows: Rows) -> Rows:
        """Accuracy on the test split, the length rule's, and their difference, pair by pair; 95% intervals."""
        right = ahead(gaps(model, test)).double().cpu()
        longer = ahead(torch.tensor([len(each["chosen"]) - len(each["rejected"]) for each in rows]).double())
        return [
            estimate(self, MODEL, "accuracy", right),
            estimate(self, RULE, "accuracy", longer),
            estimate(self, AHEAD, "accuracy", right - longer),
            row(self, MODEL, "loss", judged(model, test)["loss"], None, len(test), "nats"),
        ]

    def show(self, run: Run[Any]) -> None:
        super().show(run)
        text = doubt(read_report(run.folder / "report.json"))
        if text is not None:
            note(f"[yellow]{text}[/]")


def wanting(columns: Any) -> str:
    """Why a reward model cannot learn from such columns."""
    return (
        "a reward model learns from pairs (chosen, rejected) or verdicts (prompt, completion, label); the data has "
        f"{', '.join(columns)}: name a reward (--task.reward)"
    )


@torch.no_grad()
def gaps(model: RewardModel, data: Comparisons) -> torch.Tensor:
    """r_c − r_r of every pair, [n]."""

    def own(begin: int, end: int) -> list[torch.Tensor]:
        parts = [data.select(slice(k, min(k + 64, end))).pairs for k in range(begin, end, 64)]
        found = [model.score(pairs.both()).split(len(pairs)) for pairs in parts]
        return [chosen - rejected for chosen, rejected in found]

    return torch.cat(ranks.in_shares(len(data), own))


def judged(model: RewardModel, data: Comparisons) -> dict[str, float]:
    """Loss (without margins) and accuracy on held-out pairs."""
    gap = gaps(model, data).double()
    return {"loss": float(torch.nn.functional.softplus(-gap).mean()), "accuracy": float(ahead(gap).mean())}


@torch.no_grad()
def scores(model: RewardModel, data: Verdicts) -> torch.Tensor:
    """r of every answer, [n]."""

    def own(begin: int, end: int) -> list[torch.Tensor]:
        parts = [data.select(slice(k, min(k + 64, end))).samples for k in range(begin, end, 64)]
        return [model.score(part) for part in parts]

    return torch.cat(ranks.in_shares(len(data), own))


def verdict_metrics(model: RewardModel, data: Verdicts) -> dict[str, float]:
    """Loss and accuracy on held-out verdicts."""
    reward = scores(model, data).double()
    right = (reward > 0) == data.good
    return {"loss": float(verdict_loss(reward, data.good).mean()), "accuracy": float(right.double().mean())}

"""Completions of the reference for every prompt, and their rewards: lines that any method on rewards or pairs learns from.

Labels do not depend on the target's temperature, draws not on its reward either: another one finds the same ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tiltlm import ranks
from tiltlm.data.encoded import AT_ONCE, digest_of, made_once
from tiltlm.data.stored import MANY, open_samples, store_samples
from tiltlm.feeds import Draws as Settings
from tiltlm.groups import Groups
from tiltlm.jsonl import Forward, Lines, read_rows, whole_lines
from tiltlm.models.base import LanguageModel
from tiltlm.problem import SPLITS, Problem, Split
from tiltlm.progress import note, steps
from tiltlm.run import Recipe, Run
from tiltlm.samplers.ancestral import draw
from tiltlm.samplers.server import Server, mismatch, said_of
from tiltlm.samplers.serving import HERE, Drawer, Serving
from tiltlm.samples import Samples, Tokens
from tiltlm.settings import ADDED
from tiltlm.stages.log_ref import score
from tiltlm.stages.reporting import estimate
from tiltlm.stages.task import OfTask, Task

Make = Callable[[int, int], Iterator[dict[str, Any]]]
Sliced = Forward | list[dict[str, Any]]


@dataclass(frozen=True)
class Draws(OfTask):
    """Completions of the reference: lines of prompt, completions and their ids."""

    task: Task
    draws: Settings = Settings()
    seed: int = 0
    draw: Serving = field(default=HERE, metadata=ADDED)
    """Who draws: a server, or this process."""

    stage: ClassVar[str] = "generate"

    @property
    def together(self) -> bool:
        return not self.draw.url  # a server is asked by one

    def counted(self) -> Draws:
        return replace(self, task=self.task.untilted(), draw=self.draw.still)

    def check(self) -> None:
        refuse_one_prompt(self)
        super().check()

    def build(self, run: Run[Any]) -> None:
        problem = self.problem(run)
        for split in splits_of(problem):
            prompts = problem.prompts[split]
            prompts = prompts.select(slice(0, self.draws.prompts or None)) if split == "train" else prompts
            with steps(f"{self.name} {split}") as on_step:
                append(
                    run.folder / f"{split}.jsonl",
                    self.lines(problem, prompts, split),
                    len(prompts),
                    self.chunk,
                    on_step,
                )
        shown = islice(read_rows(run.folder / "test.jsonl", ("prompt",)), 50)
        run.write_jsonl(
            "samples.jsonl", [{name: row[name] for name in ("prompt", "completions")} for row in shown]
        )

    def decoder(self, run: Run[Any]) -> LanguageModel:
        raise ValueError(
            f"{run.folder} holds completions and draws nothing itself: name the run that it draws from"
        )

    @property
    def chunk(self) -> int:
        """Prompts answered at once."""
        return max(1, self.draws.batch_size // self.draws.n)

    def lines(self, problem: Problem, prompts: Tokens, split: Split) -> Make:
        """(begin, end) -> the lines of those prompts; prompt i's completions follow from its number alone."""
        n, own, drawer = self.draws.n, problem.stream.child("generate", split), self.drawer(problem)

        def make(begin: int, end: int) -> Iterator[dict[str, Any]]:
            asked = prompts.select(slice(begin, end)).cropped()
            rows = torch.arange(begin * n, end * n)
            drawn = drawer(asked, n=n, max_new_tokens=problem.width, stream=own, rows=rows)
            assert drawn.finished is not None
            texts, log_q = problem.rows(drawn), None if drawn.log_q is None else drawn.log_q.sum(1).tolist()
            done, finished = drawn.completions.lists(), drawn.finished.tolist()
            for k, ids in enumerate(asked.lists()):
                part = slice(k * n, (k + 1) * n)
                yield {
                    "prompt": texts[k * n]["prompt"], "completions": [row["completion"] for row in texts[part]],
                    "prompt_ids": ids, "completion_ids": done[part],
                    **({"retokenised": True} if log_q is None else {"log_q": log_q[part]}), "finished": finished[part],
                }  # fmt: skip

        return make

    def drawer(self, problem: Problem) -> Drawer:
        """What draws: the reference, here or on a server."""
        if not self.draw.url:
            return partial(draw, self.draw.of(problem.reference))
        return served(self.draw, problem.reference, problem.tokenizer, self.name)


def served(how: Serving, model: LanguageModel, tokenizer: Any, who: str) -> Drawer:
    """The server that `how` describes in the place of `model`; of its first rows it is said how far its log-probabilities
    are from the model's own."""
    server, compared = Server.of(how, model, tokenizer), how.text

    def drawer(prompts: Tokens, **asked: Any) -> Samples:
        nonlocal compared
        drawn = server(prompts, **asked)
        if not compared:
            note(said_of(float(mismatch(score(drawn, model).to(drawn.device), drawn).mean()), who))
        compared = True
        return drawn

    return drawer


def refuse_one_prompt(recipe: OfTask) -> None:
    """Raise ValueError where nothing would learn from stored draws."""
    if recipe.task.facts().prompts != "several":
        raise ValueError(
            f"{recipe.name}: stored draws are for many prompts; of one prompt, or of conditions, methods take fresh ones"
        )


def splits_of(problem: Problem) -> list[Split]:
    """The splits that have prompts; a test split that is the training prompts themselves counts too."""
    return [split for split in SPLITS if split in problem.prompts]


def append(path: Path, make: Make, total: int, chunk: int, on_step: Any) -> None:
    """Write a line for each of `total` to `path`, `chunk` at once, going on behind the whole lines there already.

    Several processes make a chunk each, and the first writes.
    """
    done = ranks.from_first(lambda: whole_lines(path))

    def lines(begin: int) -> list[str]:
        return [json.dumps(row, ensure_ascii=False) + "\n" for row in make(begin, min(begin + chunk, total))]

    whole = done - done % chunk
    with (path if ranks.is_first() else Path(os.devnull)).open("a", encoding="utf-8") as file:
        for begin in range(whole, total if done < total else 0, chunk * ranks.size()):
            begins = range(begin, min(begin + chunk * ranks.size(), total), chunk)
            made = ranks.in_shares(len(begins), lambda k, end: [x for b in begins[k:end] for x in lines(b)])  # noqa: B023
            file.writelines(made[max(0, done - begin) :])
            file.flush()
            on_step(min(begins[-1] + chunk, total), total, {})
    ranks.wait()


@dataclass(frozen=True)
class Labels(OfTask):
    """The reward of every completion that was drawn."""

    task: Task
    draws: Settings = Settings()
    seed: int = 0
    draw: Serving = field(default=HERE, metadata=ADDED)
    """The server that draws (none: this process)."""

    stage: ClassVar[str] = "label"
    shared: ClassVar[bool] = True

    @staticmethod
    def of(task: Task, draws: Settings, seed: int, draw: Serving = HERE) -> Labels:
        """The labels for any temperature."""
        return Labels(task.at(1.0), draws, seed, draw)

    def counted(self) -> Labels:
        return replace(self, task=self.task.at(1.0), draw=self.draw.still)

    def check(self) -> None:
        refuse_one_prompt(self)
        super().check()

    def inputs(self) -> dict[str, Recipe]:
        return {"generate": Draws(self.task.untilted(), self.draws, self.seed, self.draw)} | self.needs()

    def build(self, run: Run[Any]) -> None:
        problem, drawn, report = self.problem(run), run.inputs["generate"].folder, []
        for split in splits_of(problem):
            rows = Lines(drawn / f"{split}.jsonl", ("prompt", "completions"))
            path = run.folder / f"{split}.jsonl"
            with steps(f"{self.name} {split}") as on_step:
                append(path, labels(problem, split, rows.forward()), len(rows), 256, on_step)
            report += self.report(split, path)
        run.write_json("report.json", report)

    def report(self, split: str, path: Path) -> list[dict[str, Any]]:
        """What the rewards of a split are like, each group one observation."""
        found = torch.tensor([row["rewards"] for row in read_rows(path, ("rewards",))]).double()
        told = [estimate(self, split, "reward", found.mean(1), "reward")]
        if found.shape[1] > 1:
            tied = int((found == found[:, :1]).all(1).sum())
            if tied:
                note(f"{self.name}: {tied} of {len(found)} groups of the {split} split are tied")
            told.append(estimate(self, split, "spread within a group", found.std(1), "reward"))
        return told + self.term_rows(split, path)

    def term_rows(self, split: str, path: Path) -> list[dict[str, Any]]:
        """A report row for every term of a sum of rewards: its mean over the split, unweighted."""
        said = [row["reward_terms"] for row in read_rows(path, ("rewards",)) if "reward_terms" in row]
        means = {
            name: torch.tensor([row[name] for row in said]).double().mean(1) for name in (said[0] if said else ())
        }
        return [estimate(self, split, f"reward[{name}]", x, "reward") for name, x in means.items()]

    def decoder(self, run: Run[Any]) -> LanguageModel:
        raise ValueError(f"{run.folder} holds labels and draws nothing itself: name the run that it draws from")

    def groups(self, run: Run[Any], problem: Problem, split: Split) -> Groups:
        """The labelled groups of a split."""
        rows = Lines(run.folder / f"{split}.jsonl", ("rewards",))
        prompts = problem.prompts[split].select(slice(0, len(rows))).cropped().to("cpu")
        if len(rows) <= MANY:
            return groups_of(list(rows), prompts)

        def parts() -> Iterator[tuple[int, Samples]]:
            for begin, some in zip(count(0, AT_ONCE), rows.parts(AT_ONCE), strict=False):
                yield begin, groups_of(some, prompts.select(slice(begin, begin + len(some)))).samples

        path = run.folder.parents[1] / "encoded" / f"labels-{digest_of(rows.path)}.arrow"
        made_once(path, lambda: store_samples(path, parts()))
        return Groups(open_samples(path, prompts), len(next(iter(rows))["completion_ids"]))


def groups_of(rows: list[dict[str, Any]], prompts: Tokens) -> Groups:
    """Lines of completion_ids, finished and (perhaps) rewards as groups; line i answers prompt i."""
    size = len(rows[0]["completion_ids"])
    done = Tokens.of([ids for row in rows for ids in row["completion_ids"]])
    finished = torch.tensor([flag for row in rows for flag in row["finished"]], dtype=torch.bool)
    index = torch.arange(len(rows)).repeat_interleave(size)
    samples = Samples(prompts.to("cpu"), index, done.ids, done.mask, finished=finished)
    if "rewards" in rows[0]:
        rewards = torch.tensor([value for row in rows for value in row["rewards"]], dtype=torch.float32)
        samples = samples.with_(reward=rewards)
    return Groups(samples, size)


def labels(problem: Problem, split: Split, rows: Sliced) -> Make:
    """(begin, end) -> those of the lines `rows` with their `rewards`, and with `reward_terms` where the reward is a sum."""
    terms = {name[7:-1]: term for name, term in problem.checks.items() if name.startswith("reward[")}

    def make(begin: int, end: int) -> Iterator[dict[str, Any]]:
        asked, some = problem.prompts[split].select(slice(begin, end)).cropped(), rows[begin:end]
        samples = groups_of(some, asked).samples.to(problem.device)
        reward = short_numbers(problem.target.reward(samples))
        several = {name: short_numbers(term(samples)) for name, term in terms.items()}
        at = 0
        for row in some:
            own = slice(at, at := at + len(row["completion_ids"]))
            said = {"reward_terms": {name: values[own] for name, values in several.items()}} if several else {}
            yield row | {"rewards": reward[own]} | said

    return make


def short_numbers(x: Tensor) -> list[float]:
    """The numbers of x [N] with the shortest texts that x's precision rounds to them: 0.1, not 0.10000000149011612."""
    x = x.detach().cpu()
    half = x.is_floating_point() and x.dtype != torch.float64  # bfloat16 too: numpy does not know it
    return [float(str(value)) for value in (x.float() if half else x.double()).numpy()]

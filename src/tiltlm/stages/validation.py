"""What is told of a round: the answers it learnt from, and how good the policy is that it ended with.

On validation prompts greedy answers are graded, and the method's loss and metrics are taken on what is built of the
reference's answers to them: all rows, in the same batches at every round; log-ratios to the reference, in float32.

`made` is the round (`stages.rounds.Round`) in all of this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiltlm import ranks
from tiltlm.experience import Once
from tiltlm.feeds import mapped
from tiltlm.feeds.rounds import Shares, built, rates
from tiltlm.groups import Groups
from tiltlm.jsonl import read_json
from tiltlm.method import Learner, Lesson
from tiltlm.problem import Problem
from tiltlm.ruler.mcnemar import McNemar
from tiltlm.run import Run
from tiltlm.samplers.scenes import OnePrompt
from tiltlm.samples import Samples
from tiltlm.stages.answers import GREEDY, greedy
from tiltlm.stages.log_ref import score
from tiltlm.stages.reporting import Row, estimate, row


def shares(made: Any, run: Run[Any], right: float, rows: int) -> list[Row]:
    """What the answers were like, and how many rows were built of them."""
    drawn = made.drawn(run)[0]
    graded = drawn.recipe.graded(drawn)
    found = Shares.of(graded.reward >= right, graded.prompt_index)
    counts = {
        "always_right": found.right, "sometimes_right": found.mixed, "never_right": found.wrong, "pairs": found.pairs,
        "rows": rows,
    }  # fmt: skip
    rate = rates(graded.reward >= right, graded.prompt_index, len(graded.prompts))
    told = [estimate(made, made.called, "train_accuracy", rate[~rate.isnan()])]
    for each in read_json(drawn.folder / "report.json"):
        if each["metric"] != "reward":
            name = f"train_{each['metric']}"
            told.append(row(made, made.called, name, each["value"], each["stderr"], each["n"], "rate"))
    if made.how.rationalize:
        told.append(row(made, made.called, "asked_with_hint", found.wrong))
    return told + [row(made, made.called, name, count) for name, count in counts.items()]


@torch.no_grad()
def validated(made: Any, run: Run[Any], problem: Problem, who: Learner, right: float) -> list[Row]:
    """Greedy accuracy, also on prompts that the reference always, or sometimes, answers right; then `held_out`."""
    if not made.validated:
        return []
    who.module.eval()
    policy: Any = who.policy
    hit = greedy(problem, policy, right, made.how.batch_size)
    run.write_json(GREEDY, [int(x) for x in hit])
    drawn = run.inputs["valid"]
    graded = drawn.recipe.graded(drawn)
    rate = rates(graded.reward >= right, graded.prompt_index, len(graded.prompts))
    rows = [estimate(made, made.called, "accuracy[greedy]", hit)]
    for name, some in {"always right": rate == 1, "sometimes right": (rate > 0) & (rate < 1)}.items():
        if int(some.sum()) > 1:
            rows.append(estimate(made, made.called, f"accuracy[greedy, {name}]", hit[some]))
    own = problem.stream.child("valid pairs")
    return rows + held_out(made, problem, who, built([graded], made.method.fed, made.how, right, own))


def held_out(made: Any, problem: Problem, who: Learner, rows: Any) -> list[Row]:
    """The method's loss and metrics on validation rows."""
    if not len(rows):
        return []
    if isinstance(rows, Groups) and made.feed.size < rows.size:
        rows = rows.subsets(made.feed.size, problem.stream.child("valid subsets"))
    data, objective = referred(made, problem, rows), made.objective(problem)
    order = problem.stream.child("valid order")
    once = Once(data, made.fit.batch_size, order)
    batches = made.method.experience(once, Lesson(problem, who, OnePrompt(problem.prompts["train"]), 1, order))

    def batch(step: int) -> tuple[float, float, dict[str, Tensor]]:
        """(Σ loss, Σ weight, metrics) of a batch."""
        some = objective.prepare(batches.batch(step))
        found = objective.loss(who.module, some)
        metrics = {name: x.double().cpu() for name, x in found.metrics.items()}
        return float(found.loss.sum()), float(objective.weight(some).sum()), metrics

    found = ranks.in_shares(once.steps, lambda begin, end: [batch(step) for step in range(begin, end)])
    total, weight = sum(each[0] for each in found), sum(each[1] for each in found)
    told = [row(made, made.called, "valid_loss", total / weight, n=len(data))]
    for name in found[0][2]:
        x = torch.cat([metrics[name] for _, _, metrics in found])
        x = x[~x.isnan()]
        told += [estimate(made, made.called, f"valid_{name}", x, "nats")] if len(x) > 1 else []
    return told


def referred(made: Any, problem: Problem, rows: Any) -> Any:
    """`rows` with the reference's log-probabilities, in the precision that is validated in."""
    if made.method.fed == "answers":
        return rows.to(problem.device)

    def fill(samples: Samples) -> Samples:
        return samples.with_(log_ref=score(samples, problem.reference))

    return mapped(rows, fill).to(problem.device)


def reason_to_end(made: Any, run: Run[Any]) -> str:
    """Why no round should follow, by the settings; empty where one may."""
    if not made.validated or not (made.how.gain or made.how.collapse):
        return ""
    hit, base = hits(run), hits(run.inputs["valid"])
    if made.how.collapse and float(hit.mean()) < made.how.collapse * float(base.mean()):
        said = (
            f"{float(hit.mean()):.3f} of validation prompts are right, {float(base.mean()):.3f} by the reference"
        )
        return f"round {made.index + 1} collapsed: {said} (--feed.rounds.collapse {made.how.collapse:g})"
    if not made.how.gain:
        return ""
    before = run.inputs.get("before")
    found = McNemar.of(hit, base if before is None else hits(before))
    if found.first > found.second and found.p <= made.how.gain:
        return ""
    said = f"{found.first} validation prompts gained, {found.second} lost (exact McNemar p = {found.p:.3g})"
    return f"round {made.index + 1} brought no significant gain: {said}"


def hits(run: Run[Any]) -> Tensor:
    """Which validation prompts were answered right, greedily; float64 [P]."""
    return torch.tensor(read_json(run.folder / GREEDY), dtype=torch.float64)

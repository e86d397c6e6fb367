"""What a star graph's policies and values are measured by: its answers, every arm, and pi* in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltlm.data.star_graph_tokens import AnswerKey, Checked, GraphTokenizer, check, forced
from tiltlm.exact import log_density
from tiltlm.models.base import LanguageModel, Values
from tiltlm.problem import Check
from tiltlm.ruler.log_z import BinaryTarget
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samples import Samples, Tokens, conditions_of
from tiltlm.seeds import Stream
from tiltlm.target import Reward
from tiltlm.twists.value import value_loss

ROWS = 512
"""Rows scored at once."""

FEW = 1000
"""Graphs that a value is looked at on, and that the reference's success rate is taken over."""


def answers_to(prompts: Tokens) -> Samples:
    """The right answer to every prompt, as completions."""
    right = conditions_of(prompts)
    return Samples(prompts, torch.arange(len(prompts), device=prompts.device), right.ids, right.mask)


@dataclass(frozen=True)
class Answers:
    """The key to the test graphs. Prompts and completions handed in are of the test graphs, or of the first of them."""

    key: AnswerKey
    width: int

    def key_of(self, prompts: Tokens) -> AnswerKey:
        """The key to the first test graphs, as many as there are prompts."""
        return AnswerKey(conditions_of(prompts), self.key.arms[: len(prompts)], self.key.allowed)

    # ---- numbers of a policy ------------------------------------------------------------------------------------------

    def checks(self) -> dict[str, Check]:
        """Whole paths, valid arms, malformed answers, and every token on its own."""

        def verdict(one: Callable[[Checked], Tensor]) -> Check:
            return lambda samples: one(check(samples, self.key_of(samples.prompts)))

        def token(t: int) -> Check:
            return verdict(lambda found: found.per_token[:, t])

        return {
            "accuracy": verdict(lambda found: found.exact),
            "valid_rate": verdict(lambda found: found.valid_arm),
            "format_error": verdict(lambda found: found.format_error),
            **{f"token_{t + 1}": token(t) for t in range(self.width)},
        }

    def right(self, q: LanguageModel, prompts: Tokens) -> Tensor:
        """E_q[r | x]: the probability of the right path, [P]."""
        return log_density(q, answers_to(prompts), ROWS).exp()

    def forced(self, policy: LanguageModel, prompts: Tokens) -> dict[str, Tensor]:
        """Teacher-forced loss (nats per answer) and accuracy of every answer token, per test graph."""
        loss, right = forced(policy, answers_to(prompts), batch_size=ROWS)
        each = {f"forced_token_{t + 1}": right[:, t].double() for t in range(right.shape[1])}
        return {"forced_loss": loss.sum(1).double(), "forced_accuracy": right.all(1).double(), **each}

    # ---- pi* --------------------------------------------------------------------------------------------------------

    def log_z_of(self, reference: LanguageModel) -> Callable[[Tokens, float], Tensor]:
        """(prompts, beta) -> log Z, [P], of any prompts with their answers."""
        return lambda prompts, beta: BinaryTarget(log_density(reference, answers_to(prompts), ROWS), beta).log_z

    def optimum(self, ruler: Ruler) -> Measurement:
        """pi* itself, computed: its accuracy, valid arms, reward and divergences, per test graph."""
        log_arms = self.arm_log_probs(ruler)
        star = BinaryTarget(log_arms[:, 0], ruler.target.beta)
        wrong_arms = (log_arms[:, 1:].double().logsumexp(1) - star.log_z).exp() if log_arms.shape[1] > 1 else 0.0
        values = {"accuracy": star.success, "valid_rate": star.success + wrong_arms}
        distances = ruler.distances(star.success, star.kl_to_reference)
        nothing = {name: torch.zeros_like(star.log_z) for name in ("kl_to_target", "objective_gap")}
        return Measurement(values | distances | nothing)

    def arm_log_probs(self, ruler: Ruler) -> Tensor:
        """log pi_ref of every arm of every test graph, [P, d], the right one first; exact."""
        key, prompts = self.key_of(ruler.prompts), ruler.prompts
        arms = key.arms.to(prompts.device)
        right = (arms == key.answers.ids[:, None]).all(2)
        order = right.to(torch.int64).sort(dim=1, descending=True, stable=True).indices
        n, degree, width = arms.shape
        rows = arms.gather(1, order[:, :, None].expand(-1, -1, width)).reshape(-1, width)
        index = torch.arange(n, device=arms.device).repeat_interleave(degree)
        samples = Samples(prompts, index, rows, torch.ones_like(rows, dtype=torch.bool))
        return log_density(ruler.target.reference, samples, ROWS).reshape(n, degree)

    # ---- values -----------------------------------------------------------------------------------------------------

    def value_report(
        self, value: Values, reference: LanguageModel, prompts: Tokens, reward: Reward, own: Stream
    ) -> dict[str, Tensor]:
        """How good the value is on fresh rollouts of test graphs: loss and stated p at every token.

        `p_right_t`, `p_wrong_t`: the stated success probability after token t, among completions that turn out
        right, and those that turn out wrong; a calibrated value before the first hop states p₀ in both.
        """
        some = prompts.select(slice(0, FEW))
        drawn = draw_in_batches(reference, some, max_new_tokens=self.width, stream=own, batch_size=ROWS)
        right = reward(drawn)
        with torch.no_grad():
            parts = [drawn.select(slice(k, k + ROWS)) for k in range(0, len(drawn), ROWS)]
            values = torch.cat([value.values(part) for part in parts])
        loss, p = value_loss(values, right).double(), values[..., 0].sigmoid().double()
        out = {f"value_loss_{t + 1}": loss[:, t] for t in range(self.width)}
        out |= {f"p_right_{t + 1}": p[right == 1, t] for t in range(self.width) if (right == 1).any()}
        return out | {f"p_wrong_{t + 1}": p[right == 0, t] for t in range(self.width) if (right == 0).any()}


def log_odds(reference: LanguageModel, prompts: Tokens) -> float:
    """logit of the reference's mean success rate over the first graphs: what a value learnt on pairs leaves out."""
    rate = log_density(reference, answers_to(prompts.select(slice(0, FEW))), ROWS).exp().mean()
    return float(torch.logit(rate.clamp(1e-6, 1 - 1e-6)))


def readable(samples: Samples, tokenizer: GraphTokenizer) -> Iterator[dict[str, Any]]:
    """Rows of prompt, completion, and reward and log q where they are known."""
    numbers = {}
    if samples.reward is not None:
        numbers["reward"] = samples.reward.tolist()
    if samples.log_q is not None:
        numbers["log_q"] = samples.log_q.sum(1).tolist()
    prompts, completions = tokenizer.decode(samples.row_prompts), tokenizer.decode(samples.completions)
    for k, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        yield {"prompt": prompt, "completion": completion} | {name: x[k] for name, x in numbers.items()}


def results(rows: list[dict[str, Any]], beta: float) -> dict[str, float]:
    """Exact match in percent under the original's names: pretrain, q# (0.1), cd (0.1), reinforce, dpo, rpo."""
    names = {"reference": "pretrain", "q-sharp": f"q# ({beta:g})", "cd": f"cd ({beta:g})"}
    accuracy = [row for row in rows if row["metric"] == "accuracy" and "(" not in row["method"]]
    return {names.get(row["method"], row["method"]): round(100 * row["value"], 2) for row in accuracy}

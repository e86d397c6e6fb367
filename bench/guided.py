"""Guided decoding with 10 candidates: one forward pass for all, against one uncached call per candidate.

The work: 32 prompts of 32 tokens, 20 new tokens each, drawn from a reference guided by Q#'s twist of a V-type
value head over the reference's ten likeliest tokens. Both sides run the reference alike (cached, our own state)
and use the same uniforms; they differ in how the value model judges the candidates:

- ours: `samplers.guided.Guided`: the prefix cached, ten candidates in one masked forward, the one that is drawn
  kept in the cache at no cost;
- naive: for every step and candidate, the value model's full forward over prefix + candidate.

Both must draw the same tokens, with log-probabilities equal to 1e-3, or the script fails.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from common import LARGE, SMALL, Side, Size, Work, random_ids, ratio, run

ROWS, PROMPT, NEW, CANDIDATES, BETA = 32, 32, 20, 10, 0.5


@dataclass(frozen=True)
class Case:
    """The size of reference and value model."""

    size: Size
    goal: str = ">=5"


CASES = {"6x384": Case(LARGE), "4x128": Case(SMALL)}


def models(size: Size) -> tuple[Any, Any]:
    """A random reference and a random value model whose head says something."""
    from tiltlm.models.causal import CausalLM
    from tiltlm.models.heads import ValueHead

    reference, body = (CausalLM.from_config(size.config(), seed=seed).eval() for seed in (0, 1))
    value = ValueHead(body).eval()
    torch.manual_seed(2)
    torch.nn.init.normal_(value.head[-1].weight)
    return reference, value


class NaiveTwist:
    """The twist of a value model asked about one candidate at a time, from the first token on."""

    def __init__(self, value: Any, rule: Any) -> None:
        self.value, self.rule = value, rule

    def start(self, prompts: Any, capacity: int) -> NaiveTwist:
        self.prefix = prompts.ids
        return self

    def log_psi(self, candidates: torch.Tensor) -> torch.Tensor:
        from tiltlm.twists.value import BINARY, log_pmf

        law = log_pmf(torch.stack([self._judge(column) for column in candidates.unbind(1)], 1))
        return self.rule.log_psi(law, torch.tensor(BINARY))

    def _judge(self, token: torch.Tensor) -> torch.Tensor:
        """Values [N, 1] of every prefix followed by its token."""
        ids = torch.cat([self.prefix, token[:, None]], 1)
        body = self.value.body.model.base_model
        return self.value.head(body(input_ids=ids, use_cache=False).last_hidden_state[:, -1])

    def append(self, tokens: torch.Tensor) -> None:
        self.prefix = torch.cat([self.prefix, tokens[:, None]], 1)


def decoding(case: Case, twist_of: Any) -> Work:
    """Draw from the reference guided by `twist_of(value, rule)`."""
    from tiltlm.samplers.ancestral import draw
    from tiltlm.samplers.guided import Guided
    from tiltlm.samples import Tokens
    from tiltlm.seeds import stream
    from tiltlm.twists.q_sharp import QSharp

    reference, value = models(case.size)
    guided = Guided(reference, twist_of(value, QSharp(BETA)), top_k=CANDIDATES)
    prompts = Tokens.full(random_ids(3, ROWS, PROMPT, case.size.vocab))

    def work() -> list[Any]:
        drawn = draw(guided, prompts, max_new_tokens=NEW, stream=stream(0, "bench"))
        return [drawn.tokens.tolist(), drawn.log_q.tolist()]

    return work


def ours(case: Case) -> Work:
    from tiltlm.twists.value import ValueTwist

    return decoding(case, ValueTwist)


def naive(case: Case) -> Work:
    return decoding(case, NaiveTwist)


def report(name: str, found: dict[str, Side]) -> list[str]:
    (tokens, log_q), (theirs, their_log_q) = (found[side].results[0][-1] for side in ("ours", "naive"))
    apart = (torch.tensor(log_q) - torch.tensor(their_log_q)).abs().max().item()
    print(f"{name:9s} same tokens: {tokens == theirs}; log-probabilities apart by at most {apart:.1e}")
    if not (tokens == theirs and apart < 1e-3):
        raise SystemExit("the two sides do not draw the same")
    return [ratio(f"guided-{name}", found["naive"].cpu / found["ours"].cpu, CASES[name].goal)]


if __name__ == "__main__":
    run(sys.modules[__name__], {"ours": ours, "naive": naive}, CASES, report, rounds=1)

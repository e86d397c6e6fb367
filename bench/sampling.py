"""Plain sampling: `samplers.ancestral.draw` against transformers' `generate`.

The work: 100 different prompts of 8 tokens, one completion each of 20 or 64 tokens, float32, nothing cut and
nothing warped (`top_k=0, top_p=1, temperature=1`), no end token. Ours also hands over every drawn token's
log-probability. Whether both draw from the same distribution is checked, not assumed: the mean log-probability of
the drawn tokens under the network, which any hidden top-k or temperature would raise, must agree within 4
standard errors, and our log-probabilities with the network's own to 1e-3.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from common import LARGE, SMALL, Side, Size, Work, random_ids, ratio, run

ROWS, PROMPT = 100, 8


@dataclass(frozen=True)
class Case:
    """A model's size, how many tokens are drawn, and how many times faster we must be."""

    size: Size
    new: int
    goal: str


CASES = {
    "6x384-20": Case(LARGE, 20, ">=2.2"),
    "6x384-64": Case(LARGE, 64, ">=2.2"),
    "4x128-20": Case(SMALL, 20, ">=1.3"),
    "4x128-64": Case(SMALL, 64, ">=1.3"),
}


def network(size: Size) -> Any:
    """A random network, its output head sharpened so that a hidden top-k would show."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(size.config()).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(4)
    return model


def ours(case: Case) -> Work:
    from tiltlm.models.causal import CausalLM
    from tiltlm.samplers.ancestral import draw
    from tiltlm.samples import Tokens
    from tiltlm.seeds import stream

    model = CausalLM(network(case.size))
    prompts = Tokens.full(random_ids(1, ROWS, PROMPT, case.size.vocab))
    number = count()

    def work() -> list[Any]:
        drawn = draw(model, prompts, max_new_tokens=case.new, stream=stream(next(number), "bench"))
        return [drawn.tokens.tolist(), drawn.log_q.sum(1).tolist()]

    return work


def generate(case: Case) -> Work:
    from transformers import GenerationConfig

    model, prompts = network(case.size), random_ids(1, ROWS, PROMPT, case.size.vocab)
    settings = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=case.new, pad_token_id=0
    )
    mask = torch.ones_like(prompts)

    def work() -> list[Any]:
        drawn = model.generate(prompts, attention_mask=mask, generation_config=settings)
        return [drawn[:, PROMPT:].tolist(), None]

    return work


@torch.no_grad()
def log_prob(case: Case, tokens: torch.Tensor) -> torch.Tensor:
    """The network's log-probability of each row, computed the plain way; [N]."""
    sequences = torch.cat([random_ids(1, ROWS, PROMPT, case.size.vocab), tokens], 1)
    parts = []
    model = network(case.size)
    for part in sequences.split(10):
        log_p = model(part).logits[:, PROMPT - 1 : -1].log_softmax(-1)
        parts.append(log_p.gather(2, part[:, PROMPT:, None])[..., 0].sum(1))
    return torch.cat(parts)


def check(name: str, case: Case, found: dict[str, Side]) -> None:
    """Both sides drew `case.new` tokens a row, from the network's own distribution."""
    (tokens, log_q), (peer, _) = found["ours"].results[0][-1], found["generate"].results[0][-1]
    mine, theirs = log_prob(case, torch.tensor(tokens)), log_prob(case, torch.tensor(peer))
    wrong = (mine - torch.tensor(log_q)).abs().max().item()
    error = math.sqrt((mine.var() + theirs.var()).item() / ROWS)
    apart = (mine.mean() - theirs.mean()).item()
    print(
        f"{name:9s} mean log p: ours {mine.mean():.2f}, generate {theirs.mean():.2f}, s.e. of the gap {error:.2f}"
    )
    if not (wrong < 1e-3 and abs(apart) < 4 * error):
        raise SystemExit(f"the two sides draw from different distributions (log_q off by {wrong:.1e})")


def report(name: str, found: dict[str, Side]) -> list[str]:
    case = CASES[name]
    check(name, case, found)
    rates = {side: ROWS * case.new / one.cpu for side, one in found.items()}
    print(f"{name:9s} tokens per CPU-second: " + ", ".join(f"{side} {rate:.0f}" for side, rate in rates.items()))
    return [ratio(f"sampling-{name}", found["generate"].cpu / found["ours"].cpu, case.goal)]


if __name__ == "__main__":
    run(sys.modules[__name__], {"ours": ours, "generate": generate}, CASES, report, rounds=3)

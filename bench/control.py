"""SMC with a potential on every prefix: ours against genlm-control with its transformers backend.

The work: 100 particles, prompt 8, at most 20 tokens, the language model as proposal, potential exp(0.3 · even tokens so
far), multinomial resampling when the effective sample size has halved, GPT-2 4×128 over a byte-level vocabulary, float32.
Both hand back weighted particles. genlm-control gets batches of 100 (its default is 20) and a waiting time of 5 ms. The
end of text is all but impossible: where a sequence is cut, genlm-control appends the end and weighs by its probability,
we do not. Checked: 2000 particles × tokens on both sides, and the weighted share of even tokens, which the potential
moves, agrees within 4 standard errors.

Without genlm-control (`pip install genlm-control`, in an environment of its own if its dependencies disagree with yours)
the script says so and ends.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from statistics import mean, stdev
from tempfile import mkdtemp
from typing import Any

import torch

from common import Side, Size, Work, random_ids, ratio, run

PARTICLES, PROMPT, NEW, TILT = 100, 8, 20, 0.3


@dataclass(frozen=True)
class Case:
    size: Size
    goal: str


CASES = {"4x128": Case(Size(4, 128, 1000), ">=5")}


def folder(size: Size) -> str:
    """A random network and a byte-level tokenizer of `size.vocab` pieces, as a folder both sides load."""
    import numpy as np
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshr"), int(rng.integers(2, 7)))) for _ in range(4000)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=size.vocab,
            special_tokens=["<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert core.get_vocab_size() == size.vocab
    path = mkdtemp()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", bos_token="<eos>").save_pretrained(path)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(size.config())
    with torch.no_grad():  # the final norm's output has mean 0, so this makes the end's logit -30 everywhere
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[0] = -30.0 / size.width
    model.save_pretrained(path)
    return path


def share(contexts: list[list[int]], weights: list[float]) -> list[float]:
    """The weighted share of even tokens, and the number of tokens drawn."""
    even = sum(
        w * sum(k % 2 == 0 for k in row) / max(1, len(row)) for row, w in zip(contexts, weights, strict=True)
    )
    return [even / sum(weights), float(sum(map(len, contexts)))]


class EvenTokens:
    """log psi = 0.3 · (even tokens so far), as a twist."""

    def start(self, prompts: Any, capacity: int) -> EvenTokens:
        self.so_far = torch.zeros(len(prompts), dtype=torch.float64)
        self.gain = TILT * (torch.arange(CASES["4x128"].size.vocab) % 2 == 0).double()
        return self

    def log_psi(self, candidates: torch.Tensor | None) -> torch.Tensor:
        gain = self.gain if candidates is None else self.gain[candidates]
        return self.so_far[:, None] + gain

    def append(self, tokens: torch.Tensor) -> None:
        self.so_far = self.so_far + self.gain[tokens]

    def select(self, index: torch.Tensor) -> None:
        self.so_far = self.so_far[index]


def ours(case: Case) -> Work:
    from tiltlm.models.causal import CausalLM
    from tiltlm.samplers.smc import SMC, smc
    from tiltlm.samples import Tokens
    from tiltlm.seeds import stream
    from tiltlm.target import Target

    reference = CausalLM.load(folder(case.size), eos_ids=(0,)).requires_grad_(False)
    target = Target(reference, lambda s: TILT * ((s.tokens % 2 == 0) & s.mask).sum(1).double(), 1.0)
    prompt = Tokens.full(random_ids(1, 1, PROMPT, case.size.vocab))
    settings, number = SMC(PARTICLES, 0.5, "multinomial"), count()

    def work() -> list[float]:
        own = stream(next(number), "bench")
        found = smc(
            target, EvenTokens(), prompt, settings, max_new_tokens=NEW, stream=own, proposal=reference
        ).samples
        return share(found.completions.lists(), found.log_w.softmax(0).tolist())

    return work


def control(case: Case) -> Work:
    import asyncio

    from genlm.control import SMC, PromptedLLM, direct_token_sampler
    from genlm.control.potential import Potential

    class Even(Potential):
        async def prefix(self, context: Any) -> float:
            return TILT * sum(token.token_id % 2 == 0 for token in context)

        async def complete(self, context: Any) -> float:
            return await self.prefix(context)

    ids = random_ids(1, 1, PROMPT, case.size.vocab)[0].tolist()
    options = {"backend": "hf", "prompt_ids": ids, "batch_size": PARTICLES, "timeout": 0.005}
    llm = PromptedLLM.from_name(folder(case.size), **options)
    sampler = SMC(direct_token_sampler(llm), critic=Even(llm.vocab))
    loop = asyncio.new_event_loop()

    def work() -> list[float]:
        llm.model.clear_cache()  # otherwise a later pass finds the prompt's answers of an earlier one
        found = loop.run_until_complete(
            sampler(n_particles=PARTICLES, ess_threshold=0.5, max_tokens=NEW + 1)
        )  # the end counts
        rows = [[token.token_id for token in row if hasattr(token, "token_id")] for row in found.contexts]
        return share(rows, list(found.normalized_weights))

    return work


def report(case: str, found: dict[str, Side]) -> list[str]:
    """Both drew as much and leaned as far; the ratio of speeds, CPU-seconds per particle and token."""
    rates, shares = {}, {}
    for name, side in found.items():
        results = [result for process in side.results for result in process]
        tokens = mean(result[1] for result in results)
        shares[name] = [result[0] for result in results]
        rates[name] = tokens / side.cpu
        if not tokens == PARTICLES * NEW:
            raise SystemExit(f"{case}: {name} drew {tokens} tokens instead of {PARTICLES * NEW}")
        print(
            f"{case} {name}: {rates[name]:.0f} particles × tokens a CPU-second, even share {mean(shares[name]):.3f}"
        )
    error = sum(stdev(x) ** 2 / len(x) for x in shares.values()) ** 0.5
    if abs(mean(shares["ours"]) - mean(shares["control"])) > 4 * error:
        raise SystemExit(f"{case}: the two sides lean differently far (standard error {error:.4f})")
    return [ratio(f"smc-over-genlm-control-{case}", rates["ours"] / rates["control"], CASES[case].goal)]


SIDES = {"ours": ours, "control": control}

if __name__ == "__main__":
    if find_spec("genlm") is None:
        print("skipped: genlm-control is not installed here (pip install genlm-control)")
        sys.exit(0)
    run(sys.modules[__name__], SIDES, CASES, report, rounds=5)

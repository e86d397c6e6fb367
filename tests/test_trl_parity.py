"""Losses and gradients beside TRL 1.16's trainers: the same tiny GPT-2, the same ids, ragged lengths, temperature 1.

Where the two sides define a method differently, the test takes the case in which they meet, and says so. Skipped where
TRL is not installed (`pip install -e '.[bench]'` brings it).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from tiltlm.experience import Offline, referenced, referenced_pairs
from tiltlm.groups import Groups
from tiltlm.models.causal import CausalLM
from tiltlm.models.reward_model import RewardModel
from tiltlm.objective import Objective
from tiltlm.policies.apo import APO
from tiltlm.policies.cdpo import CDPO
from tiltlm.policies.dpo import DPO
from tiltlm.policies.exo_pref import ExoPref
from tiltlm.policies.grpo import GRPO
from tiltlm.policies.hinge import Hinge
from tiltlm.policies.ipo import IPO
from tiltlm.policies.kto import KTO, JudgedAnswers
from tiltlm.policies.opo import OPO
from tiltlm.policies.orpo import ORPO
from tiltlm.policies.robust_dpo import RobustDPO
from tiltlm.policies.sft import SFT
from tiltlm.policies.simpo import SimPO
from tiltlm.rewards.bradley_terry import BradleyTerry, Comparisons
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.seeds import stream

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[bench]'")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"written against TRL 1.16; this is {trl.__version__}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and transformers about each other

VOCAB, BETA = 23, 0.3
LENGTHS = {"prompt": (5, 3, 3, 7, 1), "chosen": (4, 7, 2, 1, 5), "rejected": (6, 2, 5, 3, 1)}

Rows = list[list[int]]


# ---- the same networks and the same ids for both sides -------------------------------------------------------


def spread(network: Any, seed: int) -> Any:
    """`network` in evaluation mode with noise on every weight: far from uniform, and from another seed's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return network.eval()


def config(**options: Any) -> GPT2Config:
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id"))
    return GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=64, vocab_size=VOCAB, pad_token_id=0, **tokens, **options
    )


def networks() -> tuple[Any, Any]:
    """Policy and reference."""
    torch.manual_seed(0)
    network = GPT2LMHeadModel(config())
    return spread(copy.deepcopy(network), 1), spread(network, 2)


def ids(lengths: tuple[int, ...], seed: int) -> Rows:
    """Random rows without token 0, which pads (TRL's reward model finds the end of a row by it)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def answers(prompts: Rows, completions: Rows) -> Samples:
    done = Tokens.of(completions)
    return Samples(Tokens.of(prompts), torch.arange(len(prompts)), done.ids, done.mask)


def preferences(**lengths: tuple[int, ...]) -> tuple[Rows, Rows, Rows, Pairs]:
    """Prompts, chosen and rejected as lists, and all of them as `Pairs`."""
    sides = LENGTHS | lengths
    prompts, chosen, rejected = (ids(sides[name], seed) for seed, name in enumerate(sides))
    return prompts, chosen, rejected, Pairs(answers(prompts, chosen), answers(prompts, rejected))


def words() -> Any:
    """A tokenizer of VOCAB words, for constructors that want one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", pad_token="t0", eos_token="t0")


def trainer(kind: Any, settings: Any, folder: Path, rows: list[dict[str, Any]], *models: Any, **loss: Any) -> Any:
    """A TRL trainer of copies of `models`, born with the data set `rows`."""
    from datasets import Dataset

    args = settings(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, **loss)
    data, models = Dataset.from_list(rows), tuple(copy.deepcopy(model) for model in models)
    built = kind(*models, args=args, train_dataset=data, processing_class=words())
    built.model.eval()
    return built


# ---- the comparison ------------------------------------------------------------------------------------------


def loss_of(objective: Objective, model: Any, batch: Any) -> torch.Tensor:
    """What the engine minimises: Σ loss / Σ weight."""
    batch = objective.prepare(batch)
    return objective.loss(model, batch).loss.sum() / objective.weight(batch).sum()


def gradient(network: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def agree(mine: torch.Tensor, network: Any, theirs: torch.Tensor, their_network: Any) -> None:
    """Losses to 1e-5 (relative where large), gradients to 1e-4 of their size."""
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-5)
    mine.backward()
    theirs.backward()
    ours, peer = gradient(network), gradient(their_network)
    assert peer.norm() > 1e-3 and (ours - peer).norm() < 1e-4 * peer.norm()


def compare(
    objective: Objective, networks: tuple[Any, Any], batch: Any, peer: Any, rows: list[dict[str, Any]]
) -> None:
    """Our loss of the policy on `batch` and the trainer `peer`'s on `rows` agree, and the reference's is another one."""
    policy, reference = (CausalLM(copy.deepcopy(network)) for network in networks)
    mine = loss_of(objective, policy, batch)
    assert abs(mine.item() - loss_of(objective, reference, batch).item()) > 1e-2
    agree(mine, policy.model, peer.compute_loss(peer.model, peer.data_collator(rows)), peer.model)


TEXTS = [{"prompt": "t1", "chosen": " t2", "rejected": " t3"}]


def dpo_trainer(folder: Path, *models: Any, **loss: Any) -> Any:
    return trainer(trl.DPOTrainer, trl.DPOConfig, folder, TEXTS, *models, beta=BETA, **loss)


def dpo_rows(prompts: Rows, chosen: Rows, rejected: Rows) -> list[dict[str, Any]]:
    together = zip(prompts, chosen, rejected, strict=True)
    return [{"prompt_ids": x, "chosen_ids": better, "rejected_ids": worse} for x, better, worse in together]


# ---- pairs with a reference ----------------------------------------------------------------------------------

WITH_REFERENCE = {
    "sigmoid": (DPO(BETA), {}),
    "robust": (RobustDPO(BETA, 0.1), {"label_smoothing": 0.1}),
    "exo_pair": (ExoPref(BETA, 0.02), {"label_smoothing": 0.02}),
    "ipo": (IPO(BETA, normalise="mean"), {}),  # TRL divides by the answers' lengths, the paper does not
    "hinge": (Hinge(BETA), {}),
    "apo_zero": (APO(BETA, "zero"), {}),
    "apo_down": (APO(BETA, "down"), {}),
}


@pytest.mark.parametrize("loss_type", WITH_REFERENCE)
def test_losses_on_pairs_are_those_of_the_dpo_trainer(loss_type: str, tmp_path: Path):
    objective, loss = WITH_REFERENCE[loss_type]
    policy, reference = networks()
    *rows, pairs = preferences()
    peer = dpo_trainer(tmp_path, policy, reference, loss_type=loss_type, **loss)
    compare(objective, (policy, reference), referenced_pairs(pairs, CausalLM(reference)), peer, dpo_rows(*rows))


def test_conservative_dpo_is_aot_on_one_pair(tmp_path: Path):
    """TRL 1.16's sigmoid loss leaves `label_smoothing` unread; its `aot` reads it, and sorts the pairs of a batch: with
    one pair, that is conservative DPO."""
    policy, reference = networks()
    *rows, pairs = preferences()
    peer = dpo_trainer(tmp_path, policy, reference, loss_type="aot", label_smoothing=0.1)
    batch = referenced_pairs(pairs, CausalLM(reference)).select(slice(1, 2))
    compare(CDPO(BETA, 0.1), (policy, reference), batch, peer, dpo_rows(*rows)[1:2])


# ---- pairs without a reference -------------------------------------------------------------------------------


def test_simpo_without_margin_is_sigmoid_norm_with_a_uniform_reference(tmp_path: Path):
    """`sigmoid_norm` compares log-ratios per token; log V, the same in every one of them, cancels."""
    policy, uniform = networks()
    torch.nn.init.zeros_(uniform.transformer.ln_f.weight)
    torch.nn.init.zeros_(uniform.transformer.ln_f.bias)
    *rows, pairs = preferences()
    peer = dpo_trainer(tmp_path, policy, uniform, loss_type="sigmoid_norm")
    compare(SimPO(BETA, gamma=0.0), (policy, uniform), pairs, peer, dpo_rows(*rows))


def labelled(prompts: Rows, chosen: Rows, rejected: Rows) -> list[dict[str, Any]]:
    """Rows as TRL's experimental trainers tokenize them."""
    rows = []
    for x, *both in zip(prompts, chosen, rejected, strict=True):
        row = {"prompt_input_ids": x, "prompt_attention_mask": [1] * len(x)}
        for name, y in zip(("chosen", "rejected"), both, strict=True):
            row[f"{name}_input_ids"] = x + y
            row[f"{name}_attention_mask"] = [1] * len(x + y)
            row[f"{name}_labels"] = [-100] * len(x) + y
        rows.append(row)
    return rows


def test_simpo_is_that_of_the_cpo_trainer(tmp_path: Path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    models = networks()
    *rows, pairs = preferences()
    loss = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0, "max_length": 64}
    peer = trainer(CPOTrainer, CPOConfig, tmp_path, TEXTS, models[0], **loss)
    compare(SimPO(2.0, gamma=0.7), models, pairs, peer, labelled(*rows))


def test_orpo_is_that_of_the_orpo_trainer_where_only_the_answer_is_predicted(tmp_path: Path):
    """TRL's likelihood term covers the prompt too, and averages over a batch's tokens instead of its rows: with prompts of
    one token (which nothing predicts) and chosen answers of one length, both are ours."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    models = networks()
    *rows, pairs = preferences(prompt=(1,) * 5, chosen=(4,) * 5)
    peer = trainer(ORPOTrainer, ORPOConfig, tmp_path, TEXTS, models[0], beta=0.4, max_length=64)
    compare(ORPO(alpha=0.4), models, pairs, peer, labelled(*rows))


# ---- answers judged one by one -------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_kto_is_that_of_the_kto_trainer(turned: bool, tmp_path: Path):
    """One answer a prompt: both take z0 from every prompt with the answer before its own. Policy and reference change
    places, so that z0 is positive once, and cut at 0 once."""
    policy, reference = reversed(networks()) if turned else networks()
    prompts, completions, _, pairs = preferences()
    good = [True, False, False, True, True]
    texts = [{"prompt": "t1", "completion": " t2", "label": label} for label in (True, False)]
    loss = {"beta": BETA, "desirable_weight": 1.2, "undesirable_weight": 0.8, "per_device_train_batch_size": 5}
    peer = trainer(trl.KTOTrainer, trl.KTOConfig, tmp_path, texts, policy, reference, **loss)
    names = ("prompt_ids", "completion_ids", "KL_completion_ids", "label")
    foreign = completions[-1:] + completions[:-1]
    rows = [dict(zip(names, row, strict=True)) for row in zip(prompts, completions, foreign, good, strict=True)]
    ours, fixed = CausalLM(copy.deepcopy(policy)), CausalLM(reference)
    samples = referenced(pairs.chosen, fixed).with_(reward=torch.tensor(good).float())
    batch = JudgedAnswers(Offline(samples, 5, stream(0, "test-trl")), ours, fixed).batch(0)
    assert bool((batch.z0 > 0.1).all()) != turned
    compare(KTO(BETA, w_good=1.2, w_bad=0.8), (policy, reference), batch, peer, rows)


# ---- the policy's own draws ----------------------------------------------------------------------------------
# Both draw what the test says. Prompts have one length: TRL pads them in front without telling GPT-2 their positions.


def points(completion_ids: Rows, **others: Any) -> list[float]:
    """A reward for TRL's trainers and for ours: without ties, and far above what is added to a standard deviation."""
    return [100.0 * sum((k + 1) * token for k, token in enumerate(row)) for row in completion_ids]


def drawn(prompts: Rows, completions: Rows, reference: Any) -> Samples:
    """Completions, as many of each prompt, with reward and the reference's log-probabilities."""
    done = Tokens.of(completions)
    index = torch.arange(len(prompts)).repeat_interleave(len(completions) // len(prompts))
    samples = Samples(Tokens.of(prompts), index, done.ids, done.mask, reward=torch.tensor(points(completions)))
    return referenced(samples, CausalLM(reference))


def texts_of(rows: Rows) -> list[str]:
    return [" ".join(f"t{token}" for token in row) for row in rows]


def test_opo_with_hard_labels_is_that_of_the_online_dpo_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    policy, reference = networks()
    prompts, (first, second) = ids((5,) * 4, 0), (ids(x, k) for k, x in enumerate([(4, 7, 2, 1), (6, 2, 5, 3)], 1))
    texts = [{"prompt": text} for text in texts_of(prompts)]
    peer = trainer(OnlineDPOTrainer, OnlineDPOConfig, tmp_path, texts, policy, reference, points, beta=BETA)
    asked, done = Tokens.of(prompts + prompts), Tokens.of(first + second)
    monkeypatch.setattr(
        peer, "_generate", lambda *_: (asked.ids, asked.mask.long(), done.ids, done.mask.long(), None)
    )
    theirs = peer.training_step(peer.model, {"prompt": texts_of(prompts)})

    model = CausalLM(copy.deepcopy(policy))
    side_by_side = [row for pair in zip(first, second, strict=True) for row in pair]
    batch = Groups(drawn(prompts, side_by_side, reference), 2)
    mine = loss_of(OPO(labels="hard", beta_r=1.0, beta_pi=BETA), model, batch)
    mine.backward()
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert abs(mine.item() - loss_of(OPO(beta_r=1e6, beta_pi=BETA), model, batch).item()) > 1e-2
    ours, other = gradient(model.model), gradient(peer.model)
    assert other.norm() > 1e-3 and (ours - other).norm() < 1e-4 * other.norm()


@pytest.mark.parametrize("std", [True, False])
def test_grpo_is_that_of_the_grpo_trainer(std: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows drawn by another policy, so that ratios are not 1 and the clip bites. TRL weighs k3 by the ratio unless told not
    to; the paper does not."""
    policy, reference = networks()
    prompts, completions = ids((5, 5), 0), ids((4, 7, 2, 1, 5, 6, 2, 5), 1)
    policy.config._name_or_path = str(tmp_path / "reference")  # where it takes its reference from
    reference.save_pretrained(policy.config._name_or_path)
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "loss_type": "grpo", "beta": BETA}
    settings |= {"scale_rewards": "group" if std else "none", "use_bias_correction_kl": False}
    asked = [{"prompt": text} for text in texts_of(prompts) for _ in range(4)]
    peer = trainer(trl.GRPOTrainer, trl.GRPOConfig, tmp_path, asked, policy, points, **settings)
    rows = [row for row in prompts for _ in range(4)]
    made = (rows, completions, None, texts_of(completions), None, {}, None, None)
    monkeypatch.setattr(peer, "_generate", lambda *_: made)

    scale = 1.0 if std else 1e-3  # without a division the rewards would drown k3
    batch = drawn(prompts, completions, reference)
    assert batch.reward is not None
    batch = batch.with_(reward=scale * batch.reward, log_q=batch.log_ref)
    inputs = peer._generate_and_score_completions(asked)
    inputs |= {"advantages": scale * inputs["advantages"], "old_per_token_logps": batch.log_ref}
    model, objective = CausalLM(copy.deepcopy(policy)), GRPO(beta=BETA, std=std)
    clipped = objective.loss(model, objective.prepare(batch)).metrics["clipped"]
    assert 0 < clipped.mean() < 1
    agree(loss_of(objective, model, batch), model.model, peer._compute_loss(peer.model, inputs), peer.model)


# ---- supervised, and rewards ---------------------------------------------------------------------------------


def test_sft_is_that_of_the_sft_trainer_on_completions_only(tmp_path: Path):
    """Rows of unlike length: both sum over the batch's answer tokens and divide by their number."""
    models = networks()
    prompts, completions, _, pairs = preferences()
    rows = [
        {"input_ids": x + y, "completion_mask": [0] * len(x) + [1] * len(y)}
        for x, y in zip(prompts, completions, strict=True)
    ]
    peer = trainer(trl.SFTTrainer, trl.SFTConfig, tmp_path, rows, models[0], completion_only_loss=True)
    compare(SFT(), models, pairs.chosen, peer, list(peer.train_dataset))


@pytest.mark.parametrize("margin", [None, [0.0, 1.0, 0.5, 2.0, 0.3]])
@pytest.mark.parametrize("center", [None, 0.2])
def test_bradley_terry_is_that_of_the_reward_trainer(
    margin: list[float] | None, center: float | None, tmp_path: Path
):
    torch.manual_seed(0)
    network = spread(GPT2ForSequenceClassification(config(num_labels=1)), 1)
    *sides, pairs = preferences()
    rows = [{"chosen_ids": x + a, "rejected_ids": x + b} for x, a, b in zip(*sides, strict=True)]
    if margin is not None:
        rows = [row | {"margin": m} for row, m in zip(rows, margin, strict=True)]
    peer = trainer(trl.RewardTrainer, trl.RewardConfig, tmp_path, rows, network, center_rewards_coefficient=center)
    model = RewardModel(copy.deepcopy(network), words())
    batch = Comparisons(pairs, torch.tensor(margin or [0.0] * len(pairs)))
    mine = loss_of(BradleyTerry(center or 0.0), model, batch)
    plain = loss_of(BradleyTerry(), model, Comparisons(pairs, torch.zeros(len(pairs)))).item()
    assert (abs(mine.item() - plain) > 1e-2) == (margin is not None or center is not None)
    theirs = peer.compute_loss(peer.model, peer.data_collator(rows))
    agree(mine, model.classifier.model, theirs, peer.model)

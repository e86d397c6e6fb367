"""The loop: same update however it is cut, same run however often it is interrupted."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from close import NETWORK, close
from families import build
from tiltlm.engine import Engine, Optim
from tiltlm.experience import Generated, Live, Offline, Referenced, referenced_pairs, rows_of_step
from tiltlm.fit import Fit
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.objective import Outcome
from tiltlm.policies.dpo import DPO
from tiltlm.policies.reinforce import Reinforce
from tiltlm.policies.rpo import RPO
from tiltlm.policies.sft import SFT
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.train import Course, Pace, Training, Watch, best_checkpoint, checkpoints, fit
from tiltlm.twists.value import ValueLearning

ROOT = stream(0, "test-train")


def ragged_samples(n: int = 16) -> Samples:
    rng = ROOT.numpy()
    prompts = Tokens.of([rng.integers(0, 23, rng.integers(1, 6)).tolist() for _ in range(n)])
    done = Tokens.of([rng.integers(0, 23, rng.integers(1, 7)).tolist() for _ in range(n)])
    reward = torch.from_numpy(rng.integers(0, 2, n)).float()
    return Samples(prompts, torch.arange(n), done.ids, done.mask, reward=reward)


def ragged_pairs(reference: CausalLM, n: int = 16) -> Pairs:
    chosen = ragged_samples(n).with_(reward=None)
    rejected = replace(chosen, tokens=(chosen.tokens + 3) % 23 * chosen.mask)
    return referenced_pairs(Pairs(chosen, rejected), reference)


def cases() -> list[Any]:
    model = build("gpt2", torch.float64)
    pairs = ragged_pairs(model)
    samples = ragged_samples().with_(log_q=model.log_prob(ragged_samples()).detach())
    value = ValueHead(copy_of(model)).double()
    learning = ValueLearning(lm_weight=0.5)
    return [
        pytest.param(model, SFT(), ragged_samples(), id="sft"),
        pytest.param(model, DPO(0.1), pairs, id="dpo"),
        pytest.param(model, RPO(0.1, normalise="mean"), pairs, id="rpo"),
        pytest.param(model, Reinforce(), samples, id="reinforce"),
        pytest.param(value, learning, samples, id="value"),
    ]


@pytest.mark.kernels
@pytest.mark.parametrize(("model", "objective", "batch"), cases())
def test_micro_batches_add_up_to_the_whole_batch(model, objective, batch):
    """1×16, 4×4 and 16×1 rows give the same loss and the same gradient, though rows differ in length."""

    def gradient(micro_batch: int) -> tuple[float, torch.Tensor]:
        twin = ValueHead(copy_of(model.body)).double() if isinstance(model, ValueHead) else copy_of(model)
        engine = Engine(twin.eval(), Optim(lr=1e-12, clip=0, micro_batch=micro_batch))
        loss = engine.update(objective, batch)["loss"]
        return loss, torch.cat([p.grad.flatten() for p in engine.parameters if p.grad is not None])

    whole_loss, whole = gradient(0)
    assert whole.norm() > 1e-3
    for micro in (4, 3, 1):
        loss, parts = gradient(micro)
        assert loss == pytest.approx(whole_loss, rel=NETWORK)
        close(parts, whole, NETWORK)


@dataclass(frozen=True)
class Broken:
    """An objective whose second row is not a number."""

    optimum: ClassVar[str] = "nowhere"

    def prepare(self, batch):
        return batch

    def weight(self, batch):
        return torch.ones(len(batch))

    def loss(self, model, batch):
        loss = model.log_prob(batch).sum(1)
        bad = batch.prompt_index == 1
        return Outcome(torch.where(bad, math.nan, loss))


def test_a_loss_that_is_not_a_number_names_its_row_and_touches_nothing():
    model = build("gpt2")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="row 1"):
        Engine(model, Optim()).update(Broken(), ragged_samples(3))
    with pytest.raises(FloatingPointError, match="row 1"):
        Engine(model, Optim(micro_batch=1)).update(Broken(), ragged_samples(3))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_weight_decay_spares_vectors():
    engine = Engine(build("gpt2"), Optim(weight_decay=0.1))
    decays = {
        p.ndim >= 2: group["weight_decay"] for group in engine.optimizer.param_groups for p in group["params"]
    }
    assert decays == {True: 0.1, False: 0.0}


def test_nothing_to_train_is_said():
    with pytest.raises(ValueError, match="frozen"):
        Engine(build("gpt2").requires_grad_(False), Optim())


def test_epochs_are_permutations_and_do_not_repeat():
    epochs = [torch.cat([rows_of_step(12, 4, 3 * e + k, ROOT) for k in range(3)]) for e in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(12)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    with pytest.raises(ValueError, match="batch size 13"):
        rows_of_step(12, 13, 0, ROOT)


@pytest.mark.kernels
def test_live_experience_scores_with_the_prompts_it_drew_for():
    model, prompts = build("gpt2"), Tokens.of([[k] for k in range(10)])
    live = Live(
        model, lambda s: s.prompts.ids[s.prompt_index, 0].float(), prompts, 4, 3, ROOT, n=2, reference=model
    )
    batch = live.batch(5)
    assert len(batch) == 8 and torch.equal(batch.reward, batch.row_prompts.ids[:, 0].float())
    close(batch.log_q, batch.log_ref)
    assert not torch.equal(batch.tokens, live.batch(6).tokens)
    assert torch.equal(batch.tokens, live.batch(5).tokens)


@pytest.mark.kernels
def test_live_reference_equals_precomputed():
    model = build("gpt2")
    pairs = ragged_pairs(model)
    bare = Pairs(pairs.chosen.with_(log_ref=None), pairs.rejected.with_(log_ref=None))
    batch = Referenced(Offline(bare, 16, ROOT), model).batch(0)
    order = rows_of_step(16, 16, 0, ROOT)
    close(batch.rejected.log_ref, pairs.rejected.log_ref[order])


def test_pace_cosine_by_hand():
    """Warm-up 10 of 110 steps, floor 0.1: step 4 is half way up; step 60 half way down: 0.1 + 0.9/2 = 0.55."""
    pace, course = Pace(steps=110, warmup=10, floor=0.1), Course()
    assert pace.factor(4, course) == pytest.approx(0.5)
    assert pace.factor(60, course) == pytest.approx(0.55)
    assert pace.factor(109, course) == pytest.approx(0.1, abs=1e-3)


def test_pace_until_ends_after_its_cool_down():
    """Solved at step 20 (at_least), the metric being 0 from the start; then 9 steps, the last at 2/10."""
    pace, course = Pace(steps=1000, until=0.5, watch=("m",), at_least=20, cool_down=9), Course()
    for step in range(40):
        if pace.over(step, course):
            break
        pace.observe(step, {"m": 0.0}, course)
    assert course.solved_at == 20 and step == 29
    assert pace.factor(28, course) == pytest.approx(1 - 8 / 10)


def test_pace_that_watches_a_metric_nobody_reports_says_which_there_are():
    with pytest.raises(ValueError, match=r"'nll/9'.*loss"):
        Pace(until=0.1, watch=("nll/9",)).observe(0, {"loss": 1.0}, Course())


class Stop(Exception):
    pass


def sft_training(folder: Path, model: CausalLM, stop_at: int | None = None) -> Training:
    def on_step(step: int, limit: int, metrics: dict[str, float]) -> None:
        if step == stop_at:
            raise Stop

    experience = Generated(lambda s: ragged_samples().select(s.permutation(16)[:4]), ROOT.child("data"))
    engine = Engine(model, Optim(lr=1e-2, weight_decay=0.1))
    return Training(model, engine, SFT(), experience, Pace(steps=30, warmup=5), ROOT, folder, 7, on_step)


@pytest.mark.parametrize("stops", [[3], [7], [19, 25], [8, 9, 10]])
def test_interrupted_training_ends_bit_for_bit_where_uninterrupted_training_does(tmp_path, stops):
    """GPT-2 with its default dropout: the streams of dropout must survive the interruption too."""
    whole = build("gpt2")
    assert whole.model.config.resid_pdrop > 0
    sft_training(tmp_path / "whole", whole).run()
    for stop in stops:
        with pytest.raises(Stop):
            sft_training(tmp_path / "cut", build("gpt2"), stop).run()
    cut = build("gpt2")
    sft_training(tmp_path / "cut", cut).run()
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[1].splitlines()] == list(range(30))


def watched(folder: Path, model: CausalLM, stop_at: int | None = None, **options: Any) -> Training:
    """30 steps at most, evaluated every 4: fewest nats a token on fixed rows, and a global random number."""
    held_out = ragged_samples()

    def measure() -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        nll = -model.log_prob(held_out).sum() / held_out.mask.sum()
        return {"nll": nll.item(), "luck": torch.rand(()).item()}

    watch = Watch(**{"every": 4, "measure": measure, "best": "nll", "patience": 2, **options})
    return replace(sft_training(folder, model, stop_at), watch=watch)


def story(folder: Path) -> list[str]:
    """Everything a run leaves that must not depend on interruptions, as text."""
    logs = [(folder / name).read_text() for name in ("metrics.jsonl", "evals.jsonl")]
    return [*logs, *sorted(str(path.relative_to(folder)) for path in folder.iterdir())]


@pytest.mark.parametrize("stops", [[1], [4], [9], [11, 13], [5, 6, 7, 8]])
@pytest.mark.parametrize(
    "options", [{"higher": True}, {"best": "luck", "patience": 3}, {"best": "", "patience": 0}]
)
def test_interrupted_evaluations_end_bit_for_bit_where_uninterrupted_ones_do(tmp_path, stops, options):
    """The highest nll is found at once and patience ends training at 8; the luckiest number comes anywhere."""
    whole, cut = build("gpt2"), build("gpt2")
    course = watched(tmp_path / "whole", whole, **options).run()
    for stop in stops:
        try:
            watched(tmp_path / "cut", build("gpt2"), stop, **options).run()
        except Stop:
            continue
    assert watched(tmp_path / "cut", cut, **options).run() == course
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
    assert story(tmp_path / "whole") == story(tmp_path / "cut")
    best = best_checkpoint(tmp_path / "cut")
    assert best.is_dir() and best.name == best_checkpoint(tmp_path / "whole").name


def test_evaluations_come_before_the_first_step_at_their_rhythm_and_at_the_end(tmp_path):
    watched(tmp_path, build("gpt2"), patience=0).run()
    steps = [json.loads(line)["step"] for line in (tmp_path / "evals.jsonl").read_text().splitlines()]
    assert steps == [0, 4, 8, 12, 16, 20, 24, 28, 30]


@pytest.mark.kernels
def test_evaluations_do_not_move_training(tmp_path):
    """Though they draw from torch's global generator: weights and metrics are those of unwatched training."""
    plain, seen = build("gpt2"), build("gpt2")
    sft_training(tmp_path / "plain", plain).run()
    watched(tmp_path / "seen", seen, patience=0).run()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), seen.parameters(), strict=True))
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("plain", "seen")]
    assert logs[0] == logs[1]


def test_an_evaluation_puts_the_random_stream_back(tmp_path):
    model = build("gpt2")
    training = watched(tmp_path, model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    training._evaluate(training.watch, 0, Course())
    assert torch.equal(torch.rand(3), expected)


def test_the_best_model_is_kept_beside_the_last_and_patience_ends_training(tmp_path):
    """The lowest of 3, 5, 1, 2, 1 is the first 1, at step 8; two evaluations later it ends: 5 no longer counts."""
    numbers = iter([3.0, 5.0, 1.0, 2.0, 1.0, 5.0])
    course = watched(tmp_path, build("gpt2"), measure=lambda: {"nll": next(numbers)}).run()
    assert (course.best_step, course.best_value, course.stale) == (8, 1.0, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-16"]
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    assert CausalLM.load(best_checkpoint(tmp_path)).vocab_size == 23


def test_without_a_best_the_last_checkpoint_is_the_best_and_without_any_that_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        best_checkpoint(tmp_path)
    watched(tmp_path, build("gpt2"), best="", patience=0).run()
    assert best_checkpoint(tmp_path).name == "checkpoint-30"


def test_multiples_of_keep_every_are_kept_though_no_checkpoint_was_due_there(tmp_path):
    replace(sft_training(tmp_path, build("gpt2")), keep_every=12).run()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-12", "checkpoint-24", "checkpoint-30"]


def test_what_cannot_be_watched_is_said(tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 0: nll is not a number"):
        watched(tmp_path / "a", build("gpt2"), measure=lambda: {"nll": math.nan, "kl": 0.0}).run()
    with pytest.raises(ValueError, match=r"'reward'.*luck, nll"):
        watched(tmp_path / "b", build("gpt2"), best="reward").run()
    with pytest.raises(ValueError, match="every must be"):
        Watch(0, dict)
    with pytest.raises(ValueError, match="name it in `best`"):
        Watch(1, dict, patience=1)
    with pytest.raises(ValueError, match="set evaluations"):
        Fit(patience=1)
    with pytest.raises(ValueError, match="checkpoints must not be negative; got -1"):
        Fit(checkpoints=-1)
    with pytest.raises(ValueError, match="batch_size must be 1 or more; got 0"):
        Fit(batch_size=0)
    with pytest.raises(ValueError, match=r"steps must be 1 or more; got -1$"):
        Fit(steps=-1)


def test_a_fit_gives_its_rhythm_to_the_watch():
    assert Fit().watching(dict) is None
    assert Fit(steps=9, evaluations=3, patience=2).watching(dict, "kl") == Watch(3, dict, "kl", False, 2)


def test_epochs_are_counted_in_steps_and_need_an_end_of_the_data():
    """Two and a half passes over 10 rows in batches of 4: round(2.5 · 10 / 4) = 6 steps; 4 rows hold no batch of 64."""
    found = Fit(epochs=2.5, batch_size=4, checkpoints=3).of(10)
    assert (found.steps, found.epochs, found.keep_every) == (6, 0.0, 2)
    assert Fit(batch_size=64, steps=7).of(4) == Fit(batch_size=4, steps=7)
    with pytest.raises(ValueError, match="set steps instead"):
        Fit(epochs=1.0).of(None)
    with pytest.raises(ValueError, match="nothing to train on"):
        Fit().of(0)


def test_a_half_written_checkpoint_is_not_taken_for_one(tmp_path):
    sft_training(tmp_path, build("gpt2")).run()
    (found,) = checkpoints(tmp_path)
    assert found.name == "checkpoint-30"
    (tmp_path / "checkpoint-31").mkdir()
    (tmp_path / ".checkpoint-32.tmp").mkdir()
    assert checkpoints(tmp_path) == [found]
    assert CausalLM.load(found).vocab_size == 23


def test_lora_and_value_heads_resume_bit_for_bit(tmp_path):
    value = ValueHead(build("gpt2"), mlp_layers=1)
    torch.nn.init.normal_(value.head[-1].weight)
    policy = copy_of(build("gpt2")).with_lora(rank=2, target_modules=["c_attn"])
    for k, model in enumerate((value, policy)):
        folder = tmp_path / str(k)
        model.save(folder)
        state = {name: x.clone() for name, x in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            if k == 0 or "lora_" in name:
                parameter.data.add_(1.0)
        model.restore(folder)
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_fit_in_memory_learns():
    model = build("gpt2")
    data = Offline(ragged_samples(), 16, ROOT)
    before = model.log_prob(ragged_samples()).sum().item()
    after = fit(model, SFT(), data, steps=30, optim=Optim(lr=1e-2)).log_prob(ragged_samples()).sum().item()
    assert after > before + 10 and not model.training

"""Networks that no process holds whole are, to whoever asks them, the whole network."""

from __future__ import annotations

import gc
import json
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import every_family
import question_world
import ranked
import side_by_side as side_by_side_module
from close import alike, close
from families import build
from side_by_side import side_by_side
from test_sharing import in_rounds, shortly
from tiltlm import ranks, turns
from tiltlm.commands.launch.building import build_all
from tiltlm.commands.launch.order import Order
from tiltlm.commands.launch.settings import Launch
from tiltlm.engine import Engine, Optim
from tiltlm.jsonl import read_json
from tiltlm.models.body import layers_of
from tiltlm.models.causal import CausalLM, steady
from tiltlm.models.reward_model import RewardModel
from tiltlm.models.scattered import in_parts, is_wanted, scattered_in
from tiltlm.models.scattering import refill
from tiltlm.nets import trainable
from tiltlm.policies.sft import SFT
from tiltlm.problem import Problem
from tiltlm.recipes.preset import Preset
from tiltlm.recipes.stages import measured
from tiltlm.rewards.by_name import TextReward
from tiltlm.rewards.of_texts import RewardOf
from tiltlm.run import Recipe, ensure, find
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.sharded import at_rest
from tiltlm.stages.measure import RulerSettings

OWN = stream(0, "test-scattered")
FAMILIES = ("gpt2", "opt", "mixtral", "qwen3_next", "gemma2", "llama4_text", "falcon", "mamba2")
"""Tied weights; a body whose layers are reached in two ways; experts; several kinds of layers; no attention."""


def both(work: Callable[[], None]) -> None:
    """`work()` in two processes that hold parts."""

    def inside() -> None:
        with in_parts():
            work()

    assert side_by_side(inside) == [0, 0]


def equal(found: Tensor, wanted: Tensor) -> None:
    assert torch.equal(found, wanted), float((found - wanted).abs().max())


def rows(n: int = 9) -> Samples:
    return ranked.ragged(n)


@pytest.fixture
def folder(tmp_path) -> Path:
    build("llama", eos_ids=(3,)).save(tmp_path / "model")
    return tmp_path / "model"


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_process_holds_a_slice_and_asks_the_whole(family, tmp_path):
    torch.manual_seed(0)
    every_family.build(family).save_pretrained(tmp_path)
    whole, samples = CausalLM.load(tmp_path, eos_ids=()).requires_grad_(False), rows()
    wanted = whole.log_prob(samples)

    def work() -> None:
        model = CausalLM.load(tmp_path, eos_ids=()).requires_grad_(False)
        (found,) = scattered_in(model)
        inside = numbers(whole) - numbers(model)
        slices = sum(len(x) for layer in found.layers for x in layer.slices.values())
        assert inside / 2 <= slices <= inside / 2 + 2 * len(found.layers) < inside
        equal(model.log_prob(samples), wanted)
        equal(steady(model).log_prob(samples), wanted)
        assert numbers(model) < numbers(whole) and model.eos_ids == whole.eos_ids

    both(work)


def test_processes_may_ask_as_often_as_they_like_and_whichever_they_like(folder):
    """Rows one by one, five and four of them; one row alone; two networks the other way round; the first alone, drawing."""
    samples, other = rows(), build("llama", seed=1, eos_ids=(3,)).requires_grad_(False)
    whole = {"model": CausalLM.load(folder).requires_grad_(False), "other": other}
    other.save(folder.parent / "other")
    some = samples.prompts.select(slice(0, 5))
    how = {"n": 2, "max_new_tokens": 6, "stream": OWN}
    drawn = draw(whole["model"], some, **how)

    def each(model: CausalLM, begin: int, end: int) -> list[Tensor]:
        return [model.log_prob(samples.select(slice(k, k + 1))).sum() for k in range(begin, end)]

    def work() -> None:
        parts = {name: CausalLM.load(folder.parent / name).requires_grad_(False) for name in whole}
        one = parts["model"]
        for n in (9, 1):
            found = ranks.in_shares(n, lambda b, e: each(one, b, e))
            equal(torch.stack(found), torch.stack(each(whole["model"], 0, n)))
        mine = samples.select(slice(0, 4 + 3 * ranks.number()))
        names = sorted(parts, reverse=ranks.is_first())
        with ranks.alone():
            got = {name: parts[name].log_prob(mine) for name in names}
        for name in names:
            equal(got[name], whole[name].log_prob(mine))
        again = ranks.from_first(lambda: draw(one, some, **how))
        equal(again.tokens, drawn.tokens)
        assert again.log_q is not None and drawn.log_q is not None
        equal(again.log_q, drawn.log_q)

    both(work)


def test_weights_are_written_read_and_adapted(folder):
    """By one process alone while the others wait; taken back; other weights; adapters beside them."""
    samples, whole = rows(), CausalLM.load(folder).requires_grad_(False)
    wanted = whole.log_prob(samples)
    other = build("llama", seed=1, eos_ids=(3,))
    his, theirs = other.log_prob(samples).detach(), other.model.state_dict()
    torch.manual_seed(0)
    adapted = CausalLM.load(folder).with_lora(2)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}

    def work() -> None:
        model = CausalLM.load(folder).requires_grad_(False)
        ranks.from_first(lambda: model.save(folder.parent / "copy"))
        refill(model.model, theirs if ranks.is_first() else None)
        equal(model.log_prob(samples), his)
        model.restore(folder.parent / "copy")
        equal(model.log_prob(samples), wanted)
        with pytest.raises(RuntimeError, match="missing, or has another shape"):
            refill(model.model, {name: x[:1] for name, x in theirs.items()})
        torch.manual_seed(0)
        mine = model.with_lora(2)
        equal(mine.log_prob(samples), wanted)
        for name, p in mine.named_parameters():
            assert not p.requires_grad or torch.equal(p, before[name])

    both(work)
    equal(CausalLM.load(folder.parent / "copy").log_prob(samples), wanted)


def test_slices_go_with_the_network(folder):
    """As whole weights do, without a collector; those of a copy with the copy."""

    def work() -> None:
        gc.disable()
        model = CausalLM.load(folder).requires_grad_(False)
        copied = steady(model)
        kept, gone = ([weakref.ref(x) for x in slices_of(each)] for each in (model, copied))
        copied.log_prob(rows())
        del copied
        assert all(x() is not None for x in kept)
        for _ in range(
            100
        ):  # what the last slice was sent by, in a thread of its own, lets go of it a little later
            if not any(x() is not None for x in gone):
                return
            time.sleep(0.05)
        raise AssertionError("slices are still there, and no collector runs")

    both(work)


def slices_of(model: nn.Module) -> list[Tensor]:
    return [x for each in scattered_in(model) for layer in each.layers for x in layer.slices.values()]


def test_layers_out_of_order_are_refused(folder):
    """What another process lends comes in the order of the list."""

    def work() -> None:
        model = CausalLM.load(folder).requires_grad_(False)
        (found,) = scattered_in(model)
        with pytest.raises(RuntimeError, match="layer 1 of this network runs where layer 0 should"):
            found.begin(1)

    both(work)


def test_a_process_that_fails_at_work_ends_those_that_lend(folder, capfd):
    def work() -> None:
        with in_parts():
            model = CausalLM.load(folder).requires_grad_(False)

        def fails() -> None:
            model.log_prob(rows())
            raise ValueError("planted")

        ranks.from_first(fails)

    assert side_by_side(work) == [1, 1]
    told = capfd.readouterr().err
    assert "ValueError: planted" in told and "have lost each other" in told


def test_a_process_that_fails_between_layers_waits_for_nobody(folder, monkeypatch, capfd):
    """The other one waits for the next layer, and would for ten minutes."""
    monkeypatch.setattr(side_by_side_module, "LONGEST", 60)

    def work() -> None:
        model = CausalLM.load(folder).requires_grad_(True)
        engine = Engine(model, Optim())

        def fails(*_: Any) -> None:
            raise MemoryError("planted")

        if not ranks.is_first():
            layers_of(model.model)[1].register_forward_pre_hook(fails, prepend=True)
        with engine.whole(), ranks.alone():
            model.log_prob(rows())

    with in_parts():
        assert side_by_side(work) == [1, 1]
    assert "MemoryError: planted" in capfd.readouterr().err


def test_what_was_trained_in_parts_takes_other_weights(folder):
    """The best ones, say; then the first process alone asks."""
    other, samples = build("llama", seed=1, eos_ids=(3,)), rows()
    other.save(folder.parent / "other")
    wanted = other.log_prob(samples).detach()

    def work() -> None:
        model = CausalLM.load(folder).requires_grad_(True)
        engine = Engine(model, Optim())
        engine.update(SFT(), samples)
        engine.finish()
        with at_rest(model):
            model.restore(folder.parent / "other")
        with torch.no_grad():
            equal(ranks.from_first(lambda: model.log_prob(samples)), wanted)

    both(work)


def test_one_process_holds_the_whole(folder):
    with in_parts():
        assert not is_wanted()
        assert not scattered_in(CausalLM.load(folder))
    assert not turns._LENDERS


def letters(tmp_path: Path) -> Preset:
    task = question_world.Letters()
    place = str(question_world.written(tmp_path / "model", layers=3))
    task = replace(task, language=replace(task.language, model=place))
    return Preset(task, ruler=RulerSettings(n=20, batch_size=16, absolute=False))


def adapted(made: Any, **net: Any) -> Any:
    return replace(made, net=replace(made.net, **net))


def test_runs_end_where_those_of_one_process_do(tmp_path):
    """Trained in parts and measured in parts: adapters, an actor and a critic, a head on the reference's own body, rounds;
    four questions, so that shares are unequal."""
    preset = letters(tmp_path)
    made: list[Recipe] = [
        adapted(shortly(measured(preset, "rloo")), policy="lora"),
        shortly(measured(preset, "ppo")),
        adapted(shortly(measured(preset, "fudge")), body="frozen"),
        in_rounds(preset.task, SFT(), 1, lr=1e-3),
    ]

    def work() -> None:
        for recipe in made:
            ensure(recipe, tmp_path / "two")

    both(work)
    for recipe in made:
        report = ensure(recipe, tmp_path / "one").folder / "report.json"
        alike(read_json(find(recipe, tmp_path / "two").folder / "report.json"), read_json(report), recipe.name)


def test_reward_models_are_scattered_too(tmp_path):
    place = question_world.written(tmp_path / "model", layers=3)
    whole = RewardModel.from_body(place, seed=0)
    whole.save(tmp_path / "judge")
    asked, answers = ["1?\nA 1", "34?"], ["A", " B"]
    wanted = whole.scores(asked, answers)

    def work() -> None:
        model = RewardModel.load(tmp_path / "judge")
        assert scattered_in(model)
        with ranks.alone():  # as often as each likes
            for _ in range(1 + 2 * ranks.number()):
                equal(model.scores(asked, answers), wanted)
        equal(RewardModel.from_body(place, seed=0).scores(asked, answers), wanted)

    both(work)


def test_a_reward_by_name_is_read_before_rows_are_shared_out(tmp_path):
    """One row, which the second process alone asks about; then all of them by both."""
    place = question_world.written(tmp_path / "model", layers=3)
    whole = RewardModel.from_body(place, seed=0)
    whole.save(tmp_path / "judge")
    asked, answers = ["1?\nA 1", "34?"], ["A", " B"]
    wanted = whole.scores(asked, answers).tolist()

    def work() -> None:
        found = TextReward(f"2*reward-model:{tmp_path / 'judge'}", None)
        assert ranks.in_shares(1, lambda begin, end: found.of(asked[:1], answers[:1])) == [2 * wanted[0]]
        assert found.of(asked, answers) == [2 * each for each in wanted]
        (network,) = (reward.network for reward in found.function.rewards if isinstance(reward, RewardOf))
        assert scattered_in(network)

    both(work)


OWN_REWARD = """
from functools import cache

from tiltlm.models.reward_model import RewardModel

@cache
def judge():
    return RewardModel.load({place!r})

def reward(prompts, completions):
    return judge().scores(prompts, completions).tolist()
"""


def test_networks_of_a_function_of_ones_own_are_whole(tmp_path):
    """Whoever asks first reads by himself."""
    whole = RewardModel.from_body(question_world.written(tmp_path / "model", layers=3), seed=0)
    whole.save(tmp_path / "judge")
    (tmp_path / "mine.py").write_text(OWN_REWARD.format(place=str(tmp_path / "judge")))
    asked, answers = ["1?\nA 1", "34?"], ["A", " B"]
    wanted = whole.scores(asked, answers).tolist()

    def work() -> None:
        found = TextReward(f"{tmp_path / 'mine.py'}:reward", None)
        assert ranks.in_shares(1, lambda begin, end: found.of(asked[:1], answers[:1])) == wanted[:1]
        assert found.of(asked, answers) == wanted

    both(work)


def test_a_policy_begins_with_merged_adapters(tmp_path):
    place, samples = question_world.written(tmp_path / "model", layers=3), Tokens.of([[1, 7], [1, 8, 9]])
    torch.manual_seed(0)
    adapted = CausalLM.load(place).with_lora(2)
    for p in adapted.parameters():
        p.data += 0.1 * p.requires_grad
    adapted.save(tmp_path / "adapters")
    how: dict[str, Any] = {"reward": lucky, "prompts": samples, "beta": 1.0, "max_new_tokens": 3}
    rows = draw(CausalLM.load(place), samples, max_new_tokens=3, stream=OWN)
    wanted = trainable(Problem.of(place, **how), str(tmp_path / "adapters")).log_prob(rows)
    close(wanted, adapted.log_prob(rows), 1e-5)

    def work() -> None:
        model = trainable(Problem.of(place, **how), str(tmp_path / "adapters"))
        assert scattered_in(model)
        equal(model.log_prob(rows), wanted)

    both(work)


def lucky(samples: Samples) -> Tensor:
    return (samples.tokens == 7).any(1).float()


def test_orders_hand_it_on(tmp_path):
    run = find(in_rounds(question_world.Letters()), tmp_path)
    with in_parts():
        order = Order.of(run, "")
    assert order.shard and not Order.of(run, "").shard
    assert json.loads(json.dumps(order.__dict__))["shard"]


def test_one_process_is_told_that_it_holds_everything(tmp_path, capsys):
    for launch, told in ((Launch(shard=True), True), (Launch(), False)):
        assert build_all([], launch, "")
        assert ("one process holds everything" in capsys.readouterr().err) is told

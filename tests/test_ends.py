"""End tokens: where a model's files name them, what stops at them, what is written and said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from tiltlm.commands.options import from_json
from tiltlm.data.encoding import Encoder
from tiltlm.exact import all_completions, every_pair, log_density, solve
from tiltlm.models.causal import CausalLM
from tiltlm.models.ends import _found, ends_of, turn_id
from tiltlm.models.heads import ValueHead
from tiltlm.recipes import recipe
from tiltlm.run import Run, ensure
from tiltlm.samplers.ancestral import draw
from tiltlm.samplers.guided import Guided
from tiltlm.samplers.smc import SMC, smc
from tiltlm.samples import Tokens
from tiltlm.seeds import stream
from tiltlm.stages.reading import Reader, Reading
from tiltlm.stages.sft import Sft, SftSettings
from tiltlm.target import Target
from tiltlm.tasks.language import Language
from tiltlm.tasks.mine import Mine
from tiltlm.tasks.pairs import Pairs
from tiltlm.tasks.words import Words

WORDS = ("<unk>", "<s>", "</s>", "<|eot|>", "<|eom|>", "Is", "it", "?", "Quite", "yes", "no", "user", "assistant")
CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
)
PROMPTS = Tokens.of([[5, 6, 7], [9]])


def tokenizer(template: str | None = None, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """A word a token; the first five are special."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", **({"eos_token": eos} if eos else {})}
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=["</s>", "<|eot|>", "<|eom|>"], **special
    )
    made.chat_template = template
    return made


def network(eos: int | list[int] | None = None) -> CausalLM:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), **size, bos_token_id=1, eos_token_id=eos, pad_token_id=None)
    return CausalLM.from_config(config, seed=3)


def folder(
    path: Path, *, config: int | list[int] | None = None, generation: list[int] | None = None, words: object = None
) -> Path:
    """A model's folder that names these ends in its config and generation_config, with a tokenizer if there is one."""
    model = network(config)
    model.tokenizer = words
    model.save(path)
    if generation is not None:
        GenerationConfig(eos_token_id=generation).save_pretrained(path)
    return path


# ---- where they are named -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation", "words", "wanted", "said"),
    [
        (2, [2, 3, 4], tokenizer(None), (2, 3, 4), "2 '</s>', 3 '<|eot|>', 4 '<|eom|>' (tokenizer, generation_config)"),
        ([2, 3, 4], [2, 3, 4], tokenizer(eos="<|eot|>"), (3, 2, 4), "(tokenizer, generation_config)"),  # Llama 3
        (2, [2, 3], tokenizer(CHATML), (2, 3), "(tokenizer, generation_config)"),  # Gemma
        (2, None, tokenizer(CHATML), (2, 3), "2 '</s>', 3 '<|eot|>' (tokenizer, chat template)"),
        (None, None, tokenizer(None), (2,), "(tokenizer)"),
        (4, None, tokenizer(None), (2, 4), "(tokenizer, config)"),
        (8, None, tokenizer(None), (2,), "(tokenizer)"),  # an ordinary word: a default nobody set
        (2, [8], tokenizer(None), (2, 8), "(tokenizer, generation_config)"),  # set on purpose
        ([1, 2], None, None, (1, 2), ": 1, 2 (config)"),
        (None, [2, 99], None, (2,), ": 2 (generation_config)"),  # 99: no such token
        (None, None, tokenizer(None, eos=None), (), ""),
    ],
)  # fmt: skip
def test_ends_are_read_from_all_places_and_said_once(tmp_path, capsys, config, generation, words, wanted, said):
    path = folder(tmp_path, config=config, generation=generation, words=words)
    assert CausalLM.load(path).eos_ids == wanted == ends_of(path)
    lines = " ".join(capsys.readouterr().err.split())
    assert lines.count("end tokens of") == bool(wanted) and lines.endswith(said)


def test_ends_can_be_left_out_or_named(tmp_path, capsys):
    path = folder(tmp_path, config=2, generation=[2, 3], words=tokenizer(CHATML))
    assert CausalLM.load(path, eos_ids=()).eos_ids == () and CausalLM.load(path, eos_ids=[4]).eos_ids == (4,)
    assert "end tokens" not in capsys.readouterr().err
    assert ends_of(path, ("yes", "4")) == (9, 4)
    assert "9 'yes', 4 '<|eom|>' (--stop)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("stop", "said"),
    [("99", r"--stop 99: token ids go from 0 to 12"), ("yes no", r"--stop 'yes no' is 2 tokens, \[9, 10\]")],
)
def test_a_stop_that_is_no_single_token_is_refused(tmp_path, stop, said):
    path = folder(tmp_path, words=tokenizer(CHATML))
    with pytest.raises(ValueError, match=said):
        ends_of(path, (stop,))


def test_a_text_is_no_stop_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"--task.stop 'yes': this model has no tokenizer"):
        ends_of(folder(tmp_path), ("yes",), "--task.stop")


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHATML, 3),
        ("{% for m in messages %}{{ m['content'] + ' ' + eos_token }}{% endfor %}", 2),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", None),
        (
            "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}/answer <|eot|>",
            3,
        ),  # text stands between
        ("{% for m in messages %}{{ m['content'] }}<|eot|><|eom|>{% endfor %}", 3),
        ("{{ raise_exception('no such talk') }}", None),
        ("{% for m in messages %}{{ m['content'][0]['text'] + 1 }}{% endfor %}", None),
        ("a fixed text <|eot|>", None),
        (None, None),
    ],
)
def test_the_template_s_end_of_turn_is_what_it_puts_behind_an_answer(template, wanted):
    assert turn_id(tokenizer(template)) == wanted


def test_the_stories_model_has_two_ends(shared_data):
    """Its generation_config names 1 and 2, its tokenizer and config 2 alone."""
    assert ends_of(shared_data / "models" / "stories260K") == (2, 1)


def test_a_saved_model_names_its_ends_to_everyone(tmp_path):
    model = network()
    model.eos_ids = (4, 3)
    model.save(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [4, 3]
    assert ends_of(tmp_path) == (4, 3) and CausalLM.load(tmp_path).eos_ids == (4, 3)


# ---- what stops at them -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> CausalLM:
    """Three ends, as a folder names them."""
    path = folder(tmp_path_factory.mktemp("three"), config=2, generation=[2, 3, 4])
    return CausalLM.load(path).double().requires_grad_(False)


def test_draws_stop_at_each_of_three_ends(model):
    """`finished` is whether the last token is an end; no other token is one; log_q is the score of all tokens."""
    drawn = draw(model, PROMPTS, n=200, max_new_tokens=5, stream=stream(0, "ends"))
    rows = drawn.completions.lists()
    assert {row[-1] for row in rows if row[-1] in (2, 3, 4)} == {2, 3, 4}
    assert drawn.finished.tolist() == [row[-1] in (2, 3, 4) for row in rows]
    assert 0 < drawn.finished.sum() < len(rows) and all(len(r) == 5 or r[-1] in (2, 3, 4) for r in rows)
    assert not any(token in (2, 3, 4) for row in rows for token in row[:-1])
    torch.testing.assert_close(drawn.log_q, model.log_prob(drawn), atol=1e-10, rtol=0)


def test_all_completions_with_three_ends_have_probability_one(model):
    everything = every_pair(PROMPTS, all_completions(model.vocab_size, 3, model.eos_ids))
    total = log_density(model, everything).reshape(2, -1).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64), atol=1e-10, rtol=0)
    assert len(everything) == 2 * (3 + 10 * 3 + 10 * 10 * 13)


def test_smc_with_three_ends_estimates_the_z_of_the_enumeration(model):
    """Z by enumeration within 4 standard errors of 40 estimates; what would count one end alone is far away."""
    target = Target(model, lambda s: s.mask.sum(1).double(), 1.0)
    exact = solve(target, PROMPTS, 3).log_z
    head = ValueHead(model)
    many = Tokens.of([[5, 6, 7]] * 40)
    found = smc(target, None, many, SMC(20), max_new_tokens=3, stream=stream(0, "z"))
    z = found.log_z.exp()
    assert abs(z.mean() - exact[0].exp()) < 4 * z.std() / 40**0.5
    one = network()
    one.load_state_dict(model.float().state_dict())
    one.eos_ids = (2,)
    other = solve(Target(one.double(), target.reward, 1.0), PROMPTS, 3).log_z
    model.double()
    assert abs(z.mean() - other[0].exp()) > 8 * z.std() / 40**0.5
    assert Guided(model, head).eos_ids == (2, 3, 4) and found.samples.finished.any()  # type: ignore[arg-type]


# ---- what is written and shown ------------------------------------------------------------------------------


def test_a_finished_completion_is_written_with_exactly_one_end():
    """Its own, if its text has one; else the first of the list. Shown, it has none."""
    encoder = Encoder(tokenizer(), (3, 2), most=12, most_new=6)
    assert encoder.completion("yes no") == ([9, 10, 3], True)
    assert encoder.completion("yes no </s>") == ([9, 10, 2], True)
    assert encoder.completion("yes no", finished=False) == ([9, 10], False)
    assert [encoder.text(ids) for ids in ([9, 10, 3], [9, 10, 2], [9, 10], [])] == ["yes no"] * 3 + [""]


@pytest.mark.parametrize(
    ("args", "stop", "ends"),
    [((), (), {2, 3, 4}), (("--stop", "<|eom|>", "9"), ("<|eom|>", "9"), {4, 9}), (("--stop", "2"), ("2",), {2})],
)
def test_sample_stops_where_the_model_or_stop_says_and_shows_no_end(
    tmp_path, monkeypatch, args, stop, ends, capsys
):
    from tiltlm.cli import main

    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "model", config=2, generation=[2, 3, 4], words=tokenizer())
    Path("p.jsonl").write_text('{"prompt": "Is it ?"}\n')
    drawn = ["--prompts", "p.jsonl", "--out", "y.jsonl", "--n", "64", "--max-new-tokens", "6"]
    assert main(["sample", "model", *drawn, *args]) == 0
    rows = [json.loads(line) for line in Path("y.jsonl").read_text().splitlines()]
    assert {row["completion_ids"][-1] for row in rows if row["finished"]} == ends
    for row in rows:
        ids = row["completion_ids"]
        body = ids[:-1] if row["finished"] else ids
        assert not ends & set(body) and row["completion"] == tokenizer().decode(body)
    assert capsys.readouterr().err.count("end tokens of model") == 1


def test_another_folder_of_the_same_name_has_ends_of_its_own(tmp_path, monkeypatch):
    """What was found is kept for a folder as it was written, not for its name."""
    found = []
    for k, ends in enumerate(([2], [3, 4])):
        (tmp_path / str(k)).mkdir()
        monkeypatch.chdir(tmp_path / str(k))
        folder(Path("model"), config=2, generation=ends, words=tokenizer())
        found.append(set(ends_of("model")))
    assert found[0] != found[1] and {3, 4} <= found[1]


def test_a_file_begun_with_other_ends_is_not_completed(tmp_path, monkeypatch, capsys):
    """Also one that an earlier version began, which knew one end alone."""
    from tiltlm.cli import main

    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "model", config=2, words=tokenizer())
    Path("p.jsonl").write_text('{"prompt": "Is it ?"}\n')
    command = ["sample", "model", "--prompts", "p.jsonl", "--out", "y.jsonl"]
    assert main(command) == 0 and main([*command, "--stop", "4"]) == 2
    beside = Path("y.jsonl.settings.json")
    old = json.loads(beside.read_text())
    del old["stop"]
    beside.write_text(json.dumps(old | {"eos_id": "None"}))
    assert main(command) == 2
    assert capsys.readouterr().err.count("y.jsonl was begun with stop=") == 2


def test_a_run_s_folder_has_the_ends_of_its_model(tmp_path):
    best = folder(tmp_path / "run" / "checkpoint-1", config=2, generation=[2, 3], words=tokenizer(CHATML))
    for path in (best / "COMPLETE", tmp_path / "run" / "DONE"):
        path.touch()
    (tmp_path / "run" / "provenance.json").write_text("{}")
    name = str(tmp_path / "run")
    assert ends_of(name) == CausalLM.load(name).eos_ids == (2, 3)
    assert ends_of(name, ("<|eom|>",)) == (4,)  # a text: by the run's own tokenizer


# ---- the tasks ----------------------------------------------------------------------------------------------


def reading(path: Path, **settings: Any) -> Reading:
    """A reader of that model, of short sequences."""
    return Reading(Reader(str(path), most_tokens=12, new_tokens=4, **settings), str(path))


def test_a_reader_of_preferences_takes_the_model_s_ends_and_stop_overrides(tmp_path):
    path = folder(tmp_path, config=2, generation=[2, 3, 4], words=tokenizer())
    read, other = reading(path), reading(path, stop=("no",))
    assert read.load().eos_ids == read.encoder.eos_ids == (2, 3, 4)
    assert other.load().eos_ids == other.encoder.eos_ids == (10,)
    _found.cache_clear()
    bare = folder(tmp_path / "bare", words=tokenizer(eos=None))
    with pytest.raises(ValueError, match=r"names no token that ends a completion: name one \(--task.stop\)"):
        _ = reading(bare).encoder


def test_merged_adapters_stop_where_the_settings_said(tmp_path):
    path = folder(tmp_path / "model", config=2, words=tokenizer())
    read, sft = reading(path, stop=("no",)), SftSettings(lora=2)
    trained = tmp_path / "run" / "checkpoint-1"
    read.trainable(lora=sft.lora).save(trained)
    (trained / "COMPLETE").touch()
    stage = Sft(Pairs(reader=read.reader, sft=sft))
    stage.merge(Run(stage, tmp_path / "run", {}), read)
    merged = CausalLM.load(tmp_path / "run" / "merged")
    assert WORDS.index("no") in merged.eos_ids
    own, samples = read.load(), draw(read.load(), PROMPTS, n=2, max_new_tokens=4, stream=stream(0, "merged"))
    torch.testing.assert_close(
        merged.at(0.8).log_prob(samples), own.log_prob(samples)
    )  # fresh adapters add nothing


def test_a_task_on_text_has_a_fixed_length_unless_stop_says_otherwise(tmp_path):
    """With ends, the reward reads texts without them: "yes yes" and "yes yes no" (no: an end) have equal hits."""
    path = str(folder(tmp_path, config=2, generation=[2, 3, 4], words=tokenizer()))
    language = Language(path, "Is it ?", new_tokens=3)
    assert Words(language).problem({}, 0).reference.eos_ids == ()
    problem = Words(replace(language, stop=("no", "2")), words=("no",)).problem({}, 0)
    assert problem.reference.eos_ids == (10, 2)
    drawn = draw(problem.reference, problem.prompts["test"], n=200, max_new_tokens=3, stream=stream(0, "lab"))
    assert len({*problem.target.reward(drawn).tolist()}) == 1 and drawn.finished.any()
    assert not any("no" in row["completion"] or "</s>" in row["completion"] for row in problem.rows(drawn))


def test_terms_of_a_sum_are_reported_and_read_no_end_either(tmp_path):
    path = str(folder(tmp_path / "model", config=2, words=tokenizer()))
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def no(prompts, completions):\n    return ['no' in y.split() for y in completions]\n\n\nalso = no\n"
    )
    task = Mine(Language(path, "Is it ?", new_tokens=3, stop=("no",)), reward=f"{mine}:no + 0.5*{mine}:also")
    problem = task.problem({}, 0)
    drawn = draw(problem.reference, problem.prompts["test"], n=100, max_new_tokens=3, stream=stream(0, "lab"))
    assert drawn.finished.any() and list(problem.checks) == [f"reward[{mine}:no]", f"reward[{mine}:also]"]
    assert all(not part(drawn).any() for part in [problem.target.reward, *problem.checks.values()])
    free = replace(task, language=replace(task.language, stop=())).problem({}, 0)
    assert free.target.reward(drawn).any() and all(part(drawn).any() for part in free.checks.values())


@pytest.mark.parametrize("stage", ["evaluate", "ctl", "exact", "dpg-twist"])
def test_an_infilling_with_ends_is_refused_before_any_work(tmp_path, stage):
    value = recipe(f"infill2-small/{stage}")
    task = replace(value.task, language=replace(value.task.language, stop=("1",)))
    with pytest.raises(ValueError, match=r"leave --task\.stop out"):
        ensure(replace(value, task=task), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_settings_of_an_older_version_are_refused_in_one_line():
    """A config.json that knows `stop_id` alone."""
    with pytest.raises(ValueError, match=r"no setting task\.reader\.stop_id: written by another version\?"):
        from_json(recipe("dialogues/sft-model"), {"task": {"reader": {"model": "gpt2", "stop_id": 0}}})

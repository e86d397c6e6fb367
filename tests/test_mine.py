"""A target of one's own on the command line: prompts of any file, columns that reach the reward, mistakes before work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

import tiltlm as tl
from tiltlm.data.asked import Asked, ids_of, read_prompts
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.data.wording import Wording
from tiltlm.models.causal import CausalLM
from tiltlm.recipes import preset_of, recipe
from tiltlm.rewards.user_file import function_of
from tiltlm.ruler.table import read_report
from tiltlm.run import ensure, find
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.settings import hashed
from tiltlm.stages.evaluate import Evaluate
from tiltlm.stages.log_z import LogZSettings
from tiltlm.stages.measure import RulerSettings
from tiltlm.tasks.language import Language
from tiltlm.tasks.mine import Mine

REWARDS = """
def plain(prompts, completions):
    return [float("a" in y) for y in completions]


def length(prompts, completions):
    return [len(y) for y in completions]


def named(prompts, completions, wanted):
    return [float(w in y) for y, w in zip(completions, wanted, strict=True)]
"""
CHATML = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a tiny GPT-2 that has a tokenizer and a chat template, and rewards.py."""
    folder = tmp_path_factory.mktemp("mine")
    tokenizer = train_tokenizer(stories(300, stream(0, "text")))
    tokenizer.chat_template = CHATML
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16, n_positions=96, bos_token_id=0, eos_token_id=0
    )
    CausalLM.from_config(config, seed=torch.Generator().manual_seed(0)).save(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def task_of(home: Path, **settings) -> Mine:
    language = Language(model=str(home / "model"), prompt="One day", new_tokens=4)
    return Mine(**({"language": language, "reward": f"{home / 'rewards.py'}:plain", "beta": 0.5} | settings))


def rows_in(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


TEXTS = ["One day", "Tom had a", "She saw the", "In the park", "He was sad"]


@pytest.fixture
def file(tmp_path) -> str:
    words = ["a", "b", "c", "d", "e"]
    return rows_in(tmp_path / "p.jsonl", [{"prompt": x, "wanted": w} for x, w in zip(TEXTS, words, strict=True)])


def test_it_is_in_the_catalogue():
    assert recipe("mine/ctl").name == "mine/ctl" and recipe("mine/evaluate").name == "mine/evaluate"


# ---- prompts ----------------------------------------------------------------------------------------------------


def test_a_single_text_is_one_prompt(home):
    task = task_of(home)
    assert task.facts().prompts == "one" and task.facts().r_max is None
    problem = task.problem({}, 0)
    assert problem.tokenizer.decode(problem.prompts["train"].ids[0], skip_special_tokens=True).strip() == "One day"
    assert problem.stream == stream(0, "mine")


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "txt"])
def test_prompts_are_read_from_files_of_all_kinds(home, tmp_path, ending):
    path = tmp_path / f"p.{ending}"
    text = {
        "jsonl": "".join(json.dumps({"prompt": x}) + "\n" for x in TEXTS),
        "json": json.dumps([{"prompt": x} for x in TEXTS]),
        "csv": "prompt,n\n" + "".join(f"{x},{k}\n" for k, x in enumerate(TEXTS)),
        "txt": "\n".join([TEXTS[0], "", *TEXTS[1:]]) + "\n",
    }[ending]
    path.write_text(text)
    task = task_of(home, prompts=str(path))
    assert task.facts().prompts == "several"
    problem = task.problem({}, 0)
    decoded = problem.tokenizer.batch_decode(problem.prompts["test"].lists(), skip_special_tokens=True)
    assert [x.strip() for x in decoded] == TEXTS


def test_messages_and_ids_are_prompts_too(home, tmp_path):
    talk = [{"role": "user", "content": "Hello"}]
    path = rows_in(
        tmp_path / "p.jsonl",
        [
            {"prompt": talk},
            {"messages": [*talk, {"role": "assistant", "content": "answer"}]},
            {"prompt": [5, 6, 7]},
        ],
    )
    problem = task_of(home, prompts=path).problem({}, 0)
    first, second, third = problem.prompts["train"].lists()
    text = problem.tokenizer.decode(first, skip_special_tokens=True)
    assert first == second and text.rstrip().endswith("[assistant]") and third == [5, 6, 7]


def test_prompts_of_ones_own_making_are_distinct_and_always_the_same(home):
    task = task_of(home, prompts="stories:40", test_rows=10)
    train, test = ([row.prompt for row in task.rows(split, 0)] for split in ("train", "test"))
    assert len(train) == 30 and len(test) == 10 and len({*train, *test}) == 40
    assert all(len(prompt.split()) == 9 for prompt in train + test)
    assert [row.prompt for row in read_prompts("stories:7")] == [row.prompt for row in read_prompts("stories:40")][
        :7
    ]
    for source, words in (("stories:0", "a number, stories:200 say; got '0'"), ("stories:x", "got 'x'")):
        with pytest.raises(ValueError, match=words):
            read_prompts(source)
    with pytest.raises(ValueError, match=r"stories:1000: no more than [78]\d\d were found that differ"):
        read_prompts("stories:1000")


def test_a_question_is_a_prompt_where_a_row_has_no_other(home, tmp_path):
    talk = [{"role": "user", "content": "Hello"}]
    rows = [{"question": "One day"}, {"question": "x", "prompt": "Tom"}, {"question": "x", "messages": talk}]
    assert [row.prompt for row in read_prompts(rows_in(tmp_path / "p.jsonl", rows))] == ["One day", "Tom", talk]


def test_the_policy_goes_on_from_the_template_and_the_reward_sees_the_bare_prompt(home, tmp_path):
    talk = {"prompt": [{"role": "user", "content": "Hello"}], "wanted": "z"}
    path = rows_in(
        tmp_path / "p.jsonl", [{"prompt": "One day", "wanted": "a"}, {"prompt": "Tom {x}", "wanted": "b"}, talk]
    )
    (tmp_path / "seen.py").write_text(
        "SEEN = []\ndef f(prompts, completions, wanted):\n"
        "    SEEN.extend(zip(prompts, wanted))\n    return [float(w in y) for w, y in zip(wanted, completions)]\n"
    )
    reward = f"{tmp_path / 'seen.py'}:f"
    problem = task_of(home, prompts=path, template="Say: {prompt}\nSo: ", reward=reward).problem({}, 0)
    texts = problem.tokenizer.batch_decode(problem.prompts["train"].lists(), skip_special_tokens=True)
    assert texts[:2] == ["Say: One day\nSo: ", "Say: Tom {x}\nSo: "] and texts[2].endswith("[assistant] ")
    done = Tokens.of(problem.tokenizer(["bad"] * 3, add_special_tokens=False)["input_ids"])
    samples = Samples(problem.prompts["train"], torch.arange(3), done.ids, done.mask)
    assert problem.target.reward(samples).tolist() == [1.0, 1.0, 0.0]
    assert function_of(reward).__globals__["SEEN"] == [("One day", "a"), ("Tom {x}", "b"), (texts[2], "z")]


def test_templates_by_name_are_the_published_ones():
    asked = Asked("p:1", "Why?", None, {})
    assert Wording("tulu").around(asked).prompt == "<user>\nWhy?\n<assistant>\n"
    text = Wording("alpaca").around(asked).prompt
    assert text.startswith("Below is an instruction") and text.endswith("### Instruction:\nWhy?\n\n### Response:")
    for template in ("vicuna", "{prompt} and {prompt}"):
        with pytest.raises(ValueError, match=r"a text with \{prompt\} in it, once, or one of alpaca, tulu"):
            Mine(template=template)
    with pytest.raises(ValueError, match="prompt-tokens"):
        Mine(prompt_tokens=-1)


def test_a_prompts_first_tokens_alone_are_kept(home, tmp_path):
    path = rows_in(tmp_path / "p.jsonl", [{"prompt": "One day, Tom went home"}, {"prompt": [5, 6, 7, 8]}])
    whole, cut = (
        task_of(home, prompts=path, prompt_tokens=n).problem({}, 0).prompts["train"].lists() for n in (0, 3)
    )
    assert cut == [row[:3] for row in whole]
    worded = task_of(home, prompts=path, prompt_tokens=3, template="Q {prompt} A").problem({}, 0)
    kept = worded.tokenizer.decode(whole[0][:3], skip_special_tokens=True)
    text = worded.tokenizer.decode(worded.prompts["train"].lists()[0], skip_special_tokens=True)
    assert text == f"Q {kept} A"


def test_settings_that_came_later_leave_older_runs_their_keys():
    before = hashed(Mine())
    assert "template" not in before and "prompt_tokens" not in before
    assert "template" in hashed(Mine(template="tulu"))


def test_rows_are_held_out_at_random_or_given_apart(home, file, tmp_path):
    task = task_of(home, prompts=file, test_rows=2)
    train, test = ({row.prompt for row in task.rows(split, 0)} for split in ("train", "test"))
    assert len(test) == 2 and not train & test and train | test == set(TEXTS)
    assert {row.prompt for row in task.rows("test", 3)} != test or {
        row.prompt for row in task.rows("test", 4)
    } != test
    other = rows_in(tmp_path / "t.jsonl", [{"prompt": "A bird"}])
    apart = task_of(home, prompts=file, test_prompts=other)
    assert [row.prompt for row in apart.rows("test")] == ["A bird"] and len(apart.rows("train")) == 5


# ---- the reward -------------------------------------------------------------------------------------------------


def test_columns_of_a_prompts_row_reach_the_reward(home, file):
    task = task_of(home, prompts=file, reward=f"{home / 'rewards.py'}:named")
    task.check()
    problem = task.problem({}, 0)
    ids = problem.tokenizer(["bad", "bad"], add_special_tokens=False)["input_ids"]
    prompts = problem.prompts["train"]
    done = Tokens.of(ids)
    samples = Samples(prompts, torch.tensor([1, 4]), done.ids, done.mask)  # rows that want b and e
    assert problem.target.reward(samples).tolist() == [1.0, 0.0]


def test_sums_show_their_terms_and_bounds_come_from_the_reward(home):
    name = f"{home / 'rewards.py'}"
    problem = task_of(home, reward=f"{name}:plain + 0.5*{name}:length").problem({}, 0)
    assert len([check for check in problem.checks if check.startswith("reward[")]) == 2
    assert task_of(home, r_max=1.5).facts().r_max == 1.5
    assert task_of(home, atoms=(0.0, 1.0)).facts().atoms == (0.0, 1.0)


def test_another_reward_finds_the_same_draws(home, file):
    one, other = (task_of(home, prompts=file, reward=r) for r in (f"{home / 'rewards.py'}:plain", "none"))
    assert one.untilted() == other.untilted()
    one.untilted().check()
    problem = one.untilted().problem({}, 0)
    drawn = draw(problem.reference, problem.prompts["train"], max_new_tokens=4, stream=stream(0))
    assert not problem.target.reward(drawn).any()


# ---- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reward": ""}, "--task.reward"),
        ({"reward": "nowhere.py:f"}, "nowhere.py"),
        ({"reward": "HOME/rewards.py:plian"}, "plain"),
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"prompts": "EMPTY"}, "has no prompts"),
        ({"prompts": "FILE", "reward": "exact-answer"}, "takes the column 'answer', and .*p.jsonl:1 has wanted"),
        ({"reward": "HOME/rewards.py:named"}, "takes the column 'wanted', and --task.prompt has no other columns"),
        ({"prompts": "FILE", "test_rows": 5}, "leave none to train on"),
        ({"language": Language(model="no/such-model")}, "no/such-model"),
        ({"language": Language(model="MODEL", new_tokens=96)}, "holds 96 tokens"),
    ],
)  # fmt: skip
def test_mistakes_are_said_before_any_work(home, file, tmp_path, settings, words):
    (tmp_path / "empty.jsonl").write_text("")
    places = {"HOME": str(home), "FILE": file, "EMPTY": str(tmp_path / "empty.jsonl")}
    for name, value in settings.items():
        for mark, place in places.items() if isinstance(value, str) else ():
            value = value.replace(mark, place)
        if isinstance(value, Language) and value.model == "MODEL":
            value = replace(value, model=str(home / "model"))
        settings = settings | {name: value}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        task = task_of(home, **settings)
        task.facts()
        task.check()


def test_settings_that_exclude_each_other_are_refused_at_birth():
    with pytest.raises(ValueError, match="held out of"):
        Mine(test_rows=3)
    with pytest.raises(ValueError, match="beta"):
        Mine(beta=0.0)


def test_rows_that_cannot_be_prompts_name_their_place(tmp_path, home):
    for row, words in (
        ({"text": "x"}, "p.jsonl:1: column 'prompt' is missing"),
        ({"prompt": ""}, "p.jsonl:1: the prompt is empty"),
        ({"prompt": 7}, "p.jsonl:1: a prompt is text"),
        ({"prompt": [{"role": "user", "content": "x"}], "images": ["y"]}, "p.jsonl:1: the row has images"),
    ):
        with pytest.raises(ValueError, match=words):
            read_prompts(rows_in(tmp_path / "p.jsonl", [row]))
    asked = read_prompts(rows_in(tmp_path / "q.jsonl", [{"prompt": [99]}]))
    with pytest.raises(ValueError, match=r"q.jsonl:1: token id 99 is outside the vocabulary \(0 to 9\)"):
        ids_of(asked, None, 10, 100)
    with pytest.raises(ValueError, match="the prompt has 1 tokens, and the model holds 0"):
        ids_of(asked, None, 100, 0)
    with pytest.raises(ValueError, match="no tokenizer"):
        ids_of(read_prompts(rows_in(tmp_path / "r.jsonl", [{"prompt": "x"}])), None, 100, 10)


def test_like_prompts_with_other_columns_are_refused(home, tmp_path):
    path = rows_in(
        tmp_path / "p.jsonl", [{"prompt": "One day", "wanted": "a"}, {"prompt": "One day", "wanted": "b"}]
    )
    task = task_of(home, prompts=path, reward=f"{home / 'rewards.py'}:named")
    with pytest.raises(ValueError, match=r"p.jsonl:2: the same prompt"):
        task.problem({}, 0)


# ---- runs -------------------------------------------------------------------------------------------------------


def test_a_comparison_of_ones_own_target_runs_from_prompts_to_table(home, file, tmp_path):
    found = recipe("mine/evaluate", ("reference", "best-of-n", "ctl", "smc-ctl", "exo-rw"))
    assert isinstance(found, Evaluate)
    cells = {name: replace(c, fit=replace(c.fit, steps=2)) for name, c in found.cells.items()}
    small = replace(
        found, task=task_of(home, prompts=file, name="mine"), cells=cells, ruler=RulerSettings(n=4),
        log_z=LogZSettings(draws=50), twist=cells["ctl"],
    )  # fmt: skip
    run = ensure(small, tmp_path / "runs")
    rows = read_report(run.folder / "report.json")
    metrics = {(row["method"], row["metric"]) for row in rows}
    assert {("reference", "kl_to_target"), ("ctl", "kl_to_target"), ("smc-ctl", "kl_to_target_at_most")} <= metrics
    assert ("best-of-n", "kl_to_reference_at_most") in metrics and all(row["n"] == 5 for row in rows)
    trained = [each for each in (tmp_path / "runs" / "mine").iterdir() if each.name.endswith("-twist")]
    assert [each.name for each in trained] == ["ctl-twist"] and len(list(trained[0].iterdir())) == 1
    page = tl.report(run.folder, out=tmp_path / "page.html")
    assert "best-of-n" in page.read_text()
    problem = small.task.problem({}, 0)
    again = tl.measure(
        problem, {"reference": problem.reference, "ctl": run.inputs["ctl"].folder}, n=4, log_z="none"
    )
    row = next(row for row in rows if (row["method"], row["metric"]) == ("ctl", "reward"))
    assert again.value("ctl", "reward") == pytest.approx(row["value"])  # the same draws


def test_other_contents_of_a_file_are_another_run(home, tmp_path):
    path = rows_in(tmp_path / "p.jsonl", [{"prompt": x} for x in TEXTS])
    made = replace(recipe("mine/ctl"), task=task_of(home, prompts=path))
    before = find(made, tmp_path).key
    rows_in(tmp_path / "p.jsonl", [{"prompt": x} for x in TEXTS[:3]])
    assert find(made, tmp_path).key != before
    assert preset_of("mine").task.name == "mine"

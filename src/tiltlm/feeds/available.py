"""What a problem can feed a method, and why not."""

from __future__ import annotations

from dataclasses import replace

from tiltlm.feeds.rounds import BUILT
from tiltlm.feeds.settings import NEW, AnyFeed, Draws, Feed, Rounds, TwistFeed
from tiltlm.judges.settings import Judging
from tiltlm.method import Method
from tiltlm.problem import Facts, Fed, Source
from tiltlm.samplers.serving import HERE
from tiltlm.twists.objective import TwistMethod


def owned(facts: Facts, fed: Fed) -> bool:
    """Whether the data holds it, or what it can be made of."""
    made_of: dict[Fed, set[Fed]] = {
        "judged": {"judged", "pairs", "groups"}, "groups": {"groups", "pairs"}, "pairs": {"pairs", "groups"}
    }  # fmt: skip
    return bool(made_of.get(fed, {fed}) & facts.owns)


def source_of(facts: Facts, method: Method, feed: AnyFeed) -> Source:
    """Where the rows come from."""
    fed = method.fed
    if fed == "live":
        return "live"
    if isinstance(feed, TwistFeed) or fed in ("draws", "nothing"):
        return "fresh"
    if feed.source != "task":
        return feed.source
    if method.source is not None:
        return method.source
    if fed == "answers":
        return "own" if owned(facts, fed) else "fresh"
    if facts.source == "own":
        return "own" if owned(facts, fed) else "fresh"
    return facts.source


def why_not(facts: Facts, method: Method, feed: AnyFeed) -> str | None:
    """Why such a problem cannot feed the method so, or None."""
    fed = method.fed
    if isinstance(feed, TwistFeed):
        return _why_no_twist(facts, feed) or _unheeded(method, feed)
    source = source_of(facts, method, feed)
    if fed == "live" and feed.source not in ("task", "live"):
        return f"it learns from the policy's own draws, and from no others: leave --feed.source {feed.source} out"
    if source == "rounds":
        return _why_no_rounds(facts, method, feed) or _undrawn(facts, method, feed, source)
    if feed.rounds != Rounds():
        return "it does not learn in rounds: set --feed.source rounds as well, or leave --feed.rounds out"
    if source == "live" and fed in ("answers", "values"):
        of = "answers of pi* or the data" if fed == "answers" else "draws of the reference"
        return f"it learns from {of}, not from the policy's own: --feed.source task"
    if method.judged and feed.judge.kind == "none":
        return "its labels are a judge's: --feed.judge.kind reward-model (without a judge it is opo)"
    if (why := _undrawn(facts, method, feed, source)) is not None:
        return why
    if feed.judge.kind != "none":
        why = _unjudged(facts, method, feed, source)
        if why is not None:
            return why
    elif feed.judge != Judging():
        return "settings of a judge, and none is named: --feed.judge.kind reward-model, or leave the others out"
    if 0 < feed.n < method.least and facts.prompts != "one":
        return f"its baseline wants {method.least} draws of a prompt in a step or more: --feed.n {method.least}"
    if feed.n and source in NEW and facts.prompts == "one":
        return "there is one prompt, and a step's batch is all of it: --feed.n does nothing, set --fit.batch-size"
    if source == "own" and not owned(facts, fed):
        holds = ", ".join(sorted(facts.owns)) or "nothing of its own"
        return f"it learns from {fed}, and the data holds {holds}: take --feed.source stored or fresh"
    if source == "stored" and facts.prompts != "several":
        return "stored draws are for many prompts; here fresh ones cost the same: --feed.source fresh"
    if source == "stored" and fed == "answers":
        return "answers to imitate are the data's own, or fresh exact draws: --feed.source own or fresh"
    if source == "stored" and fed in ("groups", "pairs", "judged") and feed.size > feed.draws.n:
        wanted = f"groups of {feed.size} (--feed.size) want as many draws of a prompt"
        return f"{wanted}, and {feed.draws.n} are stored: --feed.draws.n {feed.size}"
    if source == "fresh" and fed == "answers":
        why = facts.no_exact_draws()
        return None if why is None else f"it imitates exact draws of pi*, and {why}"
    return None


def _undrawn(facts: Facts, method: Method, feed: Feed, source: Source) -> str | None:
    """Why such rows are not drawn as `--feed.draw` says, or None."""
    if feed.draw == HERE:
        return None
    asked = "--feed.draw.url" if feed.draw.url else "--feed.draw.precision"
    if source == "own":
        return f"the data's own rows are not drawn: leave {asked} out"
    if source == "fresh" and method.fed == "answers":
        return f"it imitates exact draws of pi*, whatever else draws: leave {asked} out"
    if feed.draw.url:
        return _unserved(facts, feed, source)
    if not facts.network and feed.draw.precision != "float32":
        return "a transformer alone draws in bfloat16: leave --feed.draw.precision out"
    return None


def _unserved(facts: Facts, feed: Feed, source: Source) -> str | None:
    """Why a server cannot draw such rows, or None."""
    if facts.conditioned or facts.teacherless or not facts.network:
        return "a server draws from a transformer that sees the prompt and goes on: leave --feed.draw.url out"
    if facts.temperature != 1:
        return (
            f"models are read at temperature {facts.temperature:g} here, and a server's log-probabilities are those at 1: "
            "--task.temperature 1, or leave --feed.draw.url out"
        )
    if source == "stored":
        return None
    if feed.draw.text and source != "rounds":
        return "new rows want the log q of the tokens that were drawn, and texts have none: leave --feed.draw.text out"
    if source in ("live", "rounds") and not feed.draw.weights:
        return "the server has to follow the policy: --feed.draw.weights FOLDER, one that both can read"
    return None


def _unjudged(facts: Facts, method: Method, feed: Feed, source: Source) -> str | None:
    """Why a judge cannot score such rows, or None."""
    if source not in NEW or method.fed not in ("live", "groups"):
        return "a judge scores new rows that are drawn in pairs or groups: leave --feed.judge out"
    if method.asks:
        return "it asks the reward of draws of its own, which no judge scores or counts: leave --feed.judge out"
    if facts.paid and not (feed.judge.budget or feed.judge.url):
        return "the reward costs money: say how many of its verdicts may be bought, --feed.judge.budget"
    if facts.paid and feed.judge.monitor:
        return "the reward costs money, and watching the judge would ask it for every row: leave --feed.judge.monitor out"
    if facts.conditioned:
        return "a judge reads prompt and completion, and here a condition decides as well: leave --feed.judge out"
    if method.fed == "groups" and feed.size % 2:
        return (
            f"a judge buys verdicts on pairs, and groups of {feed.size} do not part into pairs: --feed.size 2 or 4"
        )
    if method.fed == "live" and facts.prompts != "one" and (feed.n or 4) % 2:
        return f"a judge buys verdicts on pairs: an even number of draws of a prompt (--feed.n); got {feed.n}"
    return None


HEEDED: dict[Fed, tuple[str, ...]] = {
    "answers": ("cap", "unique", "weigh", "rationalize", "show_hint"),
    "pairs": ("pairs", "cut_off", "weigh", "reference"),
    "groups": ("reference",),
    "judged": ("reference",),
}  # fmt: skip
"""Of the settings of rounds that are for some kinds of rows alone, those that count for each."""

PARTICULAR = tuple(dict.fromkeys(name for names in HEEDED.values() for name in names))


def _why_no_rounds(facts: Facts, method: Method, feed: Feed) -> str | None:
    if facts.prompts != "several":
        return "rounds go over many prompts, and here there is one: --feed.source live"
    if method.judged or feed.judge != Judging():
        return "a round's answers are scored by the reward itself: leave --feed.judge out"
    if method.fed not in BUILT:
        return (
            f"a round builds {', '.join(BUILT)}, and it learns from {method.fed}: leave --feed.source rounds out"
        )
    if feed.rounds.right is None and facts.r_max is None:
        return "no bound of the reward is known: say from which one an answer counts as right, --feed.rounds.right"
    drawn = feed.rounds.count > 1 or not feed.rounds.samples
    if method.fed != "answers" and drawn and feed.rounds.n < 2:
        return "it learns from answers to one prompt side by side: --feed.rounds.n 2"
    for name in PARTICULAR:
        if name not in HEEDED[method.fed] and getattr(feed.rounds, name) != getattr(Rounds(), name):
            heeds = ", ".join(HEEDED[method.fed]) or "none of the kind"
            said = f"it learns from {method.fed}, for which --feed.rounds.{name.replace('_', '-')} does nothing"
            return f"{said}: leave it out (these count: {heeds})"
    if (feed.n, feed.draws, feed.pairing) != (0, Draws(), "best-worst"):
        return "a round's draws and pairs are --feed.rounds.n and pairs: leave --feed.n, draws and pairing out"
    if feed.rounds.rationalize and not facts.hints:
        return "this task's prompts have no hints: leave --feed.rounds.rationalize out"
    if (feed.rounds.gain or feed.rounds.collapse) and not facts.held_out:
        return "there are no validation prompts to stop by: leave --feed.rounds.gain and collapse out"
    if feed.rounds.valid_samples and not facts.held_out:
        return "there are no validation prompts: leave --feed.rounds.valid-samples out"
    return None


def _why_no_twist(facts: Facts, feed: TwistFeed) -> str | None:
    if feed.supply == "stored" and facts.prompts != "one":
        return "stored exact draws (--feed.supply stored) are of one prompt; leave supply at fresh"
    if feed.prefixes and not facts.network:
        return "a table's prompts are numbers, and nothing can be drawn behind a prefix: leave --feed.prefixes out"
    return facts.no_exact_draws() if feed.wants_exact else None


def _unheeded(method: Method, feed: TwistFeed) -> str | None:
    """What the feed asks for and the method would not look at, or None."""
    plain = isinstance(method, TwistMethod) and method.plain
    if not plain:
        return (
            "prefixes with labels of their own are FUDGE's: leave --feed.prefixes out" if feed.prefixes else None
        )
    if feed.drawn_by != "q" or feed.tempered != 1:
        return (
            "FUDGE draws from the reference, and its psi is a probability: leave --feed.drawn-by and --feed.tempered out; "
            f"got drawn-by {feed.drawn_by}, tempered {feed.tempered:g}"
        )
    if feed.prefixes != (feed.positives != "particles"):
        return (
            "FUDGE learns from draws of the reference, and with prefixes from exact ones too: set prefixes and positives "
            f"together; got prefixes {feed.prefixes}, positives {feed.positives}"
        )
    return None


def unshared(facts: Facts, feed: Feed, batch_size: int) -> str | None:
    """Why a batch of new rows cannot be shared out among prompts, or None."""
    if facts.prompts == "one" or feed.n <= batch_size:
        return None
    return f"{feed.n} draws of a prompt (--feed.n) do not fit a batch of {batch_size} (--fit.batch-size)"


def shares(facts: Facts, feed: Feed, batch_size: int) -> tuple[int, int]:
    """(prompts of a step, rows of each): the batch shared out. Raises ValueError where it cannot be."""
    if facts.prompts == "one":
        return 1, batch_size
    why, n = unshared(facts, feed, batch_size), feed.n or min(4, batch_size)
    if why is not None:
        raise ValueError(why)
    return batch_size // n, n


def prompts_of_step(facts: Facts, feed: Feed, batch_size: int, prompts: int) -> tuple[int, int]:
    """(prompts of a step, draws of each) as `shares`, where there are so many `prompts` to train on."""
    count, n = shares(facts, feed, batch_size)
    return min(count, prompts) if facts.prompts == "several" else count, n


def rows_drawn(facts: Facts, method: Method, feed: Feed, batch_size: int, prompts: int) -> int:
    """Rows that are drawn and scored for a step of new ones."""
    count, n = prompts_of_step(facts, feed, batch_size, prompts)
    together: dict[Fed, int] = {"groups": feed.size, "pairs": 2, "judged": 2}
    return count * n * together.get(method.fed, 1)


JUDGE = Judging("reward-model", budget=200, warm=100, warm_epochs=4)
"""The judge of a method that needs one, if nothing is said of it."""


def default_feed(method: Method, facts: Facts) -> AnyFeed:
    """The feed of a method's kind with its defaults: of many prompts a few a step, with fewer particles each."""
    if method.fed != "draws":
        judge = JUDGE if method.judged else Judging()
        return Feed(n=1 if method.source == "live" and facts.prompts != "one" else 0, judge=judge)
    return replace(TwistFeed(), prompts=4, particles=24) if facts.prompts == "several" else TwistFeed()

"""Does a 95% interval hold 95% of the time? The answer by doing it: worlds whose truth is enumerated, measured again and
again.

Every cell of the table is one quantity under one setting, measured `runs` times by the very code that prints results,
and held against the truth: how often the estimate's interval held it (among the runs that did not say themselves that it
may not), how often a run said so, how wide it was; and the same of the certificate, which has to hold always.

The world: three tokens, three steps, r = (share of token 2)², so that at a small beta pi* rests on one completion of
27. Twists: psi* itself ("exact"), with noise of 0.2 ("near") and 1 ("noisy") nats, or none. A population of prompts for
what is claimed over prompts: every run draws its own from it, and the truth is the population's mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiltlm.exact import Solution
from tiltlm.ruler.bounds import bound_repeats
from tiltlm.ruler.compare import paired
from tiltlm.ruler.intervals import Interval, of_rate, student
from tiltlm.ruler.kl import kl_along
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.measure import Measurement
from tiltlm.ruler.worlds import HORIZON, World
from tiltlm.samples import Tokens
from tiltlm.seeds import Stream

POPULATION = 200
NOISE: dict[str, float | None] = {"exact": 0.0, "near": 0.2, "noisy": 1.0, "none": None}
ROUNDING = 1e-6
"""Nats by which an interval of no width (the exact twist's) may miss by rounding."""

Found = tuple[Interval, tuple[float, float] | None]
"""What one run says: the estimate's interval, and the certificate where there is one."""


@dataclass(frozen=True)
class Cell:
    """One line of the table. held, certified: of how many runs that claimed it (`claimed`, `certificates`)."""

    what: str
    setting: str
    runs: int
    claimed: int
    held: int
    width: float
    certificates: int
    certified: int
    certified_width: float

    @property
    def coverage(self) -> float | None:
        return self.held / self.claimed if self.claimed else None

    @property
    def sound(self) -> bool:
        """Whether nothing here shows less than was claimed: 93% of estimates, 95% of certificates, each less three
        errors of the count itself."""
        slack = [
            3 * (p * (1 - p) / max(1, n)) ** 0.5 for p, n in ((0.93, self.claimed), (0.95, self.certificates))
        ]
        return self.held >= (0.93 - slack[0]) * self.claimed and (
            self.certified >= (0.95 - slack[1]) * self.certificates
        )


def cell(what: str, setting: str, truth: float, found: Sequence[Found]) -> Cell:
    """The line that `found` makes."""
    sure = [own for own, _ in found if not own.doubt]
    fixed = [ends for _, ends in found if ends is not None]
    return Cell(
        what, setting, len(found), len(sure), sum(_holds((own.low, own.high), truth) for own in sure),
        _median(own.high - own.low for own, _ in found), len(fixed), sum(_holds(ends, truth) for ends in fixed),
        _median(high - low for low, high in fixed),
    )  # fmt: skip


def _holds(ends: tuple[float, float], truth: float) -> bool:
    return ends[0] - ROUNDING <= truth <= ends[1] + ROUNDING


def _median(widths: Iterable[float]) -> float:
    x = torch.tensor(list(widths), dtype=torch.float64)
    return float(x.median()) if len(x) else float("nan")


def of_log_z(found: LogZ) -> Found:
    return Interval(*found.interval, doubt=found.doubt), found.certificate


def between(lower: Tensor, upper: Tensor) -> Found:
    """What bounds say; where they contradict each other beyond three errors no number is given, and the certificate
    counts as missed."""
    try:
        return of_log_z(LogZ.of_bounds(lower, upper, ""))
    except ValueError as error:
        return Interval(0.0, 0.0, "none", str(error)), (math.inf, -math.inf)


def bounds_cells(
    runs: int,
    repeats: Sequence[int],
    ks: Sequence[int],
    twists: Sequence[str],
    betas: Sequence[float],
    own: Stream,
) -> Iterator[Cell]:
    """log Z between SMC's bounds: twists × beta × K × R."""
    for beta in betas:
        world = World(1, beta, own.child("bounds"))
        truth, most = float(world.solution.log_z[0]), max(repeats)
        for name in twists:
            noise = NOISE[name]
            stream = own.child("bounds", beta, name)
            proposal = "reference" if noise is None else "twist"
            bounds = bound_repeats(
                world.target, None if noise is None else world.twist(noise), Tokens.of([[0]]),
                world.pins(runs * most, stream.child("pins")), ks=ks, repeats=runs * most, max_new_tokens=HORIZON,
                stream=stream, proposals=(proposal,), batch_size=10_000,
            )  # fmt: skip
            for k in ks:
                lower, upper = (
                    bounds.values[k, proposal, "smc-ess", s].reshape(runs, most) for s in ("lower", "upper")
                )
                for r in repeats:
                    found = [between(lower[i, :r], upper[i, :r]) for i in range(runs)]
                    yield cell("log Z, bounds", f"beta {beta:g}, twist {name}, K {k}, R {r}", truth, found)


def importance_cells(runs: int, draws: Sequence[int], betas: Sequence[float], own: Stream) -> Iterator[Cell]:
    """log Z by plain draws of the reference, and by what rejection keeps of them."""
    for beta in betas:
        world = World(1, beta, own.child("importance"))
        truth = float(world.solution.log_z[0])
        for n in draws:
            rows = torch.zeros(runs, dtype=torch.int64)
            numbers = world.drawn(world.solution.log_ref, rows, n, own.child("importance", beta, n))
            log_w = world.solution.reward[0][numbers] / beta
            found = [of_log_z(LogZ.of_importance(x, "draws", 1 / beta)) for x in log_w]
            yield cell("log Z, importance", f"beta {beta:g}, n {n}", truth, found)
            coins = torch.rand(log_w.shape, generator=own.child("coins", beta, n).generator(), dtype=torch.float64)
            kept = (coins.log() < log_w - 1 / beta).sum(1).tolist()
            found = [of_log_z(LogZ.of_acceptance(a, n, 1 / beta)) for a in kept]
            yield cell("log Z, rejection", f"beta {beta:g}, n {n}", truth, found)


METRICS = ("reward", "kl_to_reference", "kl_to_target", "kl_from_target")


def method_cells(
    runs: int, sizes: Sequence[int], prompts: Sequence[int], betas: Sequence[float], own: Stream
) -> Iterator[Cell]:
    """Both KLs, E[r] and differences of two methods: n draws of one prompt, log Z by 2000 plain draws; or n prompts of a
    population, four draws and one exact draw each, log Z known."""
    for beta in betas:
        one, many = World(1, beta, own.child("one")), World(POPULATION, beta, own.child("many"))
        for n in sizes:
            yield from _cells_of(one, runs, f"beta {beta:g}, 1 prompt, n {n}", n, False, own.child(beta, n, "one"))
        for n in prompts:
            where = f"beta {beta:g}, {n} prompts, 1 exact draw each"
            yield from _cells_of(many, runs, where, n, True, own.child(beta, n, "many"))


def _cells_of(world: World, runs: int, where: str, n: int, prompts: bool, own: Stream) -> Iterator[Cell]:
    s = world.solution
    log_q = {name: s.density(world.table(name)) for name in ("q", "other")}
    along = {
        name: kl_along(world.table(name), world.reference, s.samples).sum(1).reshape(s.reward.shape)
        for name in log_q
    }
    found: dict[str, list[Found]] = {}
    for i in range(runs):
        stream = own.child(i)
        both = [
            _measured(world, log_q[name], along[name], n, prompts, stream.child("draws"), stream.child(name))
            for name in log_q
        ]
        for row in _rows(both[0]):
            low, high = (float("nan") if row[e] is None else row[e] for e in ("low", "high"))
            found.setdefault(row["metric"], []).append((Interval(low, high, doubt=row.get("doubt", "")), None))
        for d in paired(*both):
            if d.metric in ("kl_to_target", "kl_from_target"):
                said = replace(student(d.estimate), doubt=d.doubt)
                found.setdefault(f"difference of {d.metric}", []).append((said, None))
    truth = _truths(s, *log_q.values())
    yield from (cell(name, where, truth[name], found[name]) for name in truth if name in found)


def _rows(measured: Measurement) -> list[dict[str, Any]]:
    return [row for row in measured.rows("calibrate", "q", 0) if row["metric"] in METRICS]


def _measured(
    world: World, log_q: Tensor, along: Tensor, n: int, prompts: bool, shared: Stream, own: Stream
) -> Measurement:
    """n draws of prompt 0 (log Z by draws), or four draws and an exact one for each of n prompts of the population."""
    s, each = world.solution, 4 if prompts else n
    rows = torch.zeros(1, dtype=torch.int64)
    if prompts:
        rows = torch.randint(len(s.log_z), (n,), generator=shared.generator())
    numbers = world.drawn(log_q, rows, each, own)
    exact = world.drawn(s.log_pi_star, rows, 1 if prompts else n, shared.child("exact"))

    def at(table: Tensor, y: Tensor) -> Tensor:
        return table[rows[:, None], y].mean(1) if prompts else table[0, y[0]]

    reward, kl = at(s.reward, numbers), at(along, numbers)
    log_w, above = reward / world.beta - kl, at(s.log_ref + s.reward / world.beta - log_q, exact)
    log_z, shared_z = s.log_z[rows] if prompts else s.log_z, None
    if not prompts:
        plain = world.drawn(s.log_ref, rows, 2000, shared.child("log-z"))[0]
        shared_z = LogZ.of_importance(s.reward[0][plain] / world.beta, "draws", 1 / world.beta)
        log_z = torch.full((1,), shared_z.value, dtype=torch.float64)
    values = {"reward": reward, "kl_to_reference": kl, "log_w": log_w, "log_w_exact": above}
    values |= {"kl_to_target": log_z - log_w, "kl_from_target": above - log_z}
    return Measurement(values, shared_z, world.beta)


def _truths(s: Solution, log_q: Tensor, other: Tensor) -> dict[str, float]:
    """What the cells of one world are held against, averaged over its prompts."""
    to, away = ((f(log_q) - f(other)).mean() for f in (s.kl_to_target, s.kl_from_target))
    found = {
        "reward": (log_q.exp() * s.reward).sum(1).mean(),
        "kl_to_reference": (log_q.exp() * (log_q - s.log_ref)).sum(1).mean(),
        "kl_to_target": s.kl_to_target(log_q).mean(),
        "kl_from_target": s.kl_from_target(log_q).mean(),
        "difference of kl_to_target": to,
        "difference of kl_from_target": away,
    }
    return {name: float(x) for name, x in found.items()}


def rate_cells(runs: int, sizes: Sequence[int], rates: Sequence[float], own: Stream) -> Iterator[Cell]:
    """Rates: n draws of one prompt; or n prompts whose own rates are spread as a beta law of mean p, four draws each."""
    for p in rates:
        for n in sizes:
            generator = own.child("rate", p, n).generator()
            x = (torch.rand(runs, n, generator=generator) < p).double()
            yield cell("rate", f"p {p:g}, n {n}", p, [(of_rate(row), None) for row in x])
            spread = _prompts_rates(p, (runs, n), own.child("prompts", p, n))
            x = (torch.rand(runs, n, 4, generator=generator) < spread[..., None]).double().mean(2)
            yield cell("rate", f"p {p:g}, {n} prompts", p, [(of_rate(row), None) for row in x])


def _prompts_rates(p: float, shape: tuple[int, int], own: Stream) -> Tensor:
    """Rates of prompts: Beta(2p, 2(1 − p))."""
    numbers = own.numpy().beta(2 * p, 2 * (1 - p), shape)
    return torch.from_numpy(numbers)


def table(cells: Iterable[Cell], on_cell: Callable[[Cell], None] = lambda c: None) -> list[str]:
    """The cells as lines of a markdown table."""
    lines = ["| quantity | setting | estimate holds | says it may not | width | certificate holds | width |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|")
    for c in cells:
        on_cell(c)
        held = "–" if c.coverage is None else f"{c.coverage:.3f}"
        fixed = (
            ("–", "–")
            if not c.certificates
            else (f"{c.certified / c.certificates:.3f}", f"{c.certified_width:.3g}")
        )
        said = f"{1 - c.claimed / c.runs:.2f}"
        lines.append(f"| {c.what} | {c.setting} | {held} | {said} | {c.width:.3g} | {fixed[0]} | {fixed[1]} |")
    return lines

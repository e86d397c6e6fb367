"""Tables for the eyes: of measurements and of differences, on a terminal, in a notebook, as rows or as a data frame."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table as Drawn

from tiltlm.mistakes import nearest
from tiltlm.ruler.compare import Difference, holm, paired
from tiltlm.ruler.measure import Measurement
from tiltlm.ruler.table import HEADINGS, table
from tiltlm.samples import Samples

WIDTH = 150


class Shown:
    """What can be looked at: `print`, the last line of a notebook's cell, rich, `.rows`, `.frame()`."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict a number."""
        raise NotImplementedError

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __repr__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=WIDTH, highlight=False, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")

    def _repr_html_(self) -> str:
        """The same for a notebook: an HTML table; what was measured is text and never markup."""
        console = Console(file=io.StringIO(), width=WIDTH, highlight=False, record=True, force_jupyter=False)
        console.print(self)
        style = "<pre style=\"font-family: Menlo, 'DejaVu Sans Mono', monospace; line-height: 1.25\">{code}</pre>"
        return console.export_html(inline_styles=True, code_format=style)

    def frame(self) -> Any:
        """The rows as a pandas DataFrame. Raises ImportError where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise ImportError(
                "a data frame wants pandas: pip install pandas (the same numbers are in .rows)"
            ) from None
        return pandas.DataFrame(self.rows)


@dataclass(frozen=True, repr=False)
class Table(Shown):
    """Measurements side by side. measured, samples: by method; beta: the target's; log_z: what is known of it, in words."""

    measured: Mapping[str, Measurement]
    samples: Mapping[str, Samples] = field(default_factory=dict)
    beta: float = 1.0
    log_z: str = ""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Report rows: {recipe, method, metric, value, stderr, n, unit, low, high, interval, seed}."""
        return [row for name, each in self.measured.items() for row in each.rows("", name, 0)]

    def __rich__(self) -> RenderableType:
        title = f"pi* ∝ pi_ref · exp(r/{self.beta:g})"
        distances = any("kl_to_target" in each.values for each in self.measured.values())
        headings = HEADINGS if distances else HEADINGS | {"objective": "J(q)"}
        notes = [self.log_z] if self.log_z else []
        notes.append("± is one standard error" + (", log Z's own included" if self.log_z else "") + "; KL in nats")
        return Group(table(self.rows, title, headings), *(escape(note) for note in notes))

    def __getitem__(self, method: str) -> Measurement:
        """The measurement of a method."""
        if method not in self.measured:
            raise KeyError(f"no method here is called {method!r}.{nearest(method, self.measured)}")
        return self.measured[method]

    def __iter__(self) -> Iterator[str]:
        return iter(self.measured)

    def value(self, method: str, metric: str) -> float:
        """One number of the table."""
        found = self[method].estimates()
        if metric not in found:
            raise KeyError(f"{method} has no {metric!r}.{nearest(metric, found)} There are {', '.join(found)}")
        return found[metric].value


@dataclass(frozen=True, repr=False)
class Differences(Shown):
    """Paired differences, first − second, with p adjusted for all that are shown."""

    found: Sequence[tuple[str, str, Difference]]

    @staticmethod
    def of(
        measured: Mapping[str, Measurement], control: str | None = None, metrics: Sequence[str] | None = None
    ) -> Differences:
        """Of every pair, or from `control` alone. Raises ValueError for fewer than two, and for an unknown control."""
        if len(measured) < 2:
            raise ValueError(f"a comparison wants two methods or more; got {len(measured)}")
        if control is not None and control not in measured:
            raise ValueError(f"no method here is called {control!r}.{nearest(control, measured)}")
        pairs = [(a, b) for a, b in itertools.combinations(measured, 2) if control in (None, a, b)]
        pairs = [(b, a) if a == control else (a, b) for a, b in pairs]  # the control is what is subtracted
        shown = tuple(metrics) if metrics is not None else (*HEADINGS, "objective")
        raw = [(a, b, d) for a, b in pairs for d in paired(measured[a], measured[b]) if d.metric in shown]
        adjusted = holm([d for *_, d in raw])
        return Differences([(a, b, d) for (a, b, _), d in zip(raw, adjusted, strict=True)])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """{first, second, metric, difference, stderr, n, low, high, p, verdict, least, doubt}."""
        rows = []
        for first, second, d in self.found:
            low, high = d.estimate.interval()
            head = {"first": first, "second": second, "metric": d.metric, "difference": d.estimate.value}
            about = {"stderr": d.estimate.stderr, "n": d.estimate.n, "low": low, "high": high}
            rows.append({**head, **about, "p": d.p, "verdict": d.verdict, "least": d.least, "doubt": d.doubt})
        return rows

    def __rich__(self) -> RenderableType:
        out = Drawn(title="differences", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
        for name in (
            "first − second",
            "metric",
            "difference",
            "95% interval",
            "p (Holm)",
            "verdict",
            "would show",
        ):
            out.add_column(name, justify="left" if name in ("first − second", "metric", "verdict") else "right")
        headings = HEADINGS | {"objective": "J"}
        for row in self.rows:
            value = f"{row['difference']:+.4f} ± {row['stderr']:.4f}" + ("*" if row["doubt"] else "")
            p = f"{row['p']:.3f}" if row["p"] >= 0.001 else "< 0.001"
            out.add_row(
                escape(f"{row['first']} − {row['second']}"), escape(headings.get(row["metric"], row["metric"])), value,
                f"{row['low']:+.4f} to {row['high']:+.4f}", p, row["verdict"], f"{row['least']:.4f}",
            )  # fmt: skip
        doubts = dict.fromkeys(d.doubt for *_, d in self.found if d.doubt)
        said = f"* Student's t may not hold here: {'; '.join(doubts)}." if doubts else ""
        return Group(out, escape(said)) if said else Group(out)

"""Turns samples into rows, and rows into the table that people read and the JSON that programs read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pandastack.bench.promises import Promise


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a benchmark. Milliseconds; `ratio_p50` is ours by the bare tool's, below 1 is faster than it.

    `value` with `unit` carries what is no duration (a rate, bytes); `target` is what this project promises for it, and
    `met` whether it held in this run. `note` says what one must know to read the figure.
    """

    benchmark: str
    case: str
    runtime: str
    n: int
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    bare_p50_ms: float | None = None
    ratio_p50: float | None = None
    value: float | None = None
    unit: str | None = None
    target: str | None = None
    met: bool | None = None
    note: str | None = None


def percentile(samples: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: always a value that was measured."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def timing(
    benchmark: str,
    case: str,
    runtime: str,
    ours_s: Sequence[float],
    bare_s: Sequence[float] | None = None,
    *,
    promise: Promise | None = None,
    note: str | None = None,
) -> Row:
    """A row of durations. Seconds in, milliseconds out."""
    p50 = percentile(ours_s, 0.5) * 1000
    bare = percentile(bare_s, 0.5) * 1000 if bare_s else None
    ratio = round(p50 / bare, 3) if bare else None
    judged = ratio if promise is not None and promise.of == "ratio" else p50
    return Row(
        benchmark=benchmark,
        case=case,
        runtime=runtime,
        n=len(ours_s),
        p50_ms=round(p50, 2),
        p95_ms=round(percentile(ours_s, 0.95) * 1000, 2),
        p99_ms=round(percentile(ours_s, 0.99) * 1000, 2),
        bare_p50_ms=round(bare, 2) if bare is not None else None,
        ratio_p50=ratio,
        target=promise.text if promise is not None else None,
        met=promise.held(judged) if promise is not None and judged is not None else None,
        note=note,
    )


def quantity(
    benchmark: str,
    case: str,
    runtime: str,
    n: int,
    value: float,
    unit: str,
    *,
    promise: Promise | None = None,
    note: str | None = None,
) -> Row:
    """A row of something that is no duration of samples, with its promise if there is one."""
    return Row(
        benchmark=benchmark,
        case=case,
        runtime=runtime,
        n=n,
        value=round(value, 2),
        unit=unit,
        target=promise.text if promise is not None else None,
        met=promise.held(value) if promise is not None else None,
        note=note,
    )


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(
        "benchmark", "case", "n", "p50 ms", "p95 ms", "p99 ms", "bare p50", "ratio", "value", "promised", title="pandastack bench"
    )
    for row in rows:
        promised = "" if row.target is None else f"{row.target} {'[green]held[/green]' if row.met else '[red]missed[/red]'}"
        value = "" if row.value is None else f"{row.value:g} {row.unit}"
        numbers = [_text(number) for number in (row.p50_ms, row.p95_ms, row.p99_ms, row.bare_p50_ms, row.ratio_p50)]
        table.add_row(row.benchmark, row.case, str(row.n), *numbers, value, promised)
    console.print(table)
    for note in dict.fromkeys(f"{row.benchmark}: {row.note}" for row in rows if row.note):
        console.print(note)


def write(rows: Sequence[Row], file: Path) -> None:
    file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def _text(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}" if number < 100 else f"{number:.0f}"

"""Rows are judged by the one table of promises."""

from __future__ import annotations

import pytest

from pandastack.bench import figures
from pandastack.bench.promises import Promise, promise


def test_each_runtime_has_its_own_promises_and_some_are_everybodys() -> None:
    ours, theirs = promise("gvisor", "create", "with slots"), promise("qemu", "create", "with slots")
    assert (ours, theirs) == (Promise("ratio", 0.5), Promise("ratio", 1.25))
    assert promise("gvisor", "burst", "failed") == promise("qemu", "burst", "failed") == Promise("value", 0)
    assert promise("qemu", "idle", "memory") is None


@pytest.mark.parametrize(
    ("given", "text", "met"),
    [
        (Promise("ratio", 0.5), "ratio <= 0.5", False),
        (Promise("ratio", 0.51), "ratio <= 0.51", True),
        (Promise("ms", 20), "ms <= 20", True),
        (Promise("ms", 19), "ms <= 19", False),
    ],
)
def test_a_time_is_judged_by_its_ratio_or_by_itself(given: Promise, text: str, met: bool) -> None:
    row = figures.timing("create", "x", "qemu", [0.0195, 0.0196, 0.5], [0.038, 0.0385, 0.0386], promise=given)
    assert (row.p50_ms, row.bare_p50_ms, row.ratio_p50) == (19.6, 38.5, 0.509)
    assert (row.target, row.met) == (text, met)


def test_a_ratio_without_a_bare_tool_is_not_judged() -> None:
    row = figures.timing("create", "x", "qemu", [0.02], promise=Promise("ratio", 1))
    assert (row.target, row.met, row.ratio_p50) == ("ratio <= 1", None, None)


def test_a_quantity_has_a_least_or_a_most() -> None:
    assert figures.quantity("burst", "x", "qemu", 1, 20, "1/s", promise=Promise("value", 20, at_least=True)).met
    assert not figures.quantity("burst", "x", "qemu", 1, 19.9, "1/s", promise=Promise("value", 20, at_least=True)).met
    assert not figures.quantity("idle", "x", "qemu", 1, 30.5, "MiB", promise=Promise("value", 30)).met
    assert figures.quantity("idle", "x", "qemu", 1, 30.5, "MiB").met is None

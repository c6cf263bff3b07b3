"""What `pandastack bench` can be asked for."""

from __future__ import annotations

import pytest

from pandastack.bench.__main__ import BENCHMARKS, TOOLS, main


@pytest.mark.parametrize("words", [["--runtime", "other"], ["restore"], ["restore", "--runtime", "gvisor"], ["nothing"]])
def test_what_there_is_not_is_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: pandastack bench" in capsys.readouterr().err


def test_every_benchmark_is_of_a_runtime_that_has_a_bare_tool() -> None:
    for benchmark in BENCHMARKS.values():
        assert set(benchmark.runtimes) <= TOOLS.keys()
        assert any(benchmark.of(runtime) for runtime in TOOLS)

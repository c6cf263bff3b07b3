"""What docs/howto/testing.md says of second tries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FLAKY = """
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", range({count}))
def test_it(number):
    before = Path(__file__).with_name(f"seen-{{number}}")
    first = not before.exists()
    before.touch()
    assert not first, "the reason of the first"
    assert {passes}
"""


@pytest.mark.parametrize(("count", "passes", "code"), [(3, True, 0), (4, True, 1), (1, False, 1)])
def test_at_most_three_need_one_and_each_is_shown(tmp_path: Path, count: int, passes: bool, code: int) -> None:
    (tmp_path / "test_flaky.py").write_text(FLAKY.format(count=count, passes=passes))
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "conftest", "-n", "2", "--reruns", "1", "-c", os.devnull]
    ran = subprocess.run(
        [*words, f"--rootdir={tmp_path}", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (ran.returncode, ran.stdout.count("AssertionError: the reason of the first")) == (code, count), ran.stdout
    assert f"{count} failed at the first try" in ran.stdout

"""Who works with a data directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pandastack.errors import Conflict, HostUnfit
from pandastack.host import lock


def test_one_at_a_time_has_it_and_is_known(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert lock.holder(data) is None
    for _ in range(2):
        with lock.held(data):
            assert lock.holder(data) == os.getpid()
            with pytest.raises(Conflict, match="another pandastack runs"), lock.held(data):
                pass
            assert lock.holder(data) == os.getpid()
        assert lock.holder(data) is None, "what is written there does not count"


def test_one_that_does_not_say_who_it_is_is_not_guessed(tmp_path: Path) -> None:
    with lock.held(tmp_path):
        (tmp_path / "lock").write_text("")
        with pytest.raises(HostUnfit, match="does not say who uses it"):
            lock.holder(tmp_path)

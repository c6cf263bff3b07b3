"""What the benchmark reads of a runtime's own records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pandastack.bench import estimate, facts
from pandastack.bench.server import Server
from pandastack.errors import HostUnfit
from pandastack.sdk.client import Client

SMAPS = """\
55d0c8a00000-55d0c8b00000 rw-p 00000000 00:00 0                          [heap]
Rss:                1024 kB
Anonymous:          1024 kB
7f0000000000-7f0020000000 rw-p 00000000 fe:00 131                        /data/pool/states-qemu/base-0123/mem
Rss:               65536 kB
Private_Dirty:      6564 kB
Anonymous:          6416 kB
7f0030000000-7f0030001000 r--p 00000000 fe:00 132                        /usr/lib/libmem
Anonymous:             4 kB
"""


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(1, "http://127.0.0.1:1", "", Client(api_url="http://127.0.0.1:1", api_key="x"), tmp_path, tmp_path / "pool")


def _write(file: Path, **content: Any) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))


def test_a_saved_state_says_how_long_its_machine_stood_still(server: Server) -> None:
    parts = {"hold": 20.0, "stop": 1.5, "memory": 17.0, "let go": 5.0}
    _write(server.root / "snapshots/s1/machine.json", pause_ms=43.5, pause_parts_ms=parts, ahead_bytes=9, rest_bytes=3)
    pause = facts.pause(server, "s1")
    assert pause == facts.Pause(43.5, parts, 9, 3)
    assert pause.machine_ms == 18.5
    (server.root / "snapshots/s2").mkdir()
    assert facts.pause(server, "s2") is None


def test_the_restore_is_that_of_the_process(server: Server) -> None:
    parts = {"disk": 1.0, "memory": 0.5, "devices": 3.0}
    _write(server.data / "machines-qemu/m1/machine.json", pid=7, restore_parts_ms=dict.fromkeys(parts, 9.0))
    _write(server.data / "machines-qemu/m2/machine.json", pid=8, restore_parts_ms=parts)
    _write(server.data / "machines-qemu/m3/machine.json", pid=9)
    assert facts.restore_parts_ms(server, 8) == parts
    for pid in (9, 10):
        with pytest.raises(HostUnfit):
            facts.restore_parts_ms(server, pid)


def test_only_pages_of_the_saved_memory_count_as_written_by_the_guest() -> None:
    assert facts.pages_written(SMAPS) == 6416 // 4


def test_the_estimate_is_the_sum_of_its_parts_and_says_that_it_is_one() -> None:
    row = estimate.row("create", "qemu", [estimate.Part("a request", 2.25), estimate.Part("device state", 3.5)])
    assert (row.value, row.unit, row.p50_ms, row.met) == (5.75, "ms", None, None)
    assert estimate.LABEL in row.case
    assert row.note is not None
    assert all(words in row.note for words in (estimate.LABEL, "a request 2.25", "device state 3.50"))


def test_first_writes_cost_in_proportion() -> None:
    # A page fault takes tens of nanoseconds at least, and would have to be a thousand times as slow as it is to take a millisecond.
    assert 0.00005 < estimate.first_touch_ms(1000).ms / 1000 < 1

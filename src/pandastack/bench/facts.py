"""What a runtime writes down of its own work, read from the server's folders: what no client can see.

A microVM's saved state says how long its guest stood still for it, and the record of a running one what its restore took.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pandastack.bench.server import Server
from pandastack.errors import HostUnfit

PAGE_BYTES = 4096
_OF_THE_GUEST = ("hold", "let go")


@dataclass(frozen=True)
class Pause:
    """Milliseconds, and what of them was what; the memory that was copied before and in them."""

    total_ms: float
    parts_ms: Mapping[str, float]
    ahead_bytes: int
    rest_bytes: int

    @property
    def machine_ms(self) -> float:
        """Without stopping and continuing the guest's processes, which is the guest's work."""
        return sum(ms for name, ms in self.parts_ms.items() if name not in _OF_THE_GUEST)


def pause(server: Server, snapshot_id: str) -> Pause | None:
    """How long the machine stood still for a snapshot. None where its runtime does not say."""
    for file in (server.root / "snapshots" / snapshot_id).rglob("machine.json"):
        facts = json.loads(file.read_text())
        return Pause(facts["pause_ms"], facts["pause_parts_ms"], facts["ahead_bytes"], facts["rest_bytes"])
    return None


def restore_parts_ms(server: Server, pid: int) -> Mapping[str, float]:
    """What it took to restore the microVM with that process: `disk`, `memory` and `devices`. Raises HostUnfit."""
    for file in server.data.glob("machines-*/*/machine.json"):
        record = json.loads(file.read_text())
        if record["pid"] == pid and "restore_parts_ms" in record:
            parts: Mapping[str, float] = record["restore_parts_ms"]
            return parts
    raise HostUnfit("the machine does not say how it was restored")


def pages_written(smaps: str) -> int:
    """Of the text of /proc/PID/smaps: how many pages of the saved memory, a private mapping of a file `mem`, the guest has of its own."""
    kib, inside = 0, False
    for line in smaps.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.split()[-1].endswith("/mem")
        elif inside and line.startswith("Anonymous:"):
            kib += int(line.split()[1])
    return (kib << 10) // PAGE_BYTES


def pages_of(pid: int) -> int:
    return pages_written(Path(f"/proc/{pid}/smaps").read_text())

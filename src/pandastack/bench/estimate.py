"""What a create would take with KVM, where this machine can only emulate: the sum of the parts that no emulation is in.

An estimate, and told as one: the sum leaves out what nobody has measured, which is the guest's own code at the speed of a processor.
"""

from __future__ import annotations

import mmap
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pandastack.bench.figures import Row, percentile, quantity

_PAGES = 4096
_PAGE_BYTES = 4096
_SAMPLES = 20
LABEL = "estimate, not measured"


@dataclass(frozen=True)
class Part:
    """Milliseconds, and where they are from."""

    name: str
    ms: float


def row(case: str, runtime: str, parts: Sequence[Part]) -> Row:
    listed = " + ".join(f"{part.name} {part.ms:.2f}" for part in parts)
    note = f"{case}: {LABEL}; milliseconds: {listed}"
    return quantity("restore", f"{case} ({LABEL})", runtime, 1, sum(part.ms for part in parts), "ms", note=note)


def first_touch_ms(pages: int) -> Part:
    """The first write to so many pages of a file that is mapped privately and in memory: on this host, by this process."""
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        file.write(b"x" * (_PAGES * _PAGE_BYTES))
        file.flush()
        with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as memory:
            began = time.perf_counter()
            for offset in range(0, len(memory), _PAGE_BYTES):
                memory[offset] = 1
            each_ms = (time.perf_counter() - began) * 1000 / _PAGES
    return Part(f"first write to {pages} pages ({each_ms * 1000:.1f} us each, measured on the host)", pages * each_ms)


def program_ms() -> Part:
    """Starting and ending `/bin/true`."""
    took = []
    for _ in range(_SAMPLES):
        began = time.perf_counter()
        subprocess.run(["/bin/true"], check=True)
        took.append(time.perf_counter() - began)
    return Part("/bin/true (measured on the host)", percentile(took, 0.5) * 1000)

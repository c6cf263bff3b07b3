"""The contract of QEMU microVMs on KVM, in its short form, where this machine's own KVM runs no guest: see docs/howto/test-nested.md."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pandastack.host import kvm

RUNNER = Path(__file__).parents[1] / "nested" / "run.py"
UNFIT = 77


@pytest.mark.timeout(2400)
def test_it_holds_on_kvm_in_an_outer_machine() -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the outer machine has a CPU of AMD")
    if asyncio.run(kvm.check()).ok:
        pytest.skip("KVM works here: all of the contract is run over it")
    environment = {name: value for name, value in os.environ.items() if name != "PANDASTACK_FIRECRACKER"}
    command = [sys.executable, str(RUNNER), "--short", "--deadline-s", "1000"]
    ran = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2300)
    if ran.returncode == UNFIT:
        pytest.skip(ran.stderr.splitlines()[-1])
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-3000:]

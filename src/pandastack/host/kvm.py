"""Says whether /dev/kvm runs guests, by running one. Called by `doctor`.

The device node and the API prove nothing. Clouds offer nested kinds of KVM whose calls all succeed and on which a stock
kernel never starts: one of them (PVM, without hardware virtualisation) runs the guest's kernel mode in an instruction
emulator. There real mode, protected mode and even long mode with paging work, so a probe that stops there is
deceived; the first SSE instruction ends the machine, the way into user mode is a triple fault, and all else is ten to
five hundred times too slow, so that a kernel seems to hang while it unpacks itself.

So `kvm_probe.py` (see `kvm_guest.S`) does in small what a kernel does while it starts: real mode, protected mode, long
mode, SSE and CPUID and model-specific registers, a page fault that its handler repairs, user mode with system
calls and an exception, the local APIC's timer, and 40 million plain instructions. It runs in a process of its
own: a guest that never comes back is killed with it. What it proves is written in the answer; no kernel is booted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pandastack.host import kvm_probe
from pandastack.host.checks import Check, failed, passed, unsure

DEADLINE_S = 3.0
_REAP_S = 1.0
# The last step takes 20 ms on a CPU and 40 where a whole machine is emulated; an emulator in the kernel needs 9 s.
SLOW_CPU_MS = 1000.0
_DEVICE = Path("/dev/kvm")
_SPEED = "gVisor does not need it, and QEMU emulates without it; for microVMs at full speed"
_OTHER_MACHINE = f"{_SPEED} use a physical machine or one with real nested virtualisation"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the probe said before it ended or was killed. `cpu_s` is the CPU time of a killed one."""

    lines: list[dict[str, Any]]
    in_time: bool
    cpu_s: float = 0.0


async def hopeful(device: Path = _DEVICE) -> bool:
    """Whether a guest kernel may run on KVM here: False where there is none, or the probe has shown that guests do not run. 50 ms."""
    return await asyncio.to_thread(device.exists) and (await check(device)).ok is not False


async def check(device: Path = _DEVICE) -> Check:
    """True: a guest ran through every step. False: it did not. None: there is no KVM here, or nothing was proven."""
    if absent := _without(device):
        return absent
    return judge(await probe([sys.executable, "-I", "-S", kvm_probe.__file__]), kind=_module())


def _without(device: Path) -> Check | None:
    """The answer where there is nothing to run."""
    if not device.exists():
        hint = f"{_SPEED} enable virtualisation in the firmware or the cloud's settings, and load kvm_intel or kvm_amd"
        return unsure("kvm", "there is no /dev/kvm on this machine", hint=hint)
    if not os.access(device, os.R_OK | os.W_OK):
        hint = "run as root, or add the user to the group kvm"
        return unsure("kvm", "/dev/kvm is present but this user may not open it, so nothing is proven", hint=hint)
    if platform.machine() != "x86_64":
        hint = f"{_SPEED} boot a guest with QEMU to be sure"
        return unsure("kvm", "/dev/kvm is present, but not proven: the probe is for x86-64 only", hint=hint)
    return None


async def probe(command: list[str], *, deadline_s: float = DEADLINE_S) -> Outcome:
    """Run the probe program to its end or to the deadline; it is gone (or at least killed) afterwards."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    lines: list[dict[str, Any]] = []
    cpu_s, in_time = 0.0, True
    try:
        async with asyncio.timeout(deadline_s):
            if process.stdout is not None:
                async for line in process.stdout:
                    lines.append(json.loads(line))
            await process.wait()
    except TimeoutError:
        in_time, cpu_s = False, _cpu_seconds(process.pid)
    except ValueError:
        pass  # Cut off in the middle of a line; what came before counts.
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            # A process stuck in the kernel cannot be waited for; the doctor must not hang with it.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REAP_S):
                    await process.wait()
    return Outcome(lines=lines, in_time=in_time, cpu_s=cpu_s)


def judge(outcome: Outcome, *, kind: str | None = None) -> Check:
    """The answer, from what the probe said. `kind` is the kernel module behind the device, when known."""
    shown = f"/dev/kvm ({kind})" if kind else "/dev/kvm"
    last = outcome.lines[-1] if outcome.lines else {}
    steps_passed = [int(line["passed"]) for line in outcome.lines if "passed" in line]
    steps = kvm_probe.STEPS
    if stop := last.get("failed"):
        if stop["kind"] == "setup":
            return failed("kvm", f"{shown} is present but refuses to make a guest: {stop['detail']}", hint=_OTHER_MACHINE)
        return _broken(shown, max(steps_passed, default=0), str(stop["detail"]))
    if "done" in last:
        if last["cpu_ms"] > SLOW_CPU_MS:
            return _broken(shown, len(steps) - 1, f"40 million instructions took {last['cpu_ms'] / 1000:.1f} s, so they are emulated")
        detail = f"{shown} works: a small guest ran in every CPU mode, with faults, user mode and the timer (no kernel was booted)"
        return passed("kvm", detail)
    if not outcome.in_time and steps_passed:
        step = max(steps_passed)
        if step >= len(steps) - 1 and outcome.cpu_s * 1000 < SLOW_CPU_MS:
            # It did not get the CPU: that says something of the machine's load, and nothing of KVM.
            return _unproven(shown, "the machine was too busy for the probe")
        slow = f"40 million instructions took longer than {DEADLINE_S:g} s, so they are emulated"
        why = slow if step >= len(steps) - 1 else f"the guest did not come back within {DEADLINE_S:g} s"
        return _broken(shown, min(step, len(steps) - 1), why)
    return _unproven(shown, "the probe did not start in time" if not outcome.in_time else "the probe ended without an answer")


def _broken(shown: str, last: int, why: str) -> Check:
    detail = f"{shown} answers but does not run guests: it fails at {kvm_probe.STEPS[last]}, because {why}"
    return failed("kvm", detail, hint=_OTHER_MACHINE)


def _unproven(shown: str, why: str) -> Check:
    return unsure("kvm", f"{shown} is present but not proven: {why}", hint="run the doctor again when the machine is idle")


def _module() -> str | None:
    return next((name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if Path("/sys/module", name).exists()), None)


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0

"""KVM is called working only when a guest ran through every step, and a guest that hangs does not hang the doctor."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pandastack.host import kvm, kvm_probe
from pandastack.host.kvm import Outcome

SOURCE = Path(kvm_probe.__file__).with_name("kvm_guest.S")
ALL = [{"passed": step} for step in range(len(kvm_probe.STEPS) + 1)]


def judged(*lines: dict[str, Any], in_time: bool = True, cpu_s: float = 0.0) -> tuple[bool | None, str]:
    check = kvm.judge(Outcome(lines=list(lines), in_time=in_time, cpu_s=cpu_s))
    assert check.hint or check.ok
    return check.ok, check.detail


def test_kvm_works_only_when_every_step_passed():
    assert judged(*ALL, {"done": True, "cpu_ms": 37.0})[0] is True
    assert judged(*ALL)[0] is None
    assert judged()[0] is None


def test_an_instruction_that_cannot_run_names_the_step():
    failed = {"failed": {"kind": "run", "detail": "an instruction could not run"}}
    ok, detail = judged(*ALL[:4], failed)
    assert ok is False
    assert "fails at SSE" in detail


def test_a_refused_call_is_told_with_its_name():
    ok, detail = judged({"failed": {"kind": "setup", "detail": "KVM_CREATE_VM: Device or resource busy"}})
    assert ok is False
    assert "KVM_CREATE_VM" in detail


def test_a_guest_that_does_not_come_back_is_broken():
    ok, detail = judged(*ALL[:7], in_time=False)
    assert ok is False
    assert "local timer" in detail


@pytest.mark.parametrize(("cpu_s", "ok"), [(2.5, False), (0.1, None)])
def test_slow_is_broken_only_when_the_cpu_was_really_used(cpu_s: float, ok: bool | None):
    assert judged(*ALL[:8], in_time=False, cpu_s=cpu_s)[0] is ok


def test_an_emulator_that_finishes_is_still_an_emulator():
    ok, detail = judged(*ALL, {"done": True, "cpu_ms": 2100.0})
    assert ok is False
    assert "2.1 s" in detail


def test_a_probe_that_did_not_start_proves_nothing():
    assert judged(in_time=False)[0] is None


def test_no_device_is_no_failure(tmp_path: Path):
    check = asyncio.run(kvm.check(tmp_path / "kvm"))
    assert check.ok is None
    assert "no /dev/kvm" in check.detail


def test_a_hanging_probe_is_killed_at_the_deadline(tmp_path: Path):
    program = (
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
        "print('{\"passed\": 2}', flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    outcome = asyncio.run(kvm.probe([sys.executable, "-I", "-S", "-c", program], deadline_s=3.0))
    assert time.monotonic() - began < 20
    assert (outcome.lines, outcome.in_time) == ([{"passed": 2}], False)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_output_that_is_cut_off_proves_nothing():
    outcome = asyncio.run(kvm.probe([sys.executable, "-I", "-S", "-c", "print('{\"passed\": 1}'); print('{\"pas')"], deadline_s=30.0))
    assert kvm.judge(outcome).ok is None


@pytest.mark.skipif(not (shutil.which("as") and shutil.which("objcopy")), reason="no assembler on this machine")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the guest is x86-64")
def test_the_bytes_are_the_assembled_source(tmp_path: Path):
    subprocess.run(["as", "-o", tmp_path / "guest.o", SOURCE], check=True, timeout=60)
    subprocess.run(["objcopy", "-O", "binary", tmp_path / "guest.o", tmp_path / "guest.bin"], check=True, timeout=60)
    assert (tmp_path / "guest.bin").read_bytes() == kvm_probe.CODE


@pytest.mark.system
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm for this user")
def test_the_real_device_gets_the_same_answer_each_time_and_soon():
    began = time.monotonic()
    answers = [asyncio.run(kvm.check()) for _ in range(3)]
    assert time.monotonic() - began < 3 * (kvm.DEADLINE_S + 2)
    assert len({check.ok for check in answers}) == 1
    if Path("/sys/module/kvm_pvm").exists():
        assert answers[0].ok is False

"""The doctor's decisions and sentences with fakes; at the end a real run on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pandastack import standalone
from pandastack.errors import HostUnfit
from pandastack.host import __main__ as program
from pandastack.host import checks, doctor
from pandastack.host.backends import Found, Offer
from pandastack.host.doctor import Check, Report
from pandastack.host.runtimes.base import Probe
from pandastack.host.runtimes.fake import FakeRuntime
from pandastack.host.settings import HostSettings
from pandastack.wire.host import RuntimeInfo
from pandastack.wire.isolation import ORDER

DOCTOR = [sys.executable, "-m", "pandastack.host", "doctor", "--json"]
WORKS = RuntimeInfo(name="gvisor", works=True, version="20260601", isolation="gvisor")
FAILS = RuntimeInfo(name="gvisor", works=False, reason="runsc 20221219 is too old", hint="use a newer one")
EMULATES = RuntimeInfo(name="qemu", works=True, version="7.2", isolation="microvm", acceleration="tcg", reason="there is no /dev/kvm")
OLD = Probe(works=False, version="20221219.0", reason="runsc 20221219.0 is too old", hint="use a release of 20240729 or newer")
GOOD = Probe(works=True, version="20260601.0", key="k")


@pytest.fixture
def settings(tmp_path: Path) -> HostSettings:
    return HostSettings(data_dir=tmp_path / "data", cache_dir=tmp_path / "cache", run_dir=tmp_path / "run")


def tried(answers: dict[str, Probe | Exception]) -> tuple[RuntimeInfo, list[Check]]:
    async def prober(runsc: Path) -> tuple[Probe, str | None]:
        answer = answers[str(runsc)]
        if isinstance(answer, Exception):
            raise answer
        return answer, "2026" if answer.works else None

    return asyncio.run(doctor.try_runsc([Path(name) for name in answers], prober))


def test_auto_takes_the_runtime_that_works():
    assert doctor.choose([WORKS])[0] == "gvisor"


def test_auto_takes_none_and_repeats_the_reason():
    name, reason = doctor.choose([FAILS])
    assert name is None
    assert "too old" in reason


def test_auto_takes_the_strongest_that_works():
    def qemu(acceleration: str) -> RuntimeInfo:
        return RuntimeInfo(name="qemu", works=True, isolation="microvm", acceleration=acceleration)

    assert doctor.choose([WORKS, qemu("kvm")])[0] == "qemu"
    assert doctor.choose([WORKS, qemu("tcg")])[0] == "gvisor"
    assert doctor.choose([FAILS, qemu("tcg")])[0] == "qemu"


def test_auto_explains_its_order_and_minds_the_least_isolation():
    qemu = RuntimeInfo(name="qemu", works=True, isolation="microvm", acceleration="tcg")
    name, reason = doctor.choose([WORKS, qemu])
    assert (name, "the strongest of gvisor, qemu with tcg" in reason, ORDER in reason) == ("gvisor", True, True)
    assert doctor.choose([WORKS, qemu], "gvisor")[0] == "gvisor"
    name, reason = doctor.choose([WORKS, qemu], "qemu-kvm")
    assert (name, reason) == (None, "PANDASTACK_MIN_ISOLATION is qemu-kvm, and the strongest that works here is gvisor")


ROOT = checks.passed("root", "root")


def offer(found: Found | Exception) -> Offer:
    async def find() -> Found:
        if isinstance(found, Exception):
            raise found
        return found

    return Offer(name="qemu", isolation="microvm", own_kernel=True, acceleration="kvm", find=find)


def test_a_runtime_tells_what_a_boot_showed():
    made = FakeRuntime("qemu", isolation="microvm", acceleration="tcg")
    probe = Probe(works=True, version="7.2", key="k", reason="there is no /dev/kvm")
    found = asyncio.run(doctor.try_offer(offer((made, probe)), ROOT, Path("guest")))
    assert (found.works, found.version, found.acceleration, found.reason) == (True, "7.2", "tcg", "there is no /dev/kvm")
    assert found.capabilities == {"own_kernel": True}


@pytest.mark.parametrize(
    ("found", "reason", "hint"),
    [
        ((None, Probe(works=False, reason="QEMU is not installed", hint="apt install it")), "QEMU is not installed", "apt install it"),
        (HostUnfit("no guest kernel was fetched yet", hint="run setup"), "no guest kernel was fetched yet", "run setup"),
        (ValueError("strange"), "the probe itself failed: ValueError: strange", "please report it"),
    ],
)
def test_a_runtime_that_cannot_be_had_is_told(found: Found | Exception, reason: str, hint: str):
    told = asyncio.run(doctor.try_offer(offer(found), ROOT, Path("guest")))
    assert (told.works, told.reason, told.hint, told.acceleration) == (False, reason, hint, "kvm")


def test_a_runtime_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch):
    async def find() -> Found:
        await asyncio.sleep(60)
        raise AssertionError("nobody waits so long")

    monkeypatch.setattr(doctor, "TRY_TIMEOUT_S", 0.05)
    slow = Offer(name="qemu", isolation="microvm", own_kernel=True, find=find)
    told = asyncio.run(doctor.try_offer(slow, ROOT, Path("guest")))
    assert (told.works, told.reason, bool(told.hint)) == (False, "no result after 0.05 s", True)


def test_what_cannot_be_tried_is_not():
    trap = offer(RuntimeError("must not be tried"))
    for root, guest, said in ((checks.root(1000), Path("guest"), "not root"), (ROOT, None, "guest daemon")):
        told = asyncio.run(doctor.try_offer(trap, root, guest))
        assert (told.works, said in (told.reason or ""), bool(told.hint)) == (False, True, True)


def test_an_old_runsc_fails_with_its_remedy():
    runtime, found = tried({"/usr/bin/runsc": OLD})
    assert (runtime.works, runtime.reason, runtime.hint) == (False, OLD.reason, OLD.hint)
    assert [(check.ok, check.hint) for check in found] == [(False, OLD.hint)]


def test_the_next_runsc_is_tried_after_an_old_one():
    runtime, found = tried({"/usr/bin/runsc": OLD, "/cache/runsc": GOOD})
    assert (runtime.works, runtime.version) == (True, "20260601.0")
    assert [check.ok for check in found] == [None, True]
    assert "dialect 2026" in found[1].detail


def test_a_runsc_that_works_ends_the_search():
    _, found = tried({"/usr/bin/runsc": GOOD, "/cache/runsc": RuntimeError("must not be tried")})
    assert len(found) == 1


def test_a_probe_that_breaks_does_not_break_the_doctor():
    runtime, found = tried({"/usr/bin/runsc": ValueError("strange")})
    assert not runtime.works
    assert "strange" in found[0].detail


def test_no_runsc_says_how_to_get_one():
    runtime, found = tried({})
    assert found[0].ok is False
    assert "setup" in (found[0].hint or "")
    assert not runtime.works


def test_without_root_what_needs_it_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch, settings: HostSettings):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    report = asyncio.run(doctor.examine(settings))
    by_name = {check.name: check for check in report.checks}
    assert by_name["root"].ok is False
    assert "sudo" in (by_name["root"].hint or "")
    assert all(by_name[name].ok is None and "not root" in by_name[name].detail for name in ("cgroups", "disks", "reflink"))
    assert report.auto is None
    assert {runtime.name for runtime in report.runtimes} == {"gvisor", "qemu", "firecracker"}
    assert all(not runtime.works and runtime.hint for runtime in report.runtimes)
    assert not settings.data_dir.exists()


def test_root_without_capabilities_is_not_enough():
    check = checks.root(0, "Name:\tx\nCapEff:\t00000000a80425fb\n")
    assert check.ok is False
    assert "SYS_ADMIN" in check.detail
    assert checks.root(0, "CapEff:\t000001ffffffffff\n").ok is True


@pytest.mark.parametrize(
    ("release", "ok"), [("6.1.0-56-cloud-amd64", True), ("5.8.0", True), ("5.4.0-1", False), ("4.19", False), ("6.18rc1", True)]
)
def test_the_kernel_must_be_new_enough(release: str, ok: bool):
    assert checks.linux(release).ok is ok


def test_plain_facts():
    assert checks.architecture("riscv64").ok is False
    assert checks.python((3, 10, 2)).ok is False
    assert checks.memory("MemTotal: 2048000 kB\nMemAvailable: 100000 kB\nSwapTotal: 0 kB\n").ok is False
    assert "1000 MiB swap" in checks.memory("MemTotal: 2048000 kB\nMemAvailable: 1000000 kB\nSwapTotal: 1024000 kB\n").detail
    assert [checks.open_files(limit).ok for limit in (1024, 20000, 1048576)] == [False, None, True]


def test_too_little_disk_space_fails(tmp_path: Path):
    assert checks.disk_space(tmp_path / "not" / "yet", 1 << 40).ok is False


def test_a_pool_that_is_gone_fails_and_one_that_is_not_mounted_is_not_tried(tmp_path: Path):
    (tmp_path / "pool.json").write_text(json.dumps({"file": str(tmp_path / "pool.xfs"), "id": "x"}))
    gone = checks.reflink(tmp_path)
    assert (gone.ok, "is missing" in gone.detail) == (False, True)
    (tmp_path / "pool.xfs").write_bytes(b"XFSB")
    assert checks.reflink(tmp_path).ok is None
    (tmp_path / "pool.json").write_text(json.dumps({"file": None}))
    assert checks.reflink(tmp_path).ok is not False


def test_missing_tools_name_their_packages(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks.shutil, "which", lambda *_, **__: None)
    assert checks.network_tools().ok is None
    assert "nftables" in checks.network_tools().detail
    assert checks.user_namespaces().ok is None
    assert checks.template_tools(None, None).hint == "apt-get install mmdebstrap"
    assert "xfsprogs" in (checks.pool_tools().hint or "")


def test_a_check_that_raises_becomes_its_sentence(monkeypatch: pytest.MonkeyPatch, settings: HostSettings):
    def no_controller() -> Check:
        raise HostUnfit("this machine has no cgroup controller memory", hint="mount cgroup v2")

    monkeypatch.setattr(checks, "cgroup", no_controller)
    monkeypatch.setattr(checks, "linux", lambda: 1 / 0)
    monkeypatch.setattr(checks, "root", lambda: checks.passed("root", "root"))

    def no_disk(_: Path) -> Check:
        raise HostUnfit("this machine has no loop devices", hint="modprobe loop")

    monkeypatch.setattr(checks, "disks", no_disk)
    found = asyncio.run(doctor.preflight(settings))
    by_name = {check.name: check for check in found}
    assert (by_name["cgroups"].detail, by_name["cgroups"].hint) == ("this machine has no cgroup controller memory", "mount cgroup v2")
    assert "ZeroDivisionError" in by_name["linux"].detail
    with pytest.raises(HostUnfit) as caught:
        doctor.require(found)
    assert "no loop devices" in str(caught.value.hint)


def test_require_is_content_with_what_is_only_missing_for_later():
    doctor.require([checks.passed("root", "root"), checks.unsure("kvm", "there is no /dev/kvm")])


def test_the_text_shows_remedies_only_where_something_is_to_do():
    report = Report(
        checks=[
            checks.passed("linux", "Linux 6.1"),
            checks.failed("disks", "no loop devices", "modprobe loop"),
            checks.unsure("kvm", "none"),
        ],
        runtimes=[WORKS, EMULATES, FAILS.model_copy(update={"name": "other"})],
        auto="gvisor",
        auto_reason="it works",
    )
    assert doctor.render(report) == (
        "ok   linux: Linux 6.1\n"
        "FAIL disks: no loop devices\n"
        "       -> modprobe loop\n"
        "--   kvm: none\n"
        "ok   runtime gvisor: 20260601 works\n"
        "ok   runtime qemu: 7.2 works, with tcg (there is no /dev/kvm)\n"
        "--   runtime other: runsc 20221219 is too old\n"
        "       -> use a newer one\n"
        "auto: gvisor (it works)\n"
    )
    nothing = Report(checks=[], runtimes=[FAILS], auto=None, auto_reason="none")
    assert doctor.render(nothing).startswith("FAIL runtime gvisor")


@pytest.mark.parametrize(("runtime", "auto", "code"), [(WORKS, "gvisor", 0), (FAILS, None, 1)])
def test_the_exit_code_follows_the_runtimes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runtime: RuntimeInfo, auto: str | None, code: int
):
    async def examine(_: HostSettings) -> Report:
        # A broken KVM is told, and does not make a host unfit on which gVisor works.
        return Report(checks=[checks.failed("kvm", "broken", "x")], runtimes=[runtime], auto=auto, auto_reason="because")

    monkeypatch.setattr(doctor, "examine", examine)
    assert program.main(["doctor", "--json"]) == code
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == ["checks", "runtimes", "auto", "auto_reason"]
    assert list(shown["checks"][0]) == ["name", "ok", "detail", "hint"]


def test_a_wrong_setting_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name, value in (("PANDASTACK_RUNTIMES", "gvisor,xen"), ("PANDASTACK_MIN_ISOLATION", "much")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert program.main(["doctor"]) == 1
            assert name in capsys.readouterr().err
    # The server reads them too, and says the same before it does anything.
    monkeypatch.setenv("PANDASTACK_MIN_ISOLATION", "much")
    assert standalone.main(["--port", "0"]) == 1
    assert "the setting PANDASTACK_MIN_ISOLATION is wrong: Input should be 'none'" in capsys.readouterr().err


def traces() -> set[str]:
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if "pandastack-doctor" in line}
    groups = {str(path) for path in Path("/sys/fs/cgroup").rglob("*pandastack-doctor*")}
    return mounts | groups | {str(path) for path in Path("/tmp").glob("pandastack-doctor-*")}


@pytest.mark.system
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_real_run_tells_the_truth_and_leaves_nothing(tmp_path: Path):
    before = traces()
    environment = {**os.environ, "PANDASTACK_DATA_DIR": str(tmp_path / "data")}
    done = subprocess.run(DOCTOR, capture_output=True, text=True, timeout=110, check=False, env=environment)
    report = Report.model_validate_json(done.stdout)
    assert (done.returncode == 0) == (report.auto is not None) == any(runtime.works for runtime in report.runtimes)
    by_name = {runtime.name: runtime for runtime in report.runtimes}
    assert set(by_name) == {"gvisor", "qemu", "firecracker"}
    # A missing QEMU is told, and no failure of a host on which gVisor works.
    assert by_name["qemu"].works or by_name["qemu"].hint
    if by_name["qemu"].works:
        assert by_name["qemu"].acceleration in ("kvm", "tcg")
        assert by_name["qemu"].acceleration == "kvm" or by_name["qemu"].reason
    assert all(check.hint for check in report.checks if check.ok is False)
    assert {check.name: check.ok for check in report.checks}["disks"] is True
    assert traces() <= before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.system
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_terminated_run_leaves_nothing(tmp_path: Path):
    environment = {**os.environ, "PANDASTACK_DATA_DIR": str(tmp_path / "data")}
    before = traces()
    for delay_s in (0.1, 0.15, 0.2, 0.25, 0.3):
        running = subprocess.Popen(DOCTOR, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        try:
            running.wait(delay_s)
        except subprocess.TimeoutExpired:
            running.terminate()
        running.wait(60)
        assert list(tmp_path.iterdir()) == []
        assert traces() <= before

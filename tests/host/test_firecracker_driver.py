"""The parts of the Firecracker driver that need no guest: what it takes for usable, and what it does not open in a jail."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from pandastack.errors import HostUnfit, RuntimeFailed
from pandastack.host.runtimes.base import Limits, MachineId, MachineSpec, Pager, Probe
from pandastack.host.runtimes.cgroups import Hierarchy, MachineCgroup
from pandastack.host.runtimes.firecracker import command, driver, jail
from pandastack.host.runtimes.firecracker.command import Binaries
from pandastack.host.runtimes.firecracker.driver import FirecrackerRuntime
from pandastack.host.runtimes.firecracker.machine import FirecrackerMachine
from pandastack.host.storage import space


def programs(folder: Path, firecracker: str, jailer: str) -> Binaries:
    for name, said in (("firecracker", firecracker), ("jailer", jailer)):
        (folder / name).write_text(f"#!/bin/sh\necho '{said}'\n")
        (folder / name).chmod(0o755)
    return Binaries(firecracker=folder / "firecracker", jailer=folder / "jailer")


def runtime(
    folder: Path, firecracker: str, jailer: str | None = None, *, unfiltered: bool = True, pager: Pager | None = None
) -> FirecrackerRuntime:
    kernel = folder / "kernel"
    kernel.touch()
    return FirecrackerRuntime(
        programs(folder, firecracker, jailer if jailer is not None else firecracker.replace("Firecracker", "Jailer")),
        vmlinux=kernel,
        initramfs=kernel,
        digest="0",
        root=folder / "fc",
        group="pandastack-test",
        clone=space.clone,
        unfiltered=unfiltered,
        pager=pager,
    )


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A line for each time that a guest kernel would be booted, which works."""
    made: list[str] = []
    monkeypatch.setattr(FirecrackerRuntime, "_try", lambda self: made.append(self.version))
    monkeypatch.setattr(driver, "KVM", tmp_path)
    return made


def probed(made: FirecrackerRuntime) -> Probe:
    return asyncio.run(made.probe())


@pytest.mark.parametrize(
    ("firecracker", "jailer", "why"),
    [
        ("Firecracker v1.16.0", None, "1.16.0 is too old, the oldest that can be used is 1.16.1"),
        ("Firecracker v1.9.1", None, "too old"),
        ("Firecracker v1.17.0", "Jailer v1.16.1", "the jailer is of version 1.16.1, and Firecracker of 1.17.0"),
        ("QEMU emulator version 7.2", None, "is no Firecracker"),
        ("Firecracker v1.17.0", "nothing", "is no jailer"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_reason_and_a_remedy(
    tmp_path: Path, trials: list[str], firecracker: str, jailer: str | None, why: str
) -> None:
    probe = probed(runtime(tmp_path, firecracker, jailer))
    assert (probe.works, why in (probe.reason or ""), bool(probe.hint), trials) == (False, True, True, []), probe


@pytest.mark.parametrize(
    ("version", "remark"), [("1.16.1", None), ("1.17.0-dev", None), ("1.18.0", "newer than what was tested"), ("2.0.0", "newer")]
)
def test_what_can_be_used_says_what_is_to_be_said_of_it(tmp_path: Path, trials: list[str], version: str, remark: str | None) -> None:
    probe = probed(runtime(tmp_path, f"Firecracker v{version}"))
    assert (probe.works, probe.version, trials) == (True, version, [version])
    assert ("newer" in (probe.reason or "")) is (remark is not None)
    assert (remark or "") in (probe.reason or "")


def test_one_without_filters_is_refused_but_in_tests(tmp_path: Path, trials: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probed(runtime(tmp_path, "Firecracker v1.17.0", unfiltered=False))
    assert not probe.works
    assert "no seccomp filters" in (probe.reason or "")
    assert "for tests only" in (probed(runtime(tmp_path, "Firecracker v1.17.0")).reason or "")
    monkeypatch.setattr(command, "has_filters", lambda _: True)
    probe = probed(runtime(tmp_path, "Firecracker v1.17.0", unfiltered=False))
    assert (probe.works, probe.reason) == (True, None)


def test_without_kvm_nothing_is_tried(tmp_path: Path, trials: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "KVM", Path("/dev/nothing-here"))
    probe = probed(runtime(tmp_path, "Firecracker v1.17.0"))
    assert (probe.works, probe.reason, trials) == (False, "there is no /dev/nothing-here", [])


def test_a_boot_is_tried_once_for_what_stays_the_same(tmp_path: Path, trials: list[str]) -> None:
    made = runtime(tmp_path, "Firecracker v1.17.0")
    before = probed(made)
    assert probed(made) == before
    assert len(trials) == 1
    made._digest = "1"
    after = probed(made)
    assert (after.key, after.boots != before.boots) == (before.key, True), "what is saved does not boot"
    assert len(trials) == 2


def test_a_boot_that_fails_is_told_and_tried_again(tmp_path: Path, trials: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: FirecrackerRuntime) -> None:
        trials.append("")
        raise RuntimeFailed("a guest kernel does not boot with Firecracker", detail="no luck")

    monkeypatch.setattr(FirecrackerRuntime, "_try", fails)
    made = runtime(tmp_path, "Firecracker v1.17.0")
    for count in (1, 2):
        probe = probed(made)
        assert (probe.works, probe.hint, len(trials)) == (False, "no luck", count)


@pytest.fixture
def machine(tmp_path: Path) -> FirecrackerMachine:
    made = runtime(tmp_path, "Firecracker v1.17.0")
    for name in ("disk", "state"):
        (tmp_path / name).mkdir()
    limits = Limits(cpu=1, memory_mib=128, disk_mib=1)
    spec = MachineSpec(
        id=MachineId("m1"), rootfs=tmp_path / "root", guest=tmp_path, disk=tmp_path / "disk", state=tmp_path / "state", limits=limits
    )
    group = MachineCgroup(Hierarchy(version=2, mounts=dict.fromkeys(("memory", "cpu", "pids"), tmp_path / "none")), "g", "m1")
    machine = FirecrackerMachine(made, spec, group)
    machine._root.mkdir(parents=True)
    return machine


class TestJail:
    """What a Firecracker that was broken into may have put into the place of a file."""

    @pytest.mark.skipif(os.geteuid() != 0, reason="files of others need root")
    @pytest.mark.parametrize("what", ["link", "owned", "folder", "pipe"])
    def test_a_disk_that_is_not_roots_is_not_opened(self, machine: FirecrackerMachine, tmp_path: Path, what: str) -> None:
        place = machine._root / "disk"
        match what:
            case "link":
                (tmp_path / "secret").touch()
                place.symlink_to(tmp_path / "secret")
            case "owned":
                place.touch()
                os.chown(place, 70001, 70001)
            case "folder":
                place.mkdir()
            case "pipe":
                os.mkfifo(place)
        with pytest.raises((RuntimeFailed, OSError)):
            jail.open_disk(machine._root)

    @pytest.mark.parametrize("what", ["link", "folder", "pipe"])
    def test_a_saved_file_that_is_none_is_not_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        monkeypatch.setattr(jail, "_scratch", lambda _: tmp_path)
        place = tmp_path / "mem"
        match what:
            case "link":
                place.symlink_to("/etc/passwd")
            case "folder":
                place.mkdir()
            case "pipe":
                os.mkfifo(place)
        with pytest.raises((RuntimeFailed, OSError)):
            jail.saved_file(1, "mem")

    def test_it_is_roots_before_a_guest_runs_and_has_nothing_more_than_it_needs(self, machine: FirecrackerMachine) -> None:
        root = machine._root
        (root / "dev" / "net").mkdir(parents=True)
        (root / "s").mkdir(mode=0o700)
        for name in ("disk", "api.sock", "v.sock", "firecracker", "firecracker.pid", "state", "dev/kvm"):
            (root / name).touch()
        root.chmod(0o700)
        jail.lock(root)
        assert root.stat().st_mode & 0o777 == (root / "dev" / "net").stat().st_mode & 0o777 == 0o755
        assert (root / "s").stat().st_mode & 0o777 == 0o700
        jail.tidy(root)
        assert {path.name for path in root.iterdir()} == {"disk", "api.sock", "v.sock", "s"}

    def test_a_memory_file_gets_a_second_name_that_nobody_can_write(self, machine: FirecrackerMachine, tmp_path: Path) -> None:
        saved = tmp_path / "mem"
        saved.write_bytes(b"x")
        jail.share(saved, machine._root / "mem", space.clone)
        assert (machine._root / "mem").samefile(saved)
        assert saved.stat().st_mode & 0o777 == 0o444


class TestWhole:
    """When the next state must be saved whole."""

    @pytest.fixture
    def elsewhere(self) -> Iterator[Path]:
        folder = Path("/dev/shm") / f"pandastack-test-{os.getpid()}"
        folder.mkdir()
        yield folder
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()

    def test_what_was_saved_here_is_the_base_of_what_comes(self, machine: FirecrackerMachine, tmp_path: Path) -> None:
        saved = tmp_path / "saved"
        machine._memory.whole = True
        saved.write_bytes(b"x")
        machine._memory.share_as_base(saved)
        assert (machine.spec.disk / "base").samefile(saved)
        assert not machine._memory.whole

    def test_what_was_saved_on_another_file_system_is_not(self, machine: FirecrackerMachine, tmp_path: Path, elsewhere: Path) -> None:
        if elsewhere.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is one file system here")
        machine._memory.whole = True
        (elsewhere / "mem").write_bytes(b"x")
        machine._memory.share_as_base(elsewhere / "mem")
        assert machine._memory.whole
        assert not (machine.spec.disk / "base").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_pager_is_used_where_there_is_userfaultfd_and_else_that_is_said(
    tmp_path: Path, trials: list[str], monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setattr(driver, "has_userfaultfd", lambda: there)
    pager = cast(Pager, object())
    made = runtime(tmp_path, "Firecracker v1.17.0", pager=pager)
    assert made.pager is (pager if there else None)
    probe = probed(made)
    assert probe.works
    assert ("no userfaultfd" in (probe.reason or "")) is not there


@pytest.mark.parametrize(
    ("misc", "allowed", "has"),
    [("229 fuse\n257 userfaultfd\n", "0", True), ("229 fuse\n", "1\n", True), ("229 fuse\n", "0\n", False), (None, None, False)],
)
def test_userfaultfd_is_a_device_or_a_setting(tmp_path: Path, misc: str | None, allowed: str | None, has: bool) -> None:
    for name, text in (("misc", misc), ("allowed", allowed)):
        if text is not None:
            (tmp_path / name).write_text(text)
    assert driver.has_userfaultfd(tmp_path / "misc", tmp_path / "allowed") is has


def test_a_binary_that_is_not_there_is_said(tmp_path: Path, trials: list[str]) -> None:
    made = runtime(tmp_path, "Firecracker v1.17.0")
    made.binaries.firecracker.unlink()
    probe = probed(made)
    assert "cannot be started" in (probe.reason or "")
    with pytest.raises(HostUnfit):
        asyncio.run(made._versions())

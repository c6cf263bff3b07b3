"""The parts of the QEMU driver that need no guest: its processes, users, sockets and what it remembers of a probe."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pandastack.errors import HostUnfit, RuntimeFailed
from pandastack.host.runtimes import launch, microvms, users
from pandastack.host.runtimes.launch import Process
from pandastack.host.runtimes.qemu import driver
from pandastack.host.runtimes.qemu.driver import QemuRuntime, Verdict
from pandastack.host.storage import space


@pytest.fixture
def runtime(tmp_path: Path) -> QemuRuntime:
    binary = tmp_path / "qemu"
    binary.write_text("#!/bin/sh\necho QEMU emulator version 7.2.1\n")
    binary.chmod(0o755)
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"")
    return QemuRuntime(
        binary, vmlinux=kernel, initramfs=kernel, digest="d", root=tmp_path / "q", group="pandastack-test", clone=space.clone
    )


@pytest.fixture
def spawned() -> Iterator[list[Process]]:
    made: list[Process] = []
    yield made
    for process in made:
        process.kill()
        process.close()


def _spawn(spawned: list[Process], script: str) -> Process:
    spawned.append(Process.spawn("QEMU", ["sh", "-c", script], []))
    return spawned[-1]


class TestVerdicts:
    """Booting takes seconds, so what it showed is kept: for this boot of the host, this QEMU and this kernel."""

    @pytest.fixture
    def trials(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """KVM fails, emulation works; the list says what was tried."""
        made: list[str] = []

        def trial(_: QemuRuntime, acceleration: str) -> str | None:
            made.append(acceleration)
            return "no luck" if acceleration == "kvm" else None

        monkeypatch.setattr(QemuRuntime, "_trial", trial)
        monkeypatch.setattr(driver, "KVM", Path("/dev/null"))
        return made

    @pytest.mark.anyio
    async def test_kvm_is_tried_first_and_the_answer_says_why_not(self, runtime: QemuRuntime, trials: list[str]) -> None:
        probe = await runtime.probe()
        assert trials == ["kvm", "tcg"]
        assert (probe.works, runtime.acceleration, probe.version) == (True, "tcg", "7.2.1")
        assert probe.reason == "a guest kernel does not boot with kvm: no luck"
        again = await runtime.probe()
        assert trials == ["kvm", "tcg"]
        assert again == probe

    @pytest.mark.anyio
    async def test_it_is_tried_again_when_something_changed(
        self, runtime: QemuRuntime, trials: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = await runtime.probe()
        runtime._digest = "another"
        after = await runtime.probe()
        assert (after.key, after.boots != before.boots) == (before.key, True), "what is saved does not boot"
        assert len(trials) == 4
        monkeypatch.setattr(microvms, "boot_id", lambda: "another")
        await runtime.probe()
        assert len(trials) == 6

    @pytest.mark.anyio
    async def test_an_update_of_a_series_loses_nothing_that_was_saved(self, runtime: QemuRuntime, trials: list[str]) -> None:
        first = await runtime.probe()
        found = {}
        for version in ("7.2.2", "8.0.0"):
            runtime._binary.write_text(f"#!/bin/sh\necho QEMU emulator version {version}\n")
            found[version] = await runtime.probe()
        assert (found["7.2.2"].key, found["7.2.2"].bakes != first.bakes) == (first.key, True)
        assert found["8.0.0"].key != first.key

    @pytest.mark.anyio
    async def test_old_answers_are_removed(self, runtime: QemuRuntime, trials: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(microvms, "_VERDICTS_KEPT", 2)
        for number in range(4):
            runtime._digest = str(number)
            await runtime.probe()
        newest = {file.name for file in (runtime.root / "cache").glob("*.json")}
        assert len(newest) == 3, "two that are kept, and the new one"
        assert len(trials) == 8
        await runtime.probe()
        assert len(trials) == 8, "the newest answer is among them"

    @pytest.mark.anyio
    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"acceleration": "warp"}', '{"acceleration": "tcg", "more": 1}'])
    async def test_a_kept_answer_that_is_none_is_no_answer(self, runtime: QemuRuntime, trials: list[str], content: str) -> None:
        await runtime.probe()
        (kept,) = (runtime.root / "cache").glob("*.json")
        kept.write_text(content)
        await runtime.probe()
        assert len(trials) == 4
        assert json.loads(kept.read_text())["acceleration"] == "tcg"

    @pytest.mark.anyio
    async def test_a_failure_is_not_kept(self, runtime: QemuRuntime, trials: list[str]) -> None:
        runtime._accelerator = "kvm"
        for count in (1, 2):
            probe = await runtime.probe()
            assert not probe.works
            assert "no luck" in str(probe.reason)
            assert len(trials) == count

    def test_without_a_device_kvm_is_not_tried(self, runtime: QemuRuntime, trials: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(driver, "KVM", Path("/dev/nothing-here"))
        assert runtime._try_all() == Verdict(acceleration="tcg", why="there is no /dev/nothing-here")
        assert trials == ["tcg"]


class TestUsers:
    def test_each_machine_has_one_of_its_own_and_keeps_it(self, runtime: QemuRuntime) -> None:
        uids = {name: runtime.users.of(name) for name in ("a", "b", "c")}
        assert len(set(uids.values())) == 3
        assert all(0x7000_0000 <= uid <= 0x7FFF_FFFF for uid in uids.values())
        runtime.users.forget("a")
        assert uids == {name: runtime.users.of(name) for name in ("c", "b", "a")}

    def test_that_of_a_machine_of_an_earlier_life_is_taken(self, runtime: QemuRuntime) -> None:
        uid = runtime.users.of("a")
        runtime.users.forget("a")
        runtime.users.remember("other", uid)
        assert runtime.users.of("a") == uid + 1

    def test_two_are_never_equal(self, runtime: QemuRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(users, "_UIDS", 0x1F)
        assert len({runtime.users.of(str(number)) for number in range(20)}) == 20


def test_a_mended_kernel_restores_what_was_saved_and_another_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for release in ("6.1.0-25-amd64", "6.1.0-28-amd64", "6.12.1-amd64"):
        monkeypatch.setattr(platform, "release", lambda release=release: release)
        found.append(microvms.cpu())
    assert found[0] == found[1] != found[2]


class TestClock:
    def test_the_rate_is_the_kernels(self, tmp_path: Path) -> None:
        info = tmp_path / "cpuinfo"
        info.write_text("processor\t: 0\ncpu MHz\t\t: 800.000\nbogomips\t: 4599.99\n\nprocessor\t: 1\nbogomips\t: 1.00\n")
        assert microvms.tsc_khz(info) == 2_299_995
        info.write_text("cpu MHz\t\t: 2299.998\n")
        assert microvms.tsc_khz(info) == 2_299_998
        info.write_text("nothing")
        with pytest.raises(HostUnfit):
            microvms.tsc_khz(info)

    @pytest.mark.parametrize("kept", [None, "2300000", "broken", ""])
    def test_one_boot_measures_as_another_unless_it_is_another_machine(self, tmp_path: Path, kept: str | None) -> None:
        verdicts = microvms.Verdicts(tmp_path / "cache")
        if kept is not None:
            (tmp_path / "cache").mkdir()
            (tmp_path / "cache" / "tsc_khz").write_text(kept)
        assert [verdicts.steady_khz(khz) for khz in (2_300_000, 2_299_987, 2_300_500)] == [2_300_000] * 3
        assert [verdicts.steady_khz(khz) for khz in (2_400_000, 2_300_000)] == [2_400_000, 2_300_000]


class TestProcess:
    def test_what_it_says_is_bounded(self, spawned: list[Process]) -> None:
        process = _spawn(spawned, "echo first; yes | head -c 1000000; echo last >&2; exec sleep 60")
        _until(lambda: os.pread(process._log_fd or -1, 1, 16383) != b"\0")
        assert os.fstat(process._log_fd or -1).st_size == 16384
        assert process.last_words() == "y"
        assert not process.over

    def test_its_last_words(self, spawned: list[Process]) -> None:
        process = _spawn(spawned, "echo one; echo two >&2")
        _until(lambda: process.over)
        assert process.last_words() == "two"

    def test_it_is_found_again_by_pid_and_start(self, spawned: list[Process]) -> None:
        process = _spawn(spawned, "exec sleep 60")
        found = Process.found("QEMU", process.pid, process.started)
        assert found is not None
        found.close()
        assert Process.found("QEMU", process.pid, process.started + 1) is None
        process.kill()
        assert Process.found("QEMU", process.pid, process.started) is None

    def test_a_program_that_is_missing(self) -> None:
        with pytest.raises(RuntimeFailed):
            Process.spawn("QEMU", ["/nonexistent"], [])

    def test_it_lives_on_without_a_word(self, spawned: list[Process], recwarn: pytest.WarningsRecorder) -> None:
        process = Process.spawn("QEMU", ["sleep", "60"], [])
        pid, started = process.pid, process.started
        process.close()
        del process
        found = Process.found("QEMU", pid, started)
        assert found is not None
        spawned.append(found)
        assert not recwarn.list


class TestWatch:
    @pytest.fixture
    def console(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            yield ours, theirs

    def test_it_is_ready(self, spawned: list[Process], console: tuple[socket.socket, socket.socket]) -> None:
        process = _spawn(spawned, "exec sleep 60")
        threading.Timer(0.2, lambda: console[1].sendall(b"one\nready\n")).start()
        assert launch.watch(process, console[0], lambda said: "ready" in said, timeout_s=20) == (True, "one\nready\n")

    def test_it_hangs(self, spawned: list[Process], console: tuple[socket.socket, socket.socket]) -> None:
        process = _spawn(spawned, "exec sleep 60")
        console[1].sendall(b"one\n")
        assert launch.watch(process, console[0], lambda _: False, timeout_s=0.2) == (False, "one\n")

    def test_it_ends_and_its_last_words_are_heard(self, spawned: list[Process], console: tuple[socket.socket, socket.socket]) -> None:
        process = _spawn(spawned, "exec sleep 0.2")
        console[1].sendall(b"x" * 100_000 + b"\npanic\n")
        console[1].close()
        began = time.monotonic()
        came, said = launch.watch(process, console[0], lambda _: False, timeout_s=20)
        assert not came
        assert said.endswith("\npanic\n")
        assert len(said) <= 16384
        assert time.monotonic() - began < 10


class TestSockets:
    def test_only_this_user_can_connect(self, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("another user is needed")
        folder = Path("/tmp") / f"ps-{os.getpid()}"
        folder.mkdir(mode=0o755)
        try:
            with launch.listening(folder / "s"):
                assert (folder / "s").stat().st_mode & 0o777 == 0o600
                connect = f"import socket; socket.socket(socket.AF_UNIX).connect('{folder}/s')"
                as_other = ["setpriv", "--reuid", "1879048192", "--clear-groups", "/usr/bin/python3", "-c", connect]
                refused = subprocess.run(as_other, capture_output=True, text=True, check=False)
                assert "PermissionError" in refused.stderr
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(folder / "s"))
        finally:
            (folder / "s").unlink()
            folder.rmdir()


def _until(true: object) -> None:
    ends = time.monotonic() + 10
    while not true():  # type: ignore[operator]
        assert time.monotonic() < ends
        time.sleep(0.005)


def test_signals_of_the_daemon_do_not_reach_it(spawned: list[Process]) -> None:
    process = _spawn(spawned, "exec sleep 60")
    assert os.getsid(process.pid) == process.pid, "so a Ctrl-C in the daemon's terminal ends no sandbox"
    assert signal.SIGINT not in _ignored(process.pid)


def _ignored(pid: int) -> set[int]:
    mask = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn"))
    return {number for number in range(1, 65) if int(mask.split()[1], 16) >> (number - 1) & 1}

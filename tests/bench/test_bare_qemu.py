"""What QEMU is told by hand, and the little of the guest protocol that is spoken by hand."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pandastack.bench.guest_session import GuestSession
from pandastack.bench.qemu_machines import Kit, Memory, command_line
from pandastack.errors import HostUnfit
from pandastack.host.runtimes.base import Limits
from pandastack.host.runtimes.qemu import command
from pandastack.wire import guest as wire
from pandastack.wire.guest import Kind

LIMITS = Limits(cpu=1, memory_mib=512, disk_mib=2048)
FOLDER = Path("/work")
BAKED = Path("/baked/memory")
SPAN = {"first": 0, "next": 0}
STARTED = {"id": "p", "pid": 5, "started_unix_ns": 1, "pty": False, "stdout": SPAN, "stderr": SPAN}
EXIT = {"id": "p", "signal": None, "reason": "exited", "stdout_bytes": 0, "stderr_bytes": 0, "duration_ms": 1}


def _kit(acceleration: command.Acceleration = "tcg") -> Kit:
    some = Path("/some")
    return Kit(
        binary=Path("/usr/bin/qemu"), acceleration=acceleration, vmlinux=some, initramfs=some, root=some, folder=FOLDER, limits=LIMITS
    )


def _after(words: Sequence[str], option: str) -> list[str]:
    return [words[index + 1] for index, word in enumerate(words) if word == option]


def test_the_machine_that_is_baked_fits_the_one_that_is_restored() -> None:
    baked = command_line(_kit(), LIMITS, FOLDER, memory=Memory(file=BAKED, share=True), incoming=None)
    waiting = command_line(_kit(), LIMITS, FOLDER, memory=Memory(file=BAKED, share=False), incoming="defer")
    for option in ("-M", "-accel", "-cpu", "-m", "-smp", "-device", "-global", "-blockdev"):
        assert _after(baked, option) == _after(waiting, option)
    assert "memory-backend-file,id=ram0,size=512M,mem-path=/baked/memory,share=on" in baked
    assert "memory-backend-file,id=ram0,size=512M,mem-path=/baked/memory,share=off" in waiting
    assert _after(waiting, "-incoming") == ["defer"]
    assert ("-kernel" in waiting, "-kernel" in baked, "-incoming" in baked) == (False, True, False)


@pytest.mark.parametrize("acceleration", ["kvm", "tcg"])
def test_the_machine_by_hand_has_the_devices_of_ours(acceleration: command.Acceleration) -> None:
    """Else the two would not boot, save and load the same."""
    size = command.Size.of(LIMITS)
    ours = command.qemu(Path("/usr/bin/qemu"), acceleration, size, channel_fd=4, control_fd=5, disk_fd=6)
    by_hand = command_line(_kit(acceleration), LIMITS, FOLDER, memory=None, incoming="defer")
    for option in ("-M", "-cpu", "-m", "-smp", "-global"):
        assert _after(by_hand, option) == _after(ours, option)
    assert [one.split(",")[0] for one in _after(by_hand, "-device")] == [one.split(",")[0] for one in _after(ours, "-device")]
    assert json.loads(_after(by_hand, "-blockdev")[0])["cache"] == json.loads(_after(ours, "-blockdev")[0])["cache"]


class Daemon(threading.Thread):
    """The guest's end: greets, and answers each call with the frames that it was given for its method."""

    def __init__(self, address: Path, answers: dict[str, list[tuple[Kind, int, Any]]]) -> None:
        super().__init__()
        self.asked: list[dict[str, Any]] = []
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(address))
        self._listener.listen()

    def run(self) -> None:
        with self._listener, self._listener.accept()[0] as peer, peer.makefile("rwb") as stream:
            assert stream.read(len(wire.MAGIC)) == wire.MAGIC
            hello, _ = self._frame(stream)
            greeting = {"version": 1, "nonce": hello["nonce"], "build": "x", "pid": 1, "sealed": False, "live": 0}
            stream.write(b"what an older session left" + wire.MAGIC)
            self._send(stream, hello["tag"], Kind.HELLO_OK, 0, 0, greeting)
            while True:
                asked, number = self._frame(stream)
                if not asked:
                    return
                self.asked.append(asked)
                if asked["method"] not in self._answers:
                    return  # It dies.
                self._send(stream, hello["tag"], Kind.EVENT, 0, 0, {"type": "activity", "live": 1})
                for kind, flags, body in self._answers[asked["method"]]:
                    self._send(stream, hello["tag"], kind, flags, number, body)

    def _frame(self, stream: Any) -> tuple[dict[str, Any], int]:
        head = stream.read(12)
        if len(head) < 12:
            return {}, 0
        body = stream.read(int.from_bytes(head[8:], "big") + 4)[:-4]
        return json.loads(body), int.from_bytes(head[4:8], "big")

    def _send(self, stream: Any, tag: int, kind: Kind, flags: int, number: int, body: Any) -> None:
        stream.write(b"".join(wire.encode(kind, number, json.dumps(body).encode(), tag, flags=flags)))
        stream.flush()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    answers: dict[str, list[tuple[Kind, int, Any]]] = {
        "process.run": [(Kind.REPLY, 0, STARTED), (Kind.END, 0, EXIT | {"exit_code": 3})],
        "process.start": [(Kind.REPLY, wire.FLAG_LAST, STARTED)],
        "bench.ping": [(Kind.ERROR, 0, {"code": "unknown_method", "message": "no"})],
    }
    made = Daemon(tmp_path / "channel", answers)
    made.start()
    yield made
    made.join(10)
    assert not made.is_alive()


def test_a_program_is_run_to_its_end_by_hand(daemon: Daemon, tmp_path: Path) -> None:
    with GuestSession(tmp_path / "channel") as guest:
        guest.start("/bin/sleep", "1")
        assert guest.run("/bin/false") == 3
        guest.ping()
    assert [asked["method"] for asked in daemon.asked] == ["process.start", "process.run", "bench.ping"]
    assert daemon.asked[1]["params"] == {"argv": ["/bin/false"]}


def test_a_daemon_that_dies_is_no_result(daemon: Daemon, tmp_path: Path) -> None:
    del daemon._answers["process.run"]
    with GuestSession(tmp_path / "channel") as guest, pytest.raises(HostUnfit):
        guest.run("/bin/true")


def test_nobody_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(HostUnfit):
        GuestSession(tmp_path / "channel")

"""Laying a file over the memory of another process, tried on a real one that waits in a system call, as QEMU does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.qemu import mapping

SIZE = 1 << 20
_CHILD = """
import ctypes, mmap, os, sys
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:4] = b"mine"
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    if line == "spin\\n":
        while not os.path.exists(sys.argv[2]):
            x = sum(range(2000))
    else:
        memory[8:12] = b"wrote"[:4]
    print(bytes(memory[:12]).hex(), flush=True)
"""


class Child:
    def __init__(self, fd: int, mark: Path) -> None:
        argv = [sys.executable, "-c", _CHILD, str(SIZE), str(mark)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[fd])
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.address = int(self.stdout.readline())

    def say(self, line: str) -> None:
        self.stdin.write(line + "\n")
        self.stdin.flush()

    def hear(self) -> bytes:
        return bytes.fromhex(self.stdout.readline())


def _map(one: Child, fd: int) -> None:
    with mapping.in_its_name(one.process.pid) as call:
        mapping.map_file(call, fd, one.address, SIZE)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    file = tmp_path / "saved"
    file.write_bytes(b"saved content".ljust(SIZE, b"\0"))
    file.chmod(0o400)
    return file


@pytest.fixture
def child(saved: Path, tmp_path: Path) -> Iterator[tuple[Child, int]]:
    if os.geteuid() != 0:
        pytest.skip("only root may do this to another process")
    fd = os.open(saved, os.O_RDONLY)
    made = Child(fd, tmp_path / "mark")
    yield made, fd
    made.process.kill()
    made.process.communicate()
    os.close(fd)


def test_a_file_is_private_memory_of_another_process(child: tuple[Child, int], saved: Path) -> None:
    one, fd = child
    before = saved.read_bytes()
    _map(one, fd)
    one.say("write")
    assert one.hear() == b"saved cowrot", "it goes on where it waited, reads the file, and writes over it"
    assert saved.read_bytes() == before
    status = Path(f"/proc/{one.process.pid}/status").read_text()
    assert "TracerPid:\t0" in status


def test_one_that_is_busy_is_waited_for(child: tuple[Child, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, fd = child
    one.say("spin")
    _map(one, fd)
    (tmp_path / "mark").touch()
    assert one.hear().startswith(b"saved")


def test_what_the_kernel_refuses_is_said_and_leaves_the_process_alone(child: tuple[Child, int]) -> None:
    one, _ = child
    with pytest.raises(RuntimeFailed) as refused:
        _map(one, 999)
    assert "Bad file descriptor" in refused.value.fields["detail"]
    one.say("write")
    assert one.hear() == b"mine\0\0\0\0wrot"


def test_a_process_that_is_gone(child: tuple[Child, int]) -> None:
    one, fd = child
    one.process.send_signal(signal.SIGKILL)
    one.process.wait()
    with pytest.raises(RuntimeFailed) as refused:
        _map(one, fd)
    assert "ptrace" in str(refused.value.hint)

"""A machine's saved memory: how it gets into the jail, here or not here yet, and what the next state is laid over."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.firecracker import jail, memory, sockets
from pandastack.host.runtimes.firecracker.attach import attach
from pandastack.host.runtimes.firecracker.client import MemoryBackend
from pandastack.host.runtimes.firecracker.memory import SavedMemory
from pandastack.host.storage import space

PAGE, USER = 4096, 0x7000_0001
SIZE = 4 * PAGE


class Pager:
    """Keeps what it is handed."""

    def __init__(self) -> None:
        self.files: list[tuple[Path, int]] = []
        self.listener: socket.socket | None = None

    def page(self, file: Path, listener: socket.socket, user: int) -> None:
        self.files.append((file, user))
        self.listener = listener.dup()


@pytest.fixture
def saved(tmp_path: Path) -> SavedMemory:
    (tmp_path / "jail").mkdir()
    return SavedMemory(tmp_path, SIZE, space.clone)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of a jail whose path is longer than that of a socket may be."""
    made = tmp_path / "jail" / ("x" * 100)
    made.mkdir(parents=True)
    return made


@pytest.fixture
def link(tmp_path: Path) -> Path:
    """A memory that is not here, as a state has it: four pages, each with its number."""
    (tmp_path / "shown").write_bytes(b"".join(bytes([number]) * PAGE for number in range(4)))
    made = tmp_path / "mem"
    made.symlink_to(tmp_path / "shown")
    return made


def written(saved: SavedMemory, into: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, *, whole: bool = False) -> bytes:
    """The memory of a state of which Firecracker has saved that content at the second page."""
    scratch = into.with_suffix(".scratch")
    scratch.mkdir()
    with (scratch / "mem").open("wb") as file:
        file.seek(PAGE)
        file.write(content)
        file.truncate(SIZE)
    monkeypatch.setattr(jail, "_scratch", lambda _: scratch)
    saved.write(1, into, whole=whole)
    return into.read_bytes()


def test_one_that_is_here_gets_another_name_and_is_the_base_of_the_next(
    saved: SavedMemory, root: Path, link: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = link.readlink()
    assert saved.put(here, root, pid=7, user=USER, pager=Pager()) == MemoryBackend(backend_path="mem")
    assert (root / "mem").samefile(here)
    saved.loaded(root)
    assert (tmp_path / "base").samefile(here)
    assert saved.source == here
    here.unlink()
    assert written(saved, tmp_path / "next", monkeypatch, b"a" * PAGE) == bytes(PAGE) + b"a" * PAGE + b"\2" * PAGE + b"\3" * PAGE
    saved.forget()
    assert not (tmp_path / "base").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="a socket of another user needs root")
def test_a_pager_is_handed_the_file_and_a_socket_that_only_the_machines_user_reaches(saved: SavedMemory, root: Path, link: Path) -> None:
    pager = Pager()
    assert saved.put(link, root, pid=1, user=USER, pager=pager) == MemoryBackend(backend_path="pages.sock", backend_type="Uffd")
    assert pager.files == [(link.readlink(), USER)]
    assert pager.listener is not None
    found = (root / "pages.sock").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (USER, USER, 0o600)
    with pager.listener, sockets.connect(root / "pages.sock", 5) as connection, pager.listener.accept()[0] as accepted:
        connection.sendall(b"x")
        assert accepted.recv(1) == b"x"
    jail.tidy(root)
    assert list(root.iterdir()) == []


def test_without_a_pager_it_is_shown_in_the_jail(saved: SavedMemory, root: Path, link: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attached: list[tuple[Path, int, str]] = []
    monkeypatch.setattr(memory, "attach", lambda *arguments: attached.append(arguments))
    assert saved.put(link, root, pid=7, user=USER, pager=None) == MemoryBackend(backend_path="mem")
    assert attached == [(link.readlink(), 7, "mem")]
    assert (root / "mem").stat().st_size == 0, "there is a file to show it in the place of"
    saved.loaded(root)
    jail.tidy(root)
    assert list(root.iterdir()) == []
    assert saved.source == link.readlink()


def test_one_that_cannot_be_shown_is_said_with_a_remedy(
    saved: SavedMemory, root: Path, link: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr(memory, "attach", fails)
    with pytest.raises(RuntimeFailed) as failed:
        saved.put(link, root, pid=7, user=USER, pager=None)
    assert "userfaultfd" in (failed.value.hint or "")


def test_a_state_of_it_is_laid_over_the_file_and_the_next_one_over_that(
    saved: SavedMemory, root: Path, link: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "attach", lambda *_: None)
    saved.put(link, root, pid=7, user=USER, pager=None)
    saved.loaded(root)
    first = written(saved, tmp_path / "first", monkeypatch, b"a" * PAGE)
    assert first == bytes(PAGE) + b"a" * PAGE + b"\2" * PAGE + b"\3" * PAGE
    saved.share_as_base(tmp_path / "first")
    link.readlink().unlink()
    second = written(saved, tmp_path / "second", monkeypatch, b"b" * PAGE)
    assert second == bytes(PAGE) + b"b" * PAGE + b"\2" * PAGE + b"\3" * PAGE


def test_a_state_that_must_be_whole_is_laid_over_nothing(
    saved: SavedMemory, root: Path, link: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "attach", lambda *_: None)
    saved.put(link, root, pid=7, user=USER, pager=None)
    saved.loaded(root)
    assert written(saved, tmp_path / "whole", monkeypatch, b"a" * PAGE, whole=True) == bytes(PAGE) + b"a" * PAGE + bytes(2 * PAGE)


@pytest.fixture
def elsewhere() -> Iterator[int]:
    """A process in a mount namespace of its own."""
    process = subprocess.Popen(["unshare", "--mount", "sh", "-c", "echo there; exec sleep 60"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid
    process.kill()
    process.communicate()


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount needs root")
def test_a_file_is_shown_to_that_process_alone_and_only_while_its_name_is_there(elsewhere: int, tmp_path: Path) -> None:
    source, place = Path(f"/dev/shm/pandastack-test-{os.getpid()}"), tmp_path / "mem"
    source.write_bytes(b"shown")
    place.touch()
    try:
        attach(source, elsewhere, str(place).lstrip("/"))
        there = Path(f"/proc/{elsewhere}/root{place}")
        assert (there.read_bytes(), place.read_bytes()) == (b"shown", b"")
        assert str(place) not in Path("/proc/self/mountinfo").read_text()
        with there.open("rb") as opened:
            place.unlink()
            assert opened.read() == b"shown", "who has it keeps it"
        ends = time.monotonic() + 5
        while str(place) in Path(f"/proc/{elsewhere}/mountinfo").read_text():
            assert time.monotonic() < ends
        assert not there.exists()
    finally:
        source.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount needs root")
def test_what_cannot_be_shown_is_an_error_and_leaves_this_process_where_it_was(elsewhere: int, tmp_path: Path) -> None:
    (tmp_path / "source").touch()
    before = Path("/proc/self/ns/mnt").readlink()
    with pytest.raises(FileNotFoundError):
        attach(tmp_path / "nothing", elsewhere, "mem")
    with pytest.raises(FileNotFoundError):
        attach(tmp_path / "source", elsewhere, f"{str(tmp_path).lstrip('/')}/nowhere")
    assert Path("/proc/self/ns/mnt").readlink() == before

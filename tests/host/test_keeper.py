"""The keeper: descriptors by name, in a small process that outlives the daemon and not what it keeps."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pandastack.host.keeper import Keeper

pytestmark = pytest.mark.usefixtures("no_leaks")


def wait_for(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 15
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.005)


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "k" / "keeper.sock"


@pytest.fixture
def keeper(address: Path) -> Iterator[Keeper]:
    made = Keeper(address)
    yield made
    made.retain(set())
    made.close()
    wait_for(lambda: not address.parent.exists())


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            continue  # The test closed it.


def process(address: Path) -> int:
    """The pid of the keeper that listens there."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(address) in words:
            return int(entry.parent.name)
    raise AssertionError("no keeper")


def test_copies_come_back_in_order(keeper: Keeper, pipe: tuple[int, int]) -> None:
    keeper.put("one", list(pipe))
    read, write = keeper.get("one")
    os.write(write, b"hi")
    assert os.read(pipe[0], 10) == b"hi"
    os.write(pipe[1], b"ho")
    assert os.read(read, 10) == b"ho"
    os.close(read)
    os.close(write)


def test_an_unknown_name_has_nothing(keeper: Keeper) -> None:
    assert keeper.get("nobody") == []
    keeper.drop("nobody")


def test_a_second_put_replaces_the_first(keeper: Keeper, pipe: tuple[int, int]) -> None:
    read, write = os.pipe()
    keeper.put("one", [write])
    os.close(write)
    keeper.put("one", [pipe[1]])
    assert os.read(read, 1) == b"", "the older one was closed"
    os.close(read)


def test_retain_drops_all_others(keeper: Keeper, pipe: tuple[int, int]) -> None:
    for name in ("a", "b", "c"):
        keeper.put(name, [pipe[0]])
    keeper.retain({"b", "z"})
    kept = {name: keeper.get(name) for name in ("a", "b", "c")}
    assert [name for name, fds in kept.items() if fds] == ["b"]
    os.close(kept["b"][0])


def test_it_goes_on_without_a_daemon_as_long_as_it_keeps_something(address: Path, pipe: tuple[int, int]) -> None:
    first = Keeper(address)
    first.put("one", [pipe[0]])
    pid = process(address)
    first.close()
    time.sleep(0.1)
    second = Keeper(address)
    os.close(second.get("one")[0])
    assert process(address) == pid
    second.drop("one")
    second.close()
    wait_for(lambda: not address.parent.exists())


def test_a_dead_keeper_is_replaced(keeper: Keeper, address: Path, pipe: tuple[int, int]) -> None:
    keeper.put("one", [pipe[0]])
    os.kill(process(address), signal.SIGKILL)
    assert keeper.get("one") == [], "what it kept is lost, and that is said by an empty list"
    keeper.put("two", [pipe[0]])
    os.close(keeper.get("two")[0])


def test_a_keeper_that_hangs_is_an_error_and_not_a_hang(
    keeper: Keeper, address: Path, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper.put("one", [pipe[0]])
    pid = process(address)
    real = socket.socket.settimeout
    monkeypatch.setattr(socket.socket, "settimeout", lambda self, value: real(self, value and 0.2))
    keeper.close()
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(OSError):  # noqa: PT011 - whichever it is
            keeper.get("one")
    finally:
        os.kill(pid, signal.SIGCONT)


def test_threads_may_share_it(keeper: Keeper, pipe: tuple[int, int]) -> None:
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(50):
            keeper.put(name, [pipe[0]])
            found = keeper.get(name)
            if len(found) != 1:
                wrong.append(name)
            for fd in found:
                os.close(fd)
        keeper.drop(name)

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nobody_else_may_speak_to_it(keeper: Keeper, address: Path, pipe: tuple[int, int]) -> None:
    keeper.put("one", [pipe[0]])
    assert address.stat().st_mode & 0o777 == 0o600
    assert address.parent.stat().st_mode & 0o777 == 0o700


def test_garbage_does_not_end_it(keeper: Keeper, address: Path, pipe: tuple[int, int]) -> None:
    keeper.put("one", [pipe[0]])
    pid = process(address)
    for garbage in (b"{", b"[]", b"\xff", b"{}", b'{"op": "dance"}'):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(2)
            stranger.connect(str(address))
            stranger.send(garbage)
            stranger.recv(100)
    os.close(keeper.get("one")[0])
    assert process(address) == pid


def test_one_that_nobody_asks_anything_ends_by_itself(address: Path) -> None:
    address.parent.mkdir()
    program = f"from pandastack.host import keeper; keeper._FIRST_CLIENT_S = 0.05; keeper.serve({str(address)!r})"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
    assert not address.parent.exists()

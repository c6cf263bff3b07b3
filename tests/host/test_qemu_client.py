"""QMP as the driver speaks it: with a real QEMU whose CPU never runs, and with servers that misbehave."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.qemu import client
from pandastack.host.runtimes.qemu.client import Connection, Gone, Refused, TimedOut

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
Serve = Callable[[Callable[[socket.socket], None]], Path]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """A server that does with its one connection what a test says."""
    threads: list[threading.Thread] = []
    listener = socket.socket(socket.AF_UNIX)

    def start(work: Callable[[socket.socket], None]) -> Path:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)

        def run() -> None:
            with listener.accept()[0] as connection:
                work(connection)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[0].start()
        return tmp_path / "s"

    yield start
    for thread in threads:
        thread.join(5)
    listener.close()


def _answering(*answers: bytes) -> Callable[[socket.socket], None]:
    """Greets, answers the negotiation and then each command with one of `answers`; NUMBER is the command's."""

    def work(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        file = connection.makefile("rb")
        for answer in (b'{"return": {}, "id": NUMBER}\n', *answers):
            request = json.loads(file.readline())
            connection.sendall(answer.replace(b"NUMBER", str(request["id"]).encode()))
        file.readline()

    return work


def test_answers_and_events_are_told_apart(serve: Serve) -> None:
    answer = b'{"event": "A", "data": 1}\n{"return": 7, "id": NUMBER}\n{"event": "B", "data": 2}\n'
    with client.opened(serve(_answering(answer))) as qmp:
        assert qmp.call("x") == 7
        assert qmp.event("B", until=time.monotonic() + 5)["data"] == 2


def test_an_event_of_an_earlier_call_is_found(serve: Serve) -> None:
    with client.opened(serve(_answering(b'{"event": "A", "data": 1}\n{"event": "B"}\n{"return": 7, "id": NUMBER}\n'))) as qmp:
        qmp.call("x")
        assert qmp.event("A", "B", until=time.monotonic() + 5)["data"] == 1
        with pytest.raises(TimedOut):
            qmp.event("A", until=time.monotonic() + 0.05)


def test_a_refusal_has_its_reason(serve: Serve) -> None:
    with client.opened(serve(_answering(b'{"error": {"class": "X", "desc": "no such thing"}, "id": NUMBER}\n'))) as qmp:
        with pytest.raises(Refused) as refused:
            qmp.call("x")
        assert refused.value.fields["detail"] == "no such thing"


@pytest.mark.parametrize("garbage", [b"garbage\n", b"[1]\n", b"\xff\xfe\n", b"[" * 5000 + b"\n", b'{"QM": 1}\n'], ids=range(5))
def test_garbage_is_no_greeting(serve: Serve, garbage: bytes) -> None:
    with pytest.raises(RuntimeFailed):
        Connection(serve(lambda connection: connection.sendall(garbage)))


def test_a_line_without_end_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MOST_LINE_BYTES", 1 << 16)

    def flood(connection: socket.socket) -> None:
        try:
            while True:
                connection.sendall(b"x" * 65536)
        except OSError:
            pass

    with pytest.raises(RuntimeFailed) as failed:
        Connection(serve(flood))
    assert "without end" in failed.value.message


def test_events_without_end_are_bounded_in_memory_and_in_time(serve: Serve) -> None:
    def flood(connection: socket.socket) -> None:
        _answering()(connection)
        try:
            while True:
                connection.sendall(b'{"event": "A"}\n' * 1000)
        except OSError:
            pass

    with client.opened(serve(flood)) as qmp:
        began = time.monotonic()
        with pytest.raises(TimedOut):
            qmp.call("x", timeout_s=0.3)
        assert time.monotonic() - began < 5
        assert len(qmp._events) <= 1000


def test_silence_has_an_end(serve: Serve) -> None:
    done = threading.Event()
    with pytest.raises(TimedOut):
        Connection(serve(lambda _: done.wait(5) and None), timeout_s=0.1)
    done.set()


def test_an_end_is_noticed(serve: Serve) -> None:
    def work(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        connection.recv(1000)
        connection.sendall(b'{"return": {}, "id": 1}\n')
        connection.recv(1000)

    with client.opened(serve(work)) as qmp, pytest.raises(Gone):
        qmp.call("x")


def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(Gone):
        Connection(tmp_path / "nothing")


class TestRealQemu:
    @pytest.fixture
    def address(self, tmp_path: Path) -> Iterator[Path]:
        binary = shutil.which("qemu-system-x86_64")
        if binary is None:
            pytest.skip("no qemu-system-x86_64")
        address = tmp_path / "q"
        words = ["-M", "microvm", "-S", "-nodefaults", "-display", "none", "-qmp", f"unix:{address},server=on,wait=off"]
        process = subprocess.Popen([binary, *words], stdin=subprocess.DEVNULL)
        ends = time.monotonic() + 20
        while not address.exists():
            assert time.monotonic() < ends
            assert process.poll() is None
            time.sleep(0.01)
        yield address
        process.kill()
        process.wait()

    def test_commands_and_refusals(self, address: Path) -> None:
        for _ in range(3):  # One connection after the other.
            with client.opened(address) as qmp:
                assert qmp.call("query-status")["status"] == "prelaunch"
                with pytest.raises(Refused) as refused:
                    qmp.call("no-such-command")
                assert "no-such-command" in refused.value.fields["detail"]

    def test_a_descriptor_arrives(self, address: Path, tmp_path: Path) -> None:
        with client.opened(address) as qmp, (tmp_path / "file").open("wb") as file:
            number = qmp.call("add-fd", {"fdset-id": 3}, fd=file.fileno())["fd"]
            assert isinstance(number, int)
            (known,) = qmp.call("query-fdsets")
            assert (known["fdset-id"], known["fds"][0]["fd"]) == (3, number)
            with pytest.raises(Refused):
                qmp.call("getfd", {"fdname": "x"})

    def test_its_end_comes_as_an_event_and_then_as_one(self, address: Path) -> None:
        with client.opened(address) as qmp:
            qmp.call("quit")
            assert qmp.event("SHUTDOWN", until=time.monotonic() + 10)["data"]["reason"] == "host-qmp-quit"
            with pytest.raises(Gone):
                qmp.event("NOTHING", until=time.monotonic() + 10)

"""The control socket, against a server that does everything a runsc might: refuse, hang, die, talk garbage."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.gvisor import client
from pandastack.host.runtimes.gvisor.cli import CliControl
from pandastack.host.runtimes.gvisor.client import CHECKPOINT_FILES, SocketControl

pytestmark = pytest.mark.usefixtures("no_leaks")


class Server:
    """Answers each connection with what the test scripted, and remembers requests and the names of files sent along."""

    def __init__(self, address: Path) -> None:
        self.asked: list[dict[str, Any]] = []
        self.files: list[list[str]] = []
        self.answer: Callable[[socket.socket], None] = self.ok
        self._listener = socket.socket(socket.AF_UNIX)
        directory = os.open(address.parent, os.O_PATH)
        self._listener.bind(f"/proc/self/fd/{directory}/{address.name}")
        os.close(directory)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @staticmethod
    def ok(connection: socket.socket) -> None:
        connection.sendall(b'{"success": true, "result": {"a": 1}}')

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                data, fds, _, _ = socket.recv_fds(connection, 65536, 8)
                self.files.append([Path(os.readlink(f"/proc/self/fd/{fd}")).name for fd in fds])  # noqa: PTH115
                for fd in fds:
                    os.close(fd)
                with contextlib.suppress(ValueError):
                    self.asked.append(json.loads(data))
                with contextlib.suppress(OSError):
                    self.answer(connection)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "c.sock"


@pytest.fixture
def server(address: Path) -> Iterator[Server]:
    made = Server(address)
    yield made
    made.close()


def call(address: Path, timeout_s: float = 5) -> Any:
    return client.call(address, "A.B", {"x": 1}, timeout_s=timeout_s)


def test_a_call_and_its_result(server: Server, address: Path) -> None:
    assert call(address) == {"a": 1}
    assert server.asked == [{"method": "A.B", "arg": {"x": 1}}]


def test_a_result_in_many_pieces(server: Server, address: Path) -> None:
    def pieces(connection: socket.socket) -> None:
        text = json.dumps({"success": True, "result": {"a}": ["}"] * 30_000, "b": {}}})
        for at in range(0, len(text), 7000):
            connection.sendall(text[at : at + 7000].encode())

    server.answer = pieces
    assert len(call(address)["a}"]) == 30_000


def test_a_refusal_says_method_and_reason_and_not_too_much(server: Server, address: Path) -> None:
    server.answer = lambda connection: connection.sendall(json.dumps({"success": False, "err": "no" * 5000}).encode())
    with pytest.raises(RuntimeFailed, match=r"refused A\.B") as refused:
        call(address)
    assert len(refused.value.fields["detail"]) == 2000


def test_a_hang_ends_at_the_deadline(server: Server, address: Path) -> None:
    done = threading.Event()
    server.answer = lambda _: done.wait(10) and None
    began = time.monotonic()
    with pytest.raises(RuntimeFailed, match="did not answer"):
        call(address, 0.2)
    assert time.monotonic() - began < 5
    done.set()


def test_an_answer_that_drips_for_ever_ends_at_the_deadline(server: Server, address: Path) -> None:
    def drip(connection: socket.socket) -> None:
        ends = time.monotonic() + 3
        while time.monotonic() < ends:
            connection.sendall(b" ")
            time.sleep(0.02)

    server.answer = drip
    began = time.monotonic()
    with pytest.raises(RuntimeFailed):
        call(address, 0.3)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("answer", [b"", b'{"success": tr', b"\xff\xff}", b"[1]", b"null"])
def test_a_death_or_garbage_is_an_end_of_the_sandbox(server: Server, address: Path, answer: bytes) -> None:
    server.answer = lambda connection: connection.sendall(answer)
    with pytest.raises(RuntimeFailed, match="ended during"):
        call(address)


def test_a_huge_answer_is_not_read_to_its_end(server: Server, address: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MAX_REPLY_BYTES", 1 << 20)
    server.answer = lambda connection: connection.sendall(b" " * (4 << 20))
    with pytest.raises(RuntimeFailed):
        call(address)


def test_nobody_there(address: Path) -> None:
    with pytest.raises(RuntimeFailed, match="ended during"):
        call(address)
    address.write_text("no socket")
    with pytest.raises(RuntimeFailed, match="ended during"):
        call(address)


@pytest.mark.parametrize("length", [50, 99, 100, 107, 108, 150, 250])
def test_a_path_of_any_length_is_reached(tmp_path: Path, length: int) -> None:
    folder = tmp_path / ("d" * max(1, length - len(str(tmp_path)) - len("/c.sock") - 1))
    folder.mkdir()
    server = Server(folder / "c.sock")
    try:
        assert call(folder / "c.sock") == {"a": 1}
    finally:
        server.close()


class TestDialects:
    """Each known dialect says the calls that its releases know."""

    @pytest.mark.parametrize(("dialect", "first"), [("2024", "Network.CreateLinksAndRoutes"), ("2026", "containerManager.SetNetworkArgs")])
    def test_start_gives_a_loopback_and_nothing_else(self, server: Server, address: Path, dialect: Any, first: str) -> None:
        SocketControl(address, "m1", dialect).start()
        assert [one["method"] for one in server.asked] == [first, "containerManager.StartRoot"]
        links = server.asked[0]["arg"]
        assert [link["Name"] for link in links["LoopbackLinks"]] == ["lo"]
        assert links["FDBasedLinks"] == links["XDPLinks"] == []
        assert server.asked[1]["arg"] == "m1"

    @pytest.mark.parametrize("dialect", ["2024", "2026"])
    def test_a_saved_state_goes_along_as_files(self, server: Server, address: Path, tmp_path: Path, dialect: Any) -> None:
        control = SocketControl(address, "m1", dialect)
        control.checkpoint(tmp_path, resume=True)
        control.restore(tmp_path)
        assert server.asked[0]["method"] == "containerManager.Checkpoint"
        assert server.asked[0]["arg"]["Resume"] is True
        assert server.asked[0]["arg"]["key"] is None
        assert server.asked[-1]["method"] == "containerManager.Restore"
        assert server.files == [list(CHECKPOINT_FILES), [], list(CHECKPOINT_FILES)]
        assert {(tmp_path / name).stat().st_mode & 0o777 for name in CHECKPOINT_FILES} == {0o600}

    def test_a_state_is_never_written_over_another(self, server: Server, address: Path, tmp_path: Path) -> None:
        (tmp_path / CHECKPOINT_FILES[1]).write_text("older")
        with pytest.raises(FileExistsError):
            SocketControl(address, "m1", "2026").checkpoint(tmp_path, resume=False)
        assert server.asked == []

    def test_pause_and_resume(self, server: Server, address: Path) -> None:
        control = SocketControl(address, "m1", "2026")
        control.pause()
        control.resume()
        assert [one["method"] for one in server.asked] == ["containerManager.Pause", "containerManager.Resume"]


class TestCommandLine:
    """The fallback: runsc's verbs."""

    @pytest.fixture
    def control(self, tmp_path: Path) -> CliControl:
        program = tmp_path / "runsc"
        program.write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n[ -e {tmp_path}/fail ] && exit 3\n[ -e {tmp_path}/hang ] && exec sleep 30\nexit 0\n'
        )
        program.chmod(0o755)
        return CliControl([str(program), "--root=/r"], "m1")

    def test_verbs(self, control: CliControl, tmp_path: Path) -> None:
        control.start()
        control.pause()
        control.resume()
        control.checkpoint(Path("/s"), resume=True)
        control.restore(Path("/s"))
        assert (tmp_path / "said").read_text().splitlines() == [
            "--root=/r start m1",
            "--root=/r pause m1",
            "--root=/r resume m1",
            "--root=/r checkpoint --image-path=/s --compression=none --leave-running m1",
            "--root=/r restore --detach --image-path=/s m1",
        ]

    def test_a_verb_that_fails_is_typed(self, control: CliControl, tmp_path: Path) -> None:
        (tmp_path / "fail").touch()
        with pytest.raises(RuntimeFailed, match="runsc start failed") as failed:
            control.start()
        assert failed.value.fields["exit_code"] == 3

    def test_a_verb_that_hangs_ends(self, control: CliControl, tmp_path: Path) -> None:
        (tmp_path / "hang").touch()
        with pytest.raises(RuntimeFailed, match="did not finish"):
            control._call("start", timeout_s=0.2)

    def test_a_runsc_that_went_away_is_typed(self, control: CliControl, tmp_path: Path) -> None:
        (tmp_path / "runsc").unlink()
        with pytest.raises(RuntimeFailed):
            control.start()

"""Much data passes through the server; it never holds much of it."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from pandastack.sdk.sandboxes import Sandbox

from .conftest import MakeSandbox
from .servers import Server, forget_peak, peak_of, until

MIB = 1 << 20
FILE_MIB = 256
PRINTED = 512 * MIB


@pytest.fixture
def sandbox(make: MakeSandbox) -> Sandbox:
    return make(disk_mb=2048)


def grown(server: Server, base: int) -> float:
    return (peak_of(server.pid) - base) / MIB


def test_a_large_file_goes_in_and_comes_back_unchanged(server: Server, sandbox: Sandbox, tmp_path: Path) -> None:
    block, digest = os.urandom(MIB), hashlib.sha256()
    with (tmp_path / "up").open("wb") as file:
        for number in range(FILE_MIB):
            piece = number.to_bytes(8, "big") + block[8:]
            file.write(piece)
            digest.update(piece)
    base = forget_peak(server.pid)
    sandbox.filesystem.upload(tmp_path / "up", "/var/large")
    assert sandbox.exec("sha256sum < /var/large").stdout.split()[0] == digest.hexdigest()
    sandbox.filesystem.download("/var/large", tmp_path / "down")
    with (tmp_path / "down").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == digest.hexdigest()
    assert grown(server, base) < 64


def test_a_flood_of_output_arrives_whole(server: Server, sandbox: Sandbox) -> None:
    base = forget_peak(server.pid)
    with sandbox.stream(f"head -c {PRINTED} /dev/zero") as output:
        assert sum(len(event.data) for event in output) == PRINTED
    assert output.exit_code == 0
    assert grown(server, base) < 64


def test_a_blocking_answer_is_cut_with_a_mark_and_the_rest_can_be_read(server: Server, sandbox: Sandbox) -> None:
    base = forget_peak(server.pid)
    result = sandbox.exec("seq 1 400000")
    whole = "".join(f"{number}\n" for number in range(1, 400001))
    assert result.truncated
    assert result.stdout_total == len(whole)
    head, mark = result.stdout[:MIB], result.stdout[MIB:]
    assert head == whole[:MIB]
    assert "output cut here" in mark
    process = sandbox.processes.get(result.process_id or "")
    rest = process.read_output("stdout", MIB, 100_000)
    assert rest.data.decode() == whole[rest.offset : rest.offset + len(rest.data)]
    assert rest.offset + len(rest.data) > MIB
    huge = sandbox.exec(f"head -c {PRINTED} /dev/zero")
    assert (huge.stdout_total, huge.truncated) == (PRINTED, True)
    assert grown(server, base) < 64


def open_stream(server: Server, sandbox: Sandbox, command: str, query: str = "") -> socket.socket:
    """A client with small buffers that decides itself when it reads."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.connect(("127.0.0.1", server.port))
    body = httpx2.Request("POST", server.url, json={"cmd": command}).content.decode()
    connection.sendall(
        f"POST /v1/sandboxes/{sandbox.id}/exec/stream{query} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    connection.settimeout(60)
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    return connection


FLOOD = "i=0; while true; do head -c 1M /dev/zero; i=$((i+1)); echo $i > /var/written; done"


def written(sandbox: Sandbox) -> int:
    return int(sandbox.exec("cat /var/written 2>/dev/null || echo 0").stdout or 0)


@pytest.fixture
def flood(server: Server, sandbox: Sandbox) -> Iterator[socket.socket]:
    with open_stream(server, sandbox, FLOOD, "?on_disconnect=kill") as connection:
        yield connection


def test_a_slow_reader_slows_the_command_down(server: Server, sandbox: Sandbox, flood: socket.socket) -> None:
    base = forget_peak(server.pid)
    time.sleep(2)
    before = written(sandbox)
    time.sleep(3)
    # Whatever is between the two is full by now; a command that ran free would write hundreds of MiB a second.
    assert written(sandbox) - before <= 4
    assert before < 128
    assert grown(server, base) < 64
    for _ in range(2000):
        flood.recv(65536)
    until(lambda: written(sandbox) > before + 4, "it goes on when it is read")


def test_a_client_that_leaves_is_forgotten_and_its_command_ended_if_it_asked_so(server: Server, sandbox: Sandbox) -> None:
    connection = open_stream(server, sandbox, FLOOD, "?on_disconnect=kill")
    until(lambda: written(sandbox) > 0, "it writes")
    connection.close()
    until(lambda: not [process for process in sandbox.processes.list() if process.running], "the command is ended")


def test_a_command_goes_on_without_the_client_that_started_it(server: Server, sandbox: Sandbox) -> None:
    connection = open_stream(server, sandbox, "echo began; while [ ! -e /var/go ]; do sleep 0.1; done; echo over; touch /var/done")
    connection.close()
    sandbox.filesystem.write("/var/go", b"")
    until(lambda: sandbox.filesystem.exists("/var/done"), "the command went on to its end")
    process = sandbox.processes.list()[0]
    assert process.read_output().data == b"began\nover\n"


def test_an_upload_that_breaks_off_leaves_no_half_file(server: Server, sandbox: Sandbox) -> None:
    sandbox.filesystem.write("/var/file", b"old")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            f"PUT /v1/sandboxes/{sandbox.id}/fs?path=/var/file HTTP/1.1\r\nHost: localhost\r\n"
            f"Authorization: Bearer {server.token}\r\nContent-Length: {8 * MIB}\r\n\r\n".encode()
        )
        connection.sendall(b"x" * MIB)
        time.sleep(0.5)
    time.sleep(1)
    assert sandbox.filesystem.read("/var/file") == b"old"
    assert [entry.name for entry in sandbox.filesystem.listdir("/var") if entry.type == "file"] == ["file"]

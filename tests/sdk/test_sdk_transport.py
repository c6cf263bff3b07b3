"""The real transport against sockets that misbehave."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.sdk.async_sandboxes import AsyncSandbox
from pandastack.sdk.client import AsyncClient, Client
from pandastack.sdk.sandboxes import Sandbox
from pandastack.sdk.testing import event
from pandastack.wire.sandboxes import SandboxView

Respond = Callable[[bytes, socket.socket], bool]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-process-id: p1\r\ntransfer-encoding: chunked\r\n\r\n"


class RawServer:
    """Hands the head of every request to `respond`, which writes what it likes; True keeps the connection."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.connections = 0
        self.respond: Respond = lambda head, peer: False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer:
            keep = True
            while keep:
                data = b""
                while b"\r\n\r\n" not in data:
                    piece = peer.recv(65536)
                    if not piece:
                        return
                    data += piece
                head, _, body = data.partition(b"\r\n\r\n")
                length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
                left = length - len(body)
                while left > 0 and (piece := peer.recv(min(left, 1 << 20))):
                    left -= len(piece)
                while b"chunked" in head.lower() and not body.endswith(b"0\r\n\r\n"):
                    body += peer.recv(65536)
                self.heads.append(head)
                keep = self.respond(head, peer)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def raw() -> Iterator[RawServer]:
    server = RawServer()
    yield server
    server.close()


@pytest.fixture
def sandbox(raw: RawServer) -> Iterator[Sandbox]:
    with Client(raw.url, "pds_k", timeout=2) as client:
        yield Sandbox(client, SandboxView(id="s1"))


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def whole(body: bytes, *, keep: bool = False) -> bytes:
    connection = "keep-alive" if keep else "close"
    return f"HTTP/1.1 200 OK\r\nconnection: {connection}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def dropping(head: bytes, peer: socket.socket) -> bool:
    """Two bytes of output per connection, then a hard break; from offset 4 on the end."""
    if b"POST" in head:
        peer.sendall(HEAD + chunk(event("stdout", b64="YWI=", offset=0)))
    elif b"stdout_offset=2" in head:
        peer.sendall(HEAD + chunk(event("stdout", b64="Y2Q=", offset=2)) + chunk(b"event: stdout\nda"))
    else:
        peer.sendall(HEAD + chunk(event("exit", exit_code=5)) + b"0\r\n\r\n")
        return True
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    return False


def test_a_stream_survives_connections_that_are_cut(raw: RawServer, sandbox: Sandbox) -> None:
    raw.respond = dropping
    stream = sandbox.stream("x")
    assert b"".join(item.data for item in stream) == b"abcd"
    assert stream.exit_code == 5
    assert len(raw.heads) == 3


@pytest.mark.anyio
async def test_an_async_stream_survives_connections_that_are_cut(raw: RawServer) -> None:
    raw.respond = dropping
    async with AsyncClient(raw.url, "pds_k", timeout=2) as client:
        stream = AsyncSandbox(client, SandboxView(id="s1")).stream("x")
        assert b"".join([item.data async for item in stream]) == b"abcd"
        assert stream.exit_code == 5


def test_connections_are_kept_and_headers_are_sent(raw: RawServer, sandbox: Sandbox) -> None:
    def respond(head: bytes, peer: socket.socket) -> bool:
        peer.sendall(whole(b'{"stdout":"","stderr":"","exit_code":0,"duration_ms":0}', keep=True))
        return True

    raw.respond = respond
    for _ in range(5):
        sandbox.exec("true")
    assert raw.connections == 1
    head = raw.heads[0].lower()
    assert b"authorization: bearer pds_k" in head
    assert b"user-agent: pandastack-py/" in head


def test_an_exec_on_a_cut_connection_is_not_repeated(raw: RawServer, sandbox: Sandbox) -> None:
    with pytest.raises(errors.APIConnectionError, match="broke off") as caught:
        sandbox.exec("true")
    assert caught.value.maybe_sent is True
    assert len(raw.heads) == 1


def test_a_refused_connection_is_a_typed_error_that_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with Client(url, "pds_k", max_create_retry_seconds=0) as client:
        with pytest.raises(ConnectionError, match="cannot reach the API") as caught:
            client.sandboxes.create()
        assert caught.value.maybe_sent is False
        assert "pandastack up" in (caught.value.hint or "")


def test_a_download_that_breaks_off_leaves_the_old_file(raw: RawServer, sandbox: Sandbox, tmp_path: Path) -> None:
    def respond(head: bytes, peer: socket.socket) -> bool:
        peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this")
        return False

    raw.respond = respond
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(errors.APIConnectionError):
        sandbox.filesystem.download("/x", target)
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_upload_announces_its_length_and_a_pipe_does_not(raw: RawServer, sandbox: Sandbox, tmp_path: Path) -> None:
    def respond(head: bytes, peer: socket.socket) -> bool:
        peer.sendall(whole(b'{"path":"/x","bytes":3000000}'))
        return False

    raw.respond = respond
    source = tmp_path / "source"
    source.write_bytes(bytes(3_000_000))
    sandbox.filesystem.upload(source, "/x")
    sandbox.filesystem.write("/x", iter([b"a", b"b"]))
    with source.open("rb") as file:
        file.seek(1_000_000)
        sandbox.filesystem.write("/x", file)
    assert b"content-length: 3000000" in raw.heads[0].lower()
    assert b"transfer-encoding: chunked" in raw.heads[1].lower()
    assert b"content-length: 2000000" in raw.heads[2].lower()


def test_a_silent_server_is_an_error_in_time(raw: RawServer) -> None:
    hold = threading.Event()

    def respond(head: bytes, peer: socket.socket) -> bool:
        hold.wait(5)
        return False

    raw.respond = respond
    with Client(raw.url, "pds_k", timeout=0.2) as client, pytest.raises(errors.APIConnectionError, match="did not answer in time"):
        client.tokens.create("x")
    hold.set()


def test_raw_bytes_of_a_path_arrive_unchanged(raw: RawServer, sandbox: Sandbox) -> None:
    def respond(head: bytes, peer: socket.socket) -> bool:
        peer.sendall(whole(b"x"))
        return False

    raw.respond = respond
    sandbox.filesystem.read(b"/\xff\xfe a+b%41?")
    assert raw.heads[0].split()[1] == b"/v1/sandboxes/s1/fs?path=/%FF%FE%20a%2Bb%2541%3F"


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(raw: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def respond(head: bytes, peer: socket.socket) -> bool:
        peer.sendall(whole(b"[]"))
        return False

    raw.respond = respond
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with Client(raw.url, "pds_k") as client:
        assert client.tokens.list() == []

"""What is said to Firecracker's API, and what is made of its answers; with a small server in its place that hands out prepared ones."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.firecracker import client, sockets
from pandastack.host.runtimes.firecracker.client import (
    Api,
    BootSource,
    Drive,
    Gone,
    MachineConfig,
    MemoryBackend,
    NetworkOverride,
    Refused,
    SnapshotCreate,
    SnapshotLoad,
    TimedOut,
    Vsock,
    VsockOverride,
)

DONE = b"HTTP/1.1 204 No Content\r\n\r\n"


def answer(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Server:
    """Answers each request with the next of `answers`, and remembers what was asked. A callable gets the socket instead."""

    def __init__(self, place: Path) -> None:
        self.asked: list[tuple[str, str, object]] = []
        self.answers: list[bytes | Callable[[socket.socket], None]] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(place))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as requests:
            while line := requests.readline().decode():
                method, path, _ = line.split(" ")
                size = 0
                while (header := requests.readline().decode().strip().lower()) != "":
                    size = int(header.partition(":")[2]) if header.startswith("content-length:") else size
                body = requests.read(size)
                self.asked.append((method, path, json.loads(body) if body else None))
                said = self.answers.pop(0)
                if callable(said):
                    said(connection)
                    return
                connection.sendall(said)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        assert not self._thread.is_alive()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "api.sock")
    yield made
    made.close()


@pytest.fixture
def api(server: Server, tmp_path: Path) -> Iterator[Api]:
    made = Api(tmp_path / "api.sock")
    yield made
    made.close()


def test_each_call_has_the_shape_that_firecracker_documents(server: Server, api: Api) -> None:
    load = SnapshotLoad(snapshot_path="state", mem_backend=MemoryBackend(backend_path="mem"), track_dirty_pages=True)
    other = SnapshotLoad(
        snapshot_path="state",
        mem_backend=MemoryBackend(backend_path="uffd.sock", backend_type="Uffd"),
        track_dirty_pages=False,
        resume_vm=True,
        network_overrides=[NetworkOverride(iface_id="eth0", host_dev_name="tap1")],
        vsock_override=VsockOverride(uds_path="other.sock"),
        clock_realtime=True,
    )
    server.answers += [DONE] * 10
    api.configure(MachineConfig(vcpu_count=2, mem_size_mib=256, track_dirty_pages=True))
    api.boot_source(BootSource(kernel_image_path="vmlinux", initrd_path="initramfs", boot_args="quiet"))
    api.drive(Drive(drive_id="d0", path_on_host="disk"))
    api.vsock(Vsock(guest_cid=3, uds_path="v.sock"))
    api.entropy()
    api.start()
    api.look_at_drive("d0", "disk")
    api.save(SnapshotCreate(snapshot_type="Diff", snapshot_path="s/state", mem_file_path="s/mem"), timeout_s=5)
    api.load(load, timeout_s=5)
    api.load(other, timeout_s=5)
    drive = {"drive_id": "d0", "path_on_host": "disk", "is_root_device": False, "is_read_only": False}
    assert server.asked == [
        ("PUT", "/machine-config", {"vcpu_count": 2, "mem_size_mib": 256, "track_dirty_pages": True}),
        ("PUT", "/boot-source", {"kernel_image_path": "vmlinux", "initrd_path": "initramfs", "boot_args": "quiet"}),
        ("PUT", "/drives/d0", drive),
        ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v.sock"}),
        ("PUT", "/entropy", {}),
        ("PUT", "/actions", {"action_type": "InstanceStart"}),
        ("PATCH", "/drives/d0", {"drive_id": "d0", "path_on_host": "disk"}),
        ("PUT", "/snapshot/create", {"snapshot_type": "Diff", "snapshot_path": "s/state", "mem_file_path": "s/mem"}),
        (
            "PUT",
            "/snapshot/load",
            {
                "snapshot_path": "state",
                "mem_backend": {"backend_path": "mem", "backend_type": "File"},
                "track_dirty_pages": True,
                "resume_vm": False,
            },
        ),
        (
            "PUT",
            "/snapshot/load",
            {
                "snapshot_path": "state",
                "mem_backend": {"backend_path": "uffd.sock", "backend_type": "Uffd"},
                "track_dirty_pages": False,
                "resume_vm": True,
                "network_overrides": [{"iface_id": "eth0", "host_dev_name": "tap1"}],
                "vsock_override": {"uds_path": "other.sock"},
                "clock_realtime": True,
            },
        ),
    ]


def test_a_machine_is_paused_and_goes_on_and_tells_its_state(server: Server, api: Api) -> None:
    server.answers += [DONE, DONE, answer(b'{"id": "m", "state": "Running", "vmm_version": "1.17.0", "app_name": "Firecracker"}')]
    api.pause()
    api.resume()
    assert api.state() == "Running"
    assert server.asked == [("PATCH", "/vm", {"state": "Paused"}), ("PATCH", "/vm", {"state": "Resumed"}), ("GET", "/", None)]


def test_a_refusal_says_what_firecracker_said(server: Server, api: Api) -> None:
    server.answers.append(answer(b'{"fault_message": "the disk is gone"}', "400 Bad Request"))
    with pytest.raises(Refused) as refused:
        api.start()
    assert refused.value.message == "Firecracker refused PUT /actions"
    assert refused.value.fields["detail"] == "the disk is gone"


@pytest.mark.parametrize(("body", "why"), [(b"garbage", "not JSON"), (b"[1]", "no object"), (b"[" * 100_000, "not JSON")])
def test_an_answer_that_is_none_is_an_error(server: Server, api: Api, body: bytes, why: str) -> None:
    server.answers.append(answer(body))
    with pytest.raises(RuntimeFailed) as failed:
        api.state()
    assert why in failed.value.message


def test_an_answer_without_end_is_not_kept(server: Server, api: Api) -> None:
    server.answers.append(answer(b" " * (2 << 20)))
    with pytest.raises(RuntimeFailed) as failed:
        api.state()
    assert "without end" in failed.value.message


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200", b"garbage\r\n\r\n"])
def test_one_that_ends_in_the_middle_is_gone(server: Server, api: Api, said: bytes) -> None:
    server.answers.append(lambda connection: connection.sendall(said))
    with pytest.raises(Gone):
        api.state()


def test_silence_has_an_end(server: Server, api: Api) -> None:
    server.answers.append(lambda connection: time.sleep(0.5))
    began = time.monotonic()
    with pytest.raises(TimedOut):
        api.call("GET", "/", timeout_s=0.1)
    assert time.monotonic() - began < 0.4


def test_a_word_now_and_then_is_silence_too(server: Server, api: Api) -> None:
    def drip(connection: socket.socket) -> None:
        for byte in b"HTTP/1.1 200 OK and more and more and more":
            connection.sendall(bytes([byte]))
            time.sleep(0.02)

    server.answers.append(drip)
    began = time.monotonic()
    with pytest.raises(TimedOut):
        api.call("GET", "/", timeout_s=0.2)
    assert time.monotonic() - began < 0.6


def test_nobody_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(Gone):
        Api(tmp_path / "nothing")


class TestSockets:
    def test_one_at_a_long_path_is_reached(self, tmp_path: Path) -> None:
        folder = tmp_path / ("x" * 100) / ("y" * 100)
        folder.mkdir(parents=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        here = Path.cwd()
        os.chdir(folder)
        try:
            listener.bind("s")
        finally:
            os.chdir(here)
        with listener:
            listener.listen()
            with sockets.connect(folder / "s", 1.0) as made:
                assert made.getpeername() == "s"

    def test_a_link_to_another_one_is_not_followed(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(tmp_path / "real"))
            listener.listen()
            (tmp_path / "link").symlink_to("real")
            with pytest.raises(RuntimeFailed):
                sockets.connect(tmp_path / "link", 1.0)
            sockets.connect(tmp_path / "real", 1.0).close()

    def test_what_is_no_socket_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RuntimeFailed):
            sockets.connect(tmp_path / "file", 1.0)


def test_the_shapes_leave_out_what_is_not_set() -> None:
    load = SnapshotLoad(snapshot_path="a", mem_backend=MemoryBackend(backend_path="b"), track_dirty_pages=True)
    assert set(client.plain(load)) == {"snapshot_path", "mem_backend", "track_dirty_pages", "resume_vm"}

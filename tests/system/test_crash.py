"""The server is killed at any moment and started again: nothing that was acknowledged is lost, nothing half done stays."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.sdk.client import Client

from .conftest import MakeServer
from .servers import RUN_DIR, Server, until

COUNT = "i=0; while true; do echo $i; i=$((i+1)); sleep 0.02; done"


class Load:
    """Creates, uses and deletes sandboxes until the server is gone; remembers what it was told."""

    def __init__(self, server: Server, seed: int) -> None:
        self.random = random.Random(seed)
        self.client = Client(api_url=server.url, api_key=server.token, max_create_retry_seconds=0, timeout=60)
        self.running: dict[str, str] = {}
        self.deleted: set[str] = set()
        self.unknown: set[str] = set()
        self.wrong: list[BaseException] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        with contextlib.suppress(errors.ConnectionError, errors.ExecInterrupted):
            try:
                while not self.over.is_set():
                    self.step()
            except (errors.ConnectionError, errors.ExecInterrupted):
                raise
            except BaseException as error:
                self.wrong.append(error)

    def step(self) -> None:
        if len(self.running) < 3:
            sandbox = self.client.sandboxes.create("base")
            self.running[sandbox.id] = ""
            content = f"{self.random.random()}\n"
            sandbox.filesystem.write("/var/mark", content)
            self.running[sandbox.id] = content
        elif self.random.random() < 0.5:
            name = self.random.choice(sorted(self.running))
            content = self.running.pop(name)
            self.unknown.add(name)
            self.client.sandboxes.delete(name)
            self.unknown.discard(name)
            self.deleted.add(name)
        else:
            name = self.random.choice(sorted(self.running))
            assert self.client.sandboxes.get(name).exec("echo fine").stdout == "fine\n"

    def end(self) -> None:
        self.over.set()
        self.thread.join(120)
        assert not self.thread.is_alive()
        assert self.wrong == []
        self.client.close()


def test_killed_at_any_moment_nothing_acknowledged_is_lost(own_server: MakeServer) -> None:
    seed = int(os.environ.get("PANDASTACK_TEST_SEED", "7"))
    chance = random.Random(seed)
    server = own_server(slots=1)
    for _ in range(3):
        load = Load(server, chance.randrange(1 << 30))
        time.sleep(chance.uniform(0.3, 2.5))
        server.kill()
        load.end()
        server.start()
        client = server.client()
        found = {sandbox.id: sandbox for sandbox in client.sandboxes.list()}
        assert found.keys() >= load.running.keys(), (seed, server.said())
        assert not found.keys() & load.deleted, seed
        # What was being made or deleted when it happened is one or the other by now.
        surplus = found.keys() - load.running.keys()
        assert all(found[name].status == "running" for name in found), (seed, [(s.status, s.status_reason) for s in found.values()])
        assert len(surplus) <= 1, seed
        for name, content in load.running.items():
            if content:
                assert found[name].filesystem.read_text("/var/mark") == content
            assert found[name].exec("echo fine").stdout == "fine\n"
        for sandbox in found.values():
            sandbox.kill()
        assert client.sandboxes.list() == []


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_restart_leaves_sandboxes_their_files_and_their_processes(own_server: MakeServer, how: str) -> None:
    server = own_server()
    client = server.client()
    sandbox = client.sandboxes.create("base", metadata={"story": "restart"}, env={"WORD": "kept"})
    idle = client.sandboxes.create("base")
    sandbox.filesystem.write("/var/mark", b"\x00\xff" * 1000)
    process = sandbox.processes.start(COUNT)
    waiting = sandbox.processes.start("read line; echo got $line", stdin=True)
    until(lambda: process.refresh().stdout_bytes > 50, "it counts")
    output = process.output()
    seen = bytearray(next(output).data)
    output.close()
    # Long enough for the other one to be frozen when it happens.
    until(lambda: Path(f"/proc/{idle.metrics().pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T", "the idle one is frozen")
    server.kill() if how == "kill" else server.stop()
    server.start()
    again = client.sandboxes.get(sandbox.id)
    assert (again.status, again.metadata, again.created_at) == ("running", {"story": "restart"}, sandbox.created_at)
    assert again.filesystem.read("/var/mark") == b"\x00\xff" * 1000
    assert again.exec("echo $WORD").stdout == "kept\n"
    process = again.processes.get(process.id)
    assert process.running
    output = process.output(stdout_offset=len(seen))
    while len(seen) < 600:
        event = next(output)
        assert event.offset == len(seen)
        seen += event.data
    output.close()
    numbers = bytes(seen).decode().split("\n")[:-1]
    assert numbers == [str(number) for number in range(len(numbers))]
    waiting = again.processes.get(waiting.id)
    waiting.write_stdin("typed\n")
    assert waiting.wait(60) == 0
    assert waiting.read_output().data == b"got typed\n"
    assert client.sandboxes.get(idle.id).exec("echo awake").stdout == "awake\n"


def test_a_stream_of_the_sdk_survives_a_restart_of_the_server(own_server: MakeServer) -> None:
    server = own_server()
    sandbox = server.client().sandboxes.create("base")
    stream = sandbox.stream("for i in $(seq 1 120); do echo $i; sleep 0.05; done")
    text = next(stream).text
    server.kill()
    server.start()
    text += "".join(event.text for event in stream)
    assert text == "".join(f"{number}\n" for number in range(1, 121))
    assert stream.exit_code == 0


def test_a_key_gives_the_same_sandbox_after_a_crash(own_server: MakeServer) -> None:
    server = own_server()
    body = {"template": "base", "metadata": {"a": "b"}}
    first = server.http("POST", "/v1/sandboxes", json=body, headers={"Idempotency-Key": "key-1"})
    assert first.status_code == 201
    server.kill()
    server.start()
    again = server.http("POST", "/v1/sandboxes", json=body, headers={"Idempotency-Key": "key-1"})
    assert (again.status_code, again.json()["id"]) == (201, first.json()["id"])
    assert again.headers["idempotent-replay"] == "true"
    other = server.http("POST", "/v1/sandboxes", json={"template": "base"}, headers={"Idempotency-Key": "key-1"})
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
    assert len(server.http("GET", "/v1/sandboxes").json()) == 1


def test_without_its_keeper_a_sandbox_fails_and_says_why(own_server: MakeServer) -> None:
    server = own_server()
    client = server.client()
    sandbox = client.sandboxes.create("base")
    server.kill()
    socket = str(RUN_DIR / server.install / "keeper.sock").encode()
    keepers = [path for path in Path("/proc").glob("[0-9]*/cmdline") if socket in path.read_bytes().split(b"\0")]
    assert len(keepers) == 1
    os.kill(int(keepers[0].parts[2]), signal.SIGKILL)
    server.start()
    failed = client.sandboxes.get(sandbox.id)
    assert (failed.status, failed.status_reason) == ("failed", "host_restarted")
    with pytest.raises(errors.SandboxNotRunning):
        failed.exec("true")
    # Nothing of it runs on, but for its record.
    assert [item for item in server.left() if "cgroup" in item and sandbox.id in item] == []
    assert server.machines() == set()
    failed.kill()
    assert client.sandboxes.list() == []
    assert client.sandboxes.create("base").exec("echo fine").stdout == "fine\n"

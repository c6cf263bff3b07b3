"""`pandastack up`: when it refuses, what it says, and how it answers when the machine is full."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.sdk.client import Client

from .conftest import MakeSandbox, MakeServer
from .servers import Server


def refused(server: Server, *more: str, environ: dict[str, str] | None = None, prefix: list[str] | None = None) -> list[str]:
    """Start a server that must not start; what it said, with every line short and without a traceback."""
    command = [*(prefix or []), *server.command(*more)]
    done = subprocess.run(command, env={**server.environ, **(environ or {})}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[0].startswith("pandastack: ")
    assert len(lines) <= 2, done.stderr
    assert "Traceback" not in done.stderr
    return lines


def test_a_full_machine_says_so_and_makes_nothing(own_server: MakeServer) -> None:
    server = own_server(environ={"PANDASTACK_MAX_SANDBOXES": "2"})
    client = server.client(max_create_retry_seconds=0)
    made = [client.sandboxes.create("base") for _ in range(2)]
    before = server.machines()
    answer = server.http("POST", "/v1/sandboxes", json={"template": "base"})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert isinstance(answer.json()["error"], str)
    with pytest.raises(errors.CapacityError):
        client.sandboxes.create("base")
    assert {sandbox.id for sandbox in client.sandboxes.list()} == {sandbox.id for sandbox in made}
    assert server.machines() == before
    # The SDK waits for room by itself.
    made.pop().kill()
    assert server.client().sandboxes.create("base").status == "running"


def test_down_stops_it_and_the_next_start_has_all_again(own_server: MakeServer) -> None:
    server = own_server()
    kept = server.client().sandboxes.create("base", persistent=True)
    kept.filesystem.write("/root/file", "kept")
    said = [down(server), down(server)]
    assert said[0].startswith(f"pandastack on {server.data} has stopped")
    assert said[1] == f"no pandastack runs on {server.data}\n"
    assert server.process is not None
    assert server.process.wait(10) == 0
    server.start()
    assert server.client().sandboxes.get(kept.id).exec("cat /root/file").stdout == "kept"


def down(server: Server) -> str:
    command = [sys.executable, "-m", "pandastack.cli", "down", "--data-dir", str(server.data)]
    return subprocess.run(command, env=server.environ, capture_output=True, text=True, timeout=120, check=True).stdout


def test_two_servers_cannot_share_a_data_directory(own_server: MakeServer) -> None:
    server = own_server()
    other = own_server(start=False)
    other.data = server.data
    assert "another pandastack runs on" in refused(other)[0]
    assert server.client().sandboxes.create("base").exec("echo fine").stdout == "fine\n"


def test_a_port_in_use_is_named(own_server: MakeServer) -> None:
    server = own_server(start=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server.port = taken.getsockname()[1]
        lines = refused(server)
    assert str(server.port) in lines[0]
    assert "--port" in lines[1]
    server.assert_nothing_left()


def test_a_data_directory_that_cannot_be_written_is_named(own_server: MakeServer, tmp_path: Path) -> None:
    server = own_server(start=False)
    (tmp_path / "file").write_text("")
    server.data = tmp_path / "file" / "data"
    lines = refused(server)
    assert str(server.data) in lines[0]
    assert "--data-dir" in lines[1]


@pytest.mark.parametrize("broken", ["missing", "not a program", "fails"])
def test_a_broken_runsc_is_one_sentence_and_leaves_nothing(own_server: MakeServer, tmp_path: Path, broken: str) -> None:
    server = own_server(start=False)
    runsc = tmp_path / "runsc"
    if broken != "missing":
        runsc.write_text("#!/bin/sh\nexit 1\n" if broken == "fails" else "nothing that can run")
        runsc.chmod(0o755)
    said = " ".join(refused(server, environ={"PANDASTACK_RUNTIMES": "gvisor", "PANDASTACK_RUNSC": str(runsc)}))
    assert "runsc" in said
    server.assert_nothing_left()


def test_without_root_there_is_one_sentence(own_server: MakeServer, tmp_path: Path) -> None:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv is not installed")
    nobody = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"]
    check = subprocess.run([*nobody, sys.executable, "-c", "import pandastack.standalone"], capture_output=True, timeout=60, check=False)
    if check.returncode != 0:
        pytest.skip("the user nobody cannot read this checkout")
    lines = refused(own_server(start=False), prefix=nobody)
    assert "root" in lines[0]
    assert "sudo" in lines[1]


def test_a_server_that_is_stopped_at_once_stops(own_server: MakeServer) -> None:
    server = own_server()
    server.stop()
    server.assert_nothing_left()


def test_an_ubuntu_sandbox_without_a_mirror_is_the_base_and_says_so(server: Server, make: MakeSandbox) -> None:
    if os.environ.get("PANDASTACK_UBUNTU_MIRROR"):
        pytest.skip("this machine names an Ubuntu mirror")
    sandbox = make("ubuntu-24.04")
    assert (sandbox.template, sandbox.template_actual) == ("ubuntu-24.04", "base")
    assert "Ubuntu" in (sandbox.template_note or "") or "ubuntu" in (sandbox.template_note or "")
    assert sandbox.exec("echo fine").stdout == "fine\n"


def test_two_hundred_commands_at_once_in_one_sandbox(server: Server, make: MakeSandbox) -> None:
    sandbox = make()
    with ThreadPoolExecutor(200) as pool:
        results = list(pool.map(lambda number: sandbox.exec(f"echo {number}", timeout_seconds=120).stdout, range(200)))
    assert results == [f"{number}\n" for number in range(200)]


def test_thirty_creates_at_once_all_succeed(own_server: MakeServer) -> None:
    server = own_server(slots=2)
    with Client(api_url=server.url, api_key=server.token, max_create_retry_seconds=0, timeout=200) as client:
        with ThreadPoolExecutor(30) as pool:
            made = list(pool.map(lambda _: client.sandboxes.create("base"), range(30)))
        assert len({sandbox.id for sandbox in made}) == len(client.sandboxes.list()) == 30
        with ThreadPoolExecutor(30) as pool:
            assert set(pool.map(lambda sandbox: sandbox.exec("hostname").stdout, made)) == {f"sandbox-{item.id[:8]}\n" for item in made}
            list(pool.map(lambda sandbox: sandbox.kill(), made))
        assert client.sandboxes.list() == []

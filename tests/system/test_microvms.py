"""MicroVMs beside gVisor on one server: each sandbox is on what it asked for, tells so, and keeps every promise there.

QEMU runs with what the machine has: KVM where guest kernels run on it, else emulation, which is what these times are written for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts import sharing_blocks
from pandastack import errors
from pandastack.sdk.client import Client
from pandastack.sdk.sandboxes import Sandbox

from .conftest import MakeServer
from .servers import Server, until

# The first time on a machine, the guest kernel is fetched and booted once to be tried.
TRIED_WITHIN_S = 300.0
NAMES = "hostname; cat /etc/machine-id"
IDENTITY = f"{NAMES} /proc/sys/kernel/random/boot_id"


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system on which copies share blocks; without one a saved state is a copy of all memory."""
    if os.geteuid() != 0 or shutil.which("qemu-system-x86_64") is None or shutil.which("mkfs.xfs") is None:
        pytest.skip("microVMs need root, qemu-system-x86 and xfsprogs")
    with sharing_blocks(tmp_path_factory.mktemp("xfs") / "file") as folder:
        yield folder


@pytest.fixture
def both(xfs: Path, own_server: MakeServer) -> Server:
    """A server on which `base` is ready for gVisor and for QEMU."""
    server = own_server(work=xfs / "server")
    client = server.client()

    def bake() -> bool:
        try:
            for _ in client.templates.bake("base", "qemu"):
                pass
        except errors.RuntimeUnavailable as error:
            if error.retry_after_s is None:
                raise
            return False  # It is being tried.
        return True

    until(bake, "QEMU was tried and its template baked", TRIED_WITHIN_S, every_s=1)
    return server


def facts(sandbox: Sandbox) -> tuple[str | None, str | None, bool]:
    return sandbox.runtime, sandbox.isolation, sandbox.own_kernel


def said(sandbox: Sandbox, command: str) -> list[str]:
    return sandbox.exec(command, check=True).stdout.split()


def test_a_microvm_and_gvisor_live_on_one_server(both: Server) -> None:
    client = both.client()
    assert client.templates.get("base").runtimes == {"gvisor": "ready", "qemu": "ready"}
    vm = client.sandboxes.create("base", isolation="qemu")
    plain = client.sandboxes.create("base", isolation="gvisor")
    _what_they_are(client, vm, plain)
    _what_is_refused(client)
    vm.filesystem.write("/var/kept", "kept")
    vm.exec("nohup sleep 1000 >/dev/null 2>&1 & echo $! > /var/pid", check=True)
    _fork(vm)
    _sleep_and_restart(both, vm)
    client = both.client()
    vm, plain = client.sandboxes.get(vm.id), client.sandboxes.get(plain.id)
    assert (facts(vm), facts(plain)) == (("qemu", "microvm", True), ("gvisor", "gvisor", False))
    assert said(plain, "echo alive") == ["alive"]
    _snapshot(client, vm)
    vm.kill()
    plain.kill()
    assert client.sandboxes.list() == []


def _what_they_are(client: Client, vm: Sandbox, plain: Sandbox) -> None:
    assert (facts(vm), facts(plain)) == (("qemu", "microvm", True), ("gvisor", "gvisor", False))
    assert (vm.acceleration in ("kvm", "tcg"), plain.acceleration) == (True, None)
    for one in (vm, plain):
        assert client.sandboxes.get(one.id).to_dict() == one.to_dict() | {"status": "running"}
    # A kernel of its own: not this machine's, nor gVisor's.
    ours, theirs = said(vm, "uname -r"), said(plain, "uname -r")
    assert ours != theirs
    assert os.uname().release not in (ours[0], theirs[0])
    assert "cloud" in ours[0]
    assert vm.exec("cat", stdin=b"\xff\x00").stdout_bytes == b"\xff\x00"


def _what_is_refused(client: Client) -> None:
    with pytest.raises(errors.RuntimeUnavailable) as missing:
        client.sandboxes.create("base", isolation="firecracker")
    assert (missing.value.http_status, missing.value.runtime, "doctor" in (missing.value.hint or "")) == (503, "firecracker", True)
    with pytest.raises(errors.InvalidRequest) as unknown:
        client.sandboxes.create("base", isolation="docker")
    assert (unknown.value.field, {"auto", "microvm", "gvisor", "qemu"} <= set(unknown.value.choices)) == ("isolation", True)
    assert len(client.sandboxes.list()) == 2


def _fork(vm: Sandbox) -> None:
    before = said(vm, IDENTITY)
    with vm.fork() as child:
        assert facts(child) == ("qemu", "microvm", True)
        assert child.acceleration == vm.acceleration
        assert child.filesystem.read_text("/var/kept") == "kept"
        # The process goes on in the copy.
        child.exec("kill -0 $(cat /var/pid)", check=True)
        own = said(child, IDENTITY)
        assert all(one != other for one, other in zip(own, before, strict=True)), (own, before)
        child.filesystem.write("/var/kept", "changed")
    assert said(vm, IDENTITY) == before
    assert vm.filesystem.read_text("/var/kept") == "kept"


def _sleep_and_restart(server: Server, vm: Sandbox) -> None:
    before = said(vm, NAMES)
    vm.hibernate()
    assert vm.status == "hibernated"
    server.stop()
    server.start()
    vm = server.client().sandboxes.get(vm.id)
    assert (vm.status, facts(vm)) == ("hibernated", ("qemu", "microvm", True))
    # A request wakes it.
    assert said(vm, NAMES) == before
    vm.exec("kill -0 $(cat /var/pid)", check=True)
    assert (vm.refresh().status, vm.boot_mode, vm.filesystem.read_text("/var/kept")) == ("running", "wake", "kept")


def _snapshot(client: Client, vm: Sandbox) -> None:
    name = vm.snapshot()
    try:
        assert client.snapshots.wait_verified(name, 120).runtime == "qemu"
        with pytest.raises(errors.SnapshotUnusable) as refused:
            client.sandboxes.create(from_snapshot=name, isolation="gvisor")
        assert (refused.value.field, refused.value.reason) == ("isolation", "runtime")
        with client.sandboxes.create(from_snapshot=name) as later:
            assert (facts(later), later.from_snapshot) == (("qemu", "microvm", True), name)
            assert later.filesystem.read_text("/var/kept") == "kept"
            assert all(one != other for one, other in zip(said(later, IDENTITY), said(vm, IDENTITY), strict=True))
    finally:
        client.snapshots.delete(name)


def test_the_command_line_asks_for_a_microvm_and_shows_it(both: Server) -> None:
    environ = {**both.environ, "PANDASTACK_API": both.url, "PANDASTACK_API_KEY": both.token}

    def call(*arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "pandastack.cli", *arguments]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    vm = call("sandbox", "create", "-t", "base", "--isolation", "microvm").strip()
    told = json.loads(call("sandbox", "get", vm, "--json"))
    assert (told["runtime"], told["isolation"], told["own_kernel"]) == ("qemu", "microvm", True)
    listed = next(line for line in call("sandbox", "list").splitlines() if line.startswith(vm))
    assert (f"qemu ({told['acceleration']})" in listed, "microvm" in listed) == (True, True)
    assert "cloud" in call("run", "-t", "base", "--isolation", "qemu", "-l", "bash", "uname -r")
    assert "pandastack doctor" in call("run", "-t", "base", "--isolation", "firecracker", "-l", "bash", "true", code=1)
    assert call("sandbox", "rm", vm).strip() == vm
    # Only that of the first `create` was kept.
    assert json.loads(call("sandbox", "list", "--json")) == []


def test_a_server_may_ask_for_more_than_an_emulator(xfs: Path, own_server: MakeServer) -> None:
    server = own_server(work=xfs / "strict", environ={"PANDASTACK_MIN_ISOLATION": "gvisor"})
    client = server.client()

    def refused() -> errors.PandastackError | None:
        try:
            client.sandboxes.create("base", isolation="qemu").kill()
        except errors.RuntimeUnavailable as error:
            if error.retry_after_s is None:
                raise
            return None  # It is being tried.
        except errors.TemplateNotReady as error:
            return error
        except errors.IsolationTooWeak as error:
            return error
        pytest.skip("QEMU has KVM here, which is enough")

    error = until(refused, "QEMU was tried", TRIED_WITHIN_S, every_s=1)
    if isinstance(error, errors.TemplateNotReady):
        pytest.skip("QEMU has KVM here, which is enough")
    assert (error.http_status, error.minimum, error.runtime) == (403, "gvisor", "qemu")
    with client.sandboxes.create("base") as plain:
        assert facts(plain) == ("gvisor", "gvisor", False)

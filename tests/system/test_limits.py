"""What one sandbox may take: memory, processes, disk and CPU. Its neighbours and the server must not notice."""

from __future__ import annotations

import time

import pytest

from pandastack import errors
from pandastack.sdk.client import Client
from pandastack.sdk.sandboxes import Sandbox

from .conftest import MakeSandbox
from .servers import Server, until


@pytest.fixture
def neighbour(make: MakeSandbox) -> Sandbox:
    """A sandbox that is there before the trouble begins, with a process that counts."""
    sandbox = make()
    sandbox.processes.start("i=0; while true; do i=$((i+1)); echo $i; sleep 0.1; done", id="counter")
    return sandbox


def assert_unharmed(neighbour: Sandbox) -> None:
    assert neighbour.refresh().status == "running"
    counter = neighbour.processes.get("counter")
    before = counter.stdout_bytes
    until(lambda: counter.refresh().stdout_bytes > before, "the neighbour goes on counting")
    assert neighbour.exec("echo fine").stdout == "fine\n"


def test_limits_that_were_asked_for_are_those_inside(any_make: MakeSandbox) -> None:
    sandbox = any_make(memory_mb=333, disk_mb=777, cpu=0.5)
    assert (sandbox.memory_mb, sandbox.disk_mb, sandbox.cpu) == (333, 777, 0.5)
    total_kib = int(sandbox.exec("awk '/^MemTotal/ {print $2}' /proc/meminfo").stdout)
    assert total_kib == 333 * 1024
    assert sandbox.metrics().memory_limit_bytes == 333 << 20


@pytest.mark.parametrize("template", ["base", "code-interpreter"])
def test_limits_that_were_not_asked_for_are_those_of_the_template(make: MakeSandbox, client: Client, template: str) -> None:
    sandbox, wanted = make(template), client.templates.get(template)
    assert (sandbox.memory_mb, sandbox.disk_mb, sandbox.cpu) == (wanted.memory_mb, wanted.disk_mb, wanted.cpu)
    assert int(sandbox.exec("awk '/^MemTotal/ {print $2}' /proc/meminfo").stdout) == wanted.memory_mb * 1024


def test_too_much_memory_ends_only_the_sandbox_that_took_it(any_make: MakeSandbox, any_server: Server) -> None:
    neighbour = any_make()
    neighbour.processes.start("i=0; while true; do i=$((i+1)); echo $i; sleep 0.1; done", id="counter")
    bomb = any_make(memory_mb=256)
    try:
        result = bomb.exec(["python3", "-c", "x = bytearray(2 << 30)\nfor i in range(0, len(x), 4096): x[i] = 1"], timeout_seconds=100)
    except (errors.SandboxNotRunning, errors.GuestError, errors.ExecInterrupted) as error:
        reason = error.fields.get("status_reason")
        until(lambda: bomb.refresh().status == "failed", "the sandbox is known to have failed")
        assert reason == bomb.status_reason == "oom"
        with pytest.raises(errors.SandboxNotRunning, match=r"memory|oom"):
            bomb.exec("true")
    else:
        # The kernel chose the process and not the sandbox; then that goes on.
        assert result.exit_code != 0
        assert bomb.exec("echo fine").stdout == "fine\n"
    assert_unharmed(neighbour)
    assert any_server.alive


FORKS = """
import errno, os, sys, time
children = 0
while True:
    try:
        pid = os.fork()
    except OSError as error:
        print(children, errno.errorcode[error.errno], flush=True)
        break
    if pid == 0:
        time.sleep(1000)
        os._exit(0)
    children += 1
"""


@pytest.mark.parametrize("user", ["root", "user"])
def test_processes_are_refused_beyond_a_number(make: MakeSandbox, user: str) -> None:
    sandbox = make(memory_mb=4096)
    forks = sandbox.processes.start(["python3", "-c", FORKS + "time.sleep(1000)"], user=user)
    until(lambda: forks.refresh().stdout_bytes > 0 or not forks.running, "a fork was refused", 120)
    said = forks.read_output().data.decode().split()
    assert said[1:] == ["EAGAIN"], (said, forks.read_output("stderr").data)
    assert 16 < int(said[0]) <= 1024
    forks.kill()
    assert forks.wait(60) == 137
    until(lambda: sandbox.exec("echo fine").stdout == "fine\n", "the sandbox is usable after it")


@pytest.mark.parametrize("user", ["root", "user"])
def test_a_fork_bomb_stays_in_its_sandbox(make: MakeSandbox, neighbour: Sandbox, server: Server, user: str) -> None:
    bomb = make()
    with pytest.raises((errors.SandboxTimeout, errors.SandboxNotRunning, errors.GuestError)):
        bomb.exec("bomb() { bomb | bomb & }; bomb; sleep 1000", user=user, timeout_seconds=8)
    assert_unharmed(neighbour)

    def settled() -> bool:
        """It works again, or it was ended, also while it is asked, and says why."""
        try:
            return bomb.exec("echo fine", timeout_seconds=60).stdout == "fine\n"
        except errors.SandboxNotRunning:
            return bool(bomb.refresh().status_reason)

    until(settled, "the sandbox is usable after it, or says why not", 120)
    assert server.alive


def test_a_full_disk_is_an_error_inside_and_nothing_more(any_make: MakeSandbox, any_server: Server) -> None:
    neighbour, sandbox = any_make(), any_make(disk_mb=256)
    before = any_server.machines()
    filled = sandbox.exec("head -c 1G /dev/zero > /var/fill", timeout_seconds=100)
    assert filled.exit_code == 1
    assert "No space left" in filled.stderr or "Input/output error" in filled.stderr
    assert 200 << 20 <= sandbox.filesystem.stat("/var/fill").size <= 256 << 20
    # It answers, reads, and takes new files when there is room again.
    assert sandbox.exec("echo fine").stdout == "fine\n"
    neighbour.filesystem.write("/var/mine", b"x" * (8 << 20))
    assert neighbour.filesystem.stat("/var/mine").size == 8 << 20
    sandbox.filesystem.remove("/var/fill")
    sandbox.exec("head -c 180M /dev/zero > /var/again", check=True, timeout_seconds=100)
    sandbox.filesystem.remove("/var/again")
    # The host gets the blocks back, too.
    images = [any_server.data / "disks" / f"{machine}.img" for machine in before]
    until(lambda: all(not image.exists() or image.stat().st_blocks * 512 < 64 << 20 for image in images), "the space came back")


def test_writing_a_file_to_a_full_disk_says_so(make: MakeSandbox) -> None:
    sandbox = make(disk_mb=128)
    with pytest.raises(errors.PandastackError) as caught:
        sandbox.filesystem.write("/var/large", (b"x" * (1 << 20) for _ in range(200)))
    assert caught.value.http_status == 507, caught.value
    assert sandbox.exec("echo fine").stdout == "fine\n"


def test_cpu_time_is_bounded_over_time(any_make: MakeSandbox) -> None:
    sandbox = any_make(cpu=0.5)
    for _ in range(3):
        sandbox.processes.start("while :; do :; done")
    began, used = time.monotonic(), sandbox.metrics().host_cpu_seconds
    time.sleep(6)
    used = sandbox.metrics().host_cpu_seconds - used
    ratio = used / (time.monotonic() - began)
    assert 0.05 < ratio < 0.75, ratio


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory_mb", 0), ("memory_mb", -1), ("memory_mb", 1 << 21), ("memory_mb", "much"), ("memory_mb", 1 << 40),
        ("cpu", 0), ("cpu", 512), ("cpu", -0.5), ("disk_mb", 0), ("disk_mb", 1 << 25), ("ttl_seconds", -1),
        ("template", "Not a name"), ("template", "no-such-template"), ("metadata", {"": "x"}), ("env", {"1X": "y"}),
    ],
)  # fmt: skip
def test_a_limit_out_of_range_is_refused_by_name(server: Server, field: str, value: object) -> None:
    answer = server.http("POST", "/v1/sandboxes", json={"template": "base", field: value})
    assert answer.status_code == 400, answer.text
    assert isinstance(answer.json()["error"], str)
    assert answer.json()["field"].split(".")[0] == field
    assert server.http("GET", "/v1/sandboxes").json() == []


@pytest.mark.parametrize("field", ["memory_mb", "disk_mb"])
def test_a_limit_too_small_to_work_with_is_refused_by_name(server: Server, field: str) -> None:
    answer = server.http("POST", "/v1/sandboxes", json={"template": "base", field: 1})
    if answer.status_code == 201:
        server.http("DELETE", f"/v1/sandboxes/{answer.json()['id']}")
    assert answer.status_code == 400, answer.text
    assert answer.json()["field"] == field


def test_the_folder_for_temporary_files_is_on_the_disk(make: MakeSandbox) -> None:
    sandbox = make(memory_mb=256, disk_mb=2048)
    assert sandbox.exec("head -c 700M /dev/zero > /tmp/large && stat -c %s /tmp/large", timeout_seconds=100).stdout == f"{700 << 20}\n"

"""What code in a sandbox can reach: nothing of the host, of the network, or of its neighbours."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

import pytest

from pandastack import errors

from .conftest import NEW_RUNSC, MakeSandbox, MakeServer
from .servers import Server, cache_dir, until

CONNECT = """
import json, socket, sys, time
found = {}
for address, port in json.loads(sys.argv[1]):
    began = time.monotonic()
    try:
        socket.create_connection((address, port), timeout=20).close()
        found[f'{address}:{port}'] = 'reached'
    except OSError as error:
        found[f'{address}:{port}'] = 'refused' if time.monotonic() - began < 10 else 'hung'
try:
    socket.getaddrinfo('example.com', 80)
    found['dns'] = 'reached'
except OSError:
    found['dns'] = 'refused'
print(json.dumps(found))
"""


def addresses_of_this_machine() -> list[str]:
    found = {"127.0.0.1"}
    for name in ("10.255.255.255", "192.0.2.1"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((name, 9))  # Sends nothing; asks the routing table.
                found.add(probe.getsockname()[0])
            except OSError:
                continue
    return sorted(found)


def test_there_is_no_network(any_make: MakeSandbox, any_server: Server) -> None:
    sandbox = any_make()
    assert sandbox.exec("ls /sys/class/net 2>/dev/null; ip -o link | cut -d: -f2").stdout.split().count("lo") >= 1
    assert [line.split(":")[0].strip() for line in sandbox.exec("cat /proc/net/dev").stdout.splitlines()[2:]] == ["lo"]
    # The API of this very server, on every address of the host, is among what must not be reached.
    targets = [(address, any_server.port) for address in addresses_of_this_machine()]
    targets += [
        ("10.0.0.1", 80),
        ("169.254.169.254", 80),
        ("172.17.0.1", 80),
        ("192.168.0.1", 80),
        ("1.1.1.1", 443),
        ("::1", any_server.port),
    ]
    result = sandbox.exec(["python3", "-c", CONNECT, json.dumps(targets)], timeout_seconds=100, check=True)
    assert set(json.loads(result.stdout).values()) == {"refused"}, result.stdout
    for kind, protocol in (("AF_PACKET", "SOCK_RAW"), ("AF_INET", "SOCK_RAW")):
        code = f"import socket; socket.socket(socket.{kind}, socket.{protocol}, 1)"
        assert "Error" in sandbox.exec(["python3", "-c", code]).stderr


def test_processes_in_one_sandbox_can_talk_over_loopback(any_make: MakeSandbox) -> None:
    sandbox = any_make()
    sandbox.processes.start(["python3", "-m", "http.server", "8123", "--bind", "127.0.0.1", "--directory", "/etc"])
    fetch = "curl -s --max-time 5 http://127.0.0.1:8123/hostname"
    assert until(lambda: sandbox.exec(fetch).stdout, "the server inside answers").startswith("sandbox")


def test_nothing_of_the_host_is_visible(any_make: MakeSandbox, any_server: Server, tmp_path: Path) -> None:
    sandbox = any_make()
    secret = tmp_path / "secret"
    secret.write_text("for the host only")
    for path in (secret, any_server.data, any_server.data / "local-key", "/var/cache/pandastack", "/run/pandastack", Path(__file__)):
        assert not sandbox.filesystem.exists(str(path)), path
        assert sandbox.exec(["ls", f"/proc/1/root{path}"]).exit_code != 0
    everything = sandbox.exec("env; cat /proc/*/environ /proc/*/cmdline /proc/mounts /proc/self/mountinfo", timeout_seconds=60).stdout
    for mark in (any_server.token, any_server.install, str(any_server.data), str(tmp_path)):
        assert mark not in everything
    assert sandbox.exec("ps -eo pid=").stdout.split()[0] == "1"
    assert int(sandbox.exec("ps -e | wc -l").stdout) < 30
    assert not {"sda", "vda", "loop0", "kvm", "mem", "kmsg"} & set(sandbox.exec("ls /dev").stdout.split())


@pytest.fixture(params=["runsc-picked", "runsc-new"])
def private_guest(request: pytest.FixtureRequest, own_server: MakeServer, tmp_path: Path) -> Server:
    """A server whose copy of the guest daemon is its own: where the promise is broken, only this test suffers."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("images", "states", "runsc"):
        if (cache_dir() / name).exists():
            (cache / name).symlink_to(cache_dir() / name)
    environ = {"PANDASTACK_CACHE_DIR": str(cache)}
    if request.param == "runsc-new":
        environ["PANDASTACK_RUNSC"] = os.environ.get(NEW_RUNSC) or pytest.skip(f"{NEW_RUNSC} does not name a second runsc")
    return own_server(environ=environ)


def test_the_daemon_that_all_sandboxes_share_cannot_be_changed_from_inside(private_guest: Server) -> None:
    binary = next((Path(private_guest.environ["PANDASTACK_CACHE_DIR"]) / "guest").glob("*/pandastack-guest"))
    content = binary.read_bytes()
    client = private_guest.client()
    for user in ("user", "root"):
        with client.sandboxes.create("base") as sandbox:
            for command in (
                "touch /.pandastack/new",
                "mkdir /.pandastack/new",
                "mount -o remount,rw /.pandastack",
                "mount -t tmpfs none /mnt",
                "chmod 777 /.pandastack/pandastack-guest",
                "ln /.pandastack/pandastack-guest /.pandastack/other",
                "mv /.pandastack/pandastack-guest /.pandastack/other",
                "rm -f /.pandastack/pandastack-guest",
                "truncate --size=0 /.pandastack/pandastack-guest",
                "echo x >> /.pandastack/pandastack-guest",
                "echo x > /.pandastack/pandastack-guest",
            ):
                assert sandbox.exec(command, user=user).exit_code != 0, command
                assert binary.read_bytes() == content, command
            assert [path.name for path in binary.parent.iterdir()] == ["pandastack-guest"]
            # Nor through the API.
            for path in ("/.pandastack/pandastack-guest", "/.pandastack/new"):
                with pytest.raises(errors.PandastackError):
                    sandbox.filesystem.write(path, b"x")
            assert binary.read_bytes() == content
            assert sandbox.exec("echo fine").stdout == "fine\n"


def test_the_image_that_sandboxes_share_cannot_be_changed_from_inside(private_guest: Server) -> None:
    client = private_guest.client()
    with client.sandboxes.create("base") as one:
        one.exec("echo x > /etc/hostname; rm -f /usr/bin/git; echo x >> /etc/passwd; chmod 777 /etc; : > /etc/debian_version", check=True)
        with client.sandboxes.create("base") as other:
            assert other.exec("cat /etc/hostname /etc/passwd /etc/debian_version").stdout.count("x\n") == 0
            assert other.exec("stat -c %a /etc; ls /usr/bin/git; test -s /etc/debian_version").stdout == "755\n/usr/bin/git\n"


def test_user_processes_lack_dangerous_capabilities(any_make: MakeSandbox) -> None:
    sandbox = any_make()
    numbers = {"NET_ADMIN": 12, "NET_RAW": 13, "SYS_MODULE": 16, "SYS_RAWIO": 17, "SYS_ADMIN": 21, "SYS_BOOT": 22, "SYS_TIME": 25}
    sudo_works = sandbox.exec("sudo -n true", user="user").exit_code == 0
    for how in ([], ["sudo", "-n"]) if sudo_works else ([],):
        lines = sandbox.exec([*how, "cat", "/proc/self/status"], user="user" if how else None, check=True).stdout.splitlines()
        sets = {name: int(value, 16) for name, value in (line.split(":") for line in lines if line.startswith("Cap"))}
        for name in ("CapEff", "CapPrm", "CapBnd"):
            assert [cap for cap, bit in numbers.items() if sets[name] >> bit & 1] == [], (how, name)
        # And what people need to install software is there.
        assert sets["CapEff"] & 1
    assert sandbox.exec("hostname other; date -s 2001-01-01; unshare -m true").exit_code != 0
    assert abs(int(sandbox.exec("date +%s").stdout) - time.time()) < 60


@pytest.mark.parametrize("name", ["KILL", "TERM", "SEGV", "HUP"])
def test_signals_to_the_first_process_do_not_break_the_sandbox_silently(any_make: MakeSandbox, name: str) -> None:
    sandbox = any_make()
    try:
        sandbox.exec(f"kill -{name} 1; sleep 0.5", timeout_seconds=30)
        assert sandbox.exec("echo fine", timeout_seconds=30).stdout == "fine\n"
    except (errors.SandboxNotRunning, errors.GuestError, errors.ExecInterrupted):
        until(lambda: sandbox.refresh().status == "failed", "the sandbox says that it failed")
        assert sandbox.status_reason


@pytest.mark.timeout(300)
def test_stopping_the_first_process_does_not_break_the_sandbox_silently(make: MakeSandbox) -> None:
    sandbox = make()
    with contextlib.suppress(errors.PandastackError):
        sandbox.exec("kill -STOP 1", timeout_seconds=1)
    until(lambda: sandbox.refresh().status == "failed", "the sandbox says that it failed", timeout_s=200)
    assert sandbox.status_reason == "guest"


IDENTITY = """
import json, os, random, socket, time, uuid
print(json.dumps([socket.gethostname(), open('/etc/machine-id').read(), os.urandom(16).hex(), random.random(), str(uuid.uuid4()),
  open('/proc/sys/kernel/random/boot_id').read(), os.environ['HOME']]))
"""


@pytest.mark.parametrize("template", ["base", "code-interpreter"])
def test_two_sandboxes_of_one_template_are_two_machines(any_make: MakeSandbox, template: str) -> None:
    seen = []
    for _ in range(2):
        sandbox = any_make(template)
        seen.append(json.loads(sandbox.run_code(IDENTITY).stdout))
        seen[-1].append(json.loads(sandbox.exec(["python3", "-c", IDENTITY]).stdout)[3])
        assert seen[-1][0] == f"sandbox-{sandbox.id[:8]}" == sandbox.exec("hostname").stdout.strip()
    names = ("hostname", "machine-id", "urandom", "random", "uuid", "boot id", "home", "cold random")
    for name, one, other in zip(names, *seen, strict=True):
        if name not in ("home", "boot id"):  # The boot id is the kernel's, which gVisor does not have one of per sandbox.
            assert one != other, name
    # Twice in one sandbox, too: a warm interpreter that forks must not repeat itself.
    assert (
        sandbox.run_code("import random; print(random.random())").stdout != sandbox.run_code("import random; print(random.random())").stdout
    )


def test_numpy_draws_differ_between_runs_and_sandboxes(make: MakeSandbox) -> None:
    code = "import numpy as np; print(np.random.rand(), np.random.default_rng().random())"
    sandboxes = [make("code-interpreter"), make("code-interpreter")]
    seen = [number for sandbox in sandboxes for _ in range(2) for number in sandbox.run_code(code).stdout.split()]
    assert len(set(seen)) == 8, seen


def test_the_clock_is_that_of_the_host(any_make: MakeSandbox) -> None:
    sandbox = any_make()
    sandbox.exec("true")
    offsets = []
    for _ in range(5):
        before = time.time()
        inside = float(sandbox.exec("date +%s.%N").stdout)
        after = time.time()
        offsets.append(max(before - inside, inside - after, 0.0))
    assert min(offsets) < 0.5, offsets


def test_a_sandbox_cannot_see_the_files_of_another(any_make: MakeSandbox) -> None:
    one, other = any_make(), any_make()
    for path in ("/tmp/mine", "/dev/shm/mine", "/etc/mine", "/home/user/mine"):
        one.filesystem.write(path, os.urandom(8))
        assert not other.filesystem.exists(path)
    one.exec("rm -rf /usr/bin/git /etc/passwd")
    assert other.exec("git --version; id -un").stdout.split()[0] == "git"

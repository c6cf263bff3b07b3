"""What the host may rely on, asked of the real daemon: as an ordinary process, and as PID 1 of its own namespaces."""

# `shell=` is a field of ProcessSpec here, and looking at /proc or a directory of three names does not block a loop.
# ruff: noqa: S604, ASYNC221, ASYNC240, ASYNC110, PTH208

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.host import identity
from pandastack.host.guest import Guest, ProcessSpec, ProcessStream
from pandastack.wire import guest as wire

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]
MIB = 1 << 20
SOURCE = Path(__file__).parents[2] / "guest"
WARM = "/run/pandastack"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Descriptors:
    read_fd: int
    write_fd: int
    fresh: bool = True


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The daemon of this tree: from the environment, else built, else the installed wheel's."""
    if named := os.environ.get("PANDASTACK_GUEST_BINARY"):
        return Path(named)
    if go := shutil.which("go"):
        target = tmp_path_factory.mktemp("guest") / "pandastack-guest"
        settings = os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOPROXY": "off"}
        subprocess.run([go, "build", "-o", str(target), "."], cwd=SOURCE, env=settings, check=True)
        return target
    installed = pytest.importorskip("pandastack_guest", reason="no guest binary: no Go toolchain and no pandastack-guest wheel")
    return Path(installed.path())


@dataclass
class Daemon:
    """A running daemon and our end of its stdio."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    port: int

    async def open(self, *, fresh: bool = True) -> Guest:
        descriptor = os.dup(self.socket.fileno())
        return await Guest.open(Descriptors(descriptor, descriptor, fresh), timeout_s=10)

    async def connect(self, token: str | None = None) -> Guest:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        descriptor = connection.detach()
        return await Guest.open(Descriptors(descriptor, descriptor), token=token, timeout_s=10)

    @property
    def pid(self) -> int:
        """Of the daemon itself: under `unshare` it is the child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        is_unshare = Path(f"/proc/{self.process.pid}/comm").read_text().strip() == "unshare"
        return int(children[0]) if is_unshare else self.process.pid

    def warm_folders(self) -> list[Path]:
        return list(Path(f"/proc/{self.pid}/root{WARM}").glob("warm-*"))

    def rss_mib(self) -> float:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmHWM")


@contextlib.contextmanager
def running(binary: Path, kind: str, tmp_path: Path) -> Iterator[Daemon]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(binary), "-listen", f"127.0.0.1:{port}", "-hooks", str(tmp_path / "hooks")]
    # Where warm interpreters have their sockets: one that is killed leaves them behind, and others run beside it.
    private = f"mkdir -p {WARM} && mount -t tmpfs warm {WARM} && "
    if kind == "process" and os.geteuid() == 0:
        command = ["unshare", "-m", "sh", "-c", f'{private} exec "$@"', "sh", *command]
    elif kind == "pid1":
        if os.geteuid() != 0:
            pytest.skip("PID 1 of its own namespaces needs root")
        # Its own copies of what identity writes; without SYS_TIME, for a test must not set this machine's clock.
        script = private + 'for f in hostname hosts machine-id; do cp /etc/$f "$0/$f" 2>/dev/null || : > "$0/$f"; '
        script += 'touch /etc/$f; mount --bind "$0/$f" /etc/$f; done; exec setpriv --bounding-set=-sys_time "$@"'
        command = ["unshare", "-p", "-f", "-m", "-u", "--mount-proc", "--kill-child", "sh", "-c", script, str(tmp_path), *command]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(), start_new_session=True)
        theirs.close()
        try:
            yield Daemon(process, ours, port)
        finally:
            process.kill()
            process.wait(timeout=10)


@pytest.fixture(params=["process", "pid1"])
def daemon(binary: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemon]:
    with running(binary, request.param, tmp_path) as daemon:
        yield daemon


@pytest.fixture
def plain(binary: Path, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that is not PID 1, for promises that do not depend on it."""
    with running(binary, "process", tmp_path) as daemon:
        yield daemon


@pytest.fixture
async def guest(daemon: Daemon) -> AsyncIterator[Guest]:
    guest = await daemon.open()
    yield guest
    await guest.close()


@pytest.fixture
async def one(plain: Daemon) -> AsyncIterator[Guest]:
    guest = await plain.open()
    yield guest
    await guest.close()


async def collect(stream: ProcessStream) -> tuple[bytes, bytes, wire.Exit]:
    out, err = bytearray(), bytearray()
    async for piece in stream:
        target = out if piece.channel == wire.Channel.STDOUT else err
        assert piece.offset == len(target)
        target += piece.data
    return bytes(out), bytes(err), stream.exit


async def run(guest: Guest, **spec: object) -> tuple[bytes, bytes, wire.Exit]:
    return await collect(await guest.run(ProcessSpec(**spec)))  # type: ignore[arg-type]


async def pieces(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def until(condition: object, timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.02)


class TestProcesses:
    async def test_run_separates_outputs_and_reports_the_code(self, guest: Guest) -> None:
        out, err, end = await run(guest, shell="printf out; printf err >&2; exit 7")
        assert (out, err, end.exit_code, end.reason, end.code) == (b"out", b"err", 7, "exited", 7)
        assert (end.stdout_bytes, end.stderr_bytes) == (3, 3)

    async def test_signal_is_no_exit_code(self, guest: Guest) -> None:
        _, _, end = await run(guest, shell="kill -TERM $$")
        assert (end.exit_code, end.signal, end.reason, end.code) == (None, 15, "signaled", 143)

    async def test_signals_are_not_ignored_by_inheritance(self, guest: Guest) -> None:
        out, _, _ = await run(guest, argv=["grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status"])
        assert all(int(line.split()[1], 16) == 0 for line in out.splitlines()), out

    async def test_environment_directory_and_user(self, guest: Guest) -> None:
        out, _, _ = await run(guest, shell='echo "$A $HOME $USER $PWD"', env={"A": "ä b"}, cwd="/tmp")
        assert out.decode().split("\n")[0] == "ä b /root root /tmp"

    @pytest.mark.skipif(os.geteuid() != 0, reason="another user needs root")
    async def test_another_user_has_its_ids_and_groups(self, guest: Guest) -> None:
        out, _, _ = await run(guest, argv=["id", "-un"], user="nobody")
        assert out == b"nobody\n"

    async def test_capabilities_are_bounded(self, guest: Guest) -> None:
        out, _, _ = await run(guest, argv=["grep", "CapBnd", "/proc/self/status"])
        assert int(out.split()[1], 16) & ~0xA80405FB == 0

    @pytest.mark.parametrize(
        ("spec", "code", "errno"),
        [
            ({"argv": ["no-such-program"]}, "not_executable", 2),
            ({"argv": ["/etc/passwd"]}, "not_executable", 13),
            ({"argv": ["true"], "cwd": "/nowhere"}, "bad_cwd", 2),
            ({"argv": ["true"], "user": "nobody-like-this"}, "unknown_user", None),
            ({"argv": ["true"], "shell": "true"}, "invalid", None),
            ({"argv": ["a\0b"]}, "invalid", None),
        ],
    )
    async def test_what_cannot_start_is_a_typed_error(self, one: Guest, spec: dict[str, object], code: str, errno: int | None) -> None:
        with pytest.raises(errors.InvalidRequest) as caught:
            await run(one, **spec)
        assert (caught.value.guest_code, caught.value.guest_errno) == (code, errno)
        assert (await one.health()).live == 0

    async def test_stdin_at_once_and_streamed(self, guest: Guest) -> None:
        assert (await run(guest, argv=["cat"], stdin=b"\0\xff" * 30_000))[0] == b"\0\xff" * 30_000
        data = os.urandom(5 * MIB)
        async with await guest.run(ProcessSpec(argv=["cat"], stdin=True)) as stream, asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(collect(stream))
            async for piece in pieces(data):
                await stream.write(piece)
            stream.end_input()
        assert reader.result()[0] == data

    async def test_stdin_of_a_started_process(self, one: Guest) -> None:
        started = await one.start(ProcessSpec(argv=["cat"], stdin=True))
        assert await one.write_stdin(started.id, b"one ") == 4
        await one.write_stdin(started.id, b"two", close=True)
        assert (await collect(await one.attach(started.id)))[0] == b"one two"

    async def test_pty_is_a_terminal_of_the_given_size(self, guest: Guest) -> None:
        async with await guest.run(ProcessSpec(shell="tty; stty size; read x; stty size; echo $TERM", stdin=True, pty=(40, 90))) as stream:
            seen = b""
            async for piece in stream:
                seen += piece.data
                if b"40 90\r\n" in seen and b"go" not in seen:
                    await guest.resize(stream.id, 50, 100)
                    await stream.write(b"go\n")
        assert b"/dev/pts/" in seen
        assert b"50 100\r\nxterm-256color\r\n" in seen
        assert stream.exit.exit_code == 0

    async def test_background_child_delays_the_end_only_briefly(self, guest: Guest) -> None:
        started = time.monotonic()
        out, _, end = await run(guest, shell="echo now; sleep 30 &")
        assert (out, end.exit_code) == (b"now\n", 0)
        assert time.monotonic() - started < 5
        await guest.signal(end.id, signal.SIGKILL)

    async def test_timeout_kills_the_tree(self, guest: Guest, tmp_path: Path) -> None:
        mark = f"31{os.getpid()}.5"
        _, _, end = await run(guest, shell=f"sleep {mark} & sleep {mark}", timeout_s=0.3)
        assert (end.reason, end.signal) == ("timeout", 9)
        assert mark not in subprocess.run(["ps", "axo", "args"], capture_output=True, text=True, check=True).stdout

    async def test_kill_reaches_a_daemon_that_left_the_session(self, guest: Guest) -> None:
        mark = f"32{os.getpid()}.5"
        leave = f"setsid sh -c '(setsid sleep {mark} </dev/null >/dev/null 2>&1 &)' & wait; echo left; sleep 60"
        async with await guest.run(ProcessSpec(shell=leave)) as stream:
            assert (await anext(stream)).data == b"left\n"
            assert await guest.signal(stream.id, signal.SIGKILL) >= 2
            assert (await stream.wait()).reason == "killed"
        assert mark not in subprocess.run(["ps", "axo", "args"], capture_output=True, text=True, check=True).stdout

    async def test_orphans_are_reaped(self, daemon: Daemon, guest: Guest) -> None:
        await run(guest, shell="for i in 1 2 3 4 5; do (true &) ; done")
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children")
        await until(lambda: not children.read_text().split())

    async def test_two_hundred_at_once(self, guest: Guest) -> None:
        ends = await asyncio.gather(*(run(guest, shell=f"echo {n}; exit {n % 100}") for n in range(200)))
        assert [(out, end.exit_code) for out, _, end in ends] == [(f"{n}\n".encode(), n % 100) for n in range(200)]
        assert (await guest.health()).live == 0

    async def test_ids_are_the_callers_and_unique(self, one: Guest) -> None:
        await one.start(ProcessSpec(argv=["sleep", "30"], id="mine-1"))
        with pytest.raises(errors.Conflict):
            await one.start(ProcessSpec(argv=["true"], id="mine-1"))
        listed = {entry.id: entry for entry in await one.list_processes()}
        assert (listed["mine-1"].running, listed["mine-1"].argv) == (True, ["sleep", "30"])
        await one.signal("mine-1", signal.SIGTERM)
        assert (await one.wait("mine-1")).signal == 15
        with pytest.raises(errors.ProcessNotFound):
            await one.wait("unknown")

    async def test_finished_processes_stay_for_a_while(self, one: Guest) -> None:
        for n in range(80):
            await run(one, argv=["echo", str(n)])
        async with asyncio.timeout(10):
            while len(kept := await one.list_processes()) > 66:
                await asyncio.sleep(0.05)
        assert len(kept) >= 60
        assert (await collect(await one.attach(kept[-1].id)))[0] == b"79\n"

    async def test_activity_is_announced(self, one: Guest) -> None:
        seen: list[int] = []
        one.connection.on_activity = seen.append
        started = await one.start(ProcessSpec(argv=["sleep", "30"]))
        await until(lambda: seen == [1])
        await one.signal(started.id, signal.SIGKILL)
        await until(lambda: seen == [1, 0])


class TestOutput:
    async def test_a_gibibyte_passes_in_bounded_memory(self, plain: Daemon, one: Guest) -> None:
        total, expected = 0, 1 << 30
        async for piece in await one.run(ProcessSpec(shell=f"head -c {expected} /dev/zero")):
            assert piece.offset == total
            total += len(piece.data)
        assert total == expected
        assert plain.rss_mib() < 64

    async def test_a_slow_reader_pauses_the_process_and_loses_nothing(self, one: Guest) -> None:
        size = 40 * MIB
        stream = await one.run(ProcessSpec(shell=f"seq 1 100000000 | head -c {size}; echo done >&2", output_limit_bytes=MIB))
        first = await anext(stream)
        await asyncio.sleep(0.5)
        assert (await one.output(stream.id, 1, 0)).next < 10 * MIB
        seen = len(first.data)
        async for piece in stream:
            if piece.channel == 1:
                assert piece.offset == seen
                seen += len(piece.data)
        assert seen == size

    async def test_attach_again_goes_on_at_the_offset(self, plain: Daemon, one: Guest) -> None:
        started = await one.start(ProcessSpec(shell="seq 1 300000; read x; seq 1 10", stdin=True))
        expected = subprocess.run("seq 1 300000; seq 1 10", shell=True, capture_output=True, check=True).stdout  # noqa: S602
        seen = b""
        async for piece in await one.attach(started.id):
            seen += piece.data
            if len(seen) > 500_000:
                break
        await one.close()
        again = await plain.open()
        stream = await again.attach(started.id, stdout_offset=len(seen))
        await again.write_stdin(started.id, b"\n", close=True)
        async for piece in stream:
            assert piece.offset == len(seen)
            seen += piece.data
        assert seen == expected
        await again.close()

    async def test_without_reader_the_oldest_bytes_go(self, one: Guest) -> None:
        started = await one.start(ProcessSpec(shell=f"head -c {5 * MIB} /dev/zero", output_limit_bytes=MIB))
        end = await one.wait(started.id)
        assert end.stdout_bytes == 5 * MIB
        stream = await one.attach(started.id, stdout_offset=0)
        assert stream.started.stdout.first >= 3 * MIB
        offsets = [(piece.offset, len(piece.data)) async for piece in stream]
        assert offsets[0][0] == stream.started.stdout.first
        assert sum(offsets[-1]) == 5 * MIB

    async def test_detached_runs_live_on_or_die_as_asked(self, one: Guest) -> None:
        kept = await one.run(ProcessSpec(argv=["sleep", "30"], id="kept"))
        killed = await one.run(ProcessSpec(argv=["sleep", "30"], id="killed", kill_on_detach=True))
        kept.close()
        killed.close()
        assert (await one.wait("killed", timeout_s=10)).signal == 9
        assert {entry.id: entry.running for entry in await one.list_processes()}["kept"]


class TestFiles:
    async def test_write_and_read_any_bytes_under_any_name(self, guest: Guest, tmp_path: Path) -> None:
        data = os.urandom(3 * MIB + 17)
        path = os.fsencode(tmp_path) + b"/new/\xff\n\xe4"
        assert await guest.write_file(path, pieces(data), mode=0o640) == len(data)
        stat, body = await guest.read_file(path)
        assert b"".join([piece async for piece in body]) == data
        assert (stat.size, stat.mode, stat.type, stat.name_bytes) == (len(data), 0o640, "file", b"\xff\n\xe4")
        _, body = await guest.read_file(path, offset=5, length=10)
        assert b"".join([piece async for piece in body]) == data[5:15]
        assert [entry.name_bytes async for entry in guest.list_dir(str(tmp_path / "new"))] == [b"\xff\n\xe4"]

    async def test_aborted_write_leaves_the_old_file_and_nothing_else(self, plain: Daemon, one: Guest, tmp_path: Path) -> None:
        target = tmp_path / "file"
        target.write_bytes(b"old")

        async def stops_half_way() -> AsyncIterator[bytes]:
            yield bytes(MIB)
            raise RuntimeError("the client hung up")

        with pytest.raises(RuntimeError):
            await one.write_file(str(target), stops_half_way())
        await until(lambda: os.listdir(tmp_path) == ["file"])
        stream = one.connection.start("file.write", {"path": str(target)}, data=True)
        await stream.send(bytes(MIB))
        await until(lambda: len(os.listdir(tmp_path)) == 2)
        await one.close()
        again = await plain.open(fresh=False)
        await until(lambda: os.listdir(tmp_path) == ["file"])
        assert target.read_bytes() == b"old"
        await again.close()

    async def test_write_keeps_mode_and_follows_links(self, one: Guest, tmp_path: Path) -> None:
        (tmp_path / "real").write_bytes(b"old")
        (tmp_path / "real").chmod(0o755)
        (tmp_path / "link").symlink_to("real")
        await one.write_file(str(tmp_path / "link"), b"new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").read_bytes() == b"new"
        assert (tmp_path / "real").stat().st_mode & 0o777 == 0o755

    async def test_large_directories_come_in_batches(self, one: Guest, tmp_path: Path) -> None:
        for n in range(3000):
            (tmp_path / f"{'x' * 100}{n}").touch()
        assert len([entry async for entry in one.list_dir(str(tmp_path))]) == 3000

    async def test_errors_are_typed(self, one: Guest, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        base = str(tmp_path)
        for call, kind, code in [
            (one.stat(base + "/none"), errors.FileNotFound, "not_found"),
            (one.read_file(base + "/full"), errors.FileConflict, "is_a_directory"),
            (one.remove(base + "/full"), errors.FileConflict, "not_empty"),
            (one.mkdir(base + "/full", parents=False), errors.FileConflict, "exists"),
            (one.stat(base + "/full/file/x"), errors.FileConflict, "not_a_directory"),
            (one.stat("relative"), errors.InvalidRequest, "invalid"),
            (one.move(base + "/full/file", base + "/full"), errors.FileConflict, "exists"),
            (one.write_file(base + "/full", b""), errors.FileConflict, "is_a_directory"),
            (one.write_file("/proc/none/x", b"x"), errors.PandastackError, None),
        ]:
            with pytest.raises(kind) as caught:
                await call
            if code:
                assert caught.value.guest_code == code

    async def test_making_moving_and_removing(self, one: Guest, tmp_path: Path) -> None:
        base = str(tmp_path)
        assert await one.mkdir(base + "/a/b", mode=0o700)
        assert not await one.mkdir(base + "/a/b")
        await one.write_file(base + "/a/b/file", b"1")
        await one.chmod(base + "/a", mode=0o750, recursive=True)
        assert (tmp_path / "a/b/file").stat().st_mode & 0o777 == 0o750
        await one.move(base + "/a", base + "/c")
        await one.move(base + "/c/b/file", f"/dev/shm/guest-test-{os.getpid()}")
        await one.move(f"/dev/shm/guest-test-{os.getpid()}", base + "/back")
        assert (tmp_path / "back").read_bytes() == b"1"
        await one.remove(base + "/c", recursive=True)
        assert os.listdir(tmp_path) == ["back"]

    async def test_watch_sees_changes_below(self, one: Guest, tmp_path: Path) -> None:
        seen: set[tuple[str, str]] = set()
        async with one.watch(str(tmp_path), recursive=True) as batches:
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "file").write_bytes(b"x")
            (tmp_path / "new").rename(tmp_path / "moved")
            await asyncio.sleep(0.1)
            (tmp_path / "moved" / "file").unlink()
            async for batch in batches:
                seen |= {(event.type, os.path.relpath(event.path_bytes.decode(), tmp_path)) for event in batch.events}
                if ("delete", "moved/file") in seen:
                    break
        assert {("create", "new"), ("move_from", "new"), ("move_to", "moved")} <= seen
        # Where it was when the guest came to look: both names are true at some moment.
        assert {("create", "new/file"), ("create", "moved/file")} & seen

    async def test_a_tree_is_read_in_order_also_while_nothing_moves(self, guest: Guest, tmp_path: Path) -> None:
        root = tmp_path / "tree"
        (root / "a" / "deep").mkdir(parents=True)
        for name in ("a/z", "a.c", "b"):
            (root / name).write_text(name)
        (root / os.fsdecode(b"odd\n\xff")).write_text("odd")
        (root / "link").symlink_to("/nowhere")
        os.mkfifo(root / "pipe")
        (root / ".pandastack-half").write_text("an upload")
        expected = [b"", b"a", b"a/deep", b"a/z", b"a.c", b"b", b"link", b"odd\n\xff", b"pipe"]
        for freeze in (False, True):
            if freeze:
                await guest.seal(freeze=True)
            found = [entry async for entry in guest.scan(root, 9)]
            assert [entry.path_bytes for entry in found] == expected
            assert [entry.type for entry in found] == ["directory"] * 3 + ["file"] * 3 + ["symlink", "file", "other"]
            assert found[6].target_bytes == b"/nowhere"
            status = (root / "b").stat()
            assert (found[5].size, found[5].mtime_ns, found[5].ctime_ns) == (1, status.st_mtime_ns, status.st_ctime_ns)
            paths = [os.fsencode(root) + b"/" + name for name in (b"b", b"link", b"a", b"gone", b"odd\n\xff")]
            hashes = [hashlib.sha256(text).hexdigest() if text else None for text in (b"b", None, None, None, b"odd")]
            assert await guest.digests(paths) == hashes
            _, body = await guest.read_file(root / "b")
            assert b"".join([piece async for piece in body]) == b"b"
            with pytest.raises(errors.TooLarge):
                [entry async for entry in guest.scan(root, 8)]
            with pytest.raises(errors.FileNotFound):
                [entry async for entry in guest.scan(root / "gone", 8)]
        assert await guest.unseal() >= 0
        assert [entry.path_bytes for entry in [entry async for entry in guest.scan(root / "b", 1)]] == [b""]
        assert await guest.digests([b"/gone"] * 1000) == [None] * 1000


class TestMachine:
    async def test_identity_and_seal(self, binary: Path, tmp_path: Path) -> None:
        with running(binary, "pid1", tmp_path) as daemon:
            guest = await daemon.open()
            assert guest.connection.greeting.pid == 1
            await guest.seal()
            with pytest.raises(errors.GuestError) as caught:
                await run(guest, argv=["true"])
            assert caught.value.guest_code == "sealed"
            assert (await guest.health()).sealed
            who = {"sandbox_id": "s", "hostname": "box-1", "entropy": os.urandom(64), "token": "secret", "env": {"B": "2"}}
            report = await guest.identity(unix_ns=time.time_ns() - 10**10, machine_id="0" * 31 + "1", **who)  # type: ignore[arg-type]
            failed = sorted(name for name, step in report.steps.items() if not step.ok)
            assert failed == ["clock", "processes"]  # It may not set this machine's clock, says so, and stays closed.
            assert report.steps["processes"].detail == "not continued: clock failed"
            assert 9.9e9 < report.offset_ns < 12e9
            assert (await guest.health()).sealed
            report = await guest.identity(unix_ns=time.time_ns(), machine_id="0" * 31 + "1", **who)  # type: ignore[arg-type]
            assert {name for name, step in report.steps.items() if step.ok} == {*identity.REQUIRED_STEPS, *identity.LATER_STEPS}
            assert (report.steps["hooks"].detail, report.steps["processes"].detail) == ("none", "0 continued")
            out, _, _ = await run(guest, shell="echo $B; hostname; cat /etc/machine-id; grep box-1 /etc/hosts")
            assert out.splitlines()[:3] == [b"2", b"box-1", b"0" * 31 + b"1"]
            assert not (await guest.health()).sealed
            await guest.close()

    async def test_a_rehearsal_leaves_a_sealed_machine_as_it_was(self, binary: Path, tmp_path: Path) -> None:
        with running(binary, "pid1", tmp_path) as daemon:
            guest = await daemon.open()
            with pytest.raises(errors.InvalidRequest, match="sealed"):
                await identity.rehearse(guest)
            await guest.seal()
            for _ in range(2):
                await identity.rehearse(guest)
            health = await guest.health()
            assert (health.sealed, health.live, health.baked) == (True, 0, 0)
            report = await become(guest)
            assert all(step.ok for step in report.steps.values()), report
            out, _, _ = await run(guest, shell="hostname; cat /etc/hostname; grep -c pandastack /etc/hosts; cat /etc/machine-id")
            assert out.split() == [b"box-2", b"box-2", b"1", b"0" * 32]
            assert not any("-version" in entry.argv for entry in await guest.list_processes())
            await guest.seal(freeze=True)
            with pytest.raises(errors.InvalidRequest, match="sealed"):
                await identity.rehearse(guest)
            await guest.close()

    async def test_resources_and_ports(self, plain: Daemon, one: Guest) -> None:
        resources = await one.resources()
        assert resources.memory_total_bytes > resources.memory_available_bytes > 0
        with socket.create_server(("127.0.0.1", 0)) as server:
            ports = {entry.port: entry for entry in await one.ports()}
            assert ports[server.getsockname()[1]].address == "127.0.0.1"
        assert plain.port not in ports

    async def test_idle_time_counts_only_without_processes(self, one: Guest) -> None:
        await run(one, argv=["true"])
        await asyncio.sleep(0.1)
        assert (await one.health()).idle_ms >= 100
        await one.start(ProcessSpec(argv=["sleep", "20"], id="busy"))
        assert (await one.health()).idle_ms == 0
        await one.signal("busy", 9)

    async def test_idle_daemon_burns_nothing(self, plain: Daemon, one: Guest) -> None:
        await run(one, argv=["true"])
        used = [Path(f"/proc/{plain.pid}/stat").read_text().split()[13:15]]
        await asyncio.sleep(1)
        used.append(Path(f"/proc/{plain.pid}/stat").read_text().split()[13:15])
        assert used[0] == used[1]
        assert plain.rss_mib() < 24


COUNTING = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.002; done"


def below(pid: int) -> dict[int, str]:
    """The states of all threads of a process's descendants, seen from outside."""
    parents, states = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    for found in parents:
        above = found
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and found != pid:
            for thread in Path(f"/proc/{found}/task").glob("*/stat"):
                with contextlib.suppress(OSError):
                    states[int(thread.parent.name)] = thread.read_text().rpartition(")")[2].split()[0]
    return states


class Follower:
    """Collects a process's stdout in the background."""

    def __init__(self, stream: ProcessStream) -> None:
        self.stream, self.seen = stream, bytearray()
        self.task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for piece in self.stream:
            assert piece.offset == len(self.seen)
            self.seen += piece.data

    async def shows(self, text: bytes, after: int = 0) -> None:
        try:
            await until(lambda: text in self.seen[after:])
        except TimeoutError:
            pytest.fail(f"no {text!r} in {bytes(self.seen)!r}")


async def become(
    guest: Guest, *, hook_timeout_s: float = 10.0, late_s: float = 0.0, env: dict[str, str] | None = None
) -> wire.IdentityReport:
    who = {"sandbox_id": "s", "hostname": "box-2", "entropy": os.urandom(64), "token": "new", "env": env or {}, "machine_id": "0" * 32}
    return await guest.identity(unix_ns=time.time_ns() - round(late_s * 1e9), hook_timeout_s=hook_timeout_s, **who)  # type: ignore[arg-type]


class TestFreeze:
    async def test_nothing_moves_and_nothing_is_missing_afterwards(self, daemon: Daemon, guest: Guest) -> None:
        counting = Follower(await guest.run(ProcessSpec(shell=COUNTING, id="counting")))
        await counting.shows(b"20\n")
        sealed = await guest.seal(freeze=True)
        assert sealed.live == 1
        assert sealed.frozen in (1, 2)  # The shell, and a `sleep` unless one had just ended.
        await asyncio.sleep(0.1)
        states, size = below(daemon.pid), len(counting.seen)
        assert set(states.values()) <= {"T", "Z"}
        await asyncio.sleep(0.3)
        assert (below(daemon.pid), len(counting.seen)) == (states, size)
        health = await guest.health()
        assert (health.sealed, health.frozen, health.live) == (True, True, 1)
        assert await guest.seal(freeze=True) == sealed
        assert await guest.unseal() == sealed.frozen
        assert await guest.unseal() == 0
        health = await guest.health()
        assert (health.sealed, health.frozen) == (False, False)
        await until(lambda: len(counting.seen) > size + 100)
        await guest.signal("counting", 9)
        await counting.task
        lines = bytes(counting.seen).split()
        assert lines == [b"%d" % n for n in range(1, len(lines) + 1)]

    async def test_a_seal_without_freeze_refuses_until_it_is_taken_back(self, guest: Guest) -> None:
        counting = Follower(await guest.run(ProcessSpec(shell=COUNTING, id="counting")))
        assert await guest.seal() == wire.Sealed(live=1, frozen=0)
        with pytest.raises(errors.GuestError) as refused:
            await run(guest, argv=["true"])
        assert refused.value.guest_code == "sealed"
        size = len(counting.seen)
        await until(lambda: len(counting.seen) > size)
        # A seal may become a freeze, and a freeze no mere seal.
        assert (await guest.seal(freeze=True)).frozen > 0
        assert (await guest.seal()).frozen > 0
        assert await guest.unseal() > 0
        assert (await run(guest, argv=["echo", "on"]))[0] == b"on\n"
        await guest.seal()
        assert await guest.unseal() == 0
        assert (await run(guest, argv=["echo", "on"]))[0] == b"on\n"

    async def test_what_its_user_had_stopped_stays_stopped(self, daemon: Daemon, guest: Guest) -> None:
        await guest.start(ProcessSpec(argv=["sleep", "60"], id="stopped"))
        await guest.signal("stopped", signal.SIGSTOP)
        await until(lambda: list(below(daemon.pid).values()) == ["T"])
        await guest.start(ProcessSpec(argv=["sleep", "60"], id="free"))
        assert (await guest.seal(freeze=True)).frozen == 1
        assert set(below(daemon.pid).values()) == {"T"}
        assert await guest.unseal() == 1
        await until(lambda: sorted(below(daemon.pid).values()) == ["S", "T"])
        await guest.signal("stopped", signal.SIGCONT)
        await until(lambda: sorted(below(daemon.pid).values()) == ["S", "S"])

    @pytest.mark.parametrize(
        "foreground",
        ["cat", "python3 -uc 'import sys; [print(line.strip()) for line in sys.stdin]'", "bash --norc -ic cat", "(cat; true) | cat"],
        ids=["cat", "python", "shell in shell", "pipeline"],
    )
    async def test_a_shell_with_job_control_does_not_notice(self, guest: Guest, foreground: str) -> None:
        shell = await guest.run(ProcessSpec(argv=["bash", "--norc", "--noprofile", "-i"], stdin=True, pty=(24, 80), id="shell"))
        screen = Follower(shell)
        await shell.write(b"PS1='pro''mpt> '; sleep 60 &\n")
        await screen.shows(b"prompt> ")
        await shell.write(b"echo rea''dy; " + foreground.encode() + b"; echo st''atus $?\n")
        await screen.shows(b"ready\r\n")  # What is typed earlier may be taken by the shell.
        for turn in range(8):
            at = len(screen.seen)
            await shell.write(b"line %d\n" % turn)
            await screen.shows(b"line %d\r\nline %d\r\n" % (turn, turn), at)
            assert (await guest.seal(freeze=True)).frozen >= 3
            await asyncio.sleep(0.02 * (turn % 3))
            await guest.unseal()
        await shell.write(b"\x04")
        await screen.shows(b"status 0\r\n")
        await shell.write(b"jobs; exit\n")
        await screen.shows(b"\r\nexit\r\n")
        assert b"Stopped" not in screen.seen
        assert b"Running" in screen.seen
        await guest.signal("shell", 9)

    async def test_who_spawns_without_end_is_frozen_completely(self, daemon: Daemon, guest: Guest) -> None:
        spawning = "import os, time\nwhile True:\n    if os.fork() == 0:\n        time.sleep(.02); os._exit(0)\n"
        spawning += "    try:\n        while os.waitpid(-1, os.WNOHANG)[0]: pass\n    except OSError: pass\n"
        # One that is never there for two looks: each process lives for a moment only, and leaves another.
        hopping = "import os\nwhile True:\n    if os.fork(): os._exit(0)\n"
        await guest.start(ProcessSpec(argv=["python3", "-c", spawning], id="spawning"))
        if guest.connection.greeting.pid == 1:
            await guest.start(ProcessSpec(argv=["python3", "-c", hopping], id="hopping"))
        await asyncio.sleep(0.3)
        for _ in range(5):
            assert (await guest.seal(freeze=True)).frozen >= 1
            states = below(daemon.pid)
            assert set(states.values()) <= {"T", "Z"}
            await asyncio.sleep(0.1)
            assert below(daemon.pid) == states
            assert await guest.unseal() >= 1
            await asyncio.sleep(0.05)
        if guest.connection.greeting.pid != 1:
            await guest.signal("spawning", 9)

    async def test_every_thread_stops_even_without_the_first(self, daemon: Daemon, guest: Guest) -> None:
        headless = "import ctypes, threading, time\ndef spin():\n    while True: pass\n"
        headless += (
            "for _ in range(4): threading.Thread(target=spin).start()\nprint('up', flush=True)\nctypes.CDLL(None).pthread_exit(None)\n"
        )
        stream = await guest.run(ProcessSpec(argv=["python3", "-c", headless], id="headless"))
        await anext(stream)
        waiting = "import ctypes, time\nif ctypes.CDLL(None).syscall(56, 0x4000 | 17, 0, 0, 0, 0) == 0:\n    time.sleep(60)\n"
        if os.uname().machine == "x86_64":  # The parent of a vfork cannot be stopped before its child lets it go.
            await guest.start(ProcessSpec(argv=["python3", "-c", waiting], id="vfork"))
            await until(lambda: "D" in below(daemon.pid).values())
        assert (await guest.seal(freeze=True)).frozen == (3 if os.uname().machine == "x86_64" else 1)
        assert "R" not in below(daemon.pid).values()
        assert "S" not in below(daemon.pid).values()
        await guest.unseal()
        await until(lambda: "R" in below(daemon.pid).values())
        # Nor does the end of the first thread save the others from being killed.
        assert await guest.signal("headless", 9) == 1
        await until(lambda: "R" not in below(daemon.pid).values())

    async def test_a_call_waits_for_the_end_of_the_freeze(self, guest: Guest, tmp_path: Path) -> None:
        await guest.seal(freeze=True)
        data = os.urandom(3 * MIB)
        calls = [
            asyncio.create_task(run(guest, argv=["cat"], stdin=b"in")),
            asyncio.create_task(guest.write_file(str(tmp_path / "file"), pieces(data))),
            asyncio.create_task(guest.resources()),
        ]
        gone = asyncio.create_task(run(guest, argv=["touch", str(tmp_path / "never")]))
        await asyncio.sleep(0.3)
        assert not any(call.done() for call in calls)
        assert not (tmp_path / "file").exists()
        gone.cancel()
        await guest.health()
        await guest.unseal()
        out, written, _ = await asyncio.gather(*calls)
        assert (out[0], written, (tmp_path / "file").read_bytes()) == (b"in", len(data), data)
        assert (await guest.health()).live == 0
        assert not (tmp_path / "never").exists()

    async def test_a_call_of_a_session_that_ended_meanwhile_never_runs(self, daemon: Daemon, tmp_path: Path) -> None:
        old = await daemon.open()
        await old.seal(freeze=True)
        calls = [
            asyncio.create_task(old.start(ProcessSpec(argv=["touch", str(tmp_path / "process")]))),
            asyncio.create_task(old.write_file(str(tmp_path / "file"), b"x")),
            asyncio.create_task(old.mkdir(str(tmp_path / "directory"))),
        ]
        await old.health()  # They have arrived before it.
        old.connection._shut(errors.GuestGone("the host died"))
        new = await daemon.open(fresh=False)
        await asyncio.gather(*calls, return_exceptions=True)
        await new.unseal()
        await run(new, argv=["sleep", "0.2"])
        assert {path.name for path in tmp_path.iterdir()} & {"process", "file", "directory"} == set()
        assert (await new.health()).live == 0
        await new.close()

    async def test_time_in_a_freeze_is_not_a_processs_own(self, guest: Guest) -> None:
        begun = time.monotonic()
        limited = asyncio.create_task(run(guest, argv=["sleep", "60"], timeout_s=1))
        await asyncio.sleep(0.3)
        await guest.seal(freeze=True)
        await asyncio.sleep(1.2)
        await guest.unseal()
        await asyncio.sleep(0.2)
        assert not limited.done()
        assert (await limited)[2].reason == "timeout"
        assert 2.1 < time.monotonic() - begun < 6

    async def test_an_identity_continues_and_ends_the_sessions_of_the_machine_before(self, binary: Path, tmp_path: Path) -> None:
        with running(binary, "pid1", tmp_path) as daemon:
            guest, other = await daemon.open(), await daemon.connect()
            counting = Follower(await guest.run(ProcessSpec(shell=COUNTING, id="counting")))
            await counting.shows(b"20\n")
            stopped = (await guest.seal(freeze=True)).frozen
            foreign = asyncio.create_task(other.write_file(str(tmp_path / "foreign"), b"x"))
            ours = asyncio.create_task(run(guest, shell="echo $NEW; hostname"))
            await other.health()
            report = await become(guest, env={"NEW": "1"}, late_s=10)
            assert not report.steps["clock"].ok
            assert report.steps["processes"] == wire.IdentityStep(ok=False, detail="not continued: clock failed")
            health = await guest.health()
            assert (health.sealed, health.frozen) == (True, True)
            assert set(below(daemon.pid).values()) <= {"T", "Z"}
            assert not ours.done()
            report = await become(guest, env={"NEW": "1"})
            assert all(step.ok for step in report.steps.values())
            assert report.steps["processes"].detail == f"{stopped} continued"
            with pytest.raises(errors.GuestGone):
                await foreign
            assert (await ours)[0] == b"1\nbox-2\n"
            size = len(counting.seen)
            await until(lambda: len(counting.seen) > size)
            assert not (tmp_path / "foreign").exists()
            again = await daemon.connect("new")
            assert not (await again.health()).sealed
            await again.close()
            await guest.close()

    async def test_a_host_over_tcp_takes_over_from_stdin_and_back(self, binary: Path, tmp_path: Path) -> None:
        with running(binary, "pid1", tmp_path) as daemon:
            old, other = await daemon.open(), await daemon.connect()
            await old.seal(freeze=True)
            assert all(step.ok for step in (await become(other)).steps.values())
            with contextlib.suppress(errors.PandastackError):
                await old.health(timeout_s=0.2)
            old.connection._shut(errors.GuestGone("the host died"))
            new = await daemon.open(fresh=False)
            assert (await run(new, argv=["echo", "on"]))[0] == b"on\n"
            await other.close()
            await new.close()

    @pytest.mark.parametrize(
        ("method", "params"),
        [
            ("machine.seal", {"freeze": 1}),
            ("machine.seal", {"freeze": True, "reason": "a b"}),
            ("machine.seal", {"freeze": True, "reason": "x" * 33}),
            ("machine.seal", {"freeze": True, "reason": ""}),
            ("machine.seal", {"freeze": True, "hook_timeout_ms": 0}),
            ("machine.seal", {"freeze": True, "hook_timeout_ms": 120_001}),
            ("machine.seal", {"freeze": True, "hook_timeout_ms": 1.5}),
            ("machine.seal", {"freeze": True, "now": True}),
            ("machine.unseal", {"force": True}),
            ("machine.identity", {"hook_timeout_ms": -1}),
        ],
    )
    async def test_wrong_params_change_nothing(self, one: Guest, method: str, params: dict[str, object]) -> None:
        with pytest.raises(errors.InvalidRequest) as refused:
            await one.connection.request(method, params, wire.Empty, timeout_s=5)
        assert refused.value.guest_code == "invalid"
        health = await one.health()
        assert (health.sealed, health.frozen) == (False, False)


class TestHooks:
    def write(self, tmp_path: Path, name: str, script: str, mode: int = 0o755) -> None:
        (tmp_path / "hooks").mkdir(exist_ok=True)
        (tmp_path / "hooks" / name).write_text("#!/bin/sh\n" + script)
        (tmp_path / "hooks" / name).chmod(mode)

    async def test_before_snapshot_runs_first_and_is_nobodys_process(self, guest: Guest, tmp_path: Path) -> None:
        said = tmp_path / "said"
        self.write(
            tmp_path, "before-snapshot", f'echo "$0 $# $PANDASTACK_REASON $PWD $USER $HOME" > {said}; sleep 0.5; echo done >> {said}\n'
        )
        await asyncio.sleep(0.1)
        sealing = asyncio.create_task(guest.seal(freeze=True, reason="fork"))
        await until(lambda: said.exists() and said.read_text())
        health = await guest.health()
        assert (health.sealed, health.live) == (False, 0)
        assert health.idle_ms >= 100
        assert await guest.list_processes() == []
        assert await sealing == wire.Sealed(live=0, frozen=0)
        user = (await asyncio.to_thread(subprocess.run, ["id", "-un"], capture_output=True, text=True, check=True)).stdout.strip()
        assert said.read_text().splitlines()[0] == f"{tmp_path}/hooks/before-snapshot 0 fork / {user} {os.environ.get('HOME', '/root')}"
        assert said.read_text().endswith("done\n")
        said.write_text("")
        await guest.seal(freeze=True)  # It is sealed already: there is nothing before it.
        assert said.read_text() == ""
        await guest.unseal()

    @pytest.mark.parametrize(
        ("script", "told"),
        [
            ("echo one; echo two >&2; exit 3\n", "ended with exit code 3: one\ntwo"),
            ("kill -9 $$\n", "was ended by signal 9"),
            ("echo slow; sleep 61.25 & sleep 61.25\n", "did not end within 300ms: slow"),
            ("echo slow; setsid sleep 61.25 & trap '' TERM INT; sleep 61.25\n", "did not end within 300ms: slow"),
        ],
        ids=["code", "signal", "slow", "slow tree"],
    )
    async def test_a_before_snapshot_that_fails_leaves_all_as_it_was(
        self, daemon: Daemon, guest: Guest, tmp_path: Path, script: str, told: str
    ) -> None:
        counting = Follower(await guest.run(ProcessSpec(shell=COUNTING, id="counting")))
        self.write(tmp_path, "before-snapshot", script)
        begun = time.monotonic()
        with pytest.raises(errors.HookFailed) as refused:
            await guest.seal(freeze=True, hook_timeout_s=0.3)
        assert time.monotonic() - begun < 5
        assert told in refused.value.message
        assert refused.value.guest_code == "hook_failed"
        health = await guest.health()
        assert (health.sealed, health.frozen) == (False, False)
        size = len(counting.seen)
        await until(lambda: len(counting.seen) > size)
        await guest.signal("counting", 9)
        await until(lambda: not below(daemon.pid))

    async def test_what_cannot_be_started_fails_and_what_may_not_is_none(self, one: Guest, tmp_path: Path) -> None:
        self.write(tmp_path, "before-snapshot", "exit 1\n", mode=0o644)
        await one.seal()
        await one.unseal()
        (tmp_path / "hooks/before-snapshot").write_text("no interpreter")
        (tmp_path / "hooks/before-snapshot").chmod(0o755)
        with pytest.raises(errors.HookFailed, match="exec format error"):
            await one.seal()
        assert not (await one.health()).sealed

    async def test_a_host_that_hangs_up_stops_the_hook_and_nothing_else(self, plain: Daemon, one: Guest, tmp_path: Path) -> None:
        self.write(tmp_path, "before-snapshot", "sleep 61.5 & sleep 61.5\n")
        sealing = asyncio.create_task(one.seal(freeze=True))
        await until(lambda: len(below(plain.pid)) == 3)
        sealing.cancel()
        await until(lambda: not below(plain.pid))
        (tmp_path / "hooks/before-snapshot").unlink()
        health = await one.health()
        assert (health.sealed, health.frozen) == (False, False)
        assert (await run(one, argv=["echo", "on"]))[0] == b"on\n"

    async def test_what_a_hook_leaves_behind_lives_on(self, daemon: Daemon, guest: Guest, tmp_path: Path) -> None:
        self.write(tmp_path, "before-snapshot", "sleep 60 &\n")
        begun = time.monotonic()
        assert await guest.seal(freeze=True) == wire.Sealed(live=0, frozen=1)
        assert time.monotonic() - begun < 2
        await guest.unseal()
        await until(lambda: list(below(daemon.pid).values()) == ["S"])
        assert (await guest.health()).live == 1

    async def test_after_restore_runs_as_the_new_machine_before_anything_else(self, binary: Path, tmp_path: Path) -> None:
        said = tmp_path / "said"
        self.write(
            tmp_path,
            "after-restore",
            f'echo "$PANDASTACK_REASON $NEW $PANDASTACK_SANDBOX_ID $(hostname)" > {said}; wc -c < {tmp_path}/count >> {said}\n',
        )
        with running(binary, "pid1", tmp_path) as daemon:
            guest = await daemon.open()
            await guest.start(ProcessSpec(shell=f"while :; do printf x >> {tmp_path}/count; done", id="counting"))
            await until(lambda: (tmp_path / "count").exists())
            stopped = (await guest.seal(freeze=True)).frozen
            size = (tmp_path / "count").stat().st_size
            report = await become(guest, env={"NEW": "yes"})
            assert said.read_text() == f"restore yes s box-2\n{size}\n"
            assert report.steps["hooks"] == wire.IdentityStep(ok=True, detail="run")
            assert report.steps["processes"].detail == f"{stopped} continued"
            await until(lambda: (tmp_path / "count").stat().st_size > size)
            await guest.close()

    @pytest.mark.parametrize(
        ("script", "told"), [("echo no; exit 4\n", "ended with exit code 4: no"), ("sleep 60 & sleep 60\n", "did not end within 300ms")]
    )
    async def test_an_after_restore_that_fails_leaves_it_frozen(self, binary: Path, tmp_path: Path, script: str, told: str) -> None:
        self.write(tmp_path, "after-restore", script)
        with running(binary, "pid1", tmp_path) as daemon:
            guest = await daemon.open()
            await guest.start(ProcessSpec(shell=COUNTING, id="counting"))
            await guest.seal(freeze=True)
            with pytest.raises(errors.HookFailed, match=told):
                await identity.confirm(guest, identity.fresh("s", "box-2", {}), hook_timeout_s=0.3)
            health = await guest.health()
            assert (health.sealed, health.frozen) == (True, True)
            await until(lambda: set(below(daemon.pid).values()) <= {"T", "Z"})
            # Nobody is told to run a hook on a machine that is not itself.
            (tmp_path / "hooks/after-restore").write_text(f"#!/bin/sh\ntouch {tmp_path}/run\n")
            report = await become(guest, late_s=10)
            assert report.steps["hooks"] == wire.IdentityStep(ok=False, detail="not run: clock failed")
            assert not (tmp_path / "run").exists()
            await identity.confirm(guest, identity.fresh("s", "box-2", {}))
            assert (tmp_path / "run").exists()
            await guest.close()


class TestSessions:
    async def test_new_session_on_an_old_stream(self, plain: Daemon) -> None:
        """A host died with a frame half sent; the next one pads, and is not glued to it."""
        old = await plain.open()
        started = await old.start(ProcessSpec(argv=["sleep", "30"]))
        old.connection._shut(errors.GuestGone("the host died"))
        half = b"".join(wire.encode(wire.Kind.DATA, 1, bytes(1000), 1))
        for cut in (1, 11, 12, 500):
            plain.socket.sendall(half[:cut])
            again = await plain.open(fresh=False)
            assert [entry.id for entry in await again.list_processes() if entry.running] == [started.id]
            again.connection._shut(errors.GuestGone("the host died"))
        last = await plain.open(fresh=False)
        await last.signal(started.id, 9)
        await last.close()

    async def test_old_output_is_discarded(self, plain: Daemon) -> None:
        old = await plain.open()
        await old.run(ProcessSpec(shell="yes"))
        await asyncio.sleep(0.2)
        old.connection._shut(errors.GuestGone("the host died"))
        again = await plain.open(fresh=False)
        assert (await run(again, argv=["echo", "clean"]))[0] == b"clean\n"
        for entry in await again.list_processes():
            if entry.running:
                await again.signal(entry.id, 9)
        await again.close()

    async def test_daemon_outlives_stdin_and_is_reached_over_tcp(self, plain: Daemon) -> None:
        first = await plain.open()
        started = await first.start(ProcessSpec(argv=["sleep", "30"]))
        await first.close()
        plain.socket.shutdown(socket.SHUT_RDWR)
        second, third = await plain.connect(), await plain.connect()
        assert [entry.id for entry in await second.list_processes()] == [started.id]
        await third.signal(started.id, 9)
        assert (await second.wait(started.id)).signal == 9
        await second.close()
        await third.close()

    async def test_tcp_needs_the_token(self, binary: Path, tmp_path: Path) -> None:
        with running(binary, "pid1", tmp_path) as daemon:
            guest = await daemon.open()
            await guest.identity(
                sandbox_id="s", hostname="box", unix_ns=time.time_ns(), entropy=bytes(64), token="secret", env={}, machine_id=""
            )
            for wrong in (None, "", "secreT"):
                with pytest.raises(errors.GuestProtocolError) as caught:
                    await daemon.connect(wrong)
                assert caught.value.guest_code == "token"
            right = await daemon.connect("secret")
            await right.health()
            await right.close()
            await guest.close()

    async def test_small_calls_pass_bulk(self, one: Guest) -> None:
        stream = await one.run(ProcessSpec(shell="yes"))
        slowest = 0.0
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(stream.wait())
            for _ in range(20):
                begun = time.monotonic()
                await one.health()
                slowest = max(slowest, time.monotonic() - begun)
            await one.signal(stream.id, 9)
        assert reader.result().signal == 9
        assert slowest < 1


class TestWarm:
    @pytest.fixture
    async def warm(self, daemon: Daemon, guest: Guest) -> AsyncIterator[Guest]:
        if os.geteuid() != 0:
            pytest.skip("the warm interpreter's directory needs root")
        started = await guest.warm(["pandastack:python", "json"], env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"})
        assert len(daemon.warm_folders()) == 1
        yield guest
        # Only the daemon dies with the test; the interpreter would live on, and keep its socket.
        await guest.signal(started.id, signal.SIGKILL)
        await until(lambda: not daemon.warm_folders())

    CODES = (
        "import sys; print(sys.argv, __name__, sys.path[0] == '')",
        "print(sorted(globals()))",
        "1/0",
        "def f(:",
        "import sys; sys.exit('bye')",
        "import sys; sys.exit(300)",
        "raise SystemExit",
        "import os; os.kill(os.getpid(), 15)",
        "raise KeyboardInterrupt",
        "import os; os.write(1, b'a'); print('b', end=''); os._exit(3)",
        "import atexit; atexit.register(print, 'last'); print('first')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(.1), print('t'))).start(); print('m')",
        "import sys; print(sys.stdin.read().upper()); print('e', file=sys.stderr)",
        "import signal; print(signal.getsignal(signal.SIGINT).__name__, signal.getsignal(signal.SIGCHLD))",
        "import os; print(os.getsid(0) == os.getpid(), os.getcwd(), os.environ['X'], sorted(os.listdir('/proc/self/fd')))",
        "try:\n    {}['a']\nexcept KeyError:\n    raise ValueError('b')",
        "class A:\n    def __del__(self): print('gone', json)\nimport json\na = A()\nprint('end')",
        "class A:\n    def __del__(self): print('gone')\na = [A()]; a.append(a)",
        "import os, threading, time\ndef f():\n    time.sleep(.1); os.write(1, b'late')\nthreading.Thread(target=f).start()",
        "import atexit\nclass F:\n    def __call__(self): 1/0\n    def __repr__(self): return 'F'\n"
        "atexit.register(print, 'after'); atexit.register(F())",
        "import sys, atexit; atexit.register(lambda: print('x', file=sys.stderr)); sys.exit(['a'])",
        "import sys; sys.exit(-1)",
        "import sys; sys.exit(1 << 70)",
        "import os; print('x'); os.close(1)",
        "import sys; sys.excepthook = lambda *a: print('mine', a[0]); 1/0",
        "import sys\ndef f(*a): raise KeyError('second')\nsys.excepthook = f\n1/0",
        "import multiprocessing as m\nif __name__ == '__main__':\n    p = m.get_context('fork').Process(target=print, args=('c',))\n"
        "    p.start(); p.join(); print(p.exitcode)",
        "import subprocess; print(subprocess.run(['echo', 'a'], capture_output=True).stdout); subprocess.Popen(['sleep', '0'])",
        "from concurrent.futures import ThreadPoolExecutor as T; T(2).submit(lambda: print('pool'))",
        "import os\nif os.fork() == 0:\n    print('child')\nelse:\n    os.wait(); print('parent')",
        "import ctypes; ctypes.CDLL(None).printf(b'from C')",
        "import logging, sys; logging.basicConfig(stream=sys.stdout); logging.warning('w')",
        "import time; print(time.tzname, time.localtime(0)[:6])",
        "f = open(1, 'w', closefd=False); f.write('kept')",
        "import sys; f = open(1, 'w', closefd=False); f.write('by another'); sys.kept = f",
        "import tempfile; d = tempfile.TemporaryDirectory(); t = tempfile.NamedTemporaryFile('w'); t.write('a')",
    )

    async def test_a_fork_behaves_as_a_fresh_python(self, warm: Guest) -> None:
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        for code in self.CODES:
            common = {"env": {"PATH": path, "X": "1", "TZ": "Asia/Tokyo"}, "stdin": b"in", "cwd": "/tmp"}
            forked = await run(warm, python=code, **common)
            fresh = await run(warm, argv=["python3", "-c", code], **common)
            assert forked[2].id in {entry.id for entry in await warm.list_processes() if entry.warm}, code
            assert forked[:2] == fresh[:2], code
            assert (forked[2].exit_code, forked[2].signal) == (fresh[2].exit_code, fresh[2].signal), code
        assert (await warm.health()).baked == 1

    async def test_forks_differ_in_random_numbers_and_can_be_killed(self, warm: Guest) -> None:
        path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        outs = [await run(warm, python="import random; print(random.random())", env=path) for _ in range(3)]
        assert len({out for out, _, _ in outs}) == 3
        _, _, end = await run(warm, python="import time; time.sleep(60)", env=path, timeout_s=0.2)
        assert end.reason == "timeout"
        assert (await run(warm, python="print(1)", env=path))[0] == b"1\n"

    async def test_a_fork_that_left_its_session_is_killed_with_its_tree(self, warm: Guest) -> None:
        path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        mark = f"left-{os.getpid()}-{id(self)}"
        leave = "import os, time, ctypes\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        leave += f"        ctypes.CDLL(None).prctl(15, b'{mark[:15]}')\n        time.sleep(60)\n    os._exit(0)\n"
        leave += "os.wait()\nprint('left', flush=True)\ntime.sleep(60)"
        async with await warm.run(ProcessSpec(python=leave, env=path)) as stream:
            assert (await anext(stream)).data.startswith(b"left")
            assert await warm.signal(stream.id, signal.SIGKILL) >= 2
            assert (await stream.wait()).reason == "killed"
        assert mark[:15] not in subprocess.run(["ps", "axo", "comm"], capture_output=True, text=True, check=True).stdout
        assert (await run(warm, python="print(1)", env=path))[0] == b"1\n"

    async def test_it_is_frozen_with_its_spare_and_serves_on(self, daemon: Daemon, warm: Guest) -> None:
        path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        for _ in range(3):
            assert (await warm.seal(freeze=True)).frozen == 2
            assert set(below(daemon.pid).values()) == {"T"}
            waiting = asyncio.create_task(run(warm, python="print(1)", env=path))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            assert await warm.unseal() == 2
            out, _, end = await waiting
            assert out == b"1\n"
            assert end.id in {entry.id for entry in await warm.list_processes() if entry.warm}
            await asyncio.sleep(0.3)  # The next spare.

    async def test_the_spare_is_nobodys_process_and_is_replaced(self, warm: Guest) -> None:
        path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        health = await warm.health()
        assert (health.live, health.baked) == (0, 1)
        parent = int((await run(warm, python="import os; print(os.getppid())", env=path))[0])
        for _ in range(3):
            out, _, _ = await run(warm, python="import os, time; time.sleep(.3); print(os.getppid())", env=path)
            assert int(out) == parent
        outs = await asyncio.gather(*(run(warm, python=f"print({n})", env=path) for n in range(20)))
        assert [out for out, _, _ in outs] == [b"%d\n" % n for n in range(20)]
        assert (await warm.health()).live == 0

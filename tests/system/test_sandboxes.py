"""From create to delete, over every build of runsc at hand: what a user does in the first hour."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.sdk.async_sandboxes import AsyncSandbox
from pandastack.sdk.client import AsyncClient, Client

from .conftest import MakeSandbox
from .servers import Server, until


def test_create_exec_and_delete(any_client: Client) -> None:
    with any_client.sandboxes.create("base", metadata={"story": "one"}, env={"WORD": "hello"}) as sandbox:
        assert (sandbox.status, sandbox.runtime, sandbox.template_actual) == ("running", "gvisor", "base")
        result = sandbox.exec("echo $WORD; echo oops >&2; exit 3")
        assert (result.stdout, result.stderr, result.exit_code) == ("hello\n", "oops\n", 3)
        assert sandbox.exec(["printf", "%s|", "a b", "$c"]).stdout == "a b|$c|"
        assert sandbox.exec("id -un; pwd; echo $HOME").stdout == "root\n/root\n/root\n"
        assert sandbox.exec("whoami; echo $HOME", user="user").stdout == "user\n/home/user\n"
        assert sandbox.exec("cat", stdin=b"\xff\x00").stdout_bytes == b"\xff\x00"
        assert sandbox.exec("kill -TERM $$").exit_code == 128 + 15
        assert [found.id for found in any_client.sandboxes.list(metadata={"story": "one"})] == [sandbox.id]
    with pytest.raises(errors.SandboxNotFound):
        sandbox.refresh()
    with pytest.raises(errors.SandboxNotFound):
        sandbox.exec("true")


def test_python_code_runs_in_an_interpreter_that_was_warm_before(any_make: MakeSandbox) -> None:
    sandbox = any_make("code-interpreter")
    code = "import sys; warm = 'numpy' in sys.modules\nimport numpy as np\nprint(warm, np.arange(10).sum(), __name__)"
    assert sandbox.run_code(code).stdout == "True 45 __main__\n"
    # Every run is a process of its own.
    sandbox.run_code("import numpy; numpy.left_over = 1; left_over = 1")
    assert sandbox.run_code("import numpy; print(hasattr(numpy, 'left_over'), 'left_over' in globals())").stdout == "False False\n"
    failed = sandbox.run_code("import sys; print('before'); sys.exit(7)")
    assert (failed.stdout, failed.exit_code) == ("before\n", 7)
    wrong = sandbox.run_code("1 / 0")
    assert wrong.exit_code == 1
    assert "ZeroDivisionError" in wrong.stderr
    assert sandbox.run_code("import os; print(os.getuid())", user="user").stdout == "1000\n"
    assert sandbox.run_code("echo $((40 + 2))", "bash").stdout == "42\n"


def test_output_arrives_while_the_command_runs(any_make: MakeSandbox) -> None:
    sandbox = any_make()
    # The command can only end after we have seen its first line.
    with sandbox.stream("echo first; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo last >&2; exit 4", timeout_seconds=60) as stream:
        first = next(stream)
        assert (first.channel, first.text) == ("stdout", "first\n")
        sandbox.filesystem.write("/tmp/go", b"")
        assert [(event.channel, event.text) for event in stream] == [("stderr", "last\n")]
    assert stream.exit_code == 4


def test_files_of_every_kind_come_back_as_they_went(any_make: MakeSandbox) -> None:
    fs = any_make().filesystem
    content = os.urandom(1 << 20)
    assert fs.write("/work/data", content, mode="0640", owner="user")["bytes"] == 1 << 20
    assert fs.read("/work/data") == content
    assert fs.read("/work/data", offset=1000, length=17) == content[1000:1017]
    assert fs.read("/work/data", offset=(1 << 20) - 3) == content[-3:]
    found = fs.stat("/work/data")
    assert (found.size, found.mode, found.uid) == (1 << 20, "0640", 1000)
    names = [b"a b+c%20&d=e#f?g", b"\xff\xfe not utf-8", "snowman \u2603".encode(), b"new\nline", b"-rf", b"'\"$`\\", b"x" * 255]
    for number, name in enumerate(names):
        fs.write(b"/work/names/" + name, str(number))
    assert sorted(os.fsencode(entry.name) for entry in fs.listdir("/work/names")) == sorted(names)
    for number, name in enumerate(names):
        assert fs.read(b"/work/names/" + name) == str(number).encode()
    fs.move("/work/data", "/work/moved")
    assert not fs.exists("/work/data")
    assert fs.chmod("/work/moved", 0o600).mode == "0600"
    with pytest.raises(errors.FileConflict):
        fs.move("/work/moved", "/work/names")
    fs.remove("/work/names")
    assert [entry.name for entry in fs.listdir("/work")] == ["moved"]
    with pytest.raises(FileNotFoundError):
        fs.read("/work/names")


def test_changes_of_files_are_seen_as_they_happen(any_make: MakeSandbox) -> None:
    sandbox = any_make()
    sandbox.filesystem.mkdir("/work/watched")
    with sandbox.filesystem.watch("/work/watched") as changes:
        sandbox.exec("echo x > /work/watched/one; rm /work/watched/one; mkdir /work/watched/two")
        seen: list[tuple[str, str]] = []
        while ("create", "/work/watched/two") not in seen:
            event = next(changes)
            seen.append((event.type, event.path))
    assert ("create", "/work/watched/one") in seen
    assert ("delete", "/work/watched/one") in seen


def test_a_background_process_can_be_left_and_found_again(any_make: MakeSandbox, any_client: Client) -> None:
    sandbox = any_make()
    process = sandbox.processes.start("i=0; while true; do echo $i; i=$((i+1)); sleep 0.02; done")
    output = process.output()
    seen = bytearray()
    while len(seen) < 50:
        seen += next(output).data
    output.close()
    # Another program that knows nothing but two ids goes on where this one stopped.
    again = any_client.sandboxes.get(sandbox.id).processes.get(process.id)
    assert again.running
    output = again.output(stdout_offset=len(seen))
    while len(seen) < 400:
        event = next(output)
        assert event.offset == len(seen)
        seen += event.data
    output.close()
    numbers = bytes(seen).decode().split("\n")[:-1]
    assert numbers == [str(number) for number in range(len(numbers))]
    assert again.read_output("stdout", 2, 4).data == b"1\n2\n"
    again.signal("TERM")
    assert (again.wait(60), again.signal_name) == (143, "TERM")


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    open('/tmp/daemon', 'w').write(str(os.getpid()))
    time.sleep(1000)
time.sleep(1000)
"""


@pytest.mark.parametrize("how", ["kill", "timeout"])
def test_ending_a_command_ends_the_daemons_it_left_behind(any_make: MakeSandbox, how: str) -> None:
    sandbox = any_make()
    argv = ["python3", "-c", DAEMON]
    if how == "kill":
        process = sandbox.processes.start(argv)
        until(lambda: sandbox.filesystem.exists("/tmp/daemon"), "the daemon runs")
        process.kill()
        assert process.wait(60) == 137
    else:
        with pytest.raises(errors.SandboxTimeout):
            sandbox.exec(argv, timeout_seconds=5)
        assert sandbox.filesystem.exists("/tmp/daemon")
    until(lambda: sandbox.exec("kill -0 $(cat /tmp/daemon)").exit_code == 1, "the daemon is gone")
    assert "sleep" not in sandbox.exec("ps -eo args").stdout
    assert "python3 -c" not in sandbox.exec("ps -eo args").stdout


def test_a_terminal_is_a_terminal(any_make: MakeSandbox) -> None:
    sandbox = any_make()
    process = sandbox.processes.start("tty; stty size; read line; echo got $line", pty=(31, 97))
    process.write_stdin("typed\n")
    assert process.wait(60) == 0
    text = "".join(event.text for event in process.output())
    assert "/dev/pts/" in text
    assert "31 97" in text
    assert "got typed" in text


def test_the_async_client_does_the_same(any_server: Server, tmp_path: Path) -> None:
    async def story() -> None:
        async with (
            asyncio.timeout(120),
            AsyncClient(any_server.url, any_server.token) as client,
            AsyncSandbox.create("code-interpreter", client=client) as sandbox,
        ):
            results = await asyncio.gather(*(sandbox.exec(f"echo {number}") for number in range(10)))
            assert [result.stdout for result in results] == [f"{number}\n" for number in range(10)]
            assert (await sandbox.run_code("import numpy; print(numpy.ones(3).sum())")).stdout == "3.0\n"
            async with sandbox.stream("echo first; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo last") as stream:
                assert (await anext(stream)).text == "first\n"
                await sandbox.filesystem.write("/tmp/go", b"")
                assert [event.text async for event in stream] == ["last\n"]
            content = os.urandom(1 << 20)
            (tmp_path / "up").write_bytes(content)
            await sandbox.filesystem.upload(tmp_path / "up", "/work/data")
            await sandbox.filesystem.download("/work/data", tmp_path / "down")
            assert (tmp_path / "down").read_bytes() == content
            process = await sandbox.processes.start("cat", stdin=True)
            await process.write_stdin(b"typed")
            await process.close_stdin()
            assert await process.wait(60) == 0
            assert [event.data async for event in process.output()] == [b"typed"]

    asyncio.run(story())


def test_deleting_a_sandbox_ends_what_runs_in_it(any_make: MakeSandbox) -> None:
    sandbox = any_make()
    failures: list[BaseException] = []

    def watch() -> None:
        try:
            for _ in sandbox.stream("echo began; sleep 1000"):
                began.set()
        except BaseException as error:
            failures.append(error)

    began = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    assert began.wait(60)
    begun = time.monotonic()
    sandbox.kill()
    thread.join(60)
    assert not thread.is_alive()
    assert time.monotonic() - begun < 60
    # Never a made-up exit code.
    assert [type(failure) for failure in failures] in ([errors.ExecInterrupted], [errors.SandboxNotFound], [errors.SandboxNotRunning]), (
        failures
    )

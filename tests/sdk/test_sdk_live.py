"""The SDK against the real control plane, over a host in memory."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.sdk import client as clients
from pandastack.sdk.async_sandboxes import AsyncSandbox
from pandastack.sdk.client import AsyncClient, Client
from pandastack.sdk.sandboxes import Sandbox

from .conftest import Live


def test_create_use_and_leave(client: Client) -> None:
    with client.sandboxes.create(metadata={"story": "one"}, ttl_seconds=60) as sandbox:
        assert sandbox.status == "running"
        result = sandbox.exec("echo hi; echo err >&2; exit 3")
        assert (result.stdout, result.stderr, result.exit_code, result.ok) == ("hi\n", "err\n", 3, False)
        assert sandbox.exec(["echo", "a b"]).stdout == "a b\n"
        assert sandbox.exec("cat", stdin=b"\xff\x00").stdout_bytes == b"\xff\x00"
        assert [found.id for found in client.sandboxes.list(metadata={"story": "one"})] == [sandbox.id]
        assert client.sandboxes.list(metadata={"story": "two"}) == []
        assert sandbox.lifecycle()["ttl_seconds"] == 60
        assert sandbox.set_ttl(90)["ttl_seconds"] == 90
        assert sandbox.metrics().memory_limit_bytes > 0
        assert client.sandboxes.get(sandbox.id) == sandbox
    with pytest.raises(errors.SandboxNotFound) as caught:
        sandbox.refresh()
    assert caught.value.request_id


def test_the_same_key_gives_the_same_sandbox(client: Client) -> None:
    one = client.sandboxes.create(idempotency_key="story-1")
    assert client.sandboxes.create(idempotency_key="story-1") == one
    with pytest.raises(errors.IdempotencyConflict):
        client.sandboxes.create("base", idempotency_key="story-1")
    one.kill()


def test_the_isolation_that_is_asked_for_is_what_the_sandbox_has(client: Client) -> None:
    with client.sandboxes.create() as plain, Sandbox.create(isolation="microvm", client=client) as own:
        assert (plain.runtime, plain.isolation, plain.acceleration, plain.own_kernel) == ("gvisor", "gvisor", None, False)
        assert (own.runtime, own.isolation, own.acceleration, own.own_kernel) == ("qemu", "microvm", "tcg", True)
        with own.fork() as child:
            assert (child.runtime, child.own_kernel) == ("qemu", True)
        assert client.sandboxes.get(own.id).to_dict()["acceleration"] == "tcg"
    with pytest.raises(errors.InvalidRequest) as unknown:
        client.sandboxes.create(isolation="docker")
    assert (unknown.value.field, "qemu" in unknown.value.choices) == ("isolation", True)
    with pytest.raises(errors.RuntimeUnavailable) as missing:
        client.sandboxes.create(isolation="firecracker")
    assert (missing.value.runtime, missing.value.http_status, bool(missing.value.hint)) == ("firecracker", 503, True)
    assert list(client.templates.bake("base", "qemu")) == []
    with pytest.raises(errors.RuntimeUnavailable):
        list(client.templates.bake("base", "firecracker"))


@pytest.mark.anyio
async def test_the_async_client_asks_for_an_isolation_too(live: Live) -> None:
    async with AsyncClient(live.api_url, live.api_key) as client:
        async with AsyncSandbox.create(isolation="qemu", client=client) as own:
            assert (own.runtime, own.acceleration, own.own_kernel) == ("qemu", "tcg", True)
        with pytest.raises(errors.RuntimeUnavailable):
            await client.sandboxes.create(isolation="firecracker")
        assert [step async for step in client.templates.bake("base", "qemu")] == []


def test_paging_finds_every_sandbox_once(client: Client) -> None:
    made = [client.sandboxes.create(metadata={"page": "yes"}) for _ in range(5)]
    found = [sandbox.id for sandbox in client.sandboxes.iterate(metadata={"page": "yes"}, page_size=2)]
    assert sorted(found) == sorted(sandbox.id for sandbox in made)
    assert len(client.sandboxes.list(limit=3)) == 3
    for sandbox in made:
        sandbox.kill()


def test_streams_and_time_limits(client: Client) -> None:
    with client.sandboxes.create() as sandbox:
        stream = sandbox.stream("echo one; sleep 0.05; echo two >&2; exit 4")
        assert [(item.channel, item.text) for item in stream] == [("stdout", "one\n"), ("stderr", "two\n")]
        assert stream.exit_code == 4
        said: list[str] = []
        assert sandbox.exec_stream("echo x; exit 2", said.append) == 2
        assert said == ["x\n"]
        for run in (sandbox.exec, lambda cmd, timeout: sandbox.stream(cmd, timeout_seconds=timeout).wait()):
            with pytest.raises(errors.SandboxTimeout, match="timeout"):
                run("sleep 5", 0.1)


def test_processes_outlive_their_caller(client: Client) -> None:
    with client.sandboxes.create() as sandbox:
        process = sandbox.processes.start("cat; exit 5", stdin=True)
        process.write_stdin("line\n")
        process.close_stdin()
        assert process.wait(10) == 5
        again = sandbox.processes.attach(process.id)
        assert b"".join(item.data for item in again.output()) == b"line\n"
        assert again.read_output("stdout", 2, 2).data == b"ne"
        sleeper = sandbox.processes.start("sleep 30")
        with pytest.raises(TimeoutError):
            sleeper.wait(0.1)
        sleeper.kill()
        assert (sleeper.wait(10), sleeper.signal_name) == (137, "KILL")
        limited = sandbox.processes.start("sleep 30", timeout_seconds=0.1)
        assert (limited.wait(10), limited.reason) == (137, "timeout")
        assert {found.id for found in sandbox.processes.list()} >= {process.id, sleeper.id}
        with pytest.raises(errors.ProcessNotFound):
            sandbox.processes.get("nothing")


def test_files(client: Client, tmp_path: Path) -> None:
    with client.sandboxes.create() as sandbox:
        fs = sandbox.filesystem
        assert fs.write("/tmp/x", "h\xe9llo", mode="0600") == {"path": "/tmp/x", "bytes": 6}
        assert fs.read("/tmp/x", offset=1, length=2) == "\xe9".encode()
        assert fs.read("/tmp/x", offset=99) == b""
        assert fs.stat("/tmp/x").mode == "0600"
        assert fs.chmod("/tmp/x", 0o644).mode == "0644"
        fs.write(b"/tmp/\xff\n", b"raw")
        assert fs.read(next(entry.path for entry in fs.listdir("/tmp") if entry.name != "x")) == b"raw"
        fs.mkdir("/tmp/d/e")
        fs.move("/tmp/x", "/tmp/d/e/y")
        with pytest.raises(errors.FileConflict):
            fs.move("/tmp/d/e/y", "/tmp/d")
        assert [folder for folder, _, _ in fs.walk("/tmp")] == ["/tmp", "/tmp/d", "/tmp/d/e"]
        fs.remove("/tmp/d")
        assert not fs.exists("/tmp/d")
        with pytest.raises(FileNotFoundError):
            fs.read("/tmp/d")
        data = os.urandom(3_000_001)
        (tmp_path / "up").write_bytes(data)
        fs.upload(tmp_path / "up", "/tmp/big")
        fs.download("/tmp/big", tmp_path / "down")
        assert (tmp_path / "down").read_bytes() == data
        assert b"".join(fs.read_chunks("/tmp/big")) == data
        with fs.watch("/tmp") as changes:
            fs.write("/tmp/new", "1")
            assert next(changes).path == "/tmp/new"


def test_tokens_and_me(client: Client, live: Live) -> None:
    token = client.tokens.create("reader", expires_in_days=1, scopes=["read"])
    assert token.token
    assert token.token not in repr(token)
    with Client(live.api_url, token.token) as reader:
        assert reader.me()["user_id"]
        with pytest.raises(errors.PermissionDenied):
            reader.sandboxes.create()
    client.tokens.revoke(token.prefix)
    with Client(live.api_url, token.token) as reader, pytest.raises(errors.AuthError):
        reader.me()
    assert token.prefix not in [found.prefix for found in client.tokens.list()]


def test_templates(client: Client) -> None:
    assert "base" in [template.name for template in client.templates.list()]
    list(client.templates.bake("base"))
    assert client.templates.get("base").state == "ready"
    with pytest.raises(errors.TemplateNotFound):
        client.templates.get("nothing")


def test_the_default_client_comes_from_the_environment(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANDASTACK_API", live.api_url)
    monkeypatch.setenv("PANDASTACK_API_KEY", live.api_key)
    with Sandbox.create() as sandbox:
        assert Sandbox.get(sandbox.id).status == "running"
        assert sandbox in Sandbox.list()
    clients.get_default_client().close()


def test_many_threads_share_one_client(client: Client) -> None:
    with client.sandboxes.create() as sandbox, ThreadPoolExecutor(50) as pool:
        results = list(pool.map(lambda number: sandbox.exec(f"echo {number}").stdout, range(100)))
    assert results == [f"{number}\n" for number in range(100)]


@pytest.mark.anyio
async def test_the_async_client_does_the_same(live: Live, tmp_path: Path) -> None:
    async with AsyncClient(live.api_url, live.api_key) as client, AsyncSandbox.create(client=client) as sandbox:
        results = await asyncio.gather(*(sandbox.exec(f"echo {number}") for number in range(50)))
        assert [result.stdout for result in results] == [f"{number}\n" for number in range(50)]
        async with sandbox.stream("echo a; exit 3") as stream:
            assert [item.text async for item in stream] == ["a\n"]
        assert stream.exit_code == 3
        process = await sandbox.processes.start("cat", stdin=True)
        await process.write_stdin(b"x")
        await process.close_stdin()
        assert await process.wait(10) == 0
        assert [item.data async for item in process.output()] == [b"x"]
        (tmp_path / "up").write_bytes(bytes(2_000_001))
        await sandbox.filesystem.upload(tmp_path / "up", "/tmp/big")
        await sandbox.filesystem.download("/tmp/big", tmp_path / "down")
        assert (tmp_path / "down").stat().st_size == 2_000_001
        assert [folder async for folder, _, _ in sandbox.filesystem.walk("/tmp")] == ["/tmp"]
        async with sandbox.filesystem.watch("/tmp") as changes:
            await sandbox.filesystem.write("/tmp/new", "1")
            assert (await anext(changes)).path == "/tmp/new"
        assert sandbox in [found async for found in client.sandboxes.iterate(page_size=1)]
        made = await AsyncSandbox.create(client=client)
        await made.kill()
    with pytest.raises(errors.SandboxNotFound):
        await sandbox.refresh()


@pytest.mark.anyio
async def test_a_cancelled_task_still_deletes_its_sandbox(live: Live) -> None:
    async with AsyncClient(live.api_url, live.api_key) as client:
        ids: list[str] = []

        async def work() -> None:
            async with AsyncSandbox.create(client=client) as sandbox:
                ids.append(sandbox.id)
                await sandbox.exec("sleep 30")

        task = asyncio.create_task(work())
        while not ids:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(errors.SandboxNotFound):
            await client.sandboxes.get(ids[0])

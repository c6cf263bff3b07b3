"""What goes over the wire, and how answers are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pandastack import errors
from pandastack.sdk import config
from pandastack.sdk.client import Client
from pandastack.sdk.sandboxes import Sandbox
from pandastack.sdk.testing import MemoryTransport, answer
from pandastack.wire.sandboxes import SandboxView

RESULT = {"stdout": "", "stderr": "", "exit_code": 0, "duration_ms": 1}


def using(reply: Any = None, status: int = 200, **headers: str) -> tuple[Sandbox, MemoryTransport]:
    transport = MemoryTransport(lambda request: answer(reply, status, **headers))
    return Sandbox(Client("http://api", "key", transport=transport), SandboxView(id="s1")), transport


@pytest.mark.parametrize(
    ("call", "body"),
    [
        (lambda s: s.exec("ls"), {"cmd": "ls"}),
        (lambda s: s.exec(["ls", "-l"]), {"argv": ["ls", "-l"]}),
        (lambda s: s.exec("ls", 5), {"cmd": "ls", "timeout_seconds": 5.0}),
        (lambda s: s.exec("cat", stdin="text", cwd="/x", env={"A": "b"}, user="nobody"),
         {"cmd": "cat", "stdin": "text", "cwd": "/x", "env": {"A": "b"}, "user": "nobody"}),
        (lambda s: s.exec("cat", stdin=b"\xff"), {"cmd": "cat", "stdin_b64": "/w=="}),
        (lambda s: s.run_code("print(1)"), {"code": "print(1)", "language": "python"}),
        (lambda s: s.run_code("ls", "sh"), {"code": "ls", "language": "bash"}),
        (lambda s: s.commands.run("ls", 2), {"cmd": "ls", "timeout_seconds": 2.0}),
    ],
)  # fmt: skip
def test_bodies_of_commands(call: Any, body: dict[str, Any]) -> None:
    sandbox, transport = using(RESULT)
    call(sandbox)
    assert json.loads(transport.bodies[0]) == body
    assert transport.requests[0].path == "/sandboxes/s1/exec"


def test_a_blocking_exec_waits_as_long_as_its_command_may_run() -> None:
    sandbox, transport = using(RESULT)
    sandbox.exec("x", timeout_seconds=600)
    sandbox.exec("x")
    assert transport.requests[0].read_s == 630
    assert transport.requests[1].read_s is None


def test_a_create_sends_only_what_was_given() -> None:
    transport = MemoryTransport(lambda request: answer({"id": "s1", "status": "running", "created_at": 5}, 201))
    client = Client("http://api", "key", transport=transport)
    sandbox = client.sandboxes.create()
    assert json.loads(transport.bodies[0]) == {"template": "code-interpreter"}
    assert (sandbox.created_at, sandbox.persistent) == ("5", False)
    client.sandboxes.create("base", 0.5, 512, 60, True, {"k": "v"}, disk_mb=100, env={"A": "b"})
    assert json.loads(transport.bodies[1]) == {
        "template": "base", "cpu": 0.5, "memory_mb": 512, "ttl_seconds": 60, "persistent": True, "metadata": {"k": "v"},
        "disk_mb": 100, "env": {"A": "b"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/a b+c", "/a%20b%2Bc"),
        ("/ä", "/%C3%A4"),
        (b"/\xff", "/%FF"),
        ("/\udcff", "/%FF"),
        (Path("/x"), "/x"),
        ("/?&=#%", "/%3F%26%3D%23%25"),
    ],
)
def test_paths_are_percent_encoded_bytes(path: Any, query: str) -> None:
    sandbox, transport = using(b"data")
    assert sandbox.filesystem.read(path) == b"data"
    assert transport.requests[0].path == f"/sandboxes/s1/fs?path={query}"


def test_names_outside_utf8_come_back_as_they_were() -> None:
    entry = {"name": "\ufffd", "path": "/d/\ufffd", "name_b64": "/w==", "is_dir": False, "size": 1, "mode": "0644", "mtime": 7}
    found = using({"path": "/d", "entries": [entry]})[0].filesystem.listdir("/d")
    assert (found[0].name, found[0].path) == ("\udcff", "/d/\udcff")


def test_sparse_entries_of_older_servers_are_understood() -> None:
    found = using({"path": "/d", "entries": [{"name": "x", "is_dir": True}]})[0].filesystem.listdir("/d")
    assert (found[0].path, found[0].type, found[0].size) == ("/d/x", "directory", 0)
    assert using({"path": "/d", "entries": None})[0].filesystem.listdir("/d") == []


def test_a_long_directory_is_read_page_by_page() -> None:
    def handle(request: Any) -> Any:
        last = "after=" in request.path
        entry = {"name": "b" if last else "a", "path": "/d/x", "is_dir": False, "size": 0, "mode": "0644", "mtime": 0}
        return answer({"path": "/d", "entries": [entry], "truncated": not last})

    transport = MemoryTransport(handle)
    sandbox = Sandbox(Client("http://api", "key", transport=transport), SandboxView(id="s1"))
    assert [item.name for item in sandbox.filesystem.listdir("/d")] == ["a", "b"]
    assert transport.requests[1].path.endswith("&after=a")


def test_lists_are_filtered_and_paged() -> None:
    def handle(request: Any) -> Any:
        if "cursor=c1" in request.path:
            return answer({"items": [{"id": "s3"}], "next_cursor": None})
        return answer({"items": [{"id": "s1"}, {"id": "s2"}], "next_cursor": "c1"})

    transport = MemoryTransport(handle)
    client = Client("http://api", "key", transport=transport)
    assert [sandbox.id for sandbox in client.sandboxes.iterate(page_size=2)] == ["s1", "s2", "s3"]
    assert [sandbox.id for sandbox in client.sandboxes.list(status="running", metadata={"a": "b&c", "d": "e"}, limit=1)] == ["s1"]
    assert transport.requests[-1].path == "/sandboxes?status=running&limit=1&metadata=a%3Db%26c&metadata=d%3De"


@pytest.mark.parametrize("body", [[{"id": "s1"}], {"items": [{"id": "s1"}]}])
def test_lists_come_bare_or_wrapped(body: Any) -> None:
    client = Client("http://api", "key", transport=MemoryTransport(lambda request: answer(body)))
    assert [sandbox.id for sandbox in client.sandboxes.list()] == ["s1"]


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, {"error": "unauthorized", "detail": "x"}, errors.AuthError),
        (403, {"error": "no", "code": "quota_exceeded", "used": 5}, errors.QuotaExceeded),
        (404, {"error": "no", "code": "file_not_found"}, FileNotFoundError),
        (404, {"error": "no"}, errors.NotFoundError),
        (409, {"error": "no", "code": "sandbox_not_running"}, errors.SandboxNotRunning),
        (429, {"error": "slow down"}, errors.BadRequestError),
        (500, {"error": "command timeout: exceeded 1 s"}, errors.SandboxTimeout),
        (500, {"error": "dial: i/o timeout"}, errors.ServerError),
        (504, {"error": "command timeout", "code": "exec_timeout", "stdout": "x"}, TimeoutError),
        (502, b"<html>bad gateway</html>", errors.ServerError),
        (302, None, errors.ServerError),
    ],
)
def test_errors_are_typed_and_name_their_request(status: int, body: Any, kind: type[Exception]) -> None:
    sandbox, _ = using(body, status, x_request_id="r9", location="http://elsewhere")
    with pytest.raises(kind) as caught:
        sandbox.exec("x")
    assert isinstance(caught.value, errors.PandastackError)
    assert caught.value.http_status == status
    assert status == 302 or caught.value.request_id == "r9"
    assert "<html>" not in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.exec(""),
        lambda s: s.exec([]),
        lambda s: s.exec("x", cwd="relative"),
        lambda s: s.exec("a\0b"),
        lambda s: s.exec("x", timeout_seconds=0),
        lambda s: s.exec("cat", stdin=b"x" * (2 << 20)),
        lambda s: s.filesystem.read("relative"),
        lambda s: s.filesystem.mkdir(b"/\xff"),
        lambda s: s.filesystem.chmod("/x"),
        lambda s: s.processes.get(".."),
        lambda s: s._client.sandboxes.get(""),
        lambda s: s._client.sandboxes.create("Not A Template"),
        lambda s: s._client.sandboxes.create(metadata={"k": 5}),
        lambda s: s._client.sandboxes.create(idempotency_key="a b"),
    ],
)
def test_what_cannot_be_right_is_refused_before_it_is_sent(call: Any) -> None:
    sandbox, transport = using({})
    with pytest.raises(errors.InvalidRequest):
        call(sandbox)
    assert transport.requests == []


def test_an_unknown_language_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="Unsupported language: perl"):
        using({})[0].run_code("x", "perl")


def test_check_raises_with_everything() -> None:
    sandbox, _ = using({**RESULT, "exit_code": 2, "stderr": "line\nlast words\n"})
    with pytest.raises(errors.CommandFailed, match="exited with code 2: make") as caught:
        sandbox.exec("make", check=True)
    assert (caught.value.exit_code, caught.value.stderr) == (2, "line\nlast words\n")
    assert "last words" in str(caught.value)


def test_exact_bytes_where_the_text_is_not() -> None:
    result = using({**RESULT, "stdout": "\ufffd", "stdout_b64": "/w==", "stdout_bytes": 1, "future": True})[0].exec("x")
    assert (result.stdout, result.stdout_bytes, result.stdout_total, result.ok) == ("\ufffd", b"\xff", 1, True)


def test_leaving_with_deletes_unless_persistent_and_keeps_the_first_error() -> None:
    sandbox, transport = using(status=204)
    with sandbox:
        pass
    assert [(request.method, request.path) for request in transport.requests] == [("DELETE", "/sandboxes/s1")]
    sandbox.persistent = True
    with sandbox:
        pass
    assert len(transport.requests) == 1
    with using({"error": "gone"}, 404)[0]:
        pass
    with pytest.raises(KeyError) as caught, using({"error": "broken"}, 500)[0]:
        raise KeyError("mine")
    assert "s1 could not be deleted" in caught.value.__notes__[0]
    with pytest.raises(errors.ServerError), using({"error": "broken"}, 500)[0]:
        pass


def test_no_key_is_an_auth_error_before_any_request() -> None:
    transport = MemoryTransport(lambda request: answer([]))
    with pytest.raises(errors.AuthError, match="pandastack up"):
        Client("http://api", transport=transport).sandboxes.list()
    with pytest.raises(errors.AuthError, match="characters"):
        Client("http://api", "a\nb", transport=transport).sandboxes.list()
    assert transport.requests == []


def write(folder: Path, name: str, **data: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(data))


def test_configuration_precedence(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    folder = tmp_path / "pandastack"
    assert config.load(environ=environ).api_key is None
    write(folder, "local.json", api_url="http://local", token="k-local")
    assert config.load(environ=environ) == config.Settings("http://local", "k-local")
    write(folder, "config.json", api_url="http://file/v1/", api_key="k-file")
    assert config.load(environ=environ) == config.Settings("http://file", "k-file")
    environ |= {"PANDASTACK_API": "http://env/", "PANDASTACK_API_KEY": "k-env"}
    assert config.load(environ=environ) == config.Settings("http://env", "k-env")
    assert config.load("http://arg", "k-arg", environ=environ) == config.Settings("http://arg", "k-arg")


def test_the_local_key_goes_to_the_local_server_only(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "PANDASTACK_API": "https://elsewhere.example"}
    write(tmp_path / "pandastack", "local.json", api_url="http://127.0.0.1:8080", token="k-local")
    assert config.load(environ=environ).api_key is None
    assert config.load("http://127.0.0.1:8080/", environ=environ).api_key == "k-local"


@pytest.mark.parametrize("value", ["nan", "-1", "soon", "inf"])
def test_a_create_budget_that_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="PANDASTACK_MAX_CREATE_RETRY_SECONDS"):
        config.load(environ={"PANDASTACK_MAX_CREATE_RETRY_SECONDS": value})


def test_the_key_is_never_shown(tmp_path: Path) -> None:
    client = Client("http://api", "pds_secret")
    assert "pds_secret" not in repr(client) + repr(client._settings)

"""`pandastack diff` against an answer in memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from pandastack.cli.main import app
from pandastack.sdk.calls.call import Answer, Request
from pandastack.sdk.testing import MemoryTransport, answer

SIDE = {"type": "file", "size": 4, "mode": "0644", "uid": 0, "gid": 0}
FOLDER = {**SIDE, "type": "directory", "size": 0, "mode": "0755"}
CHANGES: list[dict[str, Any]] = [
    {"path": "/w", "kind": "added", "after": FOLDER},
    {"path": "/w/text", "kind": "modified", "before": SIDE, "after": {**SIDE, "size": 7}},
    {"path": "/w/\ufffd", "path_b64": "L3cv/w==", "kind": "removed", "before": SIDE},
    {"path": "/w/a\nb\u001b[31m", "kind": "metadata", "before": SIDE, "after": {**SIDE, "mode": "0600"}},
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    paths: list[str] = []

    def world(request: Request) -> Answer:
        paths.append(request.path)
        if "format=patch" in request.path:
            return Answer(200, {"content-type": "text/x-diff"}, b"diff \xff\n")
        return answer({"a": "one", "b": "two", "path": "/w", "changes": CHANGES, "truncated": "cut" in request.path})

    monkeypatch.setattr("pandastack.sdk.client.transports.HttpTransport", lambda *_: MemoryTransport(world))
    monkeypatch.setenv("PANDASTACK_API", "http://localhost:1")
    monkeypatch.setenv("PANDASTACK_API_KEY", "key")
    return paths


def call(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["diff", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_a_listing_for_people(asked: list[str]) -> None:
    rows = [line.split() for line in call("one", "two", "--path", "/w").stdout.splitlines()]
    assert rows == [
        ["BEFORE", "AFTER", "PATH"],
        ["A", "-", "-", "/w/"],
        ["M", "4", "7", "/w/text"],
        ["D", "4", "-", "/w/\\xff"],
        ["P", "4", "4", "/w/a", "b\\x1b[31m"],
    ]
    assert asked == ["/diff?a=one&b=two&path=/w&limit=100000"]


@pytest.mark.usefixtures("asked")
def test_a_listing_for_programs_and_a_patch() -> None:
    found = json.loads(call("one", "two", "--json").stdout)
    assert [change["kind"] for change in found] == ["added", "modified", "removed", "metadata"]
    assert call("one", "two", "--patch").stdout_bytes == b"diff \xff\n"
    call("one", "two", "--patch", "--json", code=2)
    assert "more than 100000 changes" in call("one", "cut", code=1).stderr

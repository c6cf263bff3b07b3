from __future__ import annotations

import asyncio

import httpx2
import pytest

from .world import World, events, served, until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def fs(w: World) -> str:
    return f"/v1/sandboxes/{await w.sandbox()}/fs"


async def test_what_is_written_is_read(w: World, fs: str) -> None:
    data = bytes(range(256)) * 3000
    put = await w.ours.put(fs, params={"path": "/root/new/a b+c.bin", "mode": "0600"}, content=data)
    assert (put.status_code, put.json()) == (200, {"path": "/root/new/a b+c.bin", "bytes": len(data)})
    got = await w.ours.get(fs, params={"path": "/root/new/a b+c.bin"})
    assert (got.content, got.headers["content-type"], got.headers["content-length"]) == (data, "application/octet-stream", str(len(data)))
    stat = (await w.ours.get(f"{fs}/stat", params={"path": "/root/new/a b+c.bin"})).json()
    assert (stat["name"], stat["size"], stat["mode"], stat["is_dir"], type(stat["mtime"])) == ("a b+c.bin", len(data), "0600", False, int)
    head = await w.ours.head(fs, params={"path": "/root/new/a b+c.bin"})
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(data)), b"")


async def test_an_empty_file_is_a_file(w: World, fs: str) -> None:
    assert (await w.ours.put(f"{fs}?path=/tmp/e", content=b"")).json()["bytes"] == 0
    assert (await w.ours.get(f"{fs}?path=/tmp/e")).content == b""


@pytest.mark.parametrize(
    ("range_", "status", "content", "content_range"),
    [
        ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=-4", 206, b"6789", "bytes 6-9/10"),
        ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
        ("bytes=-0", 416, b"", "bytes */10"),
        ("bytes=5-2", 200, b"0123456789", None),
        ("bytes=0-1,3-4", 200, b"0123456789", None),
        ("bytes=" + "0" * 5000 + "-1", 200, b"0123456789", None),
        ("lines=1-2", 200, b"0123456789", None),
        ("bytes=a-b", 200, b"0123456789", None),
    ],
)
async def test_a_part_of_a_file(w: World, fs: str, range_: str, status: int, content: bytes, content_range: str | None) -> None:
    await w.ours.put(f"{fs}?path=/tmp/f", content=b"0123456789")
    got = await w.ours.get(f"{fs}?path=/tmp/f", headers={"range": range_})
    assert (got.status_code, got.content, got.headers.get("content-range")) == (status, content, content_range)


@pytest.mark.parametrize("query", ["", "?path=", "?path=relative", "?path=/a%00b", "?path=/" + "a" * 4096, "?path=/a&path=/b"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
async def test_a_path_must_be_one_absolute_path(w: World, fs: str, query: str, method: str) -> None:
    answer = await w.ours.request(method, fs + query, content=b"x" if method == "PUT" else None)
    assert answer.status_code == 400
    if method != "HEAD":
        assert answer.json()["field"] == "path"


async def test_missing_things_are_404_and_wrong_kinds_409(w: World, fs: str) -> None:
    await w.ours.put(f"{fs}?path=/tmp/f", content=b"x")
    for method, path in [("GET", "/no"), ("DELETE", "/no"), ("GET", "/../../no")]:
        assert (await w.ours.request(method, fs, params={"path": path})).status_code == 404
    for path in ("/no", "/tmp/no"):
        assert (await w.ours.get(f"{fs}/stat", params={"path": path})).json()["code"] == "file_not_found"
        assert (await w.ours.get(f"{fs}/dir", params={"path": path})).status_code == 404
    assert (await w.ours.get(f"{fs}?path=/tmp")).status_code == 409
    assert (await w.ours.get(f"{fs}/dir?path=/tmp/f")).status_code == 409
    assert (await w.ours.put(f"{fs}?path=/tmp", content=b"x")).status_code == 409


async def test_any_linux_name_works(w: World, fs: str) -> None:
    for name in ("%FF%FE", "a%0Ab", "%2B", "%F0%9F%90%BC", "%26%3D%3F%23"):
        assert (await w.ours.put(f"{fs}?path=/tmp/{name}", content=name.encode())).status_code == 200
        assert (await w.ours.get(f"{fs}?path=/tmp/{name}")).content == name.encode()
    listed = (await w.ours.get(f"{fs}/dir?path=/tmp")).json()["entries"]
    assert [row["name"] for row in listed] == ["&=?#", "+", "a\nb", "🐼", "\ufffd\ufffd"]
    assert [row["name_b64"] for row in listed] == [None, None, None, None, "//4="]


async def test_a_large_directory_is_listed_in_pages(w: World, fs: str) -> None:
    for n in range(30):
        await w.ours.put(f"{fs}?path=/tmp/{n:02}", content=b"")
    whole = (await w.ours.get(f"{fs}/dir?path=/tmp")).json()
    assert ([row["name"] for row in whole["entries"]], whole["truncated"]) == ([f"{n:02}" for n in range(30)], False)
    names: list[str] = []
    while True:
        after = f"&after={names[-1]}" if names else ""
        page = (await w.ours.get(f"{fs}/dir?path=/tmp&limit=7{after}")).json()
        names += [row["name"] for row in page["entries"]]
        if not page["truncated"]:
            break
    assert names == [f"{n:02}" for n in range(30)]
    assert (await w.ours.get(f"{fs}/dir?path=/tmp&limit=0")).status_code == 400


async def test_making_moving_and_deleting(w: World, fs: str) -> None:
    made = await w.ours.post(f"{fs}/mkdir", json={"path": "/tmp/a/b"})
    assert (made.status_code, made.json()["is_dir"]) == (201, True)
    await w.ours.put(f"{fs}?path=/tmp/a/b/f", content=b"x")
    moved = await w.ours.post(f"{fs}/move", json={"source": "/tmp/a", "destination": "/tmp/c"})
    assert moved.json()["path"] == "/tmp/c"
    assert (await w.ours.get(f"{fs}?path=/tmp/c/b/f")).content == b"x"
    assert (await w.ours.post(f"{fs}/move", json={"source": "/tmp/c/b/f", "destination": "/root"})).status_code == 409
    changed = await w.ours.post(f"{fs}/chmod", json={"path": "/tmp/c/b/f", "mode": "0700"})
    assert changed.json()["mode"] == "0700"
    assert (await w.ours.delete(f"{fs}?path=/tmp/c&recursive=false")).status_code == 409
    assert (await w.ours.delete(f"{fs}?path=/tmp/c")).status_code == 204
    assert (await w.ours.delete(f"{fs}?path=/tmp/c")).status_code == 404


async def test_an_upload_that_breaks_off_leaves_the_old_file(w: World, fs: str) -> None:
    await w.ours.put(f"{fs}?path=/tmp/f", content=b"old")
    async with served(w.app) as port:
        _reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"PUT {fs}?path=/tmp/f HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {w.key}\r\ncontent-length: 99\r\n\r\nnew".encode())
        await writer.drain()
        await until(lambda: w.host.calls.get("write_file") == 2)
        writer.transport.abort()
        await until(lambda: not next(iter(w.host.sandboxes.values())).requests)
    assert (await w.ours.get(f"{fs}?path=/tmp/f")).content == b"old"


async def test_changes_are_told_until_the_client_leaves(w: World, fs: str) -> None:
    async with served(w.app) as port, httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=w.ours.headers) as client:
        async with client.stream("GET", f"{fs}/watch?path=/tmp") as answer:
            text = ""
            async for piece in answer.aiter_text():
                text += piece
                if text == ": watching\n\n":
                    await w.ours.put(f"{fs}?path=/tmp/f", content=b"x")
                if events(text):
                    break
        assert events(text) == [("change", {"events": [{"type": "create", "path": "/tmp/f", "path_b64": None}]})]
        files = next(iter(w.host.sandboxes.values())).files
        await until(lambda: not files._watchers)
    assert (await w.ours.get(f"{fs}/watch?path=/no")).status_code == 404

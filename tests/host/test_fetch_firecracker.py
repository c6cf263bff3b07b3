"""Installing Firecracker: from a folder, and from releases that a small server in this process has, good ones and bad ones."""

from __future__ import annotations

import hashlib
import io
import socket
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pandastack.errors import HostUnfit
from pandastack.host import fetch_firecracker
from pandastack.host.__main__ import main
from pandastack.host.fetch_firecracker import VERSION, find, install

RELEASED = f"v{VERSION}-x86_64"


def program(name: str, version: str = VERSION) -> bytes:
    return f"#!/bin/sh\necho '{name} v{version}'\n".encode()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o755)
    return path


def archive(**members: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"release-{RELEASED}/{name}-{RELEASED}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return made.getvalue()


class Releases:
    """A folder that is served."""

    def __init__(self, folder: Path, address: str) -> None:
        self.address = address
        self._folder = folder / f"v{VERSION}"
        self._folder.mkdir()

    def publish(self, content: bytes, checksum: str | None = None) -> None:
        name = f"firecracker-{RELEASED}.tgz"
        (self._folder / name).write_bytes(content)
        said = checksum if checksum is not None else f"{hashlib.sha256(content).hexdigest()}  {name}\n"
        (self._folder / f"{name}.sha256.txt").write_text(said)


@pytest.fixture
def releases(tmp_path: Path) -> Iterator[Releases]:
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Releases(folder, f"http://127.0.0.1:{server.server_port}/")
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "firecracker"


def left(prefix: Path) -> list[str]:
    return sorted(path.name for path in prefix.iterdir())


def test_a_release_is_checked_and_installed(releases: Releases, prefix: Path) -> None:
    releases.publish(archive(firecracker=program("Firecracker"), jailer=program("Jailer"), **{"seccompiler-bin": b"x"}))
    said: list[str] = []
    made = install(prefix, releases=releases.address, say=said.append)
    assert made.firecracker == prefix / f"v{VERSION}" / "firecracker"
    assert made == find(None, None, prefix, search_path="")
    assert left(prefix) == ["current", f"v{VERSION}"]
    assert left(prefix / f"v{VERSION}") == ["firecracker", "jailer"]
    assert "published beside it" in said[1]
    assert "not of one that was exchanged" in said[1]
    assert "no seccomp filters" in said[2], "it is a script"


def test_installing_again_replaces_it(releases: Releases, prefix: Path) -> None:
    for more in (b"", b"# another build\n"):
        releases.publish(archive(firecracker=program("Firecracker") + more, jailer=program("Jailer")))
        install(prefix, releases=releases.address, say=lambda _: None)
    assert (prefix / f"v{VERSION}" / "firecracker").read_bytes().endswith(b"another build\n")
    assert left(prefix) == ["current", f"v{VERSION}"]


GOOD = archive(firecracker=program("Firecracker"), jailer=program("Jailer"))


@pytest.mark.parametrize(
    ("content", "checksum", "why"),
    [
        (GOOD + b"x", hashlib.sha256(GOOD).hexdigest(), "is not what was published"),
        (GOOD, "<html>", "is no checksum"),
        (GOOD[:60], None, "is no release"),
        (b"garbage", None, "is no release"),
        (archive(firecracker=program("Firecracker")), None, "is no release"),
        (archive(firecracker=b"garbage", jailer=program("Jailer")), None, "no program of Firecracker"),
        (archive(firecracker=program("Firecracker"), jailer=program("Jailer", "1.9.0")), None, "the jailer is of version 1.9.0"),
        (archive(firecracker=program("Firecracker", "1.9.0"), jailer=program("Jailer", "1.9.0")), None, "too old"),
    ],
    # By name: an archive holds the second it was packed in, and every process that runs these tests has to call them the same.
    ids=["other bytes", "no checksum", "cut off", "garbage", "no jailer", "no program", "two versions", "too old"],
)
def test_a_bad_release_is_refused_and_what_was_there_stays(
    releases: Releases, prefix: Path, tmp_path: Path, content: bytes, checksum: str | None, why: str
) -> None:
    for name in ("firecracker", "jailer"):
        put(tmp_path / "own" / name, program(name.title(), "1.99.0"))
    before = install(prefix, path=tmp_path / "own", say=lambda _: None)
    releases.publish(content, checksum)
    with pytest.raises(HostUnfit, match=why) as refused:
        install(prefix, releases=releases.address, say=lambda _: None)
    assert refused.value.hint
    assert find(None, None, prefix, search_path="") == before
    assert left(prefix) == ["current", "v1.99.0"]


def test_a_release_that_is_not_there_is_said(releases: Releases, prefix: Path) -> None:
    with pytest.raises(HostUnfit, match="HTTP 404") as refused:
        install(prefix, releases=releases.address, say=lambda _: None)
    assert "--path" in (refused.value.hint or "")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(HostUnfit, match="cannot be fetched"):
            install(prefix, releases=f"http://127.0.0.1:{unused.getsockname()[1]}", say=lambda _: None)


def test_one_that_is_far_too_large_is_not_kept(releases: Releases, prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_firecracker, "_MOST_BYTES", 100)
    releases.publish(GOOD)
    with pytest.raises(HostUnfit, match="far larger"):
        install(prefix, releases=releases.address, say=lambda _: None)


@pytest.mark.parametrize("suffix", ["", f"-{RELEASED}"])
@pytest.mark.parametrize("by_file", [True, False])
def test_one_of_this_machine_is_copied(prefix: Path, tmp_path: Path, suffix: str, by_file: bool) -> None:
    folder = tmp_path / "own"
    put(folder / f"firecracker{suffix}", program("Firecracker", "1.17.0-dev"))
    put(folder / f"jailer{suffix}", program("Jailer", "1.17.0-dev"))
    (folder / f"firecracker{suffix}.debug").touch()
    made = install(prefix, path=folder / f"firecracker{suffix}" if by_file else folder, say=lambda _: None)
    assert made.firecracker == prefix / "v1.17.0-dev" / "firecracker"
    assert made.jailer.read_bytes() == program("Jailer", "1.17.0-dev")


def test_one_without_a_jailer_is_refused(prefix: Path, tmp_path: Path) -> None:
    put(tmp_path / "own" / "firecracker", program("Firecracker"))
    with pytest.raises(HostUnfit, match=r"there is no .*/own/jailer"):
        install(prefix, path=tmp_path / "own", say=lambda _: None)


class TestFind:
    def test_the_setting_comes_before_the_installed_one_and_that_before_path(self, prefix: Path, tmp_path: Path) -> None:
        on_path = put(tmp_path / "bin" / "firecracker", program("Firecracker"))
        put(tmp_path / "bin" / "jailer", program("Jailer"))
        found = find(None, None, prefix, search_path=str(on_path.parent))
        assert found is not None
        assert (found.firecracker, found.jailer) == (on_path, on_path.with_name("jailer"))
        installed = install(prefix, path=on_path, say=lambda _: None)
        assert find(None, None, prefix, search_path=str(on_path.parent)) == installed
        named = put(tmp_path / "named" / "firecracker", b"")
        put(tmp_path / "named" / "jailer", b"")
        found = find(named, None, prefix, search_path=str(on_path.parent))
        assert found is not None
        assert (found.firecracker, found.jailer) == (named, named.with_name("jailer"))
        found = find(named, tmp_path / "other", prefix)
        assert found is not None
        assert found.jailer == tmp_path / "other"

    def test_none_is_none(self, prefix: Path) -> None:
        assert find(None, None, prefix, search_path="") is None


def test_the_command_prints_where_it_is(
    releases: Releases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PANDASTACK_CACHE_DIR", str(tmp_path / "cache"))
    releases.publish(GOOD)
    assert main(["install", "firecracker", "--releases", releases.address]) == 0
    out, err = capsys.readouterr()
    assert Path(out.strip()).read_bytes() == program("Firecracker")
    assert "published beside it" in err
    assert main(["install", "firecracker", "--path", str(tmp_path / "nothing")]) == 1
    assert "there is no" in capsys.readouterr().err

"""What became of the files of real sandboxes, through the HTTP API, the SDK and the command line; and a server killed meanwhile."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.sdk.client import Client

from .conftest import MakeSandbox, MakeServer
from .servers import until
from .test_cli import Run, cli  # noqa: F401 - a fixture

PREPARE = """
set -e; mkdir -p /project/src; cd /project
printf 'one\\ntwo\\n' > src/text; head -c 5000 /dev/urandom > binary; echo run > tool; echo old > 'old name'
"""
WORK = """
set -e; cd /project
printf 'one\\n2\\nthree' > src/text; head -c 5000 /dev/urandom > binary; chmod +x tool; rm 'old name'; ln -s src/text link
"""


def test_a_patch_makes_the_second_point_of_the_first(make: MakeSandbox, client: Client, cli: Run, tmp_path: Path) -> None:  # noqa: F811
    sandbox = make()
    sandbox.exec(PREPARE, check=True)
    before = sandbox.snapshot()
    try:
        sandbox.exec(WORK, check=True)
        found = sandbox.diff()
        assert [(change.path, change.kind) for change in found] == [
            ("/project/binary", "modified"), ("/project/link", "added"), ("/project/old name", "removed"),
            ("/project/src/text", "modified"), ("/project/tool", "metadata"),
        ]  # fmt: skip
        sandbox.hibernate()
        assert client.diff(before, sandbox, path="/project") == found
        assert sandbox.refresh().status == "hibernated"

        shown = cli("diff", before, sandbox.id)
        assert (shown.returncode, [line.split()[0] for line in shown.stdout.splitlines()[1:]]) == (0, ["M", "A", "D", "M", "P"])
        patch = cli("diff", before, sandbox.id, "--path", "/project", "--patch")
        assert patch.stdout.encode() == client.diff_patch(before, sandbox, path="/project")
        assert cli("diff", before, "nothing").returncode == 1

        if shutil.which("git") is None:
            pytest.skip("no git on this machine")
        with client.sandboxes.create(from_snapshot=before) as old:
            for name in ("src/text", "binary", "tool", "old name"):
                (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "tree" / name).write_bytes(old.filesystem.read(f"/project/{name}"))
        subprocess.run(["git", "apply", "-"], cwd=tmp_path / "tree", input=patch.stdout.encode(), check=True)
        for name in ("src/text", "binary", "tool"):
            assert (tmp_path / "tree" / name).read_bytes() == sandbox.filesystem.read(f"/project/{name}")
        assert (tmp_path / "tree/link").readlink() == Path("src/text")
        assert not (tmp_path / "tree/old name").exists()
    finally:
        client.snapshots.delete(before)


def test_a_server_that_is_killed_meanwhile_leaves_no_view(own_server: MakeServer) -> None:
    server = own_server()
    client = server.client()
    sandbox = client.sandboxes.create("base", persistent=True)
    sandbox.exec("mkdir /w; head -c 60000000 /dev/urandom > /w/large", check=True)
    before = sandbox.snapshot()
    client.snapshots.wait_verified(before, 120)  # In a machine that is gone afterwards.
    sandbox.exec("head -c 60000000 /dev/urandom > /w/large", check=True)
    machines = server.data / "machines"
    kept = {path.name for path in machines.iterdir()}
    outcome: list[errors.PandastackError] = []

    def compare() -> None:
        try:
            while True:
                client.diff_patch(before, sandbox)
        except errors.PandastackError as error:
            outcome.append(error)

    asking = threading.Thread(target=compare)
    asking.start()
    until(lambda: {path.name for path in machines.iterdir()} - kept, "a view is there")
    time.sleep(0.1)
    server.kill()
    asking.join(60)
    assert outcome
    server.start()
    client = server.client()
    until(lambda: {path.name for path in machines.iterdir()} == kept, "the view is gone")
    assert [change.path for change in client.diff(before, sandbox.id)] == ["/w/large"]
    client.snapshots.delete(before)
    client.sandboxes.get(sandbox.id).kill()

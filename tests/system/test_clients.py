"""The clients that people have already, as they were published, against this server: Python 0.10.0 and npm 0.9.0."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .servers import Server, cache_dir

PYTHON_STORY = """
import json, os, sys, tempfile
import pandastack
from pandastack import Sandbox
assert "site-packages" in pandastack.__file__, pandastack.__file__
seen = {}
sandbox = Sandbox.create(metadata={"client": "published"}, ttl_seconds=600)
seen["created"] = [sandbox.status, sandbox.template]
result = sandbox.exec("echo out; echo err >&2; exit 3")
seen["exec"] = [result.stdout, result.stderr, result.exit_code]
seen["shell"] = sandbox.exec("cd /tmp && printf 'a b' | tr ' ' '-'; id -un; echo $HOME").stdout
said = []
seen["stream"] = sandbox.exec_stream("for i in 1 2 3; do echo $i; done; echo e >&2; exit 5", on_stdout=said.append, on_stderr=said.append)
seen["said"] = "".join(sorted("".join(said).split()))
seen["code"] = sandbox.run_code("import numpy; print(numpy.arange(4).sum())").stdout
seen["bash"] = sandbox.run_code("echo $((6 * 7))", language="bash").stdout
fs = sandbox.filesystem
fs.write("/var/story/a b+c", b"\\x00\\xff" * 500)
seen["read"] = fs.read("/var/story/a b+c") == b"\\x00\\xff" * 500
seen["stat"] = fs.stat("/var/story/a b+c").size
seen["exists"] = [fs.exists("/var/story/a b+c"), fs.exists("/var/story/none")]
seen["listdir"] = [entry.name for entry in fs.listdir("/var/story")]
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "f")
    open(path, "wb").write(b"x" * 100000)
    fs.upload(path, "/var/story/deep/er/f")
    fs.download("/var/story/deep/er/f", path + "2")
    seen["download"] = open(path + "2", "rb").read() == b"x" * 100000
seen["walk"] = [folder for folder, *_ in fs.walk("/var/story")]
try:
    fs.read("/var/story/none")
except pandastack.NotFoundError:
    seen["missing"] = "NotFoundError"
try:
    sandbox.exec("sleep 30", timeout_seconds=1)
except pandastack.SandboxTimeout:
    seen["timeout"] = "SandboxTimeout"
try:
    sandbox.exec("exit 1", check=True)
except pandastack.CommandFailed:
    seen["check"] = "CommandFailed"
seen["ttl"] = sandbox.lifecycle()["ttl_seconds"]
sandbox.set_ttl(900)
sandbox.set_persistent(True)
life = sandbox.lifecycle()
seen["lifecycle"] = [life["ttl_seconds"], life["persistent"]]
sandbox.set_persistent(False)
seen["get"] = Sandbox.get(sandbox.id).metadata
seen["list"] = sandbox.id in [item.id for item in Sandbox.list()]
seen["refresh"] = (sandbox.refresh() or sandbox).status
seen["run"] = sandbox.commands.run("echo run").stdout
client = pandastack.Client()
seen["templates"] = "base" in [template.name for template in client.templates.list()]
seen["me"] = bool(client.me())
token = client.tokens.create("published client")
seen["token"] = token.token.startswith("pds_")
client.tokens.revoke(token.prefix)
sandbox.kill()
try:
    Sandbox.get(sandbox.id)
except pandastack.NotFoundError:
    seen["gone"] = "NotFoundError"
with Sandbox.create("base") as other:
    seen["with"] = other.exec("echo with").stdout
try:
    Sandbox.create("no-such-template")
except pandastack.BadRequestError as error:
    seen["unknown"] = "BadRequestError"
try:
    pandastack.Client(api_key="pds_wrong").me()
except pandastack.AuthError:
    seen["wrong key"] = "AuthError"
print(json.dumps(seen))
"""

PYTHON_STATES = """
import json
import pandastack
from pandastack import Candidate, Sandbox
assert "site-packages" in pandastack.__file__, pandastack.__file__
seen = {}
client = pandastack.Client()
sandbox = Sandbox.create("base", metadata={"client": "published"}, ttl_seconds=600, persistent=True)
sandbox.exec("nohup sh -c 'i=0; while sleep 0.05; do i=$((i+1)); echo $i > /var/beat; done' > /dev/null 2>&1 &")
sandbox.filesystem.write("/var/note", "kept")
sandbox.pause()
seen["paused"] = [sandbox.refresh().status, Sandbox.get(sandbox.id).status]
sandbox.resume()
seen["resumed"] = sandbox.refresh().status
sandbox.hibernate()
seen["hibernated"] = [sandbox.refresh().status, sandbox.lifecycle()["status"], sandbox.lifecycle()["persistent"]]
sandbox.wake()
sandbox.wake()
seen["woken"] = sandbox.refresh().status
sandbox.hibernate()
seen["woken by a command"] = [sandbox.exec("cat /var/note").stdout, sandbox.refresh().status]
beat = sandbox.exec("cat /var/beat").stdout
seen["goes on"] = sandbox.exec(f"sleep 1; test x$(cat /var/beat) != x{beat.strip()}").exit_code
snapshot = sandbox.snapshot()
seen["snapshot"] = snapshot == client.snapshots.get(snapshot)["id"]
seen["snapshots"] = [item["id"] == snapshot for item in client.snapshots.list(sandbox_id=sandbox.id)]
seen["sizes"] = [item["size_bytes"] > 0 and bool(item["created_at"]) for item in client.snapshots.list()]
copy = Sandbox.create(from_snapshot=snapshot)
seen["from snapshot"] = [copy.filesystem.read("/var/note").decode(), copy.status, copy.template, copy.id != sandbox.id]
copy.kill()
client.snapshots.delete(snapshot)
seen["deleted"] = client.snapshots.list()
for call in (lambda: client.snapshots.get(snapshot), lambda: Sandbox.create("base", from_snapshot=snapshot)):
    try:
        call()
    except (pandastack.NotFoundError, pandastack.BadRequestError) as error:
        seen.setdefault("gone", []).append(type(error).__name__)
child = sandbox.fork({"branch": "one"})
seen["fork"] = [child.status, child.template, child.metadata["branch"], child.metadata["client"]]
seen["fork of"] = child.metadata["fork_parent_id"] == sandbox.id
seen["fork has"] = child.filesystem.read("/var/note").decode()
child.filesystem.write("/var/note", "the child's")
seen["parent has"] = sandbox.filesystem.read("/var/note").decode()
child.kill()
tree = sandbox.fork_tree(3)
seen["tree"] = [len({item.id for item in tree}), len({item.metadata["fork_tree_id"] for item in tree})]
promoted = tree[1].promote(cleanup_siblings=True)
seen["promoted"] = [promoted["winner"] == tree[1].id, sorted(promoted["deleted"]) == sorted([tree[0].id, tree[2].id]), promoted["failures"]]
seen["left"] = sorted(item.id for item in Sandbox.list()) == sorted([sandbox.id, tree[1].id])
tree[1].kill()
best, function = Candidate.shell("best", "echo 9 | tee /root/nine"), Candidate.call("fn", lambda item: item.exec("echo 5").stdout)
result = sandbox.explore(
    ["echo 3", best, function, "exit 1"],
    score_fn=lambda item, outcome: float(outcome.value or outcome.stdout_tail or 0),
)
seen["explored"] = [result.winner_outcome.label, result.winner_outcome.score, result.winner_outcome.files_changed, len(result.reaped)]
seen["no errors"] = [result.errors, result.reap_failures]
seen["winner"] = result.winner.exec("cat /root/nine").stdout
result.winner.kill()
try:
    sandbox.explore(["exit 1", "exit 2"])
except pandastack.ExploreError:
    seen["none"] = "ExploreError"
seen["alone"] = [item.id == sandbox.id for item in Sandbox.list()]
sandbox.kill()
print(json.dumps(seen))
"""

NODE_STORY = """
import * as sdk from '@pandastack/sdk';
const { Sandbox } = sdk;
const seen = {};
const sandbox = await Sandbox.create({ template: 'base', metadata: { client: 'published' }, ttlSeconds: 600 });
seen.created = sandbox.status;
const result = await sandbox.exec('echo out; echo err >&2; exit 3');
seen.exec = [result.stdout, result.stderr, result.exitCode ?? result.exit_code];
let said = '';
seen.stream = await sandbox.execStream('for i in 1 2 3; do echo $i; done; exit 5', { onStdout: (text) => { said += text; } });
seen.said = said;
seen.python = (await sandbox.runCode('print(6 * 7)', 'python').catch((error) => String(error))).stdout;
await sandbox.filesystem.write('/var/story/a b+c', 'hello');
const back = await sandbox.filesystem.read('/var/story/a b+c');
seen.read = typeof back === 'string' ? back : Buffer.from(back).toString();
seen.list = (await sandbox.filesystem.list('/var/story')).map((entry) => entry.name);
seen.lifecycle = (await sandbox.lifecycle()).ttl_seconds ?? (await sandbox.lifecycle()).ttlSeconds;
seen.listed = (await Sandbox.list()).some((item) => item.id === sandbox.id);
const snapshot = await sandbox.snapshot();
const client = new sdk.Client();
seen.snapshots = (await client.snapshots.list({ sandbox_id: sandbox.id })).map((item) => item.id === snapshot.id);
const copy = await Sandbox.create({ from_snapshot: snapshot.id });
seen.copy = Buffer.from(await copy.filesystem.read('/var/story/a b+c')).toString();
await copy.kill();
await client.snapshots.delete(snapshot.id);
seen.deleted = await client.snapshots.list();
await sandbox.pause();
await sandbox.resume();
await sandbox.hibernate();
await sandbox.wake();
const tree = await sandbox.forkTree({ count: 2 });
seen.tree = [tree.length, (await tree[0].exec('cat "/var/story/a b+c"')).stdout];
const promoted = await tree[0].promote({ cleanupSiblings: true });
seen.promoted = [promoted.winner === tree[0].id, promoted.deleted.length === 1 && promoted.deleted[0] === tree[1].id];
await tree[0].kill();
const child = await sandbox.fork();
seen.fork = (await child.exec('cat "/var/story/a b+c"')).stdout;
await child.kill();
await sandbox.kill();
seen.gone = await Sandbox.get(sandbox.id).then(() => 'there', (error) => error.constructor.name);
console.log(JSON.stringify(seen));
"""


def installed(folder: Path, command: list[str], what: str) -> None:
    """Run an installer once; skip where it cannot reach its registry."""
    stamp = folder / ".done"
    if stamp.exists():
        return
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"{what} could not be installed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1][:200]}")
    stamp.touch()


def story(server: Server, command: list[str], tmp_path: Path) -> dict[str, object]:
    environ = {
        **os.environ,
        "PANDASTACK_API": server.url,
        "PANDASTACK_API_KEY": server.token,
        "XDG_CONFIG_HOME": str(tmp_path),
        "HOME": str(tmp_path),
    }
    environ.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    seen: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return seen


@pytest.fixture(scope="module")
def published_python() -> str:
    """An interpreter that has the published client."""
    folder = cache_dir() / "test-clients" / "python-0.10.0"
    if not (folder / ".done").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=200, capture_output=True)
    installed(folder, [str(folder / "bin/pip"), "install", "--quiet", "pandastack==0.10.0"], "pandastack 0.10.0")
    return str(folder / "bin/python")


def test_the_published_python_client_works_unmodified(server: Server, published_python: str, tmp_path: Path) -> None:
    seen = story(server, [published_python, "-c", PYTHON_STORY], tmp_path)
    assert seen == {
        "created": ["running", "code-interpreter"],
        "exec": ["out\n", "err\n", 3],
        "shell": "a-broot\n/root\n",
        "stream": 5,
        "said": "123e",
        "code": "6\n",
        "bash": "42\n",
        "read": True,
        "stat": 1000,
        "exists": [True, False],
        "listdir": ["a b+c"],
        "download": True,
        "walk": ["/var/story", "/var/story/deep", "/var/story/deep/er"],
        "missing": "NotFoundError",
        "timeout": "SandboxTimeout",
        "check": "CommandFailed",
        "ttl": 600,
        "lifecycle": [900, True],
        "get": {"client": "published"},
        "list": True,
        "refresh": "running",
        "run": "run\n",
        "templates": True,
        "me": True,
        "token": True,
        "gone": "NotFoundError",
        "with": "with\n",
        "unknown": "BadRequestError",
        "wrong key": "AuthError",
    }


def test_states_snapshots_and_forks_of_the_published_python_client(server: Server, published_python: str, tmp_path: Path) -> None:
    seen = story(server, [published_python, "-c", PYTHON_STATES], tmp_path)
    assert seen == {
        "paused": ["paused", "paused"],
        "resumed": "running",
        "hibernated": ["hibernated", "hibernated", True],
        "woken": "running",
        "woken by a command": ["kept", "running"],
        "goes on": 0,
        "snapshot": True,
        "snapshots": [True],
        "sizes": [True],
        "from snapshot": ["kept", "running", "base", True],
        "deleted": [],
        "gone": ["NotFoundError", "BadRequestError"],
        "fork": ["running", "base", "one", "published"],
        "fork of": True,
        "fork has": "kept",
        "parent has": "kept",
        "tree": [3, 1],
        "promoted": [True, True, {}],
        "left": True,
        "explored": ["best", 9.0, ["/root/nine"], 3],
        "no errors": [[], {}],
        "winner": "9\n",
        "none": "ExploreError",
        "alone": [True],
    }


def test_the_published_node_client_works_unmodified(server: Server, tmp_path: Path) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node or npm is not installed")
    folder = cache_dir() / "test-clients" / "node-0.9.0"
    folder.mkdir(parents=True, exist_ok=True)
    install = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), "@pandastack/sdk@0.9.0"]
    installed(folder, install, "@pandastack/sdk 0.9.0")
    program = folder / "story.mjs"
    program.write_text(NODE_STORY)
    seen = story(server, [node, str(program)], tmp_path)
    assert seen == {
        "created": "running",
        "exec": ["out\n", "err\n", 3],
        "stream": 5,
        "said": "1\n2\n3\n",
        "python": "42\n",
        "read": "hello",
        "list": ["a b+c"],
        "lifecycle": 600,
        "listed": True,
        "snapshots": [True],
        "copy": "hello",
        "deleted": [],
        "tree": [2, "hello"],
        "promoted": [True, True],
        "fork": "hello",
        "gone": "NotFoundError",
    }

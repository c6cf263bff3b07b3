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


def test_the_published_python_client_works_unmodified(server: Server, tmp_path: Path) -> None:
    folder = cache_dir() / "test-clients" / "python-0.10.0"
    if not (folder / ".done").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=200, capture_output=True)
    installed(folder, [str(folder / "bin/pip"), "install", "--quiet", "pandastack==0.10.0"], "pandastack 0.10.0")
    seen = story(server, [str(folder / "bin/python"), "-c", PYTHON_STORY], tmp_path)
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
        "gone": "NotFoundError",
    }

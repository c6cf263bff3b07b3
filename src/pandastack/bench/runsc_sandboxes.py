"""The bare tool: runsc by its command line on the same image with the same limits, as one would do by hand.

`runsc run --detach` starts a sandbox, `runsc exec` runs a command in it, `runsc delete` removes it. The network is `none`,
because the oldest supported runsc cannot start any other by its command line; that only makes it faster.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pandastack.bench.image import image_of
from pandastack.errors import HostUnfit
from pandastack.host import app as host_app
from pandastack.host import fetch_runsc
from pandastack.host.bakery import default_limits
from pandastack.host.runtimes import cgroups
from pandastack.host.runtimes.base import Limits, MachineId, MachineSpec
from pandastack.host.runtimes.gvisor import command
from pandastack.host.settings import HostSettings
from pandastack.host.storage.disks import Disks

_TIMEOUT_S = 60.0
_GROUP = "pandastack-bench"
_PR_SET_CHILD_SUBREAPER = 36


@contextlib.contextmanager
def work() -> Iterator[Path]:
    """A folder for what runsc is given, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="pandastack-bare-", dir="/var/tmp") as folder:
        try:
            yield Path(folder)
        finally:
            # A newer runsc mounts a namespace below its root that it never removes.
            subprocess.run(["umount", "--quiet", f"{folder}/root/null-netns"], capture_output=True, check=False, timeout=_TIMEOUT_S)


@dataclass(frozen=True)
class Bare:
    """How to drive runsc by hand on the root file system of `template`."""

    runsc: Path
    rootfs: Path
    guest: Path
    spec: MachineSpec

    @contextlib.contextmanager
    def sandbox(self, work: Path) -> Iterator[tuple[str, list[str], float]]:
        """A sandbox that sleeps: its id, the command prefix to speak of it, and how long `runsc run` took (seconds)."""
        with self.prepared(work, ["/bin/sleep", "infinity"], self.spec.limits) as (name, bundle, prefix):
            began = time.perf_counter()
            call([*prefix, "run", "--detach", "--bundle", str(bundle), name])
            yield name, prefix, time.perf_counter() - began

    @contextlib.contextmanager
    def prepared(self, work: Path, program: Sequence[str], limits: Limits) -> Iterator[tuple[str, Path, list[str]]]:
        """All that a sandbox needs, before runsc is asked for one: its id, its bundle, the command prefix to speak of it.

        What was started under the id is gone when the block ends, also where runsc was killed half way.
        """
        name = "bare-" + secrets.token_hex(4)
        bundle, disks = work / name, Disks(work / "disks", low_water_mib=0)
        prefix = [str(self.runsc), f"--root={work}/root", "--platform=systrap", "--network=none", f"--overlay2=root:dir={disks.path(name)}"]
        cgroup = cgroups.MachineCgroup(cgroups.detect(), _GROUP, name)
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, bundle, ignore_errors=True)
            bundle.mkdir()
            undo.callback(lambda: asyncio.run(disks.delete(name)))
            asyncio.run(disks.create(name, limits.disk_mib))
            config = command.bundle(self.spec, cgroup.path)
            config["process"]["args"] = list(program)
            config["linux"]["resources"] = {
                "memory": {"limit": limits.memory_mib << 20},
                "cpu": {"quota": round(limits.cpu * 100_000), "period": 100_000},
            }
            (bundle / "config.json").write_text(json.dumps(config))
            undo.callback(cgroup.remove)
            undo.callback(delete, name, prefix)
            yield name, bundle, prefix

    def exec_true(self, name: str, prefix: list[str]) -> float:
        """How long `runsc exec /bin/true` takes, in seconds."""
        began = time.perf_counter()
        call([*prefix, "exec", name, "/bin/true"])
        return time.perf_counter() - began


def bare(template: str) -> Bare:
    """The bare tool for a template that is ready. Raises HostUnfit where runsc or the image is missing."""
    settings = HostSettings()
    found = fetch_runsc.candidates(settings.runsc, settings.cache_dir / "runsc")
    if not found:
        raise HostUnfit("there is no runsc to compare with", hint="run `pandastack setup` first")
    image = image_of(template, settings)
    guest, _ = host_app.guest_directory(settings.cache_dir / "guest")
    spec = MachineSpec(
        id=MachineId("bare"), rootfs=image.rootfs, guest=guest, disk=Path("/"), state=Path("/"), limits=default_limits(image, image.rootfs)
    )
    return Bare(found[0], image.rootfs, guest, spec)


def delete(name: str, prefix: Sequence[str]) -> None:
    """`runsc delete`, which waits until the kernel has forgotten the sandbox: it is reaped here, for a slow init would count as runsc's."""
    pids = [pid for file in _root(prefix).glob(f"{name}_sandbox:*.state") for pid in _pids(file)]
    process = subprocess.Popen(
        [*prefix, "delete", "--force", name], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + _TIMEOUT_S
    try:
        while process.poll() is None and time.monotonic() < deadline:
            pids = [pid for pid in pids if not _reaped(pid)]
            time.sleep(0.001)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    # Whatever else has ended in between, our own sandboxes included: thousands of zombies would slow down every look into /proc.
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def adopt_orphans() -> None:
    """Make this process the parent of the sandboxes that runsc detaches, so that it can reap them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _root(prefix: Sequence[str]) -> Path:
    return Path(next(word.removeprefix("--root=") for word in prefix if word.startswith("--root=")))


def _pids(state: Path) -> list[int]:
    try:
        read = json.loads(state.read_text())
        return [int(read["sandbox"]["pid"]), int(read["goferPid"])]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def call(argv: Sequence[str], *, timeout_s: float = _TIMEOUT_S) -> None:
    """Run to the end with its output going nowhere: a detached sandbox would keep a pipe open."""
    process = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=timeout_s,
        check=False,
        env={"PATH": os.defpath},
    )
    if process.returncode != 0:
        raise HostUnfit(f"the bare tool failed: {' '.join(argv[-4:])} ended with {process.returncode}")

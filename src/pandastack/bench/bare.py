"""The bare tool: runsc by its command line on the same image with the same limits, as one would do by hand.

`runsc run --detach` starts a sandbox, `runsc exec` runs a command in it, `runsc delete` removes it. The network is `none`,
because the oldest supported runsc cannot start any other by its command line; that only makes it faster.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pandastack.errors import HostUnfit
from pandastack.host import app as host_app
from pandastack.host import fetch_runsc
from pandastack.host.bakery import default_limits
from pandastack.host.runtimes.base import MachineId, MachineSpec
from pandastack.host.runtimes.gvisor import command
from pandastack.host.settings import HostSettings
from pandastack.host.storage.disks import Disks
from pandastack.host.storage.images import Images

_TIMEOUT_S = 60.0


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
        name = "bare-" + secrets.token_hex(4)
        bundle = work / name
        bundle.mkdir()
        disks = Disks(work / "disks", low_water_mib=0)
        disk = asyncio.run(disks.create(name, self.spec.limits.disk_mib))
        config = command.bundle(self.spec, f"/pandastack-bench/{name}")
        config["process"]["args"] = ["/bin/sleep", "infinity"]
        config["linux"]["resources"] = {
            "memory": {"limit": self.spec.limits.memory_mib << 20},
            "cpu": {"quota": round(self.spec.limits.cpu * 100_000), "period": 100_000},
        }
        (bundle / "config.json").write_text(json.dumps(config))
        prefix = [str(self.runsc), f"--root={work}/root", "--platform=systrap", "--network=none", f"--overlay2=root:dir={disk}"]
        try:
            began = time.perf_counter()
            call([*prefix, "run", "--detach", "--bundle", str(bundle), name])
            yield name, prefix, time.perf_counter() - began
        finally:
            subprocess.run([*prefix, "delete", "--force", name], capture_output=True, timeout=_TIMEOUT_S, check=False)
            asyncio.run(disks.delete(name))
            shutil.rmtree(bundle, ignore_errors=True)
            for parent in Path("/sys/fs/cgroup").glob("*/pandastack-bench"):
                with contextlib.suppress(OSError):
                    parent.rmdir()
            with contextlib.suppress(OSError):
                Path("/sys/fs/cgroup/pandastack-bench").rmdir()

    def exec_true(self, name: str, prefix: list[str]) -> float:
        """How long `runsc exec /bin/true` takes, in seconds."""
        began = time.perf_counter()
        call([*prefix, "exec", name, "/bin/true"])
        return time.perf_counter() - began


def bare(template: str) -> Bare:
    """The bare tool for a template that is ready. Raises HostUnfit where runsc or the image is missing."""
    settings = HostSettings()
    found = fetch_runsc.candidates(settings.runsc, settings.cache_dir / "runsc")
    folders = [host_app.shipped_templates(), *([settings.templates_dir] if settings.templates_dir else [])]
    image = Images(settings.cache_dir / "images", folders).cached(template)
    if not found or image is None:
        raise HostUnfit("there is no runsc or no image to compare with", hint=f"run `pandastack template bake {template}` first")
    guest, _ = host_app.guest_directory(settings.cache_dir / "guest")
    spec = MachineSpec(
        id=MachineId("bare"), rootfs=image.rootfs, guest=guest, disk=Path("/"), state=Path("/"), limits=default_limits(image)
    )
    return Bare(found[0], image.rootfs, guest, spec)


def call(argv: list[str]) -> None:
    """Run to the end with its output going nowhere: a detached sandbox would keep a pipe open."""
    process = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=_TIMEOUT_S,
        check=False,
        env={"PATH": os.defpath},
    )
    if process.returncode != 0:
        raise HostUnfit(f"the bare tool failed: {' '.join(argv[-4:])} ended with {process.returncode}")

"""QEMU by its command line, as the bare tool of microVMs.

A state is baked once: a machine is booted with its memory in a file (`share=on`), `stop`ped, and its devices are saved
(`xen-save-devices-state`). To create is to load it into a QEMU that was started before the clock runs, with `-incoming defer`, that file
as its memory (`share=off`) and a copy of the disk: device state by `getfd` and `migrate-incoming`, then the guest's first `/bin/true`.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pandastack.bench import qemu_machines, qemu_states
from pandastack.bench.guest_session import GuestSession
from pandastack.bench.image import image_of
from pandastack.bench.qemu_machines import Kit, Machine, Memory
from pandastack.bench.server import pool
from pandastack.bench.tool import BareState
from pandastack.bench.workloads import Workload
from pandastack.errors import HostUnfit
from pandastack.host import app as host_app
from pandastack.host import runtimes_here
from pandastack.host.bakery import default_limits
from pandastack.host.settings import HostSettings
from pandastack.host.storage.roots import Roots


@contextlib.contextmanager
def tool(template: str) -> Iterator[Qemu]:
    """QEMU as the bare tool for a template, with a folder of its own in which copies share blocks."""
    with tempfile.TemporaryDirectory(prefix="pandastack-bare-", dir="/var/tmp") as folder, pool(Path(folder)) as root:
        yield Qemu(template, root)


@dataclass(frozen=True)
class _Baked:
    memory: Path
    devices: Path
    disk: Path


class Qemu:
    """See `tool.BareTool`."""

    def __init__(self, template: str, folder: Path) -> None:
        self._template, self._folder = template, folder
        self._kit: Kit | None = None
        self._baked: _Baked | None = None

    def find(self, acceleration: str | None) -> None:
        if self._kit is not None:
            return
        settings = HostSettings()
        binary = runtimes_here.qemu(settings)
        if binary is None:
            raise HostUnfit("there is no QEMU to compare with", hint="apt install qemu-system-x86")
        guest, _ = host_app.guest_directory(settings.cache_dir / "guest")
        kernel = asyncio.run(runtimes_here.guest_kernel(settings, guest, say=lambda _: None))
        image = image_of(self._template, settings)
        root = asyncio.run(Roots(self._folder / "roots").ensure(image))
        self._kit = Kit(
            binary=binary,
            acceleration="kvm" if acceleration == "kvm" else "tcg",
            vmlinux=kernel.vmlinux,
            initramfs=kernel.initramfs,
            root=root,
            folder=self._folder,
            limits=default_limits(image, root),
        )

    @property
    def kit(self) -> Kit:
        if self._kit is None:
            raise HostUnfit("the bare tool was used before its image was there")
        return self._kit

    def create_and_exec(self) -> float:
        with self._waiting() as machine:
            began = time.perf_counter()
            machine.load(self._state().devices)
            with machine.speak() as guest:
                _true(guest)
                return time.perf_counter() - began

    @contextlib.contextmanager
    def session(self) -> Iterator[Callable[[], float]]:
        with self.speaking() as guest:

            def run() -> float:
                began = time.perf_counter()
                _true(guest)
                return time.perf_counter() - began

            yield run

    @contextlib.contextmanager
    def speaking(self) -> Iterator[GuestSession]:
        """A session with a machine of the baked state."""
        with self._waiting() as machine:
            machine.load(self._state().devices)
            with machine.speak() as guest:
                yield guest

    @contextlib.contextmanager
    def holding(self, workload: Workload) -> Iterator[BareState]:
        with qemu_states.holding(self.kit, workload) as state:
            yield state

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[Machine]:
        state = self._state()
        memory = Memory(file=state.memory, share=False)
        with qemu_machines.running(Machine(self.kit, self.kit.limits, disk=state.disk, memory=memory, incoming="defer")) as machine:
            yield machine

    def _state(self) -> _Baked:
        if self._baked is None:
            self._baked = _bake(self.kit)
        return self._baked


def _bake(kit: Kit) -> _Baked:
    folder = kit.folder / "baked"
    folder.mkdir()
    baked = _Baked(folder / "memory", folder / "devices", folder / "disk")
    with qemu_machines.running(qemu_machines.booted(kit, kit.limits, Memory(file=baked.memory, share=True))) as machine:
        machine.speak().close()
        machine.monitor.do("stop")
        machine.monitor.do("xen-save-devices-state", filename=str(baked.devices))
        qemu_machines.clone(machine.disk, baked.disk)
    return baked


def _true(guest: GuestSession) -> None:
    if guest.run("/bin/true") != 0:
        raise HostUnfit("/bin/true failed in a bare machine")

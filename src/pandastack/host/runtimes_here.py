"""Which runtimes a host tries, and how: the one place that names drivers. `backends` does the rest.

To add a driver: a coroutine `_name` below that answers an Offer, and its line in `_OFFERS`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import which

from pandastack.errors import HostUnfit
from pandastack.host import fetch_firecracker, fetch_runsc, kernels, kvm
from pandastack.host.backends import Found, Offer
from pandastack.host.keeper import Keeper
from pandastack.host.runtimes.base import Pager, Probe
from pandastack.host.runtimes.firecracker.command import Binaries
from pandastack.host.runtimes.firecracker.driver import FirecrackerRuntime
from pandastack.host.runtimes.gvisor.driver import GvisorRuntime
from pandastack.host.runtimes.qemu.driver import QemuRuntime
from pandastack.host.settings import HostSettings
from pandastack.host.storage import space
from pandastack.host.storage.roots import Roots


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What drivers are made with. `guest` is the folder of the guest daemon, as sandboxes may see it.

    `group` marks every kernel object of this install; `run_dir` is its own and short. `roots` is the folder of root images, on
    the file system that disks are on. `say` gets a line for each long step. Without `fetch` nothing is taken from the network.
    """

    settings: HostSettings
    run_dir: Path
    group: str
    guest: Path
    roots: Path
    keeper: Keeper
    pager: Pager
    say: Callable[[str], None]
    fetch: bool = True


async def offers(here: Surroundings) -> Sequence[Offer]:
    """Every runtime that the settings let this host try. Raises HostUnfit for a name that is none."""
    names = wanted(here.settings)
    return [await offer(here) for name, offer in _OFFERS.items() if name in names]


def wanted(settings: HostSettings) -> Sequence[str]:
    """The names in PANDASTACK_RUNTIMES; all that this version has where it is empty."""
    names = [name.strip() for name in settings.runtimes.split(",") if name.strip()]
    for name in names:
        if name not in _OFFERS:
            raise HostUnfit(f"PANDASTACK_RUNTIMES: {name!r} is unknown", hint=f"name some of: {', '.join(_OFFERS)}")
    return names or list(_OFFERS)


async def _gvisor(here: Surroundings) -> Offer:
    settings, prefix = here.settings, here.settings.cache_dir / "runsc"

    async def find() -> Found:
        """The first runsc that really works here."""
        if here.fetch and not fetch_runsc.candidates(settings.runsc, prefix):
            await fetch_runsc.fetch(prefix, debian_mirror=settings.debian_mirror, say=here.say)
        runtime, probe, reasons = None, Probe(works=False, reason="no runsc was found"), []
        for runsc in fetch_runsc.candidates(settings.runsc, prefix):
            runtime = GvisorRuntime(runsc, root=here.run_dir / "gv", group=here.group, guest=here.guest, keeper=here.keeper)
            probe = await runtime.probe()
            if probe.works:
                return runtime, probe
            reasons.append(f"{runsc}: {probe.reason}" + (f" ({probe.hint})" if probe.hint else ""))
        return runtime, replace(probe, reason="; ".join(reasons) or probe.reason, hint=None)

    # Tried first: it takes a moment, so that the host is ready as soon as it is.
    return Offer(name="gvisor", isolation="gvisor", own_kernel=False, at_once=True, find=find)


async def _qemu(here: Surroundings) -> Offer:
    settings = here.settings
    binary = qemu(settings)

    async def find() -> Found:
        """QEMU with a guest kernel, and with KVM where a guest kernel runs on it."""
        if binary is None:
            return None, Probe(works=False, reason="QEMU is not installed", hint="apt install qemu-system-x86, or set PANDASTACK_QEMU")
        kernel = await guest_kernel(settings, here.guest, say=here.say, fetch=here.fetch)
        runtime = QemuRuntime(
            binary,
            vmlinux=kernel.vmlinux,
            initramfs=kernel.initramfs,
            digest=kernel.digest,
            root=here.run_dir / "q",
            group=f"{here.group}-qemu",
            clone=space.clone,
            cache=settings.cache_dir / "qemu",
        )
        return runtime, await runtime.probe()

    # Booting a kernel takes seconds. Only where it may turn out to be the strongest here, `auto` waits for that.
    best = "kvm" if binary is not None and await kvm.hopeful() else "tcg"
    return Offer(name="qemu", isolation="microvm", own_kernel=True, acceleration=best, find=find, rootfs=Roots(here.roots).ensure)


async def _firecracker(here: Surroundings) -> Offer:
    settings = here.settings
    binaries = firecracker(settings)

    async def find() -> Found:
        """Firecracker with a guest kernel, where that runs on KVM."""
        if binaries is None:
            hint = "run `pandastack host install firecracker`, or set PANDASTACK_FIRECRACKER"
            return None, Probe(works=False, reason="Firecracker is not installed", hint=hint)
        if not await kvm.hopeful():
            return None, Probe(works=False, reason="it needs a /dev/kvm on which guests run", hint="see `pandastack doctor`, kvm")
        kernel = await guest_kernel(settings, here.guest, say=here.say, fetch=here.fetch)
        runtime = FirecrackerRuntime(
            binaries,
            vmlinux=kernel.vmlinux,
            initramfs=kernel.initramfs,
            digest=kernel.digest,
            root=here.run_dir / "fc",
            group=f"{here.group}-firecracker",
            clone=space.clone,
            cache=settings.cache_dir / "firecracker",
            pager=here.pager if settings.firecracker_memory == "userfaultfd" else None,
        )
        return runtime, await runtime.probe()

    # Where it cannot work, that is known at once, and nobody who asks for the strongest waits for it.
    at_once = binaries is None or not await kvm.hopeful()
    return Offer(
        name="firecracker",
        isolation="microvm",
        own_kernel=True,
        acceleration="kvm",
        find=find,
        at_once=at_once,
        rootfs=Roots(here.roots).ensure,
    )


async def guest_kernel(settings: HostSettings, guest: Path, *, say: Callable[[str], None], fetch: bool = True) -> kernels.Kernel:
    """What microVMs boot, with the daemon in the folder `guest`. As `kernels.ensure`."""
    prefix = settings.cache_dir / "kernels"
    return await kernels.ensure(prefix, guest, debian_mirror=settings.debian_mirror, say=say, setting=settings.kernel, fetch=fetch)


async def update_guest_kernel(settings: HostSettings, *, say: Callable[[str], None]) -> None:
    """As `kernels.update`."""
    await kernels.update(settings.cache_dir / "kernels", debian_mirror=settings.debian_mirror, say=say)


def qemu(settings: HostSettings) -> Path | None:
    """The QEMU to use: the setting, else the one on PATH."""
    found = settings.qemu or which("qemu-system-x86_64")
    return Path(found) if found else None


def firecracker(settings: HostSettings) -> Binaries | None:
    """The Firecracker to use, with its jailer; see `fetch_firecracker.find`."""
    return fetch_firecracker.find(settings.firecracker, settings.jailer, settings.cache_dir / "firecracker")


_OFFERS: dict[str, Callable[[Surroundings], Awaitable[Offer]]] = {"gvisor": _gvisor, "qemu": _qemu, "firecracker": _firecracker}

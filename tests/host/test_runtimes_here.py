"""Which runtimes a host tries, and what it expects of each before it has tried it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pandastack.errors import HostUnfit, RuntimeUnavailable
from pandastack.host import backends, kernels, kvm, runtimes_here
from pandastack.host.backends import Backend, Backends, Found, Offer
from pandastack.host.checks import Check, failed, passed, unsure
from pandastack.host.runtimes.base import Pager, Probe
from pandastack.host.runtimes.fake import FakeRuntime
from pandastack.host.runtimes.firecracker import driver
from pandastack.host.runtimes.firecracker.driver import FirecrackerRuntime
from pandastack.host.runtimes_here import Surroundings
from pandastack.host.settings import HostSettings
from pandastack.host.slots import Refills
from pandastack.wire.isolation import AUTO, Level

pytestmark = pytest.mark.anyio
BROKEN = failed("kvm", "it does not run guests", hint="use another machine")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def surroundings(tmp_path: Path, **settings: Any) -> Surroundings:
    values = {"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache", "run_dir": tmp_path / "run"} | settings
    return Surroundings(
        settings=HostSettings(**values),
        run_dir=tmp_path / "run",
        group="test",
        guest=tmp_path / "guest",
        roots=tmp_path / "roots",
        keeper=cast(Any, None),
        pager=cast(Pager, "the pager"),
        say=lambda _: None,
        fetch=False,
    )


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    binary = tmp_path / "qemu-system-x86_64"
    binary.touch(0o755)
    return binary


def kvm_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: Check, *, there: bool = True) -> None:
    device = tmp_path / "kvm"
    if there:
        device.touch()

    async def check(_: Path) -> Check:
        return found

    monkeypatch.setattr(kvm, "check", check)
    monkeypatch.setattr(kvm.hopeful, "__defaults__", (device,))


async def offered(here: Surroundings) -> dict[str, Offer]:
    return {offer.name: offer for offer in await runtimes_here.offers(here)}


@pytest.mark.parametrize(
    ("found", "best", "level"),
    [
        (passed("kvm", "it works"), "kvm", Level.KVM),
        # Nothing was proven, so it may be.
        (unsure("kvm", "the machine was too busy"), "kvm", Level.KVM),
        (BROKEN, "tcg", Level.EMULATED),
    ],
)
async def test_qemu_is_expected_to_have_kvm_only_where_guests_run_on_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, qemu: Path, found: Check, best: str, level: Level
) -> None:
    kvm_is(monkeypatch, tmp_path, found)
    offer = (await offered(surroundings(tmp_path, qemu=qemu)))["qemu"]
    assert (offer.acceleration, offer.level, offer.at_once) == (best, level, False)


async def test_without_the_device_there_is_no_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, qemu: Path) -> None:
    kvm_is(monkeypatch, tmp_path, unsure("kvm", "there is no /dev/kvm"), there=False)
    assert (await offered(surroundings(tmp_path, qemu=qemu)))["qemu"].acceleration == "tcg"


async def test_only_the_runtimes_of_the_setting_are_offered(tmp_path: Path) -> None:
    assert list(await offered(surroundings(tmp_path, runtimes="gvisor"))) == ["gvisor"]
    for wrong in ("gvisor,xen", "docker"):
        with pytest.raises(HostUnfit, match="PANDASTACK_RUNTIMES"):
            await offered(surroundings(tmp_path, runtimes=wrong))


async def test_a_missing_qemu_and_a_missing_kernel_are_told_with_their_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kvm_is(monkeypatch, tmp_path, BROKEN)
    monkeypatch.setattr(runtimes_here, "which", lambda _: None)
    runtime, probe = await (await offered(surroundings(tmp_path)))["qemu"].find()
    assert (runtime, probe.works, "apt install qemu-system-x86" in (probe.hint or "")) == (None, False, True)
    monkeypatch.setattr(kernels.platform, "machine", lambda: "x86_64")
    with pytest.raises(HostUnfit, match="no guest kernel") as missing:
        await (await offered(surroundings(tmp_path, qemu=tmp_path / "qemu")))["qemu"].find()
    assert "setup" in (missing.value.hint or "")


@pytest.mark.parametrize(
    ("setting", "paged"), [({}, False), ({"firecracker_memory": "file"}, False), ({"firecracker_memory": "userfaultfd"}, True)]
)
async def test_firecracker_gets_a_pager_only_by_the_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: dict[str, str], paged: bool
) -> None:
    kvm_is(monkeypatch, tmp_path, passed("kvm", "it works"))

    async def kernel(*_: object, **__: object) -> kernels.Kernel:
        return kernels.Kernel(vmlinux=tmp_path / "vmlinux", initramfs=tmp_path / "initramfs", version="6.1", digest="0")

    monkeypatch.setattr(runtimes_here, "guest_kernel", kernel)
    monkeypatch.setattr(driver, "has_userfaultfd", lambda: True)
    here = surroundings(tmp_path, firecracker=tmp_path / "firecracker", **setting)
    runtime, _ = await (await offered(here))["firecracker"].find()
    assert isinstance(runtime, FirecrackerRuntime)
    assert runtime.pager == ("the pager" if paged else None)


def join(offer: Offer, runtime: Any, probe: Probe) -> Backend:
    return Backend(probe, cast(Any, SimpleNamespace(runtime=runtime)), cast(Any, None))


@pytest.mark.parametrize(("found", "waits"), [(BROKEN, False), (passed("kvm", "it works"), True)])
async def test_auto_waits_for_qemu_only_where_it_may_win(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, qemu: Path, found: Check, waits: bool
) -> None:
    kvm_is(monkeypatch, tmp_path, found)
    monkeypatch.setattr(backends, "PATIENCE_S", 5.0)
    booting = asyncio.Event()

    async def gvisor() -> Found:
        runtime = FakeRuntime("gvisor", isolation="gvisor")
        return runtime, runtime.outcome

    async def slow() -> Found:
        await booting.wait()
        runtime = FakeRuntime("qemu", isolation="microvm", acceleration="kvm")
        return runtime, runtime.outcome

    here = await offered(surroundings(tmp_path, qemu=qemu))
    offers = [replace(here["gvisor"], find=gvisor), replace(here["qemu"], find=slow)]
    host = Backends(offers, join, Refills())
    await host.open(())
    trying = asyncio.create_task(host._try(offers[1]))
    asked = asyncio.create_task(host.choose(AUTO))
    await asyncio.sleep(0.05)
    assert asked.done() is not waits
    with pytest.raises(RuntimeUnavailable, match="still being tried"):
        host.of("qemu")
    booting.set()
    assert (await asked).name == ("qemu" if waits else "gvisor")
    await trying

"""Shared by the contract suites: where machines with images live, what they are made of, and every runtime of this machine."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from hosts import sharing_blocks, until
from pandastack.errors import HostUnfit
from pandastack.host import app, kernels
from pandastack.host.keeper import Keeper
from pandastack.host.runtimes.fake import FakeRuntime
from pandastack.host.runtimes.gvisor.driver import GvisorRuntime
from pandastack.host.storage.disks import Disks
from pandastack.host.storage.images import Image, Images

from .benches import (
    ACCELERATORS,
    CACHE,
    NAMES,
    Bench,
    Microvms,
    made_folder,
    make_microvms,
    runsc,
)

T = TypeVar("T")


@pytest.fixture(scope="session")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system on which copies share blocks."""
    with sharing_blocks(tmp_path_factory.mktemp("xfs") / "file") as folder:
        yield folder


def awaited(work: Coroutine[Any, Any, T]) -> T:
    """What a fixture of the session waits for; it may be asked for while a loop runs in this thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


@pytest.fixture(scope="session")
def image() -> Image:
    """The image of `base`; built once."""
    images = Images(CACHE / "images", [app.shipped_templates()])
    return images.cached("base") or awaited(images.ensure("base", lambda _: None))


@pytest.fixture(scope="session")
def rootfs(image: Image) -> Path:
    return image.rootfs


@pytest.fixture(scope="session")
def guest_directory() -> Path:
    try:
        return app.guest_directory(CACHE / "guest")[0]
    except HostUnfit as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def kernel(guest_directory: Path) -> kernels.Kernel:
    try:
        return awaited(kernels.ensure(CACHE / "kernels", guest_directory, debian_mirror=None, say=print))
    except HostUnfit as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def microvms(kernel: kernels.Kernel, guest_directory: Path, image: Image, xfs: Path) -> Callable[[str], Microvms]:
    """By the name of the runtime; made when first asked for."""
    found: dict[str, Microvms | str] = {}

    def of(name: str) -> Microvms:
        if name not in found:
            found[name] = awaited(make_microvms(name, kernel, guest_directory, image, xfs))
        made = found[name]
        if isinstance(made, str):
            if os.environ.get("PANDASTACK_TEST_KVM") == "required":
                pytest.fail(made)
            pytest.skip(made)
        return made

    return of


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name: the path of a socket has at most 107 bytes."""
    folder = Path("/tmp") / f"pd-{secrets.token_hex(4)}"
    folder.mkdir()
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture(params=NAMES)
async def bench(request: pytest.FixtureRequest, short: Path, no_leaks: None) -> AsyncIterator[Bench]:
    """A runtime that was probed; after the test its machines are stopped and nothing may be left of them."""
    group = f"pandastack-test-{short.name}"
    if request.param == "fake":
        made = Bench("fake", FakeRuntime(), short, short, short, None, None, group)
    elif request.param in ACCELERATORS:
        guest, microvms = request.getfixturevalue("guest_directory"), request.getfixturevalue("microvms")(request.param)
        root = request.getfixturevalue("xfs") / short.name
        runtime = microvms.runtime(made_folder(root) / "run", group)
        made = Bench(request.param, runtime, root, microvms.root, guest, None, None, group, microvms)
    else:
        binary = runsc(request.param)
        guest, rootfs = request.getfixturevalue("guest_directory"), request.getfixturevalue("rootfs")
        keeper = Keeper(short / "k" / "keeper.sock")
        gvisor = GvisorRuntime(binary, root=short / "run", group=group, guest=guest, keeper=keeper)
        made = Bench(request.param, gvisor, short, rootfs, guest, Disks(short / "disks", low_water_mib=0), keeper, group)
    made_folder(made.root / "machines")
    probe = await made.runtime.probe()
    assert probe.works, f"{probe.reason} {probe.hint}"
    assert made.left() == {}, "the probe left something"
    yield made
    for machine in made.made:
        await machine.stop()
    if made.disks is not None:
        await made.disks.sweep([])
    for _ in range(200):
        if not made.left():
            break
        await asyncio.sleep(0.02)
    assert made.left() == {}
    if made.keeper is not None:
        assert set(made.keeper._call({"op": "names"}, [])[0]["names"]) <= made.forgotten
        made.keeper.retain(set())
        made.keeper.close()
        await until(lambda: not (short / "k").exists())
    if made.root != short:
        await asyncio.to_thread(shutil.rmtree, made.root)

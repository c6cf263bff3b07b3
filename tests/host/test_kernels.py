"""What a guest boots from, without booting: the kernel in a bzImage, the order of modules, the archive, the cache."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import lzma
import random
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pandastack.errors import HostUnfit
from pandastack.host import cpio, debian, kernels, vmlinux

KERNEL = b"\x7fELF" + random.Random(7).randbytes(3000) + b"abc" * 4000 + bytes(70000) + b"the end"


def bzimage(payload: bytes, *, version: int = 0x20F, magic: bytes = b"HdrS") -> bytes:
    """As the kernel's build makes it: two sectors of setup behind the first, some code, the payload, more code."""
    setup = bytearray(3 * 512)
    setup[0x1F1] = 2
    setup[0x202:0x206] = magic
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<II", setup, 0x248, 100, len(payload))
    return bytes(setup) + bytes(100) + payload + b"code" * 50


def lz4_block(data: bytes) -> bytes:
    """A plain compressor: literals, and matches of any distance found by their first four bytes; some overlap themselves."""
    out, seen, at, anchor = bytearray(), {}, 0, 0

    def length(value: int) -> bytes:
        return b"" if value < 15 else bytes([255]) * ((value - 15) // 255) + bytes([(value - 15) % 255])

    while at < len(data) - 12:
        key = data[at : at + 4]
        start = seen.get(key)
        seen[key] = at
        if start is None or at - start > 65535:
            at += 1
            continue
        count = 4
        while at + count < len(data) - 5 and data[start + count] == data[at + count]:
            count += 1
        literals = data[anchor:at]
        out.append(min(len(literals), 15) << 4 | min(count - 4, 15))
        out += length(len(literals)) + literals + struct.pack("<H", at - start) + length(count - 4)
        at += count
        anchor = at
    literals = data[anchor:]
    out.append(min(len(literals), 15) << 4)
    return bytes(out + length(len(literals)) + literals)


def lz4_legacy(data: bytes) -> bytes:
    chunks = [lz4_block(data[at : at + 40000]) for at in range(0, len(data), 40000)]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(chunk)) + chunk for chunk in chunks)


SIZE = struct.pack("<I", len(KERNEL))
PAYLOADS = {
    "plain": KERNEL,
    "gzip": gzip.compress(KERNEL),
    "bzip2": bz2.compress(KERNEL) + SIZE,
    "xz": lzma.compress(KERNEL, lzma.FORMAT_XZ) + SIZE,
    "lzma": lzma.compress(KERNEL, lzma.FORMAT_ALONE) + SIZE,
    "lz4": lz4_legacy(KERNEL) + SIZE,
}


@pytest.mark.parametrize("method", PAYLOADS)
def test_the_kernel_is_found_in_its_image(method: str) -> None:
    assert vmlinux.extract(bzimage(PAYLOADS[method])) == KERNEL


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (b"", "no bzImage"),
        (bzimage(KERNEL, magic=b"none"), "no bzImage"),
        (bzimage(KERNEL, version=0x207), "too old"),
        (bzimage(KERNEL)[:5000], "cut off"),
        (bzimage(b"\x28\xb5\x2f\xfd" + bytes(100)), "compressed by zstd"),
        (bzimage(b"\x89LZO" + bytes(100)), "compressed by LZO"),
        (bzimage(b"nothing at all, really"), "an unknown method"),
        (bzimage(gzip.compress(b"not a kernel, but a text of some length")), "no ELF"),
        (bzimage(PAYLOADS["xz"][:60] + bytes(4000)), "damaged"),
        (bzimage(PAYLOADS["lz4"][:-400] + SIZE), "damaged"),
        (bzimage(lz4_legacy(KERNEL) + struct.pack("<I", 5)), "damaged"),
        (bzimage(b"\x02\x21\x4c\x18" + struct.pack("<I", 8) + b"\x11a\x09\x00\x00\x00\x00\x00" + SIZE), "damaged"),  # from before the start
    ],
)
def test_what_is_no_kernel_is_refused_with_the_reason(image: bytes, why: str) -> None:
    with pytest.raises(HostUnfit, match=why) as refused:
        vmlinux.extract(image)
    assert refused.value.hint


def module(*needs: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0retpoline=Y\0"


def test_modules_come_after_what_they_need() -> None:
    files = {
        "virtio": module(),
        "virtio_ring": module("virtio"),
        "virtio-rng": module("virtio_ring", "virtio"),
        "virtio_blk": module("virtio_ring", "virtio"),
        "unused": module(),
    }
    assert kernels.order(files, ["virtio_rng", "virtio_blk"]) == ["virtio", "virtio_ring", "virtio-rng", "virtio_blk"]
    with pytest.raises(HostUnfit, match="no module virtio_net"):
        kernels.order(files, ["virtio_net"])
    with pytest.raises(HostUnfit, match="no module failover"):
        kernels.order({**files, "virtio_net": module("failover")}, ["virtio_net"])


def test_an_archive_member_is_laid_out_as_documented() -> None:
    archive = cpio.archive([cpio.file("ab", b"12345", 0o640)])
    header = archive[:110]
    assert header[:6] == b"070701"
    fields = [int(header[at : at + 8], 16) for at in range(6, 110, 8)]
    assert fields == [1, 0o100640, 0, 0, 1, 0, 5, 0, 0, 0, 0, 3, 0]
    assert archive[110:116] == b"ab\0\0\0\0"[:6]
    assert archive[116:124] == b"12345\0\0\0"
    assert archive[124:].startswith(b"070701")
    assert b"TRAILER!!!\0" in archive[124:]
    assert len(archive) % 4 == 0


def package(folder: Path, *, compressed: bool = False, version: str = "1") -> Path:
    """A package as Debian's are, with a kernel and modules that need one another."""
    release = "6.1.0-0-cloud-amd64"
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: linux-image\nVersion: 1{version}\nArchitecture: amd64\nMaintainer: nobody <n@o>\nDescription: none\n"
    )
    (tree / "boot").mkdir()
    (tree / f"boot/vmlinuz-{release}").write_bytes(bzimage(PAYLOADS["lz4"]))
    modules = tree / f"lib/modules/{release}/kernel/drivers"
    modules.mkdir(parents=True)
    for name in (*kernels.MODULES, "virtio", "unused"):
        content = module(*([] if name in ("virtio", "unused") else ["virtio"]))
        (modules / f"{name}.ko{'.xz' if compressed else ''}").write_bytes(lzma.compress(content) if compressed else content)
    made = folder / "kernel.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", str(tree), str(made)], check=True, capture_output=True)
    return made


@pytest.mark.anyio
@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no Debian system")
@pytest.mark.parametrize("compressed", [False, True])
async def test_a_kernel_is_unpacked_once_and_follows_the_daemon(tmp_path: Path, compressed: bool) -> None:
    given, guest = package(tmp_path, compressed=compressed), tmp_path / "guest"
    guest.mkdir()
    (guest / "pandastack-guest").write_bytes(b"one")

    async def ensure(prefix: str = "kernels") -> kernels.Kernel:
        return await kernels.ensure(tmp_path / prefix, guest, debian_mirror=None, say=pytest.fail, setting=given)

    first = await ensure()
    assert first.vmlinux.read_bytes() == KERNEL
    assert first.version == f"6.1.0-0-cloud-amd64_{hashlib.sha256(given.read_bytes()).hexdigest()[:12]}"
    assert sorted(path.stem for path in (first.vmlinux.parent / "modules").iterdir()) == sorted([*kernels.MODULES, "virtio"])
    assert b"virtio.ko\nvirtio_mmio.ko\n" in first.initramfs.read_bytes()
    stamp = first.vmlinux.stat().st_mtime_ns
    assert await ensure() == first
    assert first.vmlinux.stat().st_mtime_ns == stamp
    (guest / "pandastack-guest").write_bytes(b"two")
    second = await ensure()
    assert (second.vmlinux, second.version) == (first.vmlinux, first.version)
    assert second.initramfs != first.initramfs
    assert second.digest != first.digest
    # The same went in, so the same comes out, elsewhere, too.
    other = await ensure("elsewhere")
    assert (other.digest, other.initramfs.read_bytes()) == (second.digest, second.initramfs.read_bytes())
    assert [path for path in (tmp_path / "kernels").iterdir() if path.name.startswith(".")] == []


class Packages:
    """A Debian whose newest kernel is `newest`, a package file."""

    def __init__(self, newest: Path, work: Path) -> None:
        self.newest, self.work, self.downloads = newest, work, 0

    async def field(self, package: str, name: str) -> str | None:
        return {"Depends": "linux-image-6.1.0-0-cloud-amd64 (= 1)", "SHA256": hashlib.sha256(self.newest.read_bytes()).hexdigest()}[name]

    async def download(self, package: str) -> Path:
        self.downloads += 1
        return self.newest


@pytest.mark.anyio
@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no Debian system")
async def test_an_update_takes_a_newer_kernel_and_keeps_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, said, downloads = tmp_path / "kernels", [], []

    async def update(newest: Path) -> str:
        @contextlib.asynccontextmanager
        async def opened(prefix: Path, *_: Any, **__: Any) -> AsyncIterator[Packages]:
            with debian.work_folder(prefix) as work:
                packages = Packages(newest, work)
                yield packages
                downloads.append(packages.downloads)

        monkeypatch.setattr(debian, "opened", opened)
        await kernels.update(prefix, debian_mirror=None, say=said.append)
        return (prefix / "current").read_text().strip()

    releases = []
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
        releases.append(package(tmp_path / name, version=name))
    used = [await update(release) for release in releases]
    assert len(set(used)) == 3
    assert {path.name for path in prefix.iterdir()} == {"current", *used[1:]}
    assert await update(releases[2]) == used[2]
    assert said[-1] == f"there is no newer guest kernel than {used[2]}"
    assert await update(releases[1]) == used[1], "Debian took one back"
    assert downloads == [1, 1, 1, 0, 0]
    assert {path.name for path in prefix.iterdir()} == {"current", *used[1:]}


@pytest.mark.anyio
async def test_a_kernel_that_cannot_be_had_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pandastack-guest").touch()
    with pytest.raises(HostUnfit, match="cannot be read") as refused:
        await kernels.ensure(tmp_path / "kernels", tmp_path, debian_mirror=None, say=print, setting=tmp_path / "none.deb")
    assert refused.value.hint
    damaged = tmp_path / "damaged.deb"
    damaged.write_bytes(b"no package")
    with pytest.raises(HostUnfit):
        await kernels.ensure(tmp_path / "kernels", tmp_path, debian_mirror=None, say=print, setting=damaged)
    assert list((tmp_path / "kernels").iterdir()) == []

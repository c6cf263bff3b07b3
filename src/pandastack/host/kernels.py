"""The kernel that microVMs run, and their first root file system with the guest daemon in it.

The kernel is Debian's, built for clouds: fetched past the system's package sources, and not installed. All virtio drivers
are modules there, so the initramfs brings those that a microVM needs, in the order in which they can be loaded.

In `prefix`, each appearing by one rename:

    current                                the name of the kernel in use, as fetched
    <release>_<hash12 of the package>/     vmlinux  modules/<name>.ko
    initramfs-<digest32>                   of that kernel, these modules and a guest daemon
"""

from __future__ import annotations

import asyncio
import hashlib
import lzma
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pandastack.errors import HostUnfit
from pandastack.host import cpio, debian, vmlinux

# The oldest Debian release whose kernel boots with QEMU and Firecracker alike; see ADR 0011.
SUITE = "bookworm"
# By the names of their files. What they depend on is found in them.
MODULES = ("virtio_mmio", "virtio_blk", "virtio_console", "virtio-rng", "virtio_net", "vmw_vsock_virtio_transport", "overlay")
_FORMAT = "1"
_META_PACKAGE = "linux-image-cloud-amd64"
_REMEDY = "name a package file of Debian's cloud kernel in PANDASTACK_KERNEL"
_WHAT = "a guest kernel"


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """`version` is the kernel's release and the hash of its package; `digest` changes with anything that a guest boots from."""

    vmlinux: Path
    initramfs: Path
    version: str
    digest: str


async def ensure(
    prefix: Path, guest: Path, *, debian_mirror: str | None, say: Callable[[str], None], setting: Path | None = None, fetch: bool = True
) -> Kernel:
    """The kernel and an initramfs with the daemon of `guest`, a directory as made by `app.guest_directory`.

    `setting` is a package file (.deb) of a kernel to use instead of fetching one. Takes seconds the first time, and no network
    afterwards. Raises HostUnfit with a remedy; without `fetch` also where one would have to be fetched.
    """
    if platform.machine() != "x86_64":
        raise HostUnfit("microVMs need a machine with x86-64", hint="use gVisor on this one")
    folder = await unpacked(prefix, debian_mirror=debian_mirror, say=say, setting=setting, fetch=fetch)
    return await asyncio.to_thread(_with_initramfs, prefix, folder, guest / "pandastack-guest")


async def unpacked(
    prefix: Path,
    *,
    debian_mirror: str | None,
    say: Callable[[str], None],
    setting: Path | None = None,
    fetch: bool = True,
    package: str = _META_PACKAGE,
    modules: Sequence[str] = MODULES,
) -> Path:
    """The folder with `vmlinux` and `modules` of the kernel that Debian's `package` depends on; fetched if `prefix` has none.

    A prefix is for one package and one list of modules. Raises HostUnfit with a remedy, also where it would have to be fetched and
    `fetch` says no.
    """
    folder = await _given(prefix, setting, modules) if setting is not None else _current(prefix)
    if folder is None and not fetch:
        raise HostUnfit("no guest kernel was fetched yet", hint="run `pandastack setup`")
    return folder or await _fetch(prefix, debian_mirror, say, package, modules)


def order(modules: Mapping[str, bytes], wanted: Sequence[str]) -> list[str]:
    """The modules to load for `wanted`, what each depends on before it. `modules` are files by name; "-" and "_" are one.

    Raises HostUnfit where one is missing. A module names what it depends on itself, so no list of depmod is needed.
    """
    names = {name.replace("-", "_"): name for name in modules}
    found: list[str] = []

    def add(name: str) -> None:
        known = names.get(name.replace("-", "_"))
        if known is None:
            raise HostUnfit(f"the guest kernel has no module {name}", hint="use the cloud kernel of Debian 12")
        if known not in found:
            match = re.search(rb"\0depends=([^\0]*)\0", modules[known])
            for needed in match[1].decode().split(",") if match else []:
                if needed:
                    add(needed)
            found.append(known)

    for name in wanted:
        add(name)
    return found


def initramfs(guest: bytes, modules: Sequence[tuple[str, bytes]]) -> bytes:
    """The archive from which a guest boots: the daemon as /init, and the modules with the order to load them in.

    It is not compressed: unpacking would take longer than reading does.
    """
    entries = [cpio.folder("dev"), cpio.character_device("dev/console", 5, 1), cpio.character_device("dev/null", 1, 3)]
    entries += [cpio.folder("modules"), cpio.folder("root")]
    entries += [cpio.file(f"modules/{name}.ko", content) for name, content in modules]
    listing = "".join(f"{name}.ko\n" for name, _ in modules)
    return cpio.archive([*entries, cpio.file("modules/order", listing.encode()), cpio.file("init", guest, 0o755)])


def _current(prefix: Path) -> Path | None:
    try:
        folder = prefix / (prefix / "current").read_text().strip()
    except OSError:
        return None
    return folder if folder != prefix and (folder / "vmlinux").is_file() else None


async def update(prefix: Path, *, debian_mirror: str | None, say: Callable[[str], None]) -> None:
    """Have the newest kernel of Debian's package be the one in use, from the next start of a host on.

    Of those before it one stays, which a host that runs has in use. Raises HostUnfit with a remedy.
    """
    before = _current(prefix)
    newest = await _fetch(prefix, debian_mirror, say, _META_PACKAGE, MODULES)
    if newest == before:
        say(f"there is no newer guest kernel than {newest.name}")
        return
    await asyncio.to_thread(_remove, [folder for folder in _folders(prefix) if folder not in (before, newest)])


async def _fetch(prefix: Path, debian_mirror: str | None, say: Callable[[str], None], meta_package: str, modules: Sequence[str]) -> Path:
    say(f"looking for a guest kernel in Debian {SUITE}")
    async with debian.opened(prefix, SUITE, debian_mirror=debian_mirror, what=_WHAT, remedy=_REMEDY) as packages:
        depends = await packages.field(meta_package, "Depends")
        match = re.search(r"linux-image-\d\S*", depends or "")
        if match is None:
            raise HostUnfit(f"Debian {SUITE} has no {meta_package}", hint=_REMEDY)
        folder = _known(prefix, await packages.field(match[0], "SHA256") or "none")
        if folder is None:
            package = await packages.download(match[0])
            digest, _ = await asyncio.to_thread(_look, prefix, package)
            folder = await _unpack(prefix, package, digest, packages.work, modules)
            say(f"the guest kernel {folder.name} is unpacked")
        pointer = packages.work / "current"
        pointer.write_text(folder.name + "\n")
        pointer.replace(prefix / "current")
    return folder


async def _given(prefix: Path, package: Path, modules: Sequence[str]) -> Path:
    """The kernel of a package file that the operator named."""
    digest, known = await asyncio.to_thread(_look, prefix, package)
    if known is not None:
        return known
    with debian.work_folder(prefix) as work:
        return await _unpack(prefix, package, digest, work, modules)


def _look(prefix: Path, package: Path) -> tuple[str, Path | None]:
    """The hash of a package file, and the kernel if it was unpacked already."""
    try:
        digest = hashlib.sha256(package.read_bytes()).hexdigest()
    except OSError as error:
        raise HostUnfit(f"the kernel package {package} cannot be read ({error.strerror})", hint=_REMEDY) from error
    return digest, _known(prefix, digest)


def _known(prefix: Path, digest: str) -> Path | None:
    return next((folder for folder in _folders(prefix) if folder.name.endswith(f"_{digest[:12]}")), None)


def _folders(prefix: Path) -> list[Path]:
    return [file.parent for file in prefix.glob("*/vmlinux")]


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


async def _unpack(prefix: Path, package: Path, digest: str, work: Path, modules: Sequence[str]) -> Path:
    tree = await debian.unpack(package, work / "tree", what=_WHAT, remedy=_REMEDY)
    return await asyncio.to_thread(_publish, prefix, tree, digest, work / "kernel", modules)


def _publish(prefix: Path, tree: Path, digest: str, work: Path, modules: Sequence[str]) -> Path:
    image = next(tree.glob("boot/vmlinuz-*"), None)
    if image is None:
        raise HostUnfit("the package has no kernel", hint=_REMEDY)
    release = image.name.removeprefix("vmlinuz-")
    (work / "modules").mkdir(parents=True)
    (work / "vmlinux").write_bytes(vmlinux.extract(image.read_bytes()))
    # Debian's next release moves /lib below /usr.
    files = {path.name.split(".ko")[0]: path for path in tree.glob(f"**/lib/modules/{release}/kernel/**/*.ko*")}
    contents = _Modules(files)
    for name in order(contents, modules):
        (work / "modules" / f"{name}.ko").write_bytes(contents[name])
    target = prefix / f"{release}_{digest[:12]}"
    if not (target / "vmlinux").is_file():  # Else somebody was faster.
        work.rename(target)
    return target


class _Modules(Mapping[str, bytes]):
    """Modules by name, read when asked for: there are a thousand, and a dozen is wanted."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self._read: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> bytes:
        if name not in self._read:
            path = self._files[name]
            match path.suffix:
                case ".ko":
                    self._read[name] = path.read_bytes()
                case ".xz":
                    self._read[name] = lzma.decompress(path.read_bytes())
                case suffix:
                    raise HostUnfit(f"the modules of the guest kernel are compressed as {suffix}", hint="use the cloud kernel of Debian 12")
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _with_initramfs(prefix: Path, folder: Path, guest: Path) -> Kernel:
    try:
        daemon = guest.read_bytes()
    except OSError as error:
        raise HostUnfit(f"the guest daemon cannot be read ({error.strerror})", hint="install pandastack-guest again") from error
    files = {path.stem: path.read_bytes() for path in (folder / "modules").iterdir()}
    names = order(files, MODULES)
    digest = hashlib.sha256()
    for part in (_FORMAT.encode(), folder.name.encode(), *(one for name in names for one in (name.encode(), files[name])), daemon):
        digest.update(hashlib.sha256(part).digest())
    target = prefix / f"initramfs-{digest.hexdigest()[:32]}"
    if not target.is_file():
        with debian.work_folder(prefix) as work:
            unfinished = work / "initramfs"
            unfinished.write_bytes(initramfs(daemon, [(name, files[name]) for name in names]))
            unfinished.chmod(0o444)
            unfinished.replace(target)
    return Kernel(vmlinux=folder / "vmlinux", initramfs=target, version=folder.name, digest=digest.hexdigest())

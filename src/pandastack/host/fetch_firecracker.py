"""Finds the Firecracker and jailer to use, and installs a release of them: into our own prefix, not into the system.

In `prefix`, each appearing by one rename:

    current             the name of the folder in use
    v<version>/         firecracker  jailer
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pandastack.errors import HostUnfit
from pandastack.host.runtimes.firecracker import command
from pandastack.host.runtimes.firecracker.command import Binaries

if TYPE_CHECKING:
    import httpx2

# The newest release when this was written. Its checksum is the one that is published beside it.
VERSION = "1.16.1"
RELEASES = "https://github.com/firecracker-microvm/firecracker/releases/download"
NAMES = ("firecracker", "jailer")
_TIMEOUT_S = 30.0
_ASK_TIMEOUT_S = 20.0
_MOST_BYTES = 256 << 20
_REMEDY = "fetch a release of Firecracker on another machine, and name its folder with --path"


def find(firecracker: Path | None, jailer: Path | None, prefix: Path, search_path: str | None = None) -> Binaries | None:
    """Those of the settings, else those that were installed into `prefix`, else those on PATH. A jailer is looked for beside its
    Firecracker.
    """
    ours = prefix / _current(prefix) / "firecracker" if _current(prefix) else None
    if firecracker is None and ours is not None and ours.is_file():
        firecracker = ours
    if firecracker is None and (found := shutil.which("firecracker", path=search_path)) is not None:
        firecracker = Path(found)
    if firecracker is None:
        return None
    if jailer is None and not beside(firecracker).exists() and (found := shutil.which("jailer", path=search_path)) is not None:
        jailer = Path(found)
    return Binaries(firecracker=firecracker, jailer=jailer or beside(firecracker))


def install(prefix: Path, *, path: Path | None = None, releases: str = RELEASES, say: Callable[[str], None]) -> Binaries:
    """Put a Firecracker into `prefix`: the one at `path` (a program with its jailer beside it, or their folder), else a release.

    Both are started once to see what they are. Raises HostUnfit with a remedy; what was there before then stays.
    """
    with _work(prefix) as work:
        if path is not None:
            _copy(path, work)
        else:
            _fetch(f"{releases.rstrip('/')}/v{VERSION}/firecracker-v{VERSION}-x86_64.tgz", work, say)
        version = _checked(Binaries(firecracker=work / "firecracker", jailer=work / "jailer"))
        if not command.has_filters((work / "firecracker").read_bytes()):
            say("this build has no seccomp filters, because it is none for musl: no sandbox will run on it")
        folder = prefix / f"v{version}"
        made = work / "made"
        made.mkdir(mode=0o755)
        for name in NAMES:
            (work / name).rename(made / name)
        if folder.exists():
            # One that runs goes on with the file that it has.
            folder.rename(work / "before")
        made.rename(folder)
        pointer = work / "current"
        pointer.write_text(folder.name + "\n")
        pointer.replace(prefix / "current")
    say(f"Firecracker {version} is installed in {folder}")
    return Binaries(firecracker=folder / "firecracker", jailer=folder / "jailer")


@contextmanager
def _work(prefix: Path) -> Iterator[Path]:
    try:
        prefix.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=prefix, prefix=".install-") as name:
            yield Path(name)
    except OSError as error:
        raise HostUnfit(
            f"Firecracker cannot be written into {prefix} ({error})", hint="run as root, or set PANDASTACK_CACHE_DIR"
        ) from error


def _current(prefix: Path) -> str:
    try:
        return (prefix / "current").read_text().strip()
    except OSError:
        return ""


def _copy(path: Path, work: Path) -> None:
    firecracker = path
    if path.is_dir():
        # A release also has files with more after the name: what debuggers read, and what describes it.
        named = [file for file in sorted(path.glob("firecracker*")) if re.fullmatch(r"firecracker(-v[\d.]+-x86_64)?", file.name)]
        firecracker = named[0] if named else path / "firecracker"
    for source, name in zip((firecracker, beside(firecracker)), NAMES, strict=True):
        if not source.is_file():
            raise HostUnfit(f"there is no {source}", hint="name a folder that has firecracker and jailer of one release")
        shutil.copyfile(source, work / name)
        (work / name).chmod(0o755)


def beside(firecracker: Path) -> Path:
    """Where its jailer should be. In a release they are firecracker-v1.16.1-x86_64 and jailer-v1.16.1-x86_64."""
    return firecracker.with_name(firecracker.name.replace("firecracker", "jailer", 1))


def _fetch(address: str, work: Path, say: Callable[[str], None]) -> None:
    # Only here: the host, which looks for what is installed when it starts, has no other use for it.
    import httpx2

    say(f"fetching {address}")
    try:
        with httpx2.Client(timeout=_TIMEOUT_S, follow_redirects=True) as client:
            published = _received(client, f"{address}.sha256.txt", 4096).decode("ascii", "replace").split()
            archive = _received(client, address, _MOST_BYTES)
    except httpx2.HTTPError as error:
        raise HostUnfit(f"{address} cannot be fetched ({error or type(error).__name__})", hint=_REMEDY) from error
    digest = hashlib.sha256(archive).hexdigest()
    if not published or not re.fullmatch("[0-9a-f]{64}", published[0]):
        raise HostUnfit(f"{address}.sha256.txt is no checksum", hint=_REMEDY)
    if digest != published[0]:
        raise HostUnfit(f"what was fetched from {address} is not what was published (sha256 {digest})", hint="try again later")
    say(f"it has the checksum that is published beside it, {digest}; that tells of a damaged archive, not of one that was exchanged")
    (work / "archive").write_bytes(archive)
    try:
        with tarfile.open(work / "archive", "r:gz") as members:
            for name in NAMES:
                member = members.extractfile(f"release-v{VERSION}-x86_64/{name}-v{VERSION}-x86_64")
                if member is None:
                    raise KeyError(name)
                with member, (work / name).open("wb") as target:
                    shutil.copyfileobj(member, target)
                (work / name).chmod(0o755)
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise HostUnfit(f"{address} is no release of Firecracker ({error})", hint=_REMEDY) from error


def _received(client: httpx2.Client, address: str, most_bytes: int) -> bytes:
    received = bytearray()
    with client.stream("GET", address) as response:
        if not response.is_success:
            raise HostUnfit(f"{address} cannot be fetched (HTTP {response.status_code})", hint=_REMEDY)
        for piece in response.iter_bytes():
            received += piece
            if len(received) > most_bytes:
                raise HostUnfit(f"{address} is far larger than it should be", hint=_REMEDY)
    return bytes(received)


def _checked(binaries: Binaries) -> str:
    versions = []
    for binary in (binaries.firecracker, binaries.jailer):
        try:
            process = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=False)
            found = command.version(process.stdout)
        except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
            found = None
        if found is None:
            raise HostUnfit(f"what should be {binary.name} is no program of Firecracker that runs here", hint=_REMEDY)
        versions.append(found)
    (version, number), (jailer, _) = versions
    if version != jailer:
        raise HostUnfit(f"the jailer is of version {jailer}, and Firecracker of {version}", hint="take both from one release")
    if number < command.OLDEST_VERSION:
        oldest = command.dotted(command.OLDEST_VERSION)
        raise HostUnfit(f"Firecracker {version} is too old", hint=f"take {oldest} or newer; {VERSION} is fetched without --path")
    return version

"""Fetches single packages of Debian past the system's package sources, and unpacks them without installing anything.

apt does the fetching, with a private configuration: it checks the signature of the package list against Debian's keyring
and the package against the list, as it would for an installation. Used for what runs sandboxes: runsc and guest kernels.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pandastack.errors import HostUnfit
from pandastack.host.storage import commands, mirrors
from pandastack.host.storage.recipes import Distribution

_FETCH_TIMEOUT_S = 300.0
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
VERSIONS = {"bookworm": "12", "trixie": "13"}


@dataclass(frozen=True, kw_only=True)
class Debian:
    """A release of Debian, its package lists fetched, in a folder that goes away with the block of `opened`."""

    suite: str
    what: str  # is fetched, for messages
    remedy: str  # where the network does not help
    work: Path
    environment: dict[str, str]

    async def field(self, package: str, name: str) -> str | None:
        """A field of the newest version of a package, such as "Depends"; None where there is no such package or field."""
        text = await self._run(["apt-cache", "--no-all-versions", "show", package], self.work)
        lines = (line.split(":", 1) for line in text.splitlines() if ":" in line)
        return next((value.strip() for key, value in lines if key == name), None)

    async def download(self, package: str) -> Path:
        """The newest version of a package, as a .deb file in the folder of this block. Raises HostUnfit."""
        await self._run(["apt-get", "-qq", "download", package], self.work / "download")
        found = list((self.work / "download").glob(f"{package}_*.deb"))
        if not found:
            raise HostUnfit(f"Debian {self.suite} has no {package}", hint=self.remedy)
        return found[0]

    async def _run(self, argv: Sequence[str], directory: Path) -> str:
        return await run(argv, directory, self.environment, what=self.what, remedy=self.remedy)


@contextlib.asynccontextmanager
async def opened(prefix: Path, suite: str, *, debian_mirror: str | None, what: str, remedy: str) -> AsyncIterator[Debian]:
    """The packages of `suite` for this machine's architecture; the folder of work is made in `prefix`, so that files can be
    renamed from it. Raises HostUnfit with a remedy where there is no mirror, no apt, or no answer.
    """
    architecture = _ARCHITECTURES.get(platform.machine())
    if architecture is None:
        raise HostUnfit(f"there is no {what} for the architecture {platform.machine()}", hint="use a machine with x86-64 or arm64")
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise HostUnfit(f"{what} is missing and this is no Debian system to fetch it with", hint=remedy)
    distribution = Distribution(name="debian", version=VERSIONS[suite], suite=suite)
    mirror = mirrors.find(distribution, debian_mirror=debian_mirror, ubuntu_mirror=None)
    keyring = mirrors.keyring(distribution)
    with work_folder(prefix) as work:
        environment = _private_apt(work, architecture, mirrors.sources_list(distribution, mirror, str(keyring)))
        debian = Debian(suite=suite, what=what, remedy=remedy, work=work, environment=environment)
        await debian._run(["apt-get", "-qq", "update"], work)
        yield debian


async def unpack(package: Path, into: Path, *, what: str, remedy: str) -> Path:
    """The files of a .deb below `into`, which is returned. Raises HostUnfit where it is none."""
    await run(["dpkg-deb", "--extract", str(package), str(into)], into.parent, dict(os.environ), what=what, remedy=remedy)
    return into


@contextlib.contextmanager
def work_folder(prefix: Path) -> Iterator[Path]:
    """A folder in `prefix`, removed at the end: what is made there appears beside it by a rename."""
    prefix.mkdir(mode=0o755, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=prefix, prefix=".fetch-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def _private_apt(work: Path, architecture: str, sources: str) -> dict[str, str]:
    for directory in ("lists/partial", "cache/archives/partial", "parts", "preferences", "download"):
        (work / directory).mkdir(parents=True)
    (work / "status").touch()
    (work / "sources.list").write_text(sources)
    (work / "apt.conf").write_text(
        "".join(
            f'{key} "{value}";\n'
            for key, value in {
                "Dir::Etc::sourcelist": work / "sources.list",
                "Dir::Etc::sourceparts": work / "parts",
                "Dir::Etc::preferences": "/dev/null",
                "Dir::Etc::preferencesparts": work / "preferences",
                "Dir::State": work,
                "Dir::State::lists": work / "lists",
                "Dir::State::status": work / "status",
                "Dir::Cache": work / "cache",
                "APT::Sandbox::User": "root",
                "APT::Architecture": architecture,
                "APT::Architectures": architecture,
                "Acquire::Languages": "none",
                "Acquire::Retries": "3",
            }.items()
        )
    )
    # The system's proxy settings in apt.conf.d are still read; its sources are not.
    return {**os.environ, "APT_CONFIG": str(work / "apt.conf"), "LC_ALL": "C.UTF-8"}


async def run(argv: Sequence[str], directory: Path, environment: dict[str, str], *, what: str, remedy: str) -> str:
    """The output of a program that helps to fetch `what`. Raises HostUnfit with its last words and the remedy."""
    # Those that apt started end with it: they write into the folder that is removed next.
    async with commands.started(argv, environment=environment, directory=directory) as process:
        try:
            async with asyncio.timeout(_FETCH_TIMEOUT_S):
                output, _ = await process.communicate()
        except TimeoutError as error:
            raise HostUnfit(f"{argv[0]} did not finish while fetching {what}", hint="check the network and the Debian mirror") from error
    text = output.decode("utf-8", "replace")
    if process.returncode != 0:
        last = text.strip().splitlines()[-1:] or [""]
        raise HostUnfit(f"{what} could not be fetched: {last[0][:300]}", hint=f"check the network and the Debian mirror; or {remedy}")
    return text

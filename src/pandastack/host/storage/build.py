"""Builds one image: a recipe and, for a derived one, its base's root file system in; a root file system out.

Runs on a host as root, called by `images`, which owns caching, locks and publishing. Steps: mmdebstrap (or a copy of
the base), apt, users, files, Python wheels, shrinking, a trial import. Every program runs in namespaces of its own
(`unshare`), so a killed build leaves files in `work` and nothing else: no mount, no process.

Whom we trust: package scripts run as root in the chroot, because Debian signed them (apt checks, against the host's
keyring). Python packages are wheels only, checked against the recipe's hashes, unpacked in a chroot without network;
code from them first runs in the trial import, without privileges and without network.
"""

from __future__ import annotations

# Every /tmp here is the chroot's own, a tmpfs that only this build sees.
# ruff: noqa: S108
import asyncio
import os
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from pandastack.errors import DiskFull, HostUnfit, TemplateBuildError
from pandastack.host.storage import commands, mirrors
from pandastack.host.storage.failures import explain
from pandastack.host.storage.recipes import Recipe, User, hooks, requirement_lines

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NOBODY = "65534"
_COMPILE = (
    "import compileall, glob\n"
    "for folder in glob.glob('/usr/local/lib/python3*/dist-packages'):\n"
    "    compileall.compile_dir(folder, quiet=2, workers=0)"
)
_LONG_S, _SHORT_S = 3600.0, 600.0  # With network, and without. A stuck mirror ends by apt's own timeouts long before.

# What identifies one machine, belongs to this build only, or is fetched again on demand. Host keys above all: an
# image that carried them would give every sandbox the same identity.
_NEVER_SHIPPED = [
    "/etc/ssh/ssh_host_*", "/var/lib/systemd/random-seed", "/var/lib/apt/lists/*", "/var/cache/apt/*", "/var/log/*.log",
    "/var/log/apt/*", "/var/cache/debconf/*-old", "/var/lib/dpkg/*-old", "/var/cache/ldconfig/*", "/root/.cache", "/root/.wget-hsts",
    "/tmp/*", "/var/tmp/*",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One sign of life from a build: `done` of `total` `unit` in `step` (None when not countable), and a readable line."""

    step: str
    done: int | None
    total: int | None
    unit: str
    message: str
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The programs a build starts. Tests replace them.

    `isolate` gives the program after it namespaces of its own and ties its life to ours: a builder that goes on after
    its parent was killed would write into a folder whose lock is free again.
    """

    mmdebstrap: Sequence[str] = ("mmdebstrap",)
    apt_config: Sequence[str] = ("apt-config", "dump", "Acquire")
    isolate: Sequence[str] = (
        "setpriv", "--pdeathsig", "KILL", "--",
        "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc",
    )  # fmt: skip
    no_network: Sequence[str] = ("--net",)
    chroot: Sequence[str] = (sys.executable, "-I", str(Path(__file__).with_name("chroot.py")))
    needs_root: bool = True
    keyrings: Mapping[str, Path] = field(default_factory=lambda: mirrors.KEYRINGS)


class Reporter:
    """Turns what a step knows into Progress; `total` may be learned on the way."""

    def __init__(self, send: Callable[[Progress], None]) -> None:
        self._send = send
        self._started = time.monotonic()
        self._sent_at = 0.0
        self._held_back = False
        self.step_name, self.unit, self.message = "prepare", "", ""
        self.done: int | None = None
        self.total: int | None = None

    def step(self, name: str, message: str, *, total: int | None = None, unit: str = "") -> None:
        if self._held_back:
            self.send()
        self.step_name, self.message, self.total, self.unit = name, message, total, unit
        self.done = 0 if unit else None
        self.send()

    def advance(self, message: str, by: int = 1) -> None:
        self.message = message
        self.done = (self.done or 0) + by
        # A hundred packages a second are no news; the 2 s tick and the next step show where it got to.
        self._held_back = True
        if time.monotonic() - self._sent_at >= 0.1:
            self.send()

    def wait(self, message: str) -> None:
        """For a caller that polls: one Progress at first, then one every 2 s."""
        if self.step_name != "wait":
            self.step("wait", message)
        elif time.monotonic() - self._sent_at >= 2:
            self.send()

    def send(self) -> None:
        self._sent_at = time.monotonic()
        self._held_back = False
        self._send(
            Progress(
                step=self.step_name,
                done=self.done,
                total=self.total,
                unit=self.unit,
                message=self.message,
                elapsed_s=self.elapsed_s,
            )
        )

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started


class Builder:
    """Builds `recipe` (with the effective values of its chain) into `work`/image/rootfs. One object per build.

    `work` is an empty folder on the file system of the images. Raises HostUnfit, DiskFull or TemplateBuildError,
    each with `reason` where `images` must tell cases apart.
    """

    def __init__(
        self, recipe: Recipe, *, work: Path, log: Path, reporter: Reporter, tools: Tools,
        debian_mirror: str | None, ubuntu_mirror: str | None,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.work = work
        self.image = work / "image"  # What `images` publishes.
        self.rootfs = self.image / "rootfs"
        self.share = work / "share"  # Visible in the chroot as /tmp/build.
        self.log = log
        self.report = reporter
        self.tools = tools
        self._mirrors = mirrors.Named(debian_mirror=debian_mirror, ubuntu_mirror=ubuntu_mirror)

    async def build(self, base: Path | None) -> None:
        """Make the root file system; `base` is the finished rootfs of a derived recipe's base."""
        (self.share / "tmp").mkdir(parents=True)
        (self.share / "tmp").chmod(0o1777)
        self.image.mkdir(mode=0o711)
        self.settings = await self._host_settings()
        if base is None:
            await self._bootstrap()
        else:
            self.report.step("copy", f"copying {self.recipe.base}")
            await self._isolated(["cp", "-a", "--reflink=auto", base, self.rootfs])
            if self.recipe.packages:
                await self._install_packages()
        await self._lay_files()
        if self.recipe.python:
            await self._install_python(self.recipe.folder / self.recipe.python.requirements)
        self.report.step("shrink", "removing caches and what the recipe leaves out")
        await self._isolated([*self.tools.chroot, self.rootfs, "remove", "--", *_NEVER_SHIPPED, *self.recipe.remove], network=False)
        await asyncio.to_thread(self._keep_tmp_on_disk)
        if self.recipe.warm and self.recipe.warm.python_modules:
            self.report.step("check", "importing " + ", ".join(self.recipe.warm.python_modules))
            await self._in_chroot(["python3", "-c", "import " + ", ".join(self.recipe.warm.python_modules)], user=_NOBODY)

    async def sync(self) -> None:
        """Bring the image onto the disk, as far as the disk is honest."""
        await self._isolated(["sync", "--file-system", self.image])

    async def _host_settings(self) -> mirrors.HostSettings:
        dump: list[str] = []
        # apt merges its files itself; reading them by hand would get includes and order wrong.
        await self._run(self.tools.apt_config, on_line=lambda line: dump.append(line or ""), quiet=True)
        settings = mirrors.host_settings("\n".join(dump), os.environ, home=Path.home())
        options = [*settings.apt_options, "Acquire::Retries=3", "Acquire::http::Timeout=30", "Acquire::https::Timeout=30"]
        if settings.ca_bundle:
            shutil.copyfile(settings.ca_bundle, self.share / "ca.crt")
        # A proxy's address may hold a password, so it goes in a file, not on a command line.
        config = self.work / "apt.conf"
        config.touch(mode=0o600)
        config.write_text("".join(f'{key} "{value}";\n' for key, value in (option.split("=", 1) for option in options)))
        return settings

    async def _bootstrap(self) -> None:
        distribution = self.recipe.origin
        keyring = mirrors.keyring(distribution, self.tools.keyrings)
        mirror = mirrors.find(distribution, **self._mirrors)
        sources = self.work / "sources.list"
        sources.write_text(mirrors.sources_list(distribution, mirror, str(keyring)))
        options = [f"--dpkgopt={option}" for option in self.recipe.dpkg_options]
        if self.settings.ca_bundle and "https:" in sources.read_text():
            options.append(f'--aptopt=Acquire::https::CAInfo "{self.settings.ca_bundle}";')
        self.report.step("packages", f"fetching the package lists of {distribution}", unit="packages")
        await self._isolated(
            [
                *self.tools.mmdebstrap, "--mode=root", "--variant=apt", "--format=directory", "--verbose",
                f"--include={','.join(self.recipe.packages)}", f"--aptopt={self.work / 'apt.conf'}", *options,
                distribution.suite, self.rootfs, sources,
            ],
            deadline_s=_LONG_S, on_line=self._apt_line,
        )  # fmt: skip
        # mmdebstrap leaves this machine's proxy and paths behind. The image installs from the mirror it was made from,
        # which is the one that this network is known to reach; an address with a password never ships.
        for name in ("sources.list", "apt.conf.d/99mmdebstrap", "sources.list.d/0000sources.list"):
            (self.rootfs / "etc/apt" / name).unlink(missing_ok=True)
        if "@" not in f"{mirror.main}{mirror.security}":
            inside = mirrors.sources_list(distribution, mirror, str(mirrors.KEYRINGS[distribution.name]))
            (self.rootfs / "etc/apt/sources.list").write_text(inside)
        # mmdebstrap copies these two from this machine.
        for name in ("hostname", "resolv.conf"):
            (self.rootfs / "etc" / name).unlink(missing_ok=True)
            (self.rootfs / "etc" / name).touch()

    async def _install_packages(self) -> None:
        distribution = self.recipe.origin
        mirror = mirrors.find(distribution, **self._mirrors)
        keyring = str(mirrors.KEYRINGS[distribution.name])
        (self.share / "sources.list").write_text(mirrors.sources_list(distribution, mirror, keyring))
        # Lists and packages stay in the build's folder, and no package may start a service in a chroot.
        config = (self.work / "apt.conf").read_text() + "".join(
            f'{key} "{value}";\n'
            for key, value in {
                "Dir::Etc::sourcelist": "/tmp/build/sources.list",
                "Dir::Etc::sourceparts": "/dev/null",
                "Dir::State::lists": "/tmp/build/lists",
                "Dir::Cache": "/tmp/build/cache",
                "Acquire::https::CAInfo": "/tmp/build/ca.crt",
                "Acquire::Languages": "none",
            }.items()
        )
        (self.share / "apt.conf").touch(mode=0o600)  # Not for the unprivileged user of the trial import.
        (self.share / "apt.conf").write_text(config)
        for folder in ("lists/partial", "cache/archives/partial"):
            (self.share / folder).mkdir(parents=True)
        policy = self.rootfs / "usr/sbin/policy-rc.d"
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        self.report.step("packages", "fetching the package lists", unit="packages")
        apt = ["apt-get", "--assume-yes", "--no-install-recommends"]
        await self._in_chroot([*apt, "update", "-o", "APT::Update::Error-Mode=any"], network=True)
        await self._in_chroot([*apt, "install", "--", *self.recipe.packages], network=True, on_line=self._apt_line)
        policy.unlink()

    async def _lay_files(self) -> None:
        self.report.step("files", "adding users, settings and files")
        for user in self.recipe.users:
            # A base's users are there already; they are in the recipe because the runtime wants to know them.
            if not self._has_user(user):
                options = ["--uid", str(user.uid), "--create-home", "--home-dir", user.home_path, "--shell", user.shell]
                await self._in_chroot(["useradd", *options, "--", user.name])
        await asyncio.to_thread(self._pack_files)
        # Unpacked by the image's own tar, inside: a link such as /var/run would lead a copy made outside onto the host.
        await self._in_chroot([
            "tar", "--extract", "--file", "/tmp/build/files.tar", "--directory", "/",
            "--keep-directory-symlink", "--no-overwrite-dir", "--numeric-owner", "--same-permissions",
        ])  # fmt: skip

    def _keep_tmp_on_disk(self) -> None:
        """Leave a file in /tmp: gVisor lays a file system in memory over an empty one, which has no limit but the sandbox's memory."""
        directory = os.open(self.rootfs / "tmp", os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.close(os.open(".keep", os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=directory))
        finally:
            os.close(directory)

    def _has_user(self, user: User) -> bool:
        passwd = self.rootfs / "etc/passwd"
        return passwd.is_file() and re.search(rf"^{re.escape(user.name)}:", passwd.read_text(), re.MULTILINE) is not None

    def _pack_files(self) -> None:
        """Write share/files.tar: the recipe's files and generated settings, with owners and modes that git cannot keep."""
        with tarfile.open(self.share / "files.tar", "w") as tar:

            def add(name: str, content: bytes, mode: int) -> None:
                tar.addfile(self._entry(name, mode, size=len(content)), BytesIO(content))

            environment = "".join(f'{key}="{value}"\n' for key, value in sorted(self.recipe.env.items()))
            add("etc/environment", environment.encode(), 0o644)
            # Whoever starts a sandbox gives it an identity and a resolver.
            add("etc/machine-id", b"", 0o444)
            add("etc/resolv.conf", b"", 0o644)
            for user in self.recipe.users:
                if user.sudo:
                    add(f"etc/sudoers.d/{user.name}", f"{user.name} ALL=(ALL:ALL) NOPASSWD:ALL\n".encode(), 0o440)

            def add_folder(name: str) -> None:
                entry = self._entry(name, 0o755)
                entry.type = tarfile.DIRTYPE
                tar.addfile(entry)

            folder = self.recipe.folder / "files"
            for file in sorted(folder.rglob("*")):
                name = file.relative_to(folder).as_posix()
                if file.is_dir():
                    add_folder(name)
                else:
                    add(name, file.read_bytes(), 0o755 if file.stat().st_mode & 0o100 else 0o644)
            if programs := hooks(self.recipe):
                add_folder("etc/pandastack")
                add_folder("etc/pandastack/hooks")
                for hook, program in programs.items():
                    add(f"etc/pandastack/hooks/{hook}", program, 0o755)

    def _entry(self, name: str, mode: int, size: int = 0) -> tarfile.TarInfo:
        entry = tarfile.TarInfo(name)
        entry.mode, entry.size, entry.mtime = mode, size, int(time.time())
        for user in self.recipe.users:
            if f"/{name}".startswith(f"{user.home_path}/"):
                entry.uid = entry.gid = user.uid
        return entry

    async def _install_python(self, lock: Path) -> None:
        if self.tools.needs_root and not (self.rootfs / "usr/bin/pip3").exists():
            raise TemplateBuildError(
                f"{self.recipe.name} has Python requirements, but its base has no pip",
                hint="add python3 and python3-pip to the packages", reason="recipe",
            )  # fmt: skip
        shutil.copyfile(lock, self.share / "requirements.txt")
        (self.share / "wheels").mkdir()
        total = len(requirement_lines(lock))
        given = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--requirement", "/tmp/build/requirements.txt"]
        pip = ["python3", "-m", "pip", "--no-cache-dir", "--progress-bar", "off"]
        self.report.step("python", "fetching Python packages", total=total, unit="packages")
        await self._in_chroot([*pip[:3], "download", *pip[3:], *given, "--dest", "/tmp/build/wheels"], network=True, on_line=self._pip_line)
        self.report.step("python", f"installing {total} Python packages")
        await self._in_chroot([
            *pip[:3], "install", *pip[3:], *given, "--no-index", "--find-links", "/tmp/build/wheels", "--no-compile",
            "--break-system-packages", "--root-user-action=ignore", "--no-warn-script-location",
        ])  # fmt: skip
        self.report.step("compile", "compiling Python modules")
        # Errors are left alone: some packages ship templates or files for other Python versions.
        await self._in_chroot(["python3", "-c", _COMPILE])

    def _apt_line(self, line: str | None) -> None:
        if line is None:
            self.report.send()
        elif found := re.match(r"\d+ upgraded, (\d+) newly installed", line):
            self.report.total = (self.report.total or 0) + int(found[1])
        elif line.startswith("Setting up "):
            self.report.advance(line.removesuffix(" ..."))
        elif line.startswith(("Get:", "Unpacking ")):
            self.report.advance(line.removesuffix(" ..."), by=0)

    def _pip_line(self, line: str | None) -> None:
        if line is None:
            self.report.send()
        elif found := re.match(r"Collecting (\S+)", line):
            self.report.advance(f"fetching {found[1]}")

    async def _in_chroot(
        self, argv: Sequence[str], *, network: bool = False, user: str | None = None, on_line: Callable[[str | None], None] | None = None
    ) -> None:
        options = [*(["--network"] if network else []), *(["--user", user] if user else [])]
        environment = {
            "PATH": _PATH, "HOME": "/tmp" if user else "/root", "LANG": "C.UTF-8", "TMPDIR": "/tmp/build/tmp",
            "DEBIAN_FRONTEND": "noninteractive", "APT_CONFIG": "/tmp/build/apt.conf", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }  # fmt: skip
        if network:
            environment |= self.settings.environment
            if self.settings.ca_bundle:
                environment["PIP_CERT"] = "/tmp/build/ca.crt"
        await self._isolated(
            [*self.tools.chroot, self.rootfs, "run", self.share, *options, "--", *argv],
            network=network, deadline_s=_LONG_S if network else _SHORT_S, environment=environment, on_line=on_line,
        )  # fmt: skip

    async def _isolated(self, argv: Sequence[str | Path], *, network: bool = True, **options: object) -> None:
        isolate = [*self.tools.isolate, *([] if network else self.tools.no_network), "--"] if self.tools.isolate else []
        await self._run([*isolate, *argv], **options)  # type: ignore[arg-type]

    async def _run(
        self,
        argv: Sequence[str | Path],
        *,
        deadline_s: float = _SHORT_S,
        environment: dict[str, str] | None = None,
        on_line: Callable[[str | None], None] | None = None,
        quiet: bool = False,
    ) -> None:
        plain = {"PATH": _PATH, "LANG": "C.UTF-8", "HOME": str(self.work), "TMPDIR": str(self.work)}
        tick = on_line or (lambda line: self.report.send() if line is None else None)
        log = Path(os.devnull) if quiet else self.log
        try:
            await commands.run(argv, log=log, deadline_s=deadline_s, environment=environment or plain, on_line=tick)
        except commands.CommandFailed as error:
            raise explain(error, template=self.recipe.name, step=self.report.step_name, log=self.log) from error


def check_host(tools: Tools) -> None:
    """Refuse before anything is written when this machine cannot build: raises HostUnfit with what to do."""
    if tools.needs_root and os.geteuid() != 0:
        raise HostUnfit("templates can only be built by root", hint="start the host daemon as root, or with sudo", reason="root")
    needed = [(tools.mmdebstrap[0], "mmdebstrap"), *((word, "util-linux") for word in tools.isolate if word in ("setpriv", "unshare"))]
    for program, package in needed:
        if shutil.which(program, path=_PATH) is None:
            raise HostUnfit(f"the program {program} is missing on this host", hint=f"install it: apt install {package}", reason="program")


def check_space(images: Path, needed_bytes: int) -> None:
    """Raises DiskFull when the file system of `images` has less than `needed_bytes` free."""
    free_bytes = shutil.disk_usage(images).free
    if free_bytes < needed_bytes:
        raise DiskFull(
            f"building needs {needed_bytes >> 20} MiB free on the disk of the images, but there are {free_bytes >> 20} MiB",
            hint="free some space, or remove images that are no longer used",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )

"""Images: the root file systems templates are built into, found by name, built once, and kept by content hash.

Runs on a host. On disk, below the images' root:

    <name>-<hash12>/rootfs  manifest.json      a finished image; it appears by one rename, so it is whole or absent
    .building/<name>-<hash12>/                 a build under way, or what a killed one left; the next build clears it
    .locks/<name>-<hash12>.lock                who holds it (flock) builds or removes that image
    .logs/<name>-<hash12>.log                  the whole output of the latest build

A process may build while another waits for the same image: the lock works across processes and inside one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pandastack.errors import HostUnfit, PandastackError, TemplateError
from pandastack.host.storage import build, locks, mirrors, recipes
from pandastack.host.storage.build import Progress as Progress
from pandastack.host.storage.recipes import Recipe

_MIB = 1 << 20
# An unreachable mirror is asked again after this long; until then a create need not wait for its timeout.
_UNREACHABLE_S = 600.0
_FALLBACK_REASONS = ("mirror", "keyring", "network")
_KEY = re.compile(r"(?P<name>[a-z0-9][a-z0-9.-]*)-[0-9a-f]{12}\Z")


@dataclass(frozen=True, kw_only=True)
class Image:
    """A built template. `requested` is the name asked for; when a fallback answers, `name` differs and `note` says why.

    `digest` is the sha256 (hex) of all that went in, `recipe` carries the effective values, sizes are on disk.
    """

    name: str
    requested: str
    rootfs: Path
    digest: str
    size_bytes: int
    distribution: str
    note: str | None
    recipe: Recipe
    manifest: dict[str, Any]


class Images:
    """`root` is a folder on a disk with room for images; later `folders` of templates win over earlier ones."""

    def __init__(
        self,
        root: Path,
        folders: Sequence[Path],
        *,
        ubuntu_mirror: str | None = None,
        debian_mirror: str | None = None,
        tools: build.Tools | None = None,
    ) -> None:
        self._root = root
        self._folders = list(folders)
        self._mirrors = mirrors.Named(ubuntu_mirror=ubuntu_mirror, debian_mirror=debian_mirror)
        self._tools = tools or build.Tools()
        self._architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        self._unreachable: dict[str, tuple[float, str]] = {}  # template: (when, why), by the monotonic clock
        self.reload()

    def reload(self) -> None:
        """Read the template folders again. Files only; broken recipes stay out and are reported when asked for."""
        self._catalog = recipes.Catalog(self._folders)
        self._digests: dict[str, str] = {}

    def names(self) -> list[str]:
        return self._catalog.names()

    def broken(self) -> dict[str, TemplateError]:
        """Template folders that could not be read, and why; for the operator's log."""
        return dict(self._catalog.broken)

    def recipe(self, name: str) -> Recipe:
        """The effective recipe, aliases resolved. Raises TemplateNotFound (with the known names) or TemplateError."""
        return self._catalog.effective(name)

    def cached(self, name: str) -> Image | None:
        """The image if it is built already, else None; reads one small file. Raises as `recipe`."""
        recipe = self.recipe(name)
        if image := self._read(recipe, requested=name, note=None):
            return image
        why = self._refusal(recipe)
        if why is None or recipe.fallback is None:
            return None
        return self._read(self.recipe(recipe.fallback), requested=name, note=_note(recipe, why))

    async def ensure(self, name: str, progress: Callable[[Progress], None]) -> Image:
        """The image, built first if it must be (minutes); `progress` is called from the event loop.

        Raises TemplateNotFound, TemplateError, HostUnfit or DiskFull before anything is written, TemplateBuildError
        when a step fails. Cancelling kills the build. A name with a fallback gives that when its mirror is missing.
        """
        await asyncio.to_thread(self.reload)
        recipe = self.recipe(name)
        if recipe.fallback is None:
            return await self._ensure(recipe, name, None, progress)
        if image := self._read(recipe, requested=name, note=None):
            return image
        why = self._refusal(recipe)
        if why is None:
            try:
                return await self._ensure(recipe, name, None, progress)
            except PandastackError as error:
                if error.fields.get("reason") not in _FALLBACK_REASONS:
                    raise
                why = error.message
                self._unreachable[recipe.name] = (time.monotonic(), why)
        return await self._ensure(self.recipe(recipe.fallback), name, _note(recipe, why), progress)

    def prune(self, keep: Collection[str]) -> list[str]:
        """Remove images no current recipe asks for; returns their keys, `<name>-<hash12>`. Blocks: call it in a thread.

        `keep` names images never to touch: keys, digests or template names. Images being built stay, as do those of
        a template whose recipe cannot be read just now.
        """
        self.reload()
        wanted = {self._key(recipe) for recipe in map(self.recipe, self._sound_names())}
        removed = []
        for folder in sorted(self._root.iterdir()) if self._root.is_dir() else []:
            match = _KEY.match(folder.name)
            if not match or not (folder / "manifest.json").is_file() or folder.is_symlink():
                continue
            digest = _manifest(folder).get("digest", "")
            if folder.name in wanted or match["name"] in self._unsound_names() or {folder.name, digest, match["name"]} & set(keep):
                continue
            with locks.attempt(self._folder(".locks") / f"{folder.name}.lock") as held:
                if held and not _mounts_below(folder):
                    # The rename comes first, so that a half-removed image is never taken for a whole one.
                    trash = self._folder(".building") / folder.name
                    _remove_tree(trash)
                    folder.rename(trash)
                    _remove_tree(trash)
                    removed.append(folder.name)
        return removed

    def _sound_names(self) -> list[str]:
        return [name for name in self.names() if name not in self._unsound_names()]

    def _unsound_names(self) -> set[str]:
        unsound = set(self._catalog.broken)
        for name in self.names():
            try:
                self._catalog.chain(name)
            except TemplateError:
                unsound.add(name)
        return unsound

    def _digest(self, recipe: Recipe) -> str:
        if recipe.name not in self._digests:
            self._digests[recipe.name] = recipes.digest(self._catalog.chain(recipe.name), self._architecture)
        return self._digests[recipe.name]

    def _key(self, recipe: Recipe) -> str:
        return f"{recipe.name}-{self._digest(recipe)[:12]}"

    def _folder(self, name: str) -> Path:
        folder = self._root / name
        # apt drops to an unprivileged user who must pass through, so x but no r; finished images are closed (0700)
        # because they hold set-uid programs that no user of the host should find.
        folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        return folder

    def _read(self, recipe: Recipe, *, requested: str, note: str | None) -> Image | None:
        folder = self._root / self._key(recipe)
        manifest = _manifest(folder)
        if manifest.get("digest") != self._digest(recipe) or not (folder / "rootfs").is_dir():
            return None
        return Image(
            name=recipe.name,
            requested=requested,
            rootfs=folder / "rootfs",
            digest=manifest["digest"],
            size_bytes=manifest["size_bytes"],
            distribution=manifest["distribution"],
            note=note,
            recipe=recipe,
            manifest=manifest,
        )

    def _refusal(self, recipe: Recipe) -> str | None:
        """Why this host cannot build the recipe's distribution at all, if so; no network is touched."""
        when, why = self._unreachable.get(recipe.name, (0.0, ""))
        if why and time.monotonic() - when < _UNREACHABLE_S:
            return why
        try:
            mirrors.find(recipe.origin, **self._mirrors)
            mirrors.keyring(recipe.origin, self._tools.keyrings)
        except HostUnfit as error:
            if error.fields.get("reason") in _FALLBACK_REASONS:
                return str(error)
            raise
        return None

    async def _ensure(self, recipe: Recipe, requested: str, note: str | None, progress: Callable[[Progress], None]) -> Image:
        reporter = build.Reporter(progress)
        if image := self._read(recipe, requested=requested, note=note):
            return image
        build.check_host(self._tools)
        base = await self._ensure(self.recipe(recipe.base), recipe.base, None, progress) if recipe.base else None
        key = self._key(recipe)
        async with locks.held(self._folder(".locks") / f"{key}.lock", lambda: reporter.wait(f"another build of {key} is under way")):
            if image := self._read(recipe, requested=requested, note=note):
                return image
            await asyncio.to_thread(self._clear_leftovers, key)
            build.check_space(self._root, recipe.build_space_mb * _MIB + (base.size_bytes if base else 0))
            await self._build(recipe, base, reporter)
        image = self._read(recipe, requested=requested, note=note)
        if image is None:
            raise TemplateError(f"the image of {recipe.name} went away right after it was built", hint="look for who removes files there")
        return image

    async def _build(self, recipe: Recipe, base: Image | None, reporter: build.Reporter) -> None:
        key = self._key(recipe)
        work = self._folder(f".building/{key}")
        log = self._fresh_log(key)
        reporter.step("prepare", f"building {recipe.name}")
        # `recipe` has its bases' values; what to install is the recipe's own list, as the base has its own already.
        builder = build.Builder(recipe, work=work, log=log, reporter=reporter, tools=self._tools, **self._mirrors)
        try:
            await builder.build(base.rootfs if base else None)
            reporter.step("publish", "measuring and writing the manifest")
            manifest = await asyncio.to_thread(_describe, builder.rootfs, recipe, base, self._digest(recipe), self._architecture)
            manifest["duration_s"] = round(reporter.elapsed_s, 1)
            text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
            await asyncio.to_thread((builder.image / "manifest.json").write_text, text)
            await builder.sync()
            await asyncio.to_thread(self._publish, builder.image, key)
        finally:
            await _to_the_end(asyncio.to_thread(_remove_tree, work))
        reporter.step("done", f"{recipe.name} is built")

    def _fresh_log(self, key: str) -> Path:
        log = self._folder(".logs") / f"{key}.log"
        log.unlink(missing_ok=True)
        log.touch(mode=0o600)
        return log

    def _publish(self, image: Path, key: str) -> None:
        """One rename, then the folder that holds the name: after a power cut an image is whole or absent."""
        image.chmod(0o700)
        target = self._root / key
        if target.exists():
            # It has no readable manifest, else it would have been used: damaged, so it makes room.
            target.rename(image.with_name("damaged"))
        image.rename(target)
        descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _clear_leftovers(self, mine: str) -> None:
        """Remove what killed builds left behind. A build under way is recognised by its lock; `mine` is held by the caller."""
        for folder in self._folder(".building").iterdir():
            if folder.name == mine:
                _remove_tree(folder)
                continue
            with locks.attempt(self._folder(".locks") / f"{folder.name}.lock") as held:
                if held:
                    _remove_tree(folder)


def _note(recipe: Recipe, why: str) -> str:
    return f"{recipe.label} is not available here, so {recipe.fallback} is used: {why}"


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _describe(rootfs: Path, recipe: Recipe, base: Image | None, digest: str, architecture: str) -> dict[str, Any]:
    return {
        "format": 1,
        "name": recipe.name,
        "digest": digest,
        "builder": recipes.BUILDER_VERSION,
        "architecture": architecture,
        "distribution": str(recipe.distribution),
        "base": {"name": base.name, "digest": base.digest} if base else None,
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "packages": _packages(rootfs),
        "python_packages": _python_packages(rootfs),
        "size_bytes": _size_bytes(rootfs),
        "built_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _packages(rootfs: Path) -> dict[str, str]:
    """Debian packages and their versions, from dpkg's own record."""
    status = rootfs / "var/lib/dpkg/status"
    text = status.read_text("utf-8", errors="replace") if status.is_file() else ""
    stanzas = [dict(re.findall(r"^(Package|Status|Version): (.*)$", stanza, re.MULTILINE)) for stanza in text.split("\n\n")]
    return {one["Package"]: one["Version"] for one in stanzas if one.get("Status") == "install ok installed"}


def _python_packages(rootfs: Path) -> dict[str, str]:
    names = [path.name.removesuffix(".dist-info") for path in rootfs.glob("usr/local/lib/python3*/dist-packages/*.dist-info")]
    return dict(sorted((name.rsplit("-", 1)[0].replace("_", "-"), name.rsplit("-", 1)[-1]) for name in names))


def _size_bytes(rootfs: Path) -> int:
    """Bytes on disk, a hard-linked file once."""
    seen: set[int] = set()
    total = 0
    for folder, _, files in os.walk(rootfs):
        for path in (folder, *(os.path.join(folder, name) for name in files)):  # noqa: PTH118 (20 000 Path objects are slow)
            info = os.lstat(path)
            if info.st_nlink == 1 or info.st_ino not in seen:
                total += info.st_blocks * 512
            seen.add(info.st_ino)
    return total


def _mounts_below(folder: Path) -> list[str]:
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    prefix = f"{folder.resolve()}/"
    return [mount for mount in mounts if mount.startswith(prefix)]


def _remove_tree(folder: Path) -> None:
    # A build mounts in namespaces of its own only. Should someone else have mounted something here, deleting would
    # go through it into their files.
    if mounts := _mounts_below(folder):
        raise HostUnfit(f"{mounts[0]} is mounted below a folder that must be removed", hint=f"umount {mounts[0]}", reason="mount")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


async def _to_the_end(work: Awaitable[None]) -> None:
    """Wait for a clean-up even when this task is cancelled meanwhile; the cancellation goes on afterwards."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise

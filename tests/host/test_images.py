"""Images are built once, whole or not at all, and every failure says what to do. The builder's programs are fakes."""

from __future__ import annotations

import asyncio
import os
import sys
import tarfile
import textwrap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pandastack.errors import DiskFull, HostUnfit, PandastackError, TemplateBuildError, TemplateNotFound
from pandastack.host.storage import build
from pandastack.host.storage.images import Image, Images, Progress

BASE = (
    'name = "base"\nlabel = "Base"\naliases = ["debian"]\nbuild_space_mb = 1\npackages = ["git"]\n'
    '[distribution]\nname = "debian"\nversion = "12"\nsuite = "bookworm"\n'
)
CHILD = 'name = "child"\nlabel = "Child"\nbase = "base"\nbuild_space_mb = 1\n'
UBUNTU = (
    'name = "ubuntu"\nlabel = "Ubuntu"\nfallback = "base"\nbuild_space_mb = 1\n'
    '[distribution]\nname = "ubuntu"\nversion = "24.04"\nsuite = "noble"\n'
)

# Writes a root file system as mmdebstrap would, and behaves as the file `mood` beside it says.
BOOTSTRAP = """
import os, pathlib, sys, time
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
root = pathlib.Path(sys.argv[-2])
(root / "etc/apt").mkdir(parents=True)
(root / "tmp").mkdir()
(root / "etc/apt/sources.list").write_text("deb http://secret-mirror.example x")
(root / "etc/passwd").write_text("root:x:0:0::/root:/bin/bash\\n")
status = root / "var/lib/dpkg/status"
status.parent.mkdir(parents=True)
status.write_text("Package: bash\\nEssential: yes\\nStatus: install ok installed\\nVersion: 5.2\\n\\n"
    "Package: gone\\nStatus: deinstall ok config-files\\nVersion: 1\\n")
mood = (here / "mood").read_text() if (here / "mood").exists() else ""
if mood == "hang":
    if os.fork() == 0:
        (here / "grandchild").write_text(str(os.getpid()))
        time.sleep(600)
    time.sleep(600)
print("0 upgraded, 2 newly installed, 0 to remove", flush=True)
time.sleep(0.05)
print("Setting up bash (5.2) ...", flush=True)
if mood and mood != "hang":
    print(mood)
    sys.exit(25)
"""
CHROOT = """
import pathlib, sys
with (pathlib.Path(__file__).parent / "calls").open("a") as calls:
    calls.write("chroot " + " ".join(sys.argv[2:]) + "\\n")
packed = pathlib.Path(sys.argv[3]) / "files.tar"
if packed.exists():
    (pathlib.Path(__file__).parent / "files.tar").write_bytes(packed.read_bytes())
"""


class Bench:
    """A folder of templates, an images' root, and fake programs that do as told; `calls` is what was started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "images"
        self.root.mkdir()
        for name, text in (("base", BASE), ("child", CHILD), ("ubuntu", UBUNTU)):
            self.write(name, text)
        for name, text in (("bootstrap.py", BOOTSTRAP), ("chroot.py", CHROOT)):
            (folder / name).write_text(textwrap.dedent(text))
        (folder / "keyring.gpg").touch()
        self.tools = build.Tools(
            mmdebstrap=(sys.executable, str(folder / "bootstrap.py")),
            apt_config=("true",),
            isolate=(),
            chroot=(sys.executable, str(folder / "chroot.py")),
            needs_root=False,
            keyrings=dict.fromkeys(("debian", "ubuntu"), folder / "keyring.gpg"),
        )
        self.seen: list[Progress] = []

    def write(self, name: str, text: str) -> None:
        (self.folder / "templates" / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "templates" / name / "template.toml").write_text(text)

    def images(self, *, ubuntu_mirror: str | None = None) -> Images:
        return Images(
            self.root, [self.folder / "templates"], debian_mirror="http://deb.example/debian", ubuntu_mirror=ubuntu_mirror, tools=self.tools
        )

    def mood(self, mood: str) -> None:
        (self.folder / "mood").write_text(mood)

    def bootstraps(self) -> int:
        path = self.folder / "calls"
        return path.read_text().count("--mode=root") if path.exists() else 0

    def finished(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir() if path.name[0] != ".")

    def under_way(self) -> list[str]:
        folder = self.root / ".building"
        return [path.name for path in folder.iterdir()] if folder.exists() else []


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def ensure(bench: Bench, name: str, images: Images | None = None) -> Image:
    return asyncio.run((images or bench.images()).ensure(name, bench.seen.append))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (the event happens in another process)
            await asyncio.sleep(0.01)


def test_an_image_is_built_once_and_then_found(bench: Bench) -> None:
    images = bench.images()
    assert images.cached("base") is None
    image = ensure(bench, "debian", images)
    assert (image.name, image.requested, image.distribution, image.note) == ("base", "debian", "debian-12", None)
    assert image.rootfs == bench.root / f"base-{image.digest[:12]}" / "rootfs"
    assert image.manifest["packages"] == {"bash": "5.2"}
    assert image.size_bytes > 0
    assert ensure(bench, "base", images).digest == image.digest
    assert images.cached("base") == images.cached("base")
    assert bench.bootstraps() == 1
    assert bench.under_way() == []


def test_the_image_names_the_mirror_it_was_made_from(bench: Bench) -> None:
    sources = (ensure(bench, "base").rootfs / "etc/apt/sources.list").read_text()
    assert "secret-mirror" not in sources  # What mmdebstrap had left there.
    assert "bookworm main" in sources
    assert "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]" in sources


def test_hooks_become_programs_of_root(bench: Bench) -> None:
    bench.write("base", BASE + '[[users]]\nname = "user"\nuid = 1000\n')
    for folder, content in (("hooks", "#!/bin/sh\nsync\n"), ("files/etc/pandastack/hooks", "other")):
        hook = bench.folder / "templates/base" / folder / "before-snapshot"
        hook.parent.mkdir(parents=True)
        hook.write_text(content)
    ensure(bench, "base")
    with tarfile.open(bench.folder / "files.tar") as tar:
        found = tar.getmember("etc/pandastack/hooks/before-snapshot")  # The last of this name, which is what stays.
        assert (found.mode, found.uid, found.gid) == (0o755, 0, 0)
        program = tar.extractfile(found)
        assert program is not None
        assert program.read() == b"#!/bin/sh\nsync\n"
        assert (tar.getmember("etc/pandastack").isdir(), tar.getmember("etc/pandastack/hooks").mode) == (True, 0o755)
        assert "etc/pandastack/hooks/after-restore" not in tar.getnames()


def test_progress_counts_packages_and_ends_with_done(bench: Bench) -> None:
    ensure(bench, "base")
    assert any((one.step, one.done, one.total, one.unit) == ("packages", 1, 2, "packages") for one in bench.seen)
    assert [one.step for one in bench.seen][-1] == "done"
    assert {"packages", "files", "shrink", "publish"} <= {one.step for one in bench.seen}
    assert all(one.elapsed_s >= 0 for one in bench.seen)


def test_a_derived_image_builds_its_base_first(bench: Bench) -> None:
    image = ensure(bench, "child")
    assert image.manifest["base"]["name"] == "base"
    assert (image.rootfs / "etc/passwd").is_file()
    assert len(bench.finished()) == 2
    assert bench.bootstraps() == 1


def test_two_builds_of_one_image_build_it_once(bench: Bench) -> None:
    async def both() -> list[Image]:
        # Two objects, as in two processes: only the lock on disk keeps them apart.
        return await asyncio.gather(*(bench.images().ensure("base", bench.seen.append) for _ in range(2)))

    first, second = asyncio.run(both())
    assert first == second
    assert bench.bootstraps() == 1
    assert "wait" in {one.step for one in bench.seen}


def test_a_cancelled_build_kills_its_programs_and_leaves_nothing(bench: Bench) -> None:
    bench.mood("hang")

    async def cancel() -> None:
        task = asyncio.create_task(bench.images().ensure("base", bench.seen.append))
        await until((bench.folder / "grandchild").exists)
        await until(lambda: (bench.folder / "grandchild").read_text())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    pid = int((bench.folder / "grandchild").read_text())
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)
    assert (bench.finished(), bench.under_way()) == ([], [])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_a_killed_build_left_is_cleared_by_the_next(bench: Bench) -> None:
    left = bench.root / ".building" / "other-0123456789ab" / "image"
    left.mkdir(parents=True)
    (left / "file").touch()
    ensure(bench, "base")
    assert bench.under_way() == []


def test_a_damaged_image_is_built_again(bench: Bench) -> None:
    images = bench.images()
    image = ensure(bench, "base", images)
    (image.rootfs.parent / "manifest.json").write_text("{")
    assert images.cached("base") is None
    assert ensure(bench, "base", images).digest == image.digest
    assert bench.bootstraps() == 2


@pytest.mark.parametrize(
    ("line", "kind", "reason"),
    [
        ("dpkg: error: failed to write: No space left on device", DiskFull, "space"),
        ("W: GPG error: http://x InRelease: NO_PUBKEY 0E98404D386FA1D9", TemplateBuildError, "signature"),
        ("Err:1 http://deb.example Could not resolve 'deb.example'", TemplateBuildError, "network"),
        ("E: Unable to locate package nosuch", TemplateBuildError, "recipe"),
        ("unshare: unshare failed: Operation not permitted", HostUnfit, "namespaces"),
        ("E: Release file for http://x is not valid yet", TemplateBuildError, "clock"),
        ("something new", TemplateBuildError, "other"),
    ],
)
def test_a_failed_build_says_why_and_what_to_do(bench: Bench, line: str, kind: type[PandastackError], reason: str) -> None:
    bench.mood(line)
    with pytest.raises(kind) as caught:
        ensure(bench, "base")
    assert caught.value.fields["reason"] == reason
    assert caught.value.hint
    note = caught.value.__notes__[0]
    assert line in Path(note.removeprefix("the whole output is in ")).read_text()
    assert str(bench.root) not in str(caught.value.body())
    assert (bench.finished(), bench.under_way()) == ([], [])


def test_an_unfit_host_is_refused_before_anything_is_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.tools = build.Tools(mmdebstrap=("no-such-program",), needs_root=False, keyrings=bench.tools.keyrings)
    with pytest.raises(HostUnfit, match="apt install mmdebstrap"):
        ensure(bench, "base")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    bench.tools = build.Tools(keyrings=bench.tools.keyrings)
    with pytest.raises(HostUnfit, match="by root"):
        ensure(bench, "base")
    assert list(bench.root.iterdir()) == []


def test_a_disk_without_room_is_refused_before_the_build(bench: Bench) -> None:
    bench.write("base", BASE.replace("build_space_mb = 1\n", f"build_space_mb = {1 << 30}\n"))
    with pytest.raises(DiskFull, match="MiB free"):
        ensure(bench, "base")
    assert bench.bootstraps() == 0


def test_without_an_ubuntu_mirror_the_fallback_answers_and_says_so(bench: Bench) -> None:
    images = bench.images()
    image = ensure(bench, "ubuntu", images)
    assert (image.name, image.requested, image.distribution) == ("base", "ubuntu", "debian-12")
    assert image.note is not None
    assert "ubuntu_mirror" in image.note
    assert images.cached("ubuntu") == image


def test_with_an_ubuntu_mirror_the_template_is_itself(bench: Bench) -> None:
    image = ensure(bench, "ubuntu", bench.images(ubuntu_mirror="http://ubuntu.example/ubuntu"))
    assert (image.name, image.distribution, image.note) == ("ubuntu", "ubuntu-24.04", None)


def test_an_unreachable_ubuntu_mirror_gives_the_fallback_and_is_not_asked_each_time(bench: Bench) -> None:
    images = bench.images(ubuntu_mirror="http://ubuntu.example/ubuntu")
    ensure(bench, "base", images)
    bench.mood("Could not resolve 'ubuntu.example'")
    image = ensure(bench, "ubuntu", images)
    assert image.name == "base"
    assert image.note is not None
    assert ensure(bench, "ubuntu", images) == image
    assert bench.bootstraps() == 2


def test_a_bad_signature_is_never_answered_with_the_fallback(bench: Bench) -> None:
    bench.mood("GPG error: BADSIG")
    with pytest.raises(TemplateBuildError, match="signature"):
        ensure(bench, "ubuntu", bench.images(ubuntu_mirror="http://ubuntu.example/ubuntu"))


def test_prune_removes_only_what_no_recipe_asks_for(bench: Bench) -> None:
    images = bench.images()
    old = ensure(bench, "child", images)
    bench.write("child", CHILD + '[env]\nA = "1"\n')
    new = ensure(bench, "child", images)
    assert images.prune({old.digest}) == []
    assert images.prune([]) == [old.rootfs.parent.name]
    assert not old.rootfs.exists()
    assert new.rootfs.exists()
    bench.write("child", "not toml")
    assert images.prune([]) == []


def test_a_new_folder_is_found_without_a_restart(bench: Bench) -> None:
    images = bench.images()
    with pytest.raises(TemplateNotFound):
        images.recipe("new")
    bench.write("new", CHILD.replace("child", "new"))
    assert ensure(bench, "new", images).name == "new"


def test_a_second_cancel_does_not_cut_the_clean_up_short(bench: Bench) -> None:
    bench.mood("hang")

    async def cancel_twice() -> None:
        task: asyncio.Task[Image] = asyncio.create_task(bench.images().ensure("base", bench.seen.append))
        await until((bench.folder / "grandchild").exists)
        waiters: list[Awaitable[None]] = [asyncio.sleep(0), asyncio.sleep(0.02), asyncio.sleep(0.02)]
        for waiter in waiters:
            task.cancel()
            await waiter
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_twice())
    assert bench.under_way() == []

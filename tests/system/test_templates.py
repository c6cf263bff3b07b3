"""The shipped templates, built for real and tried in a chroot. Needs root, mmdebstrap and the network.

A build takes minutes. The images are those of the cache directory that servers use (see `conftest`), so each is built once.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pandastack.errors import TemplateBuildError
from pandastack.host.storage import build, images
from pandastack.host.storage.images import Image, Images

from .servers import cache_dir

TEMPLATES = Path(__file__).parents[2] / "templates"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.geteuid() != 0, reason="building templates needs root"),
    pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="mmdebstrap is not installed"),
]


@pytest.fixture(scope="module")
def cache() -> Path:
    return cache_dir() / "images"


def ensure(cache: Path, name: str, *more: Path) -> Image:
    def show(one: build.Progress) -> None:
        sys.stderr.write(f"{one.elapsed_s:6.1f} s  {one.step}  {one.done}/{one.total}  {one.message}\n")

    return asyncio.run(Images(cache, [TEMPLATES, *more]).ensure(name, show))


def inside(image: Image, tmp_path: Path, *argv: str, user: str = "root") -> str:
    """Run a command in a throw-away copy of the image, without network; returns its output."""
    copy = tmp_path / image.name
    if not copy.exists():
        subprocess.run(["cp", "-a", "--reflink=auto", image.rootfs, copy], check=True)
    home = "/root" if user == "root" else f"/home/{user}"
    done = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--", "chroot", f"--userspec={user}", str(copy), *argv],
        env={**image.recipe.env, "HOME": home},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_base_is_debian_with_what_people_expect(cache: Path, tmp_path: Path) -> None:
    image = ensure(cache, "base")
    assert image.distribution == "debian-12"
    assert image.size_bytes < 400 << 20
    assert {"bash", "git", "curl", "python3", "sudo"} <= set(image.manifest["packages"])
    assert inside(image, tmp_path, "git", "--version").startswith("git version")
    assert inside(image, tmp_path, "python", "--version").startswith("Python 3.11")
    assert inside(image, tmp_path, "id", "-u", user="user") == "1000"
    assert inside(image, tmp_path, "sudo", "-n", "id", "-u", user="user") == "0"
    assert "en_US" not in inside(image, tmp_path, "bash", "-c", "printf '\\xc3\\xa9' | wc -m; locale")


def test_base_carries_nothing_of_this_machine(cache: Path) -> None:
    image = ensure(cache, "base")
    etc = image.rootfs / "etc"
    assert (etc / "hostname").read_text() == "sandbox\n"
    assert (etc / "machine-id").read_text() == (etc / "resolv.conf").read_text() == ""
    assert list(etc.glob("ssh/ssh_host_*")) == list(etc.glob("apt/apt.conf.d/99mmdebstrap")) == []
    assert "bookworm-security main" in (etc / "apt/sources.list").read_text()
    assert list((image.rootfs / "var/lib/apt/lists").glob("*")) == []
    assert [path.name for path in (image.rootfs / "tmp").iterdir()] == [".keep"]
    assert list(image.rootfs.glob("usr/share/man/man*/*")) == []
    assert image.rootfs.parent.stat().st_mode & 0o777 == 0o700


def test_the_code_interpreter_imports_its_modules_from_compiled_files(cache: Path, tmp_path: Path) -> None:
    image = ensure(cache, "code-interpreter")
    assert image.recipe.warm is not None
    code = "import " + ", ".join(image.recipe.warm.python_modules) + "; print(numpy.__cached__)"
    cached = inside(image, tmp_path, "python3", "-c", code, user="user")
    assert (image.rootfs / cached.lstrip("/")).is_file()
    assert {"numpy", "pandas", "matplotlib", "requests", "ipykernel"} <= set(image.manifest["python_packages"])
    assert inside(image, tmp_path, "python3", "-m", "pip", "check") == "No broken requirements found."


def test_pip_install_works_without_a_venv(cache: Path, tmp_path: Path) -> None:
    image = ensure(cache, "base")
    copy = tmp_path / image.name
    inside(image, tmp_path, "true")
    package = copy / "opt/hello"
    package.mkdir()
    (package / "setup.py").write_text("from setuptools import setup; setup(name='hello-there', version='1', py_modules=['hello'])")
    (package / "hello.py").write_text("word = 'hello'")
    for user, options in (("root", []), ("user", ["--force-reinstall"])):
        inside(image, tmp_path, "chown", "-R", user, "/opt/hello")
        inside(image, tmp_path, "pip", "install", "--no-index", "--no-build-isolation", *options, "/opt/hello", user=user)
        assert inside(image, tmp_path, "python3", "-c", "import hello; print(hello.word)", user=user) == "hello"


def write_recipe(top: Path, name: str, *, packages: str) -> None:
    (top / name / "files/var/run").mkdir(parents=True)
    (top / name / "files/home/user").mkdir(parents=True)
    (top / name / "files/home/user/note").write_text("mine")
    # /var/run is an absolute link in Debian: unpacked from outside, this file would land on the host.
    (top / name / "files/var/run/pandastack-escape").write_text("x")
    (top / name / "template.toml").write_text(
        f'name = "{name}"\nlabel = "Test"\nbase = "base"\npackages = ["{packages}"]\n[env]\nGREETING = "hi"\n'
    )


def test_a_derived_template_adds_packages_and_files(cache: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path / "more", "with-tree", packages="tree")
    image = ensure(cache, "with-tree", tmp_path / "more")
    assert "tree" in image.manifest["packages"]
    assert (image.rootfs / "home/user/note").stat().st_uid == 1000
    assert 'GREETING="hi"' in (image.rootfs / "etc/environment").read_text()
    assert not (image.rootfs / "usr/sbin/policy-rc.d").exists()
    assert list((image.rootfs / "var/lib/apt/lists").glob("*")) == []
    assert not Path("/run/pandastack-escape").exists()
    assert inside(image, tmp_path, "tree", "--version").startswith("tree")
    shutil.rmtree(image.rootfs.parent)


def test_an_unknown_package_is_named(cache: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path / "more", "with-nothing", packages="no-such-package-here")
    with pytest.raises(TemplateBuildError, match="there is no package no-such-package-here") as caught:
        ensure(cache, "with-nothing", tmp_path / "more")
    assert caught.value.fields["reason"] == "recipe"


def test_cancelling_a_real_build_leaves_no_process_mount_or_folder(tmp_path: Path) -> None:
    async def cancel() -> None:
        started = asyncio.Event()

        def seen(one: build.Progress) -> None:
            if one.done:
                started.set()

        task = asyncio.create_task(Images(tmp_path, [TEMPLATES]).ensure("base", seen))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert list((tmp_path / ".building").iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    # The namespace's processes are killed at once, but the kernel may take a moment to let go of them.
    deadline = time.monotonic() + 5
    while (left := commands_with(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def commands_with(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line and "pytest" not in line:
            found.append(line)
    return found


def test_a_wrongly_signed_mirror_is_refused(tmp_path: Path) -> None:
    # A keyring that signs nothing here stands for a mirror whose lists someone else signed.
    (tmp_path / "keyring.gpg").touch()
    tools = build.Tools(keyrings={"debian": tmp_path / "keyring.gpg"})
    with pytest.raises(TemplateBuildError, match="signature"):
        asyncio.run(images.Images(tmp_path, [TEMPLATES], tools=tools).ensure("base", lambda one: None))


def test_an_unreachable_mirror_is_a_network_error(tmp_path: Path) -> None:
    with pytest.raises(TemplateBuildError) as caught:
        asyncio.run(Images(tmp_path, [TEMPLATES], debian_mirror="http://127.0.0.1:9/debian").ensure("base", lambda one: None))
    assert caught.value.fields["reason"] == "network"

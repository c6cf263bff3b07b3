"""What an operator can set for a host. Read from the environment (`PANDASTACK_*`) by whoever starts the process."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from pandastack.errors import HostUnfit
from pandastack.wire.isolation import Minimum


class HostSettings(BaseSettings):
    """Sizes are MiB. `cache_dir` holds what can be made again: images, baked states, runsc, guest kernels."""

    model_config = SettingsConfigDict(env_prefix="PANDASTACK_", extra="ignore")

    data_dir: Path = Path("/var/lib/pandastack")
    cache_dir: Path = Path("/var/cache/pandastack")
    run_dir: Path = Path("/run/pandastack")
    captures_dir: Path | None = Field(default=None, description="where forks are copied through; a tmpfs is as fast and costs memory")
    templates_dir: Path | None = Field(default=None, description="a folder of your own templates, beside the shipped ones")
    runtimes: str = Field(default="", description="the runtimes to try, such as `gvisor,qemu`; empty is all that this version has")
    min_isolation: Minimum = Field(default="none", description="what isolates less is refused, and never chosen by `auto`")
    runsc: Path | None = Field(default=None, description="the runsc to use instead of the one on PATH or Debian's")
    qemu: Path | None = Field(default=None, description="the QEMU to use instead of the one on PATH")
    firecracker: Path | None = Field(default=None, description="the Firecracker to use instead of the installed one or that on PATH")
    jailer: Path | None = Field(default=None, description="its jailer, where that is not beside it")
    firecracker_memory: Literal["file", "userfaultfd"] = Field(
        default="file", description="how its machines get memory that is not here yet: a file that all map, or copies of their own"
    )
    kernel: Path | None = Field(
        default=None, description="a package file (.deb) of Debian's cloud kernel, for microVMs, instead of fetching one"
    )
    debian_mirror: str | None = None
    ubuntu_mirror: str | None = None
    slots: int = Field(default=4, ge=0, le=256, description="prepared machines kept per template, for the two used last of each runtime")
    blanks: int = Field(default=4, ge=0, le=256, description="blank machines kept for forks and wakes, for the two shapes used last")
    object_store: str = Field(
        default="",
        description="where offloaded snapshots are: a folder, or s3://bucket/prefix with AWS_*; empty is a folder of the data directory",
    )
    chunk_cache_dir: Path | None = Field(default=None, description="where chunks of the object store are kept; else the cache directory")
    chunk_cache_mb: int = Field(default=4096, ge=0, description="the most that is kept there")
    max_sandboxes: int = Field(default=1000, ge=1)
    memory_overcommit: float = Field(default=2.0, ge=1.0, le=16.0)
    disk_overcommit: float = Field(default=4.0, ge=1.0, le=64.0)
    disk_low_water_mb: int = Field(default=1024, ge=0)


def read(**given: object) -> HostSettings:
    """The settings of this process, `given` ones first. Raises HostUnfit in one sentence where one is wrong."""
    try:
        return HostSettings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = f"PANDASTACK_{str(first['loc'][0]).upper()}"
        raise HostUnfit(f"the setting {name} is wrong: {first['msg']}", hint="see docs/host.md for what it may be") from error

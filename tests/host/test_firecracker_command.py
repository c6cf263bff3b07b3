"""The command line of the jailer, and what is made of versions and binaries."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pandastack.host.runtimes.firecracker import command
from pandastack.host.runtimes.firecracker.command import Binaries, Jail, Kernel
from pandastack.host.runtimes.microvms import Size

BINARIES = Binaries(firecracker=Path("/opt/fc/firecracker"), jailer=Path("/opt/fc/jailer"))
JAIL = Jail(base=Path("/data/m1/jail"), machine="m1", binary="firecracker")


def words(kernel: Kernel | None = None) -> list[str]:
    return command.jailed(
        BINARIES,
        JAIL,
        uid=70001,
        joins=[Path("/sys/fs/cgroup/g/m1/cgroup.procs")],
        cgroup_version=2,
        cgroup="/g/m1",
        memory_mib=256,
        kernel=kernel,
    )


def test_a_machine_is_in_its_cgroup_before_anything_else_runs() -> None:
    assert words()[:2] == ["sh", "-c"]
    assert words()[4:7] == ["/sys/fs/cgroup/g/m1/cgroup.procs", "--", "unshare"]


def test_the_jailer_gets_a_user_a_cgroup_and_a_folder_of_the_machine() -> None:
    line = " ".join(words())
    assert "--mount --ipc --uts --net" in line
    assert "setpriv --no-new-privs --bounding-set -all,+chown" in line
    assert (
        "/opt/fc/jailer --id m1 --exec-file /opt/fc/firecracker --uid 70001 --gid 70001 --chroot-base-dir /data/m1/jail"
        " --cgroup-version 2 --parent-cgroup g/m1 -- --api-sock api.sock --level Error"
    ) in line
    assert "--no-seccomp" not in line


def test_what_it_saves_goes_to_memory_that_is_bounded() -> None:
    script = words()[words().index("--net") + 4]
    assert (
        "mount -t tmpfs -o size=272m,mode=700,uid=70001,gid=70001,nosuid,nodev,noexec scratch /data/m1/jail/firecracker/m1/root/s" in script
    )
    assert script.endswith('exec "$@"')
    assert "/proc/self/fd" not in script


def test_one_that_boots_finds_a_kernel_that_it_cannot_write() -> None:
    script = words(Kernel(vmlinux_fd=7, initramfs_fd=8))[words().index("--net") + 4]
    assert "mount -o bind,ro /proc/self/fd/7 /data/m1/jail/firecracker/m1/root/vmlinux" in script
    assert "mount -o bind,ro /proc/self/fd/8 /data/m1/jail/firecracker/m1/root/initramfs" in script


def test_names_for_a_shell_are_quoted() -> None:
    jail = Jail(base=Path("/da ta/$x"), machine="m1", binary="firecracker")
    line = command.jailed(BINARIES, jail, uid=1, joins=[], cgroup_version=1, cgroup="/g", memory_mib=1)
    assert any("'/da ta/$x/firecracker/m1/root'/s" in word for word in line)


def test_the_jail_is_named_after_the_program_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "firecracker-v1.17.0").touch()
    (tmp_path / "firecracker").symlink_to("firecracker-v1.17.0")
    binaries = Binaries(firecracker=tmp_path / "firecracker", jailer=tmp_path / "jailer")
    assert Jail.of(tmp_path, "m1", binaries).root == tmp_path / "firecracker-v1.17.0" / "m1" / "root"


def test_the_machine_has_relative_names_and_tracks_what_it_writes() -> None:
    config, source, drive, vsock = command.machine(Size(cpus=2, memory_mib=512), 100)
    assert (config.vcpu_count, config.mem_size_mib, config.track_dirty_pages) == (2, 512, True)
    assert not any(name.startswith("/") for name in (source.kernel_image_path, source.initrd_path, drive.path_on_host, vsock.uds_path))
    assert source.boot_args.endswith("pandastack.processes=100")
    assert not drive.is_root_device


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Firecracker v1.16.1\n\n2026 Firecracker exiting successfully.", ("1.16.1", (1, 16, 1))),
        ("Firecracker v1.17.0-dev\n", ("1.17.0-dev", (1, 17, 0))),
        ("Jailer v1.17.0\n", ("1.17.0", (1, 17, 0))),
        ("QEMU emulator version 7.2.22", None),
        ("", None),
    ],
)
def test_versions(text: str, found: object) -> None:
    assert command.version(text) == found


def elf(*notes: bytes) -> bytes:
    """A program with one segment of notes."""
    content = b"".join(notes)
    header = b"\x7fELF\x02\x01\x01".ljust(32, b"\0") + struct.pack("<QQIHHHHHH", 64, 0, 0, 64, 56, 1, 0, 0, 0)
    assert len(header) == 64
    return header + struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(content), len(content), 4) + content


def note(owner: bytes, kind: int, content: bytes) -> bytes:
    return struct.pack("<III", len(owner), len(content), kind) + owner.ljust(-(-len(owner) // 4) * 4, b"\0") + content


class TestFilters:
    def test_a_program_of_glibc_has_none(self) -> None:
        build = note(b"GNU\0", 3, b"x" * 20)
        assert not command.has_filters(elf(build, note(b"GNU\0", 1, bytes(16))))

    def test_one_of_musl_has_some(self) -> None:
        assert command.has_filters(elf(note(b"GNU\0", 3, b"x" * 20)))

    def test_what_is_no_program_has_none(self) -> None:
        assert not command.has_filters(b"#!/bin/sh\n")

    def test_python_here_is_one_of_glibc(self) -> None:
        assert not command.has_filters(Path("/bin/sh").read_bytes())

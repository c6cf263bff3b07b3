"""What QEMU is told. The words are part of the contract with saved states: `template` changes when they do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pandastack.host.runtimes.base import Limits
from pandastack.host.runtimes.microvms import Size
from pandastack.host.runtimes.qemu import command
from pandastack.host.runtimes.qemu.command import Boot, Jail

ONE = Size(cpus=1, memory_mib=256)
BOOT = Boot(vmlinux_fd=7, initramfs_fd=8, serial_fd=9, arguments="quiet x=1")
ACCELERATIONS = ("kvm", "tcg")


def _qemu(acceleration: command.Acceleration = "tcg", size: Size = ONE, **more: object) -> list[str]:
    return command.qemu(Path("/usr/bin/qemu"), acceleration, size, channel_fd=4, control_fd=5, **more)  # type: ignore[arg-type]


def _after(words: list[str], option: str) -> list[str]:
    return [words[index + 1] for index, word in enumerate(words) if word == option]


@pytest.mark.parametrize(("cpu", "cpus"), [(0.1, 1), (1, 1), (1.5, 2), (4.0, 4)])
def test_a_part_of_a_cpu_is_a_whole_one_inside(cpu: float, cpus: int) -> None:
    assert Size.of(Limits(cpu=cpu, memory_mib=300, disk_mib=1)) == Size(cpus=cpus, memory_mib=300)


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
def test_what_boots_and_what_waits_for_a_state_have_the_same_devices(acceleration: command.Acceleration) -> None:
    waiting, booting = _qemu(acceleration), _qemu(acceleration, disk_fd=6, boot=BOOT)
    for option in ("-M", "-cpu", "-m", "-smp", "-device", "-global"):
        assert _after(waiting, option) == _after(booting, option)
    assert [one.split(",")[0] for one in _after(booting, "-device")] == [
        "virtio-serial-device",
        "virtserialport",
        "virtio-blk-device",
        "virtio-rng-device",
    ]
    assert _after(waiting, "-incoming") == ["defer"]
    assert "-kernel" not in waiting
    assert "-incoming" not in booting


def test_files_are_descriptors() -> None:
    words = _qemu(disk_fd=6, boot=BOOT)
    assert _after(words, "-kernel") == ["/vmlinux"]
    assert _after(words, "-initrd") == ["/initramfs"]
    assert _after(words, "-add-fd") == ["fd=6,set=1"]
    assert _after(words, "-append") == ["quiet x=1"]
    assert json.loads(_after(words, "-blockdev")[0])["filename"] == "/dev/fdset/1"
    assert {"socket,id=c0,fd=4,server=on,wait=off", "socket,id=q0,fd=5,server=on,wait=off", "socket,id=s0,fd=9"} == set(
        _after(words, "-chardev")
    )
    paths = [word for word in words[1:] if word.startswith("/")]
    assert paths == ["/vmlinux", "/initramfs"], "which the jail has, from their descriptors"


@pytest.mark.parametrize("acceleration", ACCELERATIONS)
def test_no_machine_has_more_than_it_needs(acceleration: command.Acceleration) -> None:
    for words in (_qemu(acceleration), _qemu(acceleration, disk_fd=6, boot=BOOT)):
        assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(words)
        (sandbox,) = _after(words, "-sandbox")
        assert sandbox == "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
        assert "-netdev" not in words
        assert "-daemonize" not in words


def test_emulation_is_bounded_and_single_where_there_is_one_cpu() -> None:
    assert _after(_qemu(), "-accel") == ["tcg,thread=single,tb-size=32"]
    assert _after(_qemu(size=Size(cpus=2, memory_mib=256)), "-accel") == ["tcg,thread=multi,tb-size=32"]
    assert _after(_qemu("kvm"), "-accel") == ["kvm"]
    assert command.OVERHEAD_MIB["tcg"] > command.TRANSLATED_MIB + 64


def test_only_an_emulated_kernel_goes_without_its_mitigations_and_random_addresses() -> None:
    emulated = command.kernel_arguments("tcg", 2_300_000, 77).split()
    real = command.kernel_arguments("kvm", 2_300_000, 77).split()
    assert set(emulated) - set(real) == {"mitigations=off", "nokaslr", "norandmaps", "tsc=reliable", "tsc_early_khz=2300000"}
    assert {"console=ttyS0", "reboot=t", "panic=-1", "quiet", "pandastack.processes=77"} == set(real)


def test_a_process_is_confined_before_it_is_qemu() -> None:
    jail = Jail(place=Path("/run/it's"), folders=[Path("/usr")], links=[Path("usr/lib")])
    words = command.confined(["qemu", "-x"], joins=[Path("/c/a"), Path("/c/b")], uid=7001, jail=jail)
    script = next(word for word in words if "chroot" in word)
    order = [words.index(word) for word in ("/c/b", "unshare", script, "setpriv", "qemu")]
    assert order == sorted(order)
    assert words[-2:] == ["qemu", "-x"]
    assert _after(words, "--reuid") == _after(words, "--regid") == ["7001"]
    assert {"--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"} <= set(words)
    assert {"--mount", "--ipc", "--uts", "--net"} <= set(words)


def test_the_jail_has_what_is_named_and_no_more() -> None:
    jail = Jail(place=Path("/run/it's"), folders=[Path("/usr"), Path("/opt/my qemu")], links=[Path("usr/lib"), Path("usr/lib64")])
    plain = jail.script(kvm=False, boot=None).split(" && ")
    assert plain[1:] == [
        "mount -t tmpfs -o size=64k,mode=755,nosuid,noexec jail '/run/it'\"'\"'s'",
        "cd '/run/it'\"'\"'s'",
        "mkdir -p ./dev ./usr './opt/my qemu'",
        "ln -s usr/lib usr/lib64 .",
        "mount -o bind,ro /usr ./usr",
        "mount -o bind,ro '/opt/my qemu' './opt/my qemu'",
        "mount -o remount,ro .",
        'exec chroot . "$@"',
    ]
    booting = jail.script(kvm=True, boot=BOOT).split(" && ")
    assert set(booting) - set(plain) == {
        "mknod -m 666 dev/kvm c 10 232",
        ": >vmlinux",
        "mount -o bind,ro /proc/self/fd/7 vmlinux",
        ": >initramfs",
        "mount -o bind,ro /proc/self/fd/8 initramfs",
    }
    assert booting[-2:] == plain[-2:]


def test_a_binary_of_ones_own_is_seen_in_the_jail(tmp_path: Path) -> None:
    shipped = Jail.of(Path("/run/q"), Path("/usr/bin/qemu-system-x86_64"))
    assert Path("/usr") in shipped.folders
    assert tmp_path not in shipped.folders
    own = tmp_path / "qemu" / "bin" / "qemu-system-x86_64"
    own.parent.mkdir(parents=True)
    own.touch()
    linked = tmp_path / "qemu-link"
    linked.symlink_to(own)
    assert Jail.of(Path("/run/q"), linked).folders == [*shipped.folders, tmp_path / "qemu"]


def test_the_template_changes_with_what_a_state_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    before = command.template("tcg")
    assert before == command.template("tcg")
    assert before != command.template("kvm")
    monkeypatch.setattr(command, "PORT", "another")
    assert command.template("tcg") != before


def test_versions_are_read() -> None:
    debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c) 2003-2022 Fabrice Bellard\n"
    assert command.version(debian) == ("7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", (7, 2))
    assert command.version("QEMU emulator version 10.0.3\n") == ("10.0.3", (10, 0))
    assert command.version("something else") is None

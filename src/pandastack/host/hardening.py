"""The production checklist: what a host that runs strangers' code should look like, read from its kernel. Called by `doctor --security`.

Only looks; changes and starts nothing. Each function answers with one `Check`: false is something to change before strangers' code
runs here, null something to decide. What each means, and how to change it for good, is in docs/howto/production.md.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pandastack.host.checks import Check, failed, passed, unsure
from pandastack.host.settings import HostSettings


@dataclass(frozen=True, kw_only=True)
class Here:
    """What is looked at. `root` is the top of the host's file system; tests hand in another."""

    settings: HostSettings
    root: Path = Path("/")

    def read(self, path: str) -> str | None:
        """The text of a small file without its end of line; None where there is none."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return None


def examine(here: Here) -> list[Check]:
    """The whole checklist, in its order. Takes milliseconds."""
    return [_checked(name, look, here) for name, look in CHECKS.items()]


def _checked(name: str, look: Callable[[str, Here], Check], here: Here) -> Check:
    try:
        return look(name, here)
    except (OSError, ValueError) as error:
        return unsure(name, f"this kernel answers unexpectedly ({error})")


def _vulnerabilities(name: str, here: Here) -> Check:
    folder = here.root / "sys/devices/system/cpu/vulnerabilities"
    known = {file.name: file.read_text().strip() for file in sorted(folder.glob("*"))}
    if not known:
        return unsure(name, "this kernel does not say which flaws its CPU has", hint="use a kernel that does (x86, Linux 4.15)")
    # "Mitigation: ...; SMT vulnerable" is what the check of SMT is for.
    opened = [flaw for flaw, text in known.items() if text.startswith("Vulnerable")]
    if opened:
        hint = "install the CPU's microcode and the newest kernel, and take mitigations=off from its command line"
        return failed(name, f"no mitigation against {', '.join(opened)}", hint=hint)
    return passed(name, f"{len(known)} known flaws, none of them open")


def _smt(name: str, here: Here) -> Check:
    active = here.read("sys/devices/system/cpu/smt/active")
    if active is None:
        return unsure(name, "this kernel does not say whether CPU threads share a core")
    if active == "0":
        return passed(name, "no two sandboxes share a core at the same time")
    return failed(name, "sandboxes on two threads of a core can watch each other", hint="boot with nosmt, or write off to smt/control")


def _ksm(name: str, here: Here) -> Check:
    if here.read("sys/kernel/mm/ksm/run") in (None, "0", "2"):
        return passed(name, "equal pages of different sandboxes are not merged")
    return failed(name, "pages are merged, which tells one sandbox what another has", hint="write 0 to /sys/kernel/mm/ksm/run")


def _swap(name: str, here: Here) -> Check:
    lines = (here.read("proc/swaps") or "").splitlines()[1:]
    places = [line.split()[0] for line in lines if not line.startswith("/dev/zram")]
    if not places:
        return passed(name, "memory of sandboxes is never written to a swap device")
    return failed(
        name, f"memory of sandboxes can be written to {', '.join(places)}", hint="swapoff -a, and take it from /etc/fstab; or zram"
    )


def _nested(name: str, here: Here) -> Check:
    for module in ("kvm_intel", "kvm_amd"):
        value = here.read(f"sys/module/{module}/parameters/nested")
        if value is not None:
            if value in ("0", "N"):
                return passed(name, f"{module}: guests cannot use KVM themselves")
            hint = f"options {module} nested=0 in a file of /etc/modprobe.d, then load the module again"
            return failed(name, f"{module}: guests may use KVM themselves, which is much code that faces them", hint=hint)
    return passed(name, "no KVM that guests could use")


def _kvm_device(name: str, here: Here) -> Check:
    try:
        mode = (here.root / "dev/kvm").stat().st_mode
    except OSError:
        return passed(name, "there is none")
    if not mode & stat.S_IRWXO:
        return passed(name, "only root and its group may open /dev/kvm")
    return failed(name, "every user of this machine may open /dev/kvm", hint="chmod 660 /dev/kvm, with a udev rule to keep it so")


def _core_dumps(name: str, here: Here) -> Check:
    pattern = here.read("proc/sys/kernel/core_pattern") or ""
    if not pattern.startswith("|"):
        return passed(name, "no program is handed the memory of one that crashed")
    program = pattern[1:].split()[0] if pattern[1:].split() else ""
    hint = "sysctl kernel.core_pattern=core, unless the program keeps dumps to itself"
    return unsure(name, f"a program that crashes hands its memory to {program}, whatever its limit", hint=hint)


def _ptrace(name: str, here: Here) -> Check:
    scope = here.read("proc/sys/kernel/yama/ptrace_scope")
    if scope == "3":
        hint = "sysctl kernel.yama.ptrace_scope=2 needs a boot, since 3 cannot be left"
        return failed(name, "nothing may be traced, so the memory of microVMs cannot be put in place", hint=hint)
    if scope in ("1", "2"):
        return passed(name, "processes of one user are kept from each other")
    return unsure(name, "processes of one user may trace each other", hint="sysctl kernel.yama.ptrace_scope=1, where the kernel has Yama")


def _bpf(name: str, here: Here) -> Check:
    if (here.read("proc/sys/kernel/unprivileged_bpf_disabled") or "1") != "0":
        return passed(name, "only root may load programs into the kernel")
    return failed(name, "every user may load programs into the kernel", hint="sysctl kernel.unprivileged_bpf_disabled=1")


def _restart(name: str, here: Here) -> Check:
    if (here.root / "run/reboot-required").exists() or (here.root / "var/run/reboot-required").exists():
        return failed(name, "a newer kernel or library is installed and not in use", hint="restart the machine")
    return passed(name, "no update waits for a restart")


def _data(name: str, here: Here) -> Check:
    folder = here.settings.data_dir
    try:
        found = folder.stat()
    except FileNotFoundError:
        return unsure(name, f"{folder} is not there yet", hint="start the server once, or set PANDASTACK_DATA_DIR as it has it")
    if found.st_uid == 0 and not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return passed(name, f"{folder} is root's alone")
    hint = f"chown root {folder}; chmod 700 {folder}"
    return failed(name, f"other users can look into {folder}, where memory and disks of sandboxes are", hint=hint)


def _minimum(name: str, here: Here) -> Check:
    least = here.settings.min_isolation
    if least != "none":
        return passed(name, f"nothing weaker than {least} is ever used")
    hint = "set PANDASTACK_MIN_ISOLATION (gvisor, qemu-kvm, ...), so that nothing weaker is used when the stronger fails"
    return unsure(name, "the server may use whatever works here, if a create asks for it or nothing better works", hint=hint)


CHECKS: dict[str, Callable[[str, Here], Check]] = {
    "cpu flaws": _vulnerabilities,
    "smt": _smt,
    "ksm": _ksm,
    "swap": _swap,
    "nested kvm": _nested,
    "kvm device": _kvm_device,
    "core dumps": _core_dumps,
    "ptrace": _ptrace,
    "bpf": _bpf,
    "restart": _restart,
    "data directory": _data,
    "least isolation": _minimum,
}

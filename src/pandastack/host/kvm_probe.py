"""Runs a small guest on /dev/kvm and says step by step what worked. A program of its own: it may hang, then `kvm` kills it.

Standard library only, and started with `python -I`. One line of JSON per passed step ({"passed": 3}), at the end either
{"done": true, "cpu_ms": ...} or {"failed": {"kind": ..., "detail": ...}}. Source: Linux Documentation/virt/kvm/api.rst, linux/kvm.h.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import platform
import struct
import sys
import time

STEPS = (
    "real mode",
    "protected mode",
    "64-bit long mode with paging",
    "SSE, CPUID and the time-stamp counter",
    "a page fault repaired by its handler",
    "user mode with system calls and exceptions",
    "the interrupt of the local timer",
    "running at the speed of a CPU",
)

# kvm_guest.S, assembled; tests compare the two.
CODE = bytes.fromhex(
    "fa31c08ed88ec08ed0bc0070b9e80331c001c8e2fca30050b001e610660f01160030660f011e08300f20c00c010f22c066ea38100000080066b81000"
    "8ed88ec08ed0bc00700000e80000000058a308500000b002e610b8a00600000f22e0b8000001000f22d8b9800000c00f320d010900000f30b8330001"
    "800f22c0ea83100000180048c7c400700000b9800000c00f328904251050000048b8efcdab896745230148c7c10300000048f7e14889042518500000"
    "b003e610b807000000f20f2ac0f20f59c0f20f51c8f20f58c1f2480f2cc048890425205000000fae0425005c000031c00fa2891c25285000000f3148"
    "c1e2204809d04889c3b9100000000f3248c1e2204809d04829d84889042530500000b004e610c70425001020005a5a00008b04250010200089042538"
    "500000b005e61066b840000f00d8b9810000c031c0ba180023000f30b9820000c0b88311000031d20f30b9840000c0b80002000031d20f306a2b6800"
    "8000006a026a33687611000048cfbf110000000f054889c70f0bf4488d8700010000480f0748893c2540500000b006e610bb0000e0fec783f0000000"
    "ff010000c783e00300000b000000c7832003000040000000c7838003000040420f00fbf4fa833c25485000000074f3b007e610b9002d3101ffc975fc"
    "b008e610f4500f20d04889042550500000488b442408488904255850000048c7042508300100030018000f013c2500102000584883c40848cfb88d11"
    "0000ffe0ff04254850000053bb0000e0fec783b0000000000000005b48cfe51119122012"
)

_GET_API_VERSION, _CREATE_VM, _GET_VCPU_MMAP_SIZE = 0xAE00, 0xAE01, 0xAE04
_CREATE_VCPU, _SET_TSS_ADDR, _CREATE_IRQCHIP, _RUN = 0xAE41, 0xAE47, 0xAE60, 0xAE80
_SET_USER_MEMORY_REGION = 0x4020AE46
_GET_SUPPORTED_CPUID, _SET_CPUID2 = 0xC008AE05, 0x4008AE90
_GET_SREGS, _SET_SREGS, _SET_REGS = 0x8138AE83, 0x4138AE84, 0x4090AE82
_EXIT_IO, _EXIT_SHUTDOWN, _EXIT_FAIL_ENTRY, _EXIT_INTERNAL_ERROR = 2, 8, 9, 17
_MEMORY_BYTES = 2 << 20
_CODE_AT, _GDT_AT, _IDT_AT, _TSS_AT = 0x1000, 0x2000, 0x4000, 0x4800
_PML4_AT, _PDPT_AT, _PD_AT, _PT_AT, _PD_DEVICES_AT = 0x10000, 0x11000, 0x12000, 0x13000, 0x14000
_APIC = 0xFEE00000
# What the guest must have stored by the end of a step: step, address, smallest and largest right value.
_RESULTS = (
    (1, 0x5000, 0xA314, 0xA314),
    (2, 0x5008, 0x1000, 0x1FFF),
    (3, 0x5010, 0xD01, 0xD01),  # EFER: the CPU itself sets LMA.
    (3, 0x5018, 0x369D0369D0369CD, 0x369D0369D0369CD),
    (4, 0x5020, 56, 56),
    (4, 0x5028, 1, 0xFFFFFFFF),  # The CPU vendor's first letters.
    (4, 0x5030, 1, 1 << 40),  # The MSR and RDTSC are one clock, and it goes forward.
    (5, 0x5038, 0x5A5A, 0x5A5A),
    (5, 0x5050, 0x201000, 0x201000),  # CR2
    (5, 0x5058, 2, 2),
    (6, 0x5040, 0x111, 0x111),
    (7, 0x5048, 1, 1),
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


class Failed(Exception):
    """`kind` is "setup" (KVM refused a call), "run" (the guest stopped) or "wrong" (a wrong result)."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def _ioctl(fd: int, name: str, request: int, argument: int | bytearray = 0) -> int:
    # ctypes and not fcntl: some arguments are addresses above 2 GiB, which fcntl.ioctl takes for negative numbers.
    value = argument if isinstance(argument, int) else ctypes.addressof(ctypes.c_char.from_buffer(argument))
    while True:
        result = int(_libc.ioctl(fd, request, value))
        if result >= 0:
            return result
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise Failed("setup", f"{name}: {os.strerror(code)}")


def _segment(access: int, flags: int) -> int:
    return 0xFFFF | access << 40 | (flags << 4 | 0xF) << 48


def fill(memory: mmap.mmap) -> None:
    """Code, segment and interrupt tables, and page tables of the guest."""

    def put(address: int, *values: int) -> None:
        memory[address : address + 8 * len(values)] = struct.pack(f"<{len(values)}Q", *values)

    memory[_CODE_AT : _CODE_AT + len(CODE)] = CODE
    kernel = (_segment(0x9B, 0xC), _segment(0x93, 0xC), _segment(0x9B, 0xA), _segment(0x93, 0xC))
    user = (_segment(0xF3, 0xC), _segment(0xFB, 0xA))
    put(_GDT_AT, 0, *kernel, *user, 0, 0x67 | _TSS_AT << 16 | 0x89 << 40, 0)
    memory[0x3000:0x3006] = struct.pack("<HI", 79, _GDT_AT)
    memory[0x3008:0x300E] = struct.pack("<HI", 16 * 65 - 1, _IDT_AT)
    for vector, handler in zip((14, 6, 64), struct.unpack("<3H", CODE[-6:]), strict=True):
        memory[_IDT_AT + 16 * vector : _IDT_AT + 16 * vector + 8] = struct.pack("<HHHH", handler, 0x18, 0x8E00, 0)
    put(_TSS_AT + 4, 0x7800)  # The stack for entries from user mode.
    put(_PML4_AT, _PDPT_AT | 7)
    put(_PDPT_AT, _PD_AT | 7)
    put(_PD_AT, 0x87, _PT_AT | 3)  # The first 2 MiB as they are; the next have a table without entries, for the page fault.
    put(_PDPT_AT + 24, _PD_DEVICES_AT | 3)
    put(_PD_DEVICES_AT + 8 * (_APIC >> 21 & 511), _APIC | 0x9B)


def _open() -> tuple[int, int]:
    """The device and a new virtual machine with memory to come."""
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Failed("setup", f"/dev/kvm: {error.strerror}") from error
    version = _ioctl(kvm, "KVM_GET_API_VERSION", _GET_API_VERSION)
    if version != 12:
        raise Failed("setup", f"KVM_GET_API_VERSION: {version} instead of 12")
    vm = _ioctl(kvm, "KVM_CREATE_VM", _CREATE_VM)
    # Intel CPUs need a place for real mode; others ignore it.
    _ioctl(vm, "KVM_SET_TSS_ADDR", _SET_TSS_ADDR, 0xFFFBD000)
    _ioctl(vm, "KVM_CREATE_IRQCHIP", _CREATE_IRQCHIP)
    return kvm, vm


def _vcpu(kvm: int, vm: int) -> int:
    vcpu = _ioctl(vm, "KVM_CREATE_VCPU", _CREATE_VCPU)
    cpuid = bytearray(struct.pack("<II", 256, 0) + bytes(40 * 256))
    _ioctl(kvm, "KVM_GET_SUPPORTED_CPUID", _GET_SUPPORTED_CPUID, cpuid)
    _ioctl(vcpu, "KVM_SET_CPUID2", _SET_CPUID2, cpuid)
    special = bytearray(312)
    _ioctl(vcpu, "KVM_GET_SREGS", _GET_SREGS, special)
    special[0:8], special[12:14] = bytes(8), bytes(2)  # Base and selector of CS.
    _ioctl(vcpu, "KVM_SET_SREGS", _SET_SREGS, special)
    registers = bytearray(144)
    struct.pack_into("<QQ", registers, 128, _CODE_AT, 2)  # RIP, RFLAGS
    _ioctl(vcpu, "KVM_SET_REGS", _SET_REGS, registers)
    return vcpu


def _say(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _why(reason: int, run: mmap.mmap) -> str:
    (first,) = struct.unpack_from("<Q", run, 32)
    if reason == _EXIT_INTERNAL_ERROR:
        error = first & 0xFFFFFFFF
        what = "an instruction could neither run on the CPU nor be emulated" if error == 1 else "KVM gave up"
        return f"{what} (KVM internal error {error})"
    if reason == _EXIT_SHUTDOWN:
        return "an exception could not be delivered and the guest was shut down (triple fault)"
    if reason == _EXIT_FAIL_ENTRY:
        return f"the CPU refused the guest (reason {first:#x})"
    return f"KVM stopped the guest unexpectedly (exit {reason})"


def go() -> None:
    """Run the guest through all steps. Raises Failed at the first that goes wrong; may also never come back."""
    kvm, vm = _open()
    memory = mmap.mmap(-1, _MEMORY_BYTES)
    fill(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    region = bytearray(struct.pack("<IIQQQ", 0, 0, 0, _MEMORY_BYTES, address))
    _ioctl(vm, "KVM_SET_USER_MEMORY_REGION", _SET_USER_MEMORY_REGION, region)
    vcpu = _vcpu(kvm, vm)
    run = mmap.mmap(vcpu, _ioctl(kvm, "KVM_GET_VCPU_MMAP_SIZE", _GET_VCPU_MMAP_SIZE))
    _say({"passed": 0})
    for step in range(1, len(STEPS) + 1):
        began = time.thread_time()
        _ioctl(vcpu, "KVM_RUN", _RUN)
        (reason,) = struct.unpack_from("<I", run, 8)
        if reason != _EXIT_IO:
            raise Failed("run", _why(reason, run))
        (offset,) = struct.unpack_from("<Q", run, 40)
        results = [(struct.unpack_from("<Q", memory, at)[0], low, high) for number, at, low, high in _RESULTS if number == step]
        if run[offset] != step or not all(low <= value <= high for value, low, high in results):
            raise Failed("wrong", "the guest computed wrong results")
        _say({"passed": step})
    _say({"done": True, "cpu_ms": round((time.thread_time() - began) * 1000, 1)})


if __name__ == "__main__":
    try:
        if platform.machine() != "x86_64":
            raise Failed("setup", "the probe is written for x86-64")
        go()
    except Failed as failure:
        _say({"failed": {"kind": failure.kind, "detail": str(failure)}})

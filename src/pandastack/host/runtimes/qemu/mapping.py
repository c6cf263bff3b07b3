"""Lays a file over the memory of another process, which itself gets no right to write to that file.

QEMU before 8.2 opens a memory file for writing, even for a private mapping; any QEMU wants to know the file when it starts, and
a prepared machine does not know its state yet. So QEMU starts with anonymous memory, and the one system call that is
missing, `mmap(MAP_PRIVATE | MAP_FIXED)` of a descriptor that is open for reading only, is made in its name: its main thread is
stopped where it waits in a system call, steps over the `syscall` instruction with other registers, and goes on. Debuggers and
CRIU do the same. Only done before any code of a guest has run in there. See ADR 12. x86-64 only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from pandastack.errors import RuntimeFailed

_TIMEOUT_S = 5.0
_AGAIN_S = 0.0005
_MMAP = 9  # asm/unistd_64.h
_PROT_READ_WRITE = 3
_PRIVATE, _FIXED, _NORESERVE = 0x02, 0x10, 0x4000
_SINGLESTEP, _GETREGS, _SETREGS, _DETACH = 9, 12, 13, 17
_SEIZE, _INTERRUPT = 0x4206, 0x4207
_SYSCALL = b"\x0f\x05"
_LAST_RESULT = 2**64 - 4096  # What is above is an error number.
_WALL = 0x40000000


# fmt: off
_NAMES = [
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs",
    "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
]
# fmt: on


class _Registers(ctypes.Structure):
    """struct user_regs_struct of sys/user.h."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in _NAMES]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class Call(Protocol):
    """One system call by its number (asm/unistd_64.h) and up to six arguments; the result, or an OSError."""

    def __call__(self, number: int, *arguments: int) -> int: ...


@contextmanager
def in_its_name(pid: int) -> Iterator[Call]:
    """While the block runs, process `pid` stands still, and makes the system calls that it is told to.

    A few hundred microseconds; blocks, and must not run while another thread waits for that process. Raises RuntimeFailed: then the
    process is in an unknown place, and to be ended.
    """
    ends = time.monotonic() + _TIMEOUT_S
    _trace(_SEIZE, pid)
    try:
        registers = _stopped_in_a_call(pid, ends)

        def call(number: int, *arguments: int) -> int:
            told = _Registers.from_buffer_copy(registers)
            told.rip -= len(_SYSCALL)
            told.orig_rax = 2**64 - 1  # Else the kernel would take the result for that of the call it interrupted.
            told.rax = number
            told.rdi, told.rsi, told.rdx, told.r10, told.r8, told.r9 = (*arguments, *[0] * (6 - len(arguments)))
            _trace(_SETREGS, pid, ctypes.byref(told))
            _trace(_SINGLESTEP, pid)
            after = _Registers()
            if _wait(pid, ends) == signal.SIGTRAP:
                _trace(_GETREGS, pid, ctypes.byref(after))
            _trace(_SETREGS, pid, ctypes.byref(registers))
            if after.rip != registers.rip:
                raise RuntimeFailed("QEMU did not come back from a system call")
            if after.rax > _LAST_RESULT:
                raise OSError(2**64 - after.rax, os.strerror(2**64 - after.rax))
            return int(after.rax)

        yield call
    finally:
        # If anything failed, its machine will be ended, and it must be free for that.
        _libc.ptrace(_DETACH, pid, None, None)


def map_file(call: Call, fd: int, address: int, size_bytes: int) -> None:
    """Map the first `size_bytes` of the process's descriptor `fd` at its `address`, private and writable. Raises RuntimeFailed."""
    try:
        mapped = call(_MMAP, address, size_bytes, _PROT_READ_WRITE, _PRIVATE | _FIXED | _NORESERVE, fd, 0)
    except OSError as error:
        raise RuntimeFailed("the saved memory could not be mapped", detail=str(error)) from error
    if mapped != address:
        raise RuntimeFailed("the saved memory could not be mapped", detail="an unexpected result")


def _stopped_in_a_call(pid: int, ends: float) -> _Registers:
    """Stop the main thread where it waits in a system call, and return its registers."""
    registers = _Registers()
    while True:
        _trace(_INTERRUPT, pid)
        _wait(pid, ends)
        _trace(_GETREGS, pid, ctypes.byref(registers))
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123 - unbuffered
            memory.seek(registers.rip - len(_SYSCALL))
            if memory.read(len(_SYSCALL)) == _SYSCALL and registers.orig_rax < 2**63:
                return registers
        if time.monotonic() > ends:
            raise RuntimeFailed("QEMU does not come to rest")
        _trace(7, pid)  # PTRACE_CONT
        time.sleep(_AGAIN_S)


def _wait(pid: int, ends: float) -> int:
    """The signal with which it stopped."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | _WALL)
        if found == pid:
            if os.WIFSTOPPED(status):
                return os.WSTOPSIG(status)
            raise RuntimeFailed("QEMU ended while its memory was mapped")
        if time.monotonic() > ends:
            raise RuntimeFailed("QEMU does not stop")
        time.sleep(0.00005)


def _trace(request: int, pid: int, data: object = None) -> None:
    if _libc.ptrace(request, pid, None, data) != 0:
        error = ctypes.get_errno()
        raise RuntimeFailed(
            "this process may not map memory into QEMU",
            detail=f"ptrace: {os.strerror(error)}",
            hint="run as root with CAP_SYS_PTRACE, and with kernel.yama.ptrace_scope below 3",
        )

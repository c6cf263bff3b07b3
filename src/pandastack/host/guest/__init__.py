"""Speaks with the daemon inside a sandbox, as `guest/PROTOCOL.md` says. Called by the host's sandboxes and runtimes."""

from pandastack.host.guest.connection import ByteStream, GuestConnection
from pandastack.host.guest.guest import HOOK_TIMEOUT_S, Guest
from pandastack.host.guest.processes import Output, ProcessSpec, ProcessStream

__all__ = ["HOOK_TIMEOUT_S", "ByteStream", "Guest", "GuestConnection", "Output", "ProcessSpec", "ProcessStream"]

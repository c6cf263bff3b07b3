"""Speaks with the daemon inside a sandbox, as `guest/PROTOCOL.md` says. Called by the host's sandboxes and runtimes."""

from pandastack.host.guest.connection import ByteStream, GuestConnection
from pandastack.host.guest.guest import Guest
from pandastack.host.guest.processes import Output, ProcessSpec, ProcessStream

__all__ = ["ByteStream", "Guest", "GuestConnection", "Output", "ProcessSpec", "ProcessStream"]

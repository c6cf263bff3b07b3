"""Which host takes a sandbox, and with which limits? Pure: records in, a decision or a refusal out.

What can never work is refused here, before anything is written or spent. What may be full just now is left to the
host: it keeps the ledger, and the view that this decides on is a moment old.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pandastack.control.settings import ControlSettings
from pandastack.control.store.snapshots import SnapshotRow
from pandastack.errors import CapacityError, HostUnfit, InvalidRequest, TemplateNotFound
from pandastack.wire.host import HostInfo
from pandastack.wire.ids import HostId
from pandastack.wire.isolation import AUTO, MICROVM
from pandastack.wire.sandboxes import SandboxCreate
from pandastack.wire.templates import TemplateView


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The host and the full limits of the sandbox; sizes in MiB. `template` is None where a snapshot takes its place.

    `runtime` is the one that will take it, as far as is known: None where the host has to find out first, or will refuse.
    """

    host_id: HostId
    template: TemplateView | None
    runtime: str | None
    cpu: float
    memory_mb: int
    disk_mb: int
    ttl_seconds: int


def find_template(name: str, hosts: Sequence[HostInfo]) -> TemplateView | None:
    return next((template for host in hosts for template in host.templates if template.name == name), None)


def choose(request: SandboxCreate, hosts: Sequence[HostInfo], settings: ControlSettings, snapshot: SnapshotRow | None = None) -> Placement:
    """The host with the most free memory among those that could hold the sandbox when empty; with a snapshot, the one that has it.

    Raises InvalidRequest naming the field that is over a maximum, too small for the snapshot, or not available,
    TemplateNotFound (as a 400: the request is wrong, not its address), HostUnfit where no runtime works, CapacityError
    where no host is there. Whether the host has the isolation that is asked for, it says itself: it may be trying a runtime still.
    """
    if request.volumes:
        raise InvalidRequest("volumes are not available in this version", field="volumes")
    ttl_seconds = settings.default_ttl_seconds if request.ttl_seconds is None else request.ttl_seconds
    check_ttl(ttl_seconds, settings)
    if snapshot is not None:
        # The template in the request is ignored: clients always send one, and the snapshot has its own.
        return _beside(snapshot, request, hosts, settings, ttl_seconds)
    template = find_template(request.template, hosts)
    if template is None:
        if not hosts:
            raise CapacityError("no machine is connected", retry_after_s=5)
        raise TemplateNotFound(f"no template is called {request.template!r}", http_status=400, field="template")
    fit = _fit(hosts)
    cpu = float(request.cpu if request.cpu is not None else template.cpu)
    memory_mb = request.memory_mb if request.memory_mb is not None else template.memory_mb
    disk_mb = request.disk_mb if request.disk_mb is not None else template.disk_mb
    _check_sizes(cpu, memory_mb, disk_mb, fit, settings)
    best = max(fit, key=lambda host: host.capacity.memory_mb - host.capacity.memory_reserved_mb)
    runtime = _runtime(request.isolation, best)
    return Placement(
        host_id=best.id, template=template, runtime=runtime, cpu=cpu, memory_mb=memory_mb, disk_mb=disk_mb, ttl_seconds=ttl_seconds
    )


def _beside(
    snapshot: SnapshotRow, request: SandboxCreate, hosts: Sequence[HostInfo], settings: ControlSettings, ttl_seconds: int
) -> Placement:
    """On the host that holds the snapshot, with its limits or larger ones."""
    there = [host for host in hosts if host.id == snapshot.host_id]
    if not there:
        raise CapacityError("the machine that holds this snapshot is not connected", retry_after_s=5)
    (host,) = _fit(there)
    cpu = float(request.cpu if request.cpu is not None else snapshot.cpu)
    memory_mb = request.memory_mb if request.memory_mb is not None else snapshot.memory_mb
    disk_mb = request.disk_mb if request.disk_mb is not None else snapshot.disk_mb
    for field, value, minimum in (("memory_mb", memory_mb, snapshot.memory_mb), ("disk_mb", disk_mb, snapshot.disk_mb)):
        if value < minimum:
            raise InvalidRequest(f"{field} must be at least the snapshot's {minimum}", field=field, minimum=minimum)
    _check_sizes(cpu, memory_mb, disk_mb, there, settings)
    return Placement(
        host_id=host.id, template=None, runtime=snapshot.runtime, cpu=cpu, memory_mb=memory_mb, disk_mb=disk_mb, ttl_seconds=ttl_seconds
    )


def _runtime(isolation: str, host: HostInfo) -> str | None:
    if isolation == AUTO:
        return host.runtime
    meant = [info for info in host.runtimes if info.name == isolation or (isolation == MICROVM and info.capabilities.get("own_kernel"))]
    return next((info.name for info in meant if info.works), None)


def _fit(hosts: Sequence[HostInfo]) -> list[HostInfo]:
    fit = [host for host in hosts if host.runtime is not None]
    if not fit:
        hints = [runtime.hint for host in hosts for runtime in host.runtimes if runtime.hint]
        raise HostUnfit("no runtime works on this machine", hint=hints[0] if hints else None)
    return fit


def check_ttl(ttl_seconds: int, settings: ControlSettings) -> None:
    """Raises InvalidRequest. Existing clients look for this wording and ask again without a ttl."""
    if ttl_seconds > settings.max_ttl_seconds:
        raise InvalidRequest(
            f"ttl_seconds exceeds tier maximum of {settings.max_ttl_seconds}", field="ttl_seconds", maximum=settings.max_ttl_seconds
        )


def _check_sizes(cpu: float, memory_mb: int, disk_mb: int, fit: Sequence[HostInfo], settings: ControlSettings) -> None:
    _at_most("cpu", cpu, settings.max_cpu, max(host.capacity.cpu for host in fit))
    _at_most("memory_mb", memory_mb, settings.max_memory_mb, max(host.capacity.memory_mb for host in fit))
    _at_most("disk_mb", disk_mb, settings.max_disk_mb, max(host.capacity.disk_mb for host in fit))


def _at_most(field: str, value: float, configured: float | None, physical: float) -> None:
    maximum = physical if configured is None else min(configured, physical)
    if value > maximum:
        raise InvalidRequest(f"{field} is over the maximum of {maximum:g}", field=field, maximum=maximum)

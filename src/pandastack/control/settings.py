"""What an operator may set about the control plane: `PANDASTACK_*` in the environment, or arguments in tests."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from pandastack.wire.sandboxes import MAX_TTL_SECONDS


class ControlSettings(BaseSettings):
    """Sizes are in the unit of their name; `None` for a maximum means "what the machine has"."""

    model_config = SettingsConfigDict(env_prefix="PANDASTACK_", extra="ignore")

    database_path: Path = Path("/var/lib/pandastack/control.db")

    # What a sandbox gets. Clients that send no ttl get this one: an hour without work, then it is deleted.
    default_ttl_seconds: int = Field(3600, ge=0, le=MAX_TTL_SECONDS)
    max_ttl_seconds: int = Field(MAX_TTL_SECONDS, ge=1, le=MAX_TTL_SECONDS)
    max_cpu: float | None = Field(None, gt=0)
    max_memory_mb: int | None = Field(None, ge=1)
    max_disk_mb: int | None = Field(None, ge=1)

    # What a workspace may have; None is no limit. See `quotas`.
    quota_sandboxes: int | None = Field(None, ge=0)
    quota_snapshots: int | None = Field(None, ge=0)
    quota_stored_mb: int | None = Field(None, ge=0, description="MiB of snapshots and hibernated sandboxes; hibernation is never refused")

    # Bounds on one request.
    body_limit_bytes: int = Field(2 << 20, ge=1024)
    default_exec_timeout_s: float = Field(900.0, gt=0)
    exec_grace_s: float = Field(15.0, gt=0, description="how long after its timeout a command's end may be reported")
    create_timeout_s: float = Field(120.0, gt=0)
    state_timeout_s: float = Field(600.0, gt=0, description="for a capture or a restore of a sandbox's memory")
    host_timeout_s: float = Field(30.0, gt=0, description="for a call to a host that answers at once")
    template_wait_s: float = Field(20.0, ge=0, description="how long a create waits for a template that is being made")
    creates_in_flight_max: int = Field(64, ge=1)
    stalled_client_s: float = Field(60.0, gt=0, description="a client that takes or sends no byte for so long is dropped")
    keepalive_s: float = Field(15.0, gt=0)
    idempotency_keep_s: int = Field(24 * 3600, ge=60)

    # Loops.
    expiry_interval_s: float = Field(2.0, gt=0)
    sweep_interval_s: float = Field(30.0, gt=0)
    event_wait_s: float = Field(20.0, gt=0)
    hibernate_retry_s: float = Field(60.0, gt=0, description="how long after a failure an idle sandbox is hibernated again")
    checkpoint_interval_s: float = Field(1.0, gt=0, description="how often is looked which points are due by time")
    diffs_at_once: int = Field(2, ge=1, description="comparisons of files under way in one workspace")
    diff_timeout_s: float = Field(900.0, gt=0, description="how long one may take in all, its reader included")
    pressure_rest_s: float = Field(
        60.0, ge=0, description="at least so long lies between two points that a sandbox takes for want of memory"
    )
    checkpoint_retry_s: float = Field(30.0, ge=0, description="how long after a failure a sandbox takes no point by itself")
    failed_keep_s: int = Field(3600, ge=0, description="a failed sandbox that is not persistent is deleted after so long")
    shutdown_hibernate_s: float = Field(
        60.0, ge=0, description="how long a stop may take to hibernate persistent sandboxes; 0 leaves them running"
    )
    shutdown_grace_s: float = Field(20.0, gt=0)


def version() -> str:
    """The installed version, or "dev" in a checkout that is not installed."""
    try:
        return metadata.version("pandastack")
    except metadata.PackageNotFoundError:
        return "dev"

"""What Prometheus sees. Labels are route templates, statuses and outcomes: never a path, an id or a tenant."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

# A time of creation beside each counter doubles the output and tells nothing.
disable_created_metrics()  # type: ignore[no-untyped-call]

_LATENCY_S = (0.0005, 0.001, 0.0015, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)
STATUSES = ("creating", "running", "paused", "hibernated", "failed", "deleting")


class Meters:
    """A registry of our own, so that two servers in one process (tests) do not share numbers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("pandastack_requests", "Requests answered.", ["method", "route", "status"], registry=self.registry)
        self.latency_s = Histogram(
            "pandastack_request_seconds",
            "From the request's head to the end of the answer.",
            ["method", "route"],
            buckets=_LATENCY_S,
            registry=self.registry,
        )
        self.creates = Counter(
            "pandastack_creates", "Creates by outcome: ok, replayed, or the error's code.", ["outcome"], registry=self.registry
        )
        self.create_s = Histogram("pandastack_create_seconds", "Successful creates.", registry=self.registry)
        self.forks = Counter(
            "pandastack_forks", "Forks by outcome: ok, replayed, or the error's code.", ["outcome"], registry=self.registry
        )
        self.fork_s = Histogram("pandastack_fork_seconds", "Successful forks, all children together.", registry=self.registry)
        self.snapshots = Counter(
            "pandastack_snapshots", "Snapshots by outcome: ok, replayed, or the error's code.", ["outcome"], registry=self.registry
        )
        self.snapshot_s = Histogram("pandastack_snapshot_seconds", "Successful snapshots, until durable.", registry=self.registry)
        self.checkpoints = Counter(
            "pandastack_checkpoints", "Automatic points by outcome: ok or the error's code.", ["outcome"], registry=self.registry
        )
        self.restores = Counter(
            "pandastack_restores", "Restores in place by outcome: ok or the error's code.", ["outcome"], registry=self.registry
        )
        self.verifications = Counter(
            "pandastack_snapshot_verifications", "Trial restores by outcome: ok, later, failed.", ["outcome"], registry=self.registry
        )
        self.hibernations = Counter(
            "pandastack_hibernations", "Hibernations asked for, by cause and outcome.", ["cause", "outcome"], registry=self.registry
        )
        self.wakes = Counter(
            "pandastack_wakes", "Wakes asked for, by outcome: ok or the error's code.", ["outcome"], registry=self.registry
        )
        self.deletes = Counter("pandastack_deletes", "Sandboxes deleted, by cause.", ["cause"], registry=self.registry)
        self.bytes_in = Counter("pandastack_bytes_in", "Bytes of uploads and standard input.", registry=self.registry)
        self.bytes_out = Counter("pandastack_bytes_out", "Bytes of downloads and command output.", registry=self.registry)
        self.sandboxes = Gauge("pandastack_sandboxes", "Sandboxes by status.", ["status"], registry=self.registry)
        self.background_failures = Counter(
            "pandastack_background_failures", "Errors in work that nobody waits for.", ["task"], registry=self.registry
        )

    def render(self, sandboxes_by_status: dict[str, int]) -> bytes:
        """The text format, with the gauges set to what the store says now."""
        for status in STATUSES:
            self.sandboxes.labels(status).set(sandboxes_by_status.get(status, 0))
        return generate_latest(self.registry)

"""Calls about templates."""

from __future__ import annotations

from pandastack import errors
from pandastack.sdk.calls.call import Call, Request, build, items_of, parse, reads, segment
from pandastack.sdk.results import BakeProgress, Template
from pandastack.sdk.sse import ServerEvent
from pandastack.wire.isolation import AUTO


def list_templates() -> Call[list[Template]]:
    return Call(build("GET", "/templates"), lambda answer: [parse(Template, item) for item in items_of(answer)])


def get(name: str) -> Call[Template]:
    return Call(build("GET", f"/templates/{segment(name)}"), reads(Template))


def bake(name: str, isolation: str) -> Request:
    # A step may be silent for minutes; the server's comments show that it lives.
    query = {"isolation": None if isolation == AUTO else isolation}
    return build("POST", f"/templates/{segment(name)}/bake", query, headers={"accept": "text/event-stream"}, read_s=120.0)


def read_progress(event: ServerEvent) -> BakeProgress | None:
    """None at `done`; raises the error that the bake ended with."""
    data = event.json()
    if event.name == "error":
        raise errors.from_body(500, {"code": errors.TemplateBuildError.code, **data})
    return parse(BakeProgress, data) if event.name == "progress" else None


def ended_early(name: str) -> errors.ConnectionError:
    return errors.ConnectionError(
        f"the connection ended before the template {name} was ready", hint="bake it again: finished steps are kept"
    )

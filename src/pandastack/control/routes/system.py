"""Health, version and metrics for whoever asks (they name no tenant), and the host for its admin."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from pandastack.control.parts import Parts
from pandastack.control.routes import answers
from pandastack.control.routes.requests import Admin, parts
from pandastack.control.settings import version
from pandastack.wire.host import HostInfo

router = APIRouter(tags=["system"])
Here = Annotated[Parts, Depends(parts)]


@router.get("/healthz", operation_id="health")
async def health(here: Here) -> Response:
    """200 where the records can be read."""
    async with here.gateway.deadline():
        await here.store.sandboxes.count_by_status()
    return answers.json({"status": "ok"})


@router.get("/version", operation_id="version")
async def show_version() -> Response:
    return answers.json({"version": version()})


@router.get("/metrics", operation_id="metrics")
async def metrics(here: Here) -> Response:
    """Prometheus' text format."""
    counts = await here.store.sandboxes.count_by_status()
    return Response(here.meters.render(counts), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/host", response_model=HostInfo, operation_id="getHost")
async def host(here: Here, caller: Admin) -> Response:
    async with here.gateway.deadline():
        return answers.json(await here.host.describe())

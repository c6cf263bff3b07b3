"""`/v1/templates`: what a sandbox can be made from, and making one of them ready."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from pandastack.control import placement
from pandastack.control.gateway import error_event, sse
from pandastack.control.hosts import closing
from pandastack.control.parts import Parts
from pandastack.control.routes import answers
from pandastack.control.routes.requests import Reader, Writer, parts
from pandastack.errors import PandastackError, TemplateNotFound
from pandastack.wire.isolation import AUTO
from pandastack.wire.templates import BakeProgress, TemplateView

router = APIRouter(prefix="/v1/templates", tags=["templates"])
Here = Annotated[Parts, Depends(parts)]


@router.get("", response_model=list[TemplateView], operation_id="listTemplates")
async def list_all(here: Here, caller: Reader) -> Response:
    async with here.gateway.deadline():
        return answers.json((await here.host.describe()).templates)


@router.get("/{name}", response_model=TemplateView, operation_id="getTemplate")
async def get(here: Here, caller: Reader, name: str) -> Response:
    return answers.json(await _find(here, name))


@router.post("/{name}/bake", response_class=answers.EventStream, status_code=200, operation_id="bakeTemplate")
async def bake(
    here: Here,
    caller: Writer,
    name: str,
    isolation: Annotated[str, Query(min_length=1, max_length=64, description="for which runtime, as in a create")] = AUTO,
) -> Response:
    """Events `progress`, then one `done` or `error`. The bake goes on if the client leaves."""
    template = await _find(here, name)
    return answers.EventStream(here, caller, _progress(here.bakes.follow(template.name, isolation)))


async def _find(here: Parts, name: str) -> TemplateView:
    async with here.gateway.deadline():
        found = placement.find_template(name, [await here.host.describe()])
    if found is None:
        raise TemplateNotFound("no such template")
    return found


async def _progress(steps: AsyncIterator[BakeProgress]) -> AsyncIterator[bytes]:
    async with closing(steps):
        try:
            async for step in steps:
                yield sse("progress", step)
        except PandastackError as error:
            yield error_event(error)
        else:
            yield sse("done", {"state": "ready"})

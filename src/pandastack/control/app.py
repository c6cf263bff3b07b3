"""Builds every part of the control plane and joins them. Read this first.

    app -> routes -> parts -> gateway | reconcile | history -> checkpoints | diff -> forks | snapshots | usage -> states -> sandboxes
        -> creates | access | placement | templates | thinning -> work | quotas -> store | hosts | meters

`build` is called by whoever starts the process, with the host it should use. Starting is the same as recovering: the
store is opened (and migrated), records and host are made to agree, then the first request is answered. Stopping
stops loops and lets running creates finish; sandboxes go on running.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from pandastack.control import logs, store
from pandastack.control.access import Keys
from pandastack.control.checkpoints import Checkpoints
from pandastack.control.creates import Creates
from pandastack.control.diff import Diffs
from pandastack.control.forks import Forks
from pandastack.control.gateway import Gateway
from pandastack.control.history import History
from pandastack.control.hosts import Host
from pandastack.control.meters import Meters
from pandastack.control.parts import Parts
from pandastack.control.quotas import Quotas
from pandastack.control.reconcile import Reconciler
from pandastack.control.routes import (
    answers,
    diff,
    document,
    exec,
    files,
    forks,
    history,
    processes,
    sandboxes,
    snapshots,
    states,
    system,
    templates,
    tokens,
    usage,
)
from pandastack.control.routes.edge import Edge
from pandastack.control.routes.requests import invalid
from pandastack.control.sandboxes import Sandboxes
from pandastack.control.settings import ControlSettings, version
from pandastack.control.snapshots import Snapshots
from pandastack.control.states import States
from pandastack.control.templates import Bakes
from pandastack.control.usage import Usages
from pandastack.control.work import Crew
from pandastack.errors import BadRequestError, CapacityError, NotFoundError, PandastackError, SandboxTimeout, ServerError

log = structlog.get_logger(__name__)

MODULES = (sandboxes, states, snapshots, history, forks, diff, usage, exec, processes, files, templates, tokens, system)


def build(settings: ControlSettings, host: Host) -> FastAPI:
    """The ASGI application over one host. It opens nothing before its lifespan begins."""
    logs.configure()
    meters = Meters()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            records = await stack.enter_async_context(store.opened(settings.database_path))
            app.state.parts = parts = await assemble(settings, host, records, meters, stack)
            yield
            await parts.states.hibernate_persistent()
            await parts.keys.flush()

    app = FastAPI(
        title="PandaStack",
        version=version(),
        description="Isolated sandboxes for code that an AI wrote.",
        lifespan=lifespan,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    for module in MODULES:
        app.include_router(module.router)
    app.state.routes = [route for module in MODULES for route in module.router.routes]
    app.add_middleware(Edge, meters=meters, body_limit_bytes=settings.body_limit_bytes)
    app.add_exception_handler(PandastackError, _known)
    app.add_exception_handler(HTTPException, _from_framework)
    app.add_exception_handler(RequestValidationError, _from_validation)
    app.openapi = lambda: document.document(app)  # type: ignore[method-assign]
    return app


async def assemble(settings: ControlSettings, host: Host, records: store.Store, meters: Meters, stack: AsyncExitStack) -> Parts:
    """The parts, running; `stack` ends them. The first sweep is over, or was tried, when this returns."""
    crew = await stack.enter_async_context(Crew(meters, grace_s=settings.shutdown_grace_s))
    keys = Keys(records)
    bakes = Bakes(host, crew)
    quotas = Quotas(records, host, settings)
    creates = Creates(records, host, crew, quotas, settings)
    service = Sandboxes(records, host, creates, bakes, crew, settings, meters)
    changes = States(records, host, service, crew, settings, meters)
    saved = Snapshots(records, host, creates, changes, crew, quotas, settings, meters)
    checkpoints = Checkpoints(records, host, creates, saved, crew, settings, meters)
    reconciler = Reconciler(records, host, creates, service, changes, saved, checkpoints, keys, crew, settings, meters)
    try:
        await reconciler.sweep()
    except Exception:
        # A host that is away must not keep the records from being read; the loop goes on trying.
        log.exception("sweep.failed")
        meters.background_failures.labels("sweep").inc()
    reconciler.begin()
    return Parts(
        settings=settings,
        store=records,
        host=host,
        crew=crew,
        keys=keys,
        sandboxes=service,
        states=changes,
        snapshots=saved,
        checkpoints=checkpoints,
        history=History(records, host, creates, service, changes, saved, checkpoints, crew, quotas, meters),
        forks=Forks(records, host, creates, service, changes, crew, settings, meters),
        diffs=Diffs(host, creates, changes, saved, settings),
        usages=Usages(records, host, service, quotas, settings),
        bakes=bakes,
        gateway=Gateway(host, checkpoints, settings, meters),
        reconciler=reconciler,
        meters=meters,
    )


def _request_id(request: Request) -> str:
    return str(request.scope.get("state", {}).get("request_id", ""))


async def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, PandastackError)  # noqa: S101 - registered for this class only
    if error.http_status >= 500 and not isinstance(error, (SandboxTimeout, CapacityError)):
        log.warning("request.refused", request_id=_request_id(request), code=error.code, error=error.message, cause=repr(error.__cause__))
    # A class that has no status of its own (a client-side error that got here) must not become an invalid answer.
    shown = error if 400 <= error.http_status <= 599 else ServerError("internal error")
    return answers.error(shown, _request_id(request))


async def _from_framework(request: Request, error: Exception) -> Response:
    """The framework's own 404 and 405 in our shape."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class only
    known: PandastackError
    if error.status_code == 404:
        known = NotFoundError("no such route")
    elif error.status_code == 405:
        known = BadRequestError("this route does not know this method", http_status=405)
    else:
        known = BadRequestError("bad request", http_status=error.status_code)
    answer = answers.error(known, _request_id(request))
    for name, value in (error.headers or {}).items():
        answer.headers[name] = value
    return answer


async def _from_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class only
    return answers.error(invalid(list(error.errors())), _request_id(request))

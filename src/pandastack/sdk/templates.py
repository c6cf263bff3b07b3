"""`client.templates`: the images that sandboxes start from."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING

from pandastack.sdk import sse
from pandastack.sdk.calls import templates as calls
from pandastack.sdk.results import BakeProgress, Template
from pandastack.wire.isolation import AUTO

if TYPE_CHECKING:
    from pandastack.sdk.client import AsyncClient, Client


class Templates:
    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> list[Template]:
        return self._client._call(calls.list_templates())

    def get(self, name: str) -> Template:
        """Raises TemplateNotFound."""
        return self._client._call(calls.get(name))

    def bake(self, name: str, isolation: str = AUTO) -> Generator[BakeProgress]:
        """Make a template ready on the server, telling how far it is; ends when it is ready, raises when it fails.

        Each runtime has states of its own; `isolation`, as in a create, says for which one. Nothing happens until it is iterated.
        """
        parser = sse.Parser()
        with self._client._open(calls.bake(name, isolation)) as opened:
            for data in opened:
                for event in parser.feed(data):
                    if event.name == "done":
                        return
                    if (progress := calls.read_progress(event)) is not None:
                        yield progress
        raise calls.ended_early(name)


class AsyncTemplates:
    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[Template]:
        return await self._client._call(calls.list_templates())

    async def get(self, name: str) -> Template:
        """Raises TemplateNotFound."""
        return await self._client._call(calls.get(name))

    async def bake(self, name: str, isolation: str = AUTO) -> AsyncGenerator[BakeProgress]:
        """Make a template ready on the server, telling how far it is; ends when it is ready, raises when it fails.

        Each runtime has states of its own; `isolation`, as in a create, says for which one. Nothing happens until it is iterated.
        """
        parser = sse.Parser()
        async with self._client._open(calls.bake(name, isolation)) as opened:
            async for data in opened:
                for event in parser.feed(data):
                    if event.name == "done":
                        return
                    if (progress := calls.read_progress(event)) is not None:
                        yield progress
        raise calls.ended_early(name)

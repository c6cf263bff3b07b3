"""Both clients offer the same: names, parameters, defaults. And the package shows exactly what it says it does."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

import pandastack
from pandastack.sdk import async_sandboxes, client, explore, files, processes, sandboxes, snapshots, streams, templates, tokens

PAIRS = [
    (client.Client, client.AsyncClient),
    (sandboxes.Sandbox, async_sandboxes.AsyncSandbox),
    (sandboxes.Sandboxes, async_sandboxes.AsyncSandboxes),
    (sandboxes.Commands, async_sandboxes.AsyncCommands),
    (files.Filesystem, files.AsyncFilesystem),
    (files.FileWatch, files.AsyncFileWatch),
    (processes.Process, processes.AsyncProcess),
    (processes.Processes, processes.AsyncProcesses),
    (streams.OutputStream, streams.AsyncOutputStream),
    (snapshots.Snapshots, snapshots.AsyncSnapshots),
    (templates.Templates, templates.AsyncTemplates),
    (tokens.Tokens, tokens.AsyncTokens),
]


def public(kind: type) -> dict[str, object]:
    return {name: member for name, member in inspect.getmembers(kind) if not name.startswith("_")}


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS)
def test_both_have_the_same_public_names(blocking: type, asynchronous: type) -> None:
    assert public(blocking).keys() == public(asynchronous).keys()


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS)
def test_both_have_the_same_signatures(blocking: type, asynchronous: type) -> None:
    for name, member in {**public(blocking), "__init__": blocking.__init__}.items():
        if not callable(member):
            continue
        one, other = inspect.signature(member), inspect.signature(getattr(asynchronous, name))
        assert list(one.parameters) == list(other.parameters), name
        for parameter, twin in zip(one.parameters.values(), other.parameters.values(), strict=True):
            assert (parameter.kind, parameter.default) == (twin.kind, twin.default), f"{name}({parameter.name})"
            annotation = (
                re.sub(r"\bAsync(?=[A-Z])", "", str(twin.annotation))
                .replace(" | AsyncIterable[bytes]", "")
                .replace(" | Iterable[bytes]", "")
            )
            assert str(parameter.annotation) == annotation, f"{name}({parameter.name})"


def test_the_two_forms_of_explore_are_one() -> None:
    def shape(function: Callable[..., object]) -> list[tuple[str, str]]:
        return [
            (str(one.replace(annotation=one.empty)), re.sub("Async", "", str(one.annotation)))
            for one in inspect.signature(function).parameters.values()
        ]

    assert shape(explore.explore) == shape(explore.async_explore)
    method = shape(sandboxes.Sandbox.explore)[1:]
    assert method == shape(explore.explore)[1:]


def test_all_is_sorted_and_equals_what_can_be_loaded() -> None:
    assert pandastack.__all__ == sorted(pandastack.__all__)
    for name in pandastack.__all__:
        assert getattr(pandastack, name) is not None, name
    assert set(pandastack._HOME_OF) | {"__version__"} == set(pandastack.__all__)
    assert set(pandastack.__all__) <= set(dir(pandastack))


def test_the_lazy_names_are_those_that_type_checkers_see() -> None:
    source = inspect.getsource(pandastack)
    block = source[source.index("if TYPE_CHECKING:") : source.index("_HOMES =")]
    seen = set(re.findall(r"^        (\w+),$", block, re.MULTILINE)) | set(
        re.findall(r"(\w+)", " ".join(re.findall(r" import ([^(\n]+)$", block, re.MULTILINE)))
    )
    assert seen | {"__version__"} == set(pandastack.__all__)


def test_every_error_is_exported() -> None:
    from pandastack import errors

    assert {cls.__name__ for cls in errors._classes(errors.PandastackError).values()} <= set(pandastack.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pandastack.nonsense


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import pandastack", ("httpx2", "pydantic", "pandastack.sdk", "pandastack.wire")),
        (
            "from pandastack import Sandbox, AsyncSandbox, Client",
            ("fastapi", "sqlalchemy", "uvicorn", "typer", "rich", "pandastack.control"),
        ),
        ("import pandastack.cli.main", ("httpx2", "pydantic", "rich", "fastapi", "pandastack.sdk.client", "pandastack.control")),
    ],
)
def test_imports_pull_in_only_what_they_need(statement: str, forbidden: tuple[str, ...]) -> None:
    code = f"{statement}\nimport sys\nprint([name for name in {forbidden!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_error_that_a_room_refines_for_itself_is_not_what_users_get() -> None:
    from pandastack import errors
    from pandastack.host.runtimes.qemu.client import TimedOut

    assert errors._classes(errors.PandastackError)[TimedOut.code] is errors.RuntimeFailed
    assert type(errors.from_body(500, {"code": TimedOut.code, "error": "it did not"})) is errors.RuntimeFailed

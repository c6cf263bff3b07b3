"""What is sent again, and what never is."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from pandastack import errors
from pandastack.sdk import retry
from pandastack.sdk.async_sandboxes import AsyncSandbox
from pandastack.sdk.calls.call import Answer, build
from pandastack.sdk.client import AsyncClient, Client
from pandastack.sdk.sandboxes import Sandbox
from pandastack.sdk.testing import AsyncMemoryTransport, MemoryTransport, answer, broken
from pandastack.wire.sandboxes import SandboxView

RUNNING = {"id": "s1", "status": "running"}
GET = build("GET", "/x")
POST = build("POST", "/x")
CREATE = build("POST", "/sandboxes", is_create=True)
FULL = answer({"error": "no room", "code": "no_capacity"}, 503, retry_after="5")


def script(*steps: Any) -> Any:
    """A handler that does one step per request; exceptions are raised."""
    left = iter(steps)

    def handle(request: Any) -> Any:
        step = next(left)
        if isinstance(step, Exception):
            raise step
        return step

    return handle


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are asked for, but take no time."""

    async def at_once(delay: float, *_: Any) -> None:
        return None

    monkeypatch.setattr("pandastack.sdk.client.time.sleep", lambda _: None)
    monkeypatch.setattr("pandastack.sdk.client._sleep", at_once)


def middle(low: float, high: float) -> float:
    return (low + high) / 2


@pytest.mark.parametrize(
    ("request_", "failures", "repeats"),
    [
        (GET, broken(), 3),
        (GET, broken(maybe_sent=False), 3),
        (POST, broken(), 0),
        (POST, broken(maybe_sent=False), 3),
        (CREATE, broken(maybe_sent=False), 3),
        (GET, FULL, 0),
        (POST, FULL, 0),
        (CREATE, answer({"error": "x"}, 503), 0),
        (CREATE, answer(b"upstream gone", 503, retry_after="5"), 0),
        (CREATE, answer({"error": "x"}, 500, retry_after="1"), 0),
        (CREATE, answer({"error": "x"}, 502), 0),
        (CREATE, answer({"error": "x"}, 429), 0),
        (CREATE, answer({"error": "x"}, 409), 0),
    ],
)
def test_retry_matrix(request_: Any, failures: Any, repeats: int) -> None:
    attempts = retry.Attempts(request_, 60.0, middle)
    made = 0
    while attempts.after(failures, elapsed_s=0.5) is not None:
        made += 1
        assert made < 10
    assert made == repeats


@pytest.mark.parametrize("failure", [FULL, answer({"error": "x"}, 507), answer({"error": "x"}, 429, retry_after="1"), broken()])
def test_a_create_is_repeated_until_the_budget_is_spent(failure: Any) -> None:
    attempts = retry.Attempts(CREATE, 60.0, middle)
    elapsed = 0.0
    while (pause := attempts.after(failure, elapsed)) is not None:
        assert pause.delay_s > 0
        assert pause.event is not None
        elapsed += pause.delay_s
    assert 30 < elapsed <= 60


def test_a_wait_that_does_not_fit_ends_the_retry() -> None:
    assert retry.Attempts(CREATE, 3.0, middle).after(FULL, 0.0) is None
    assert retry.Attempts(CREATE, 0.0, middle).after(FULL, 0.0) is None


def test_the_delay_is_the_servers_wish_plus_jitter() -> None:
    attempts = retry.Attempts(CREATE, 600.0, middle)
    delays = [attempts.after(FULL, 0.0) for _ in range(6)]
    assert [pause.delay_s for pause in delays if pause] == [5.5, 6.0, 7.0, 9.0, 12.5, 12.5]


def test_a_repeated_create_carries_the_same_key_and_one_sandbox_comes_out() -> None:
    events: list[retry.CreateRetryEvent] = []
    transport = MemoryTransport(script(broken(), FULL, answer(RUNNING, 201)))
    client = Client("http://api", "key", transport=transport, on_create_retry=events.append)
    assert client.sandboxes.create().id == "s1"
    keys = {request.headers["idempotency-key"] for request in transport.requests}
    assert len(transport.requests) == 3
    assert len(keys) == 1
    assert [event.status_code for event in events] == [0, 503]
    assert events[1].error == "no room"
    assert events[1].retry_after_seconds == 5


def test_two_creates_carry_different_keys_and_a_given_key_is_used() -> None:
    transport = MemoryTransport(lambda request: answer(RUNNING, 201))
    client = Client("http://api", "key", transport=transport)
    client.sandboxes.create()
    client.sandboxes.create()
    client.sandboxes.create(idempotency_key="mine")
    keys = [request.headers["idempotency-key"] for request in transport.requests]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


def test_the_last_refusal_is_raised_unchanged() -> None:
    transport = MemoryTransport(lambda request: FULL)
    client = Client("http://api", "key", transport=transport, max_create_retry_seconds=0)
    with pytest.raises(errors.CapacityError, match="no room") as caught:
        client.sandboxes.create()
    assert caught.value.retry_after_s == 5
    assert len(transport.requests) == 1


def test_exec_is_sent_once() -> None:
    transport = MemoryTransport(script(broken()))
    sandbox = Sandbox(Client("http://api", "key", transport=transport), SandboxView(id="s1"))
    with pytest.raises(errors.APIConnectionError):
        sandbox.exec("echo")
    assert len(transport.requests) == 1


def test_a_delete_whose_answer_was_lost_has_worked() -> None:
    gone = answer({"error": "no such sandbox", "code": "sandbox_not_found"}, 404)
    Client("http://api", "key", transport=MemoryTransport(script(broken(), gone))).sandboxes.delete("s1")
    with pytest.raises(errors.SandboxNotFound):
        Client("http://api", "key", transport=MemoryTransport(script(gone))).sandboxes.delete("s1")


def test_cancel_stops_before_the_first_request_and_between_attempts() -> None:
    cancel = threading.Event()
    transport = MemoryTransport(lambda request: FULL)
    client = Client("http://api", "key", transport=transport, on_create_retry=lambda event: cancel.set())
    with pytest.raises(errors.CreateCancelled) as caught:
        client.sandboxes.create(cancel=cancel)
    assert len(transport.requests) == 1
    assert isinstance(caught.value.__cause__, errors.CapacityError)
    with pytest.raises(errors.CreateCancelled):
        client.sandboxes.create(cancel=cancel)
    assert len(transport.requests) == 1


def test_the_blocking_client_refuses_an_asyncio_event() -> None:
    client = Client("http://api", "key", transport=MemoryTransport(lambda request: answer(RUNNING, 201)))
    with pytest.raises(TypeError, match="AsyncClient"):
        client.sandboxes.create(cancel=asyncio.Event())


@pytest.mark.anyio
async def test_the_async_client_retries_alike() -> None:
    transport = AsyncMemoryTransport(script(broken(), FULL, answer(RUNNING, 201), broken(), answer([])))
    client = AsyncClient("http://api", "key", transport=transport)
    assert (await client.sandboxes.create()).id == "s1"
    assert await client.tokens.list() == []
    assert len({request.headers["idempotency-key"] for request in transport.requests[:3]}) == 1


@pytest.mark.anyio
async def test_the_async_client_cancels_and_sends_exec_once() -> None:
    cancel = asyncio.Event()
    transport = AsyncMemoryTransport(lambda request: FULL)
    client = AsyncClient("http://api", "key", transport=transport, on_create_retry=lambda event: cancel.set())
    with pytest.raises(errors.CreateCancelled):
        await client.sandboxes.create(cancel=cancel)
    lossy = AsyncMemoryTransport(script(broken()))
    sandbox = AsyncSandbox(AsyncClient("http://api", "key", transport=lossy), SandboxView(id="s1"))
    with pytest.raises(errors.APIConnectionError):
        await sandbox.exec("echo")
    assert (len(transport.requests), len(lossy.requests)) == (1, 1)


def test_retry_after_as_a_date() -> None:
    from datetime import UTC, datetime

    from pandastack.sdk.calls.call import retry_after_s

    now = datetime(2030, 1, 1, tzinfo=UTC)
    assert retry_after_s({"retry-after": "Tue, 01 Jan 2030 00:00:07 GMT"}, now) == 7
    assert retry_after_s({"retry-after": "soon"}) is None
    assert retry_after_s({}) is None


def test_answers_know_their_status() -> None:
    assert Answer(200, {}, b"[1]").json() == [1]
    with pytest.raises(errors.ServerError, match="not JSON"):
        Answer(200, {}, b"<html>").json()

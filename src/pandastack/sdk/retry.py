"""When is a request sent again, and when is that the end? Decisions only: no clock, no sleep, no socket.

    what failed                                repeatable request    create (has a key)          anything else
    no connection was made                     a few quick tries     a few quick tries           a few quick tries
    connection lost, request may have arrived  a few quick tries     until the budget is spent   never
    503 or 429 with Retry-After, 507           never                 until the budget is spent   never

A create carries the same Idempotency-Key each time, so the server answers with the sandbox it already made.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from pandastack import errors
from pandastack.sdk.calls import call
from pandastack.sdk.calls.call import Answer, Request

QUICK_DELAYS_S = (0.1, 0.3, 0.9)
MAX_JITTER_S = 15.0
DISK_FULL_MIN_DELAY_S = 0.5


@dataclass(frozen=True, slots=True)
class CreateRetryEvent:
    """One automatic retry of a create, told to `on_create_retry` just before the wait. Times are seconds.

    `status_code` is 0 where the connection failed instead of the server refusing.
    """

    method: str
    path: str
    attempt: int
    status_code: int
    error: str
    delay_seconds: float
    elapsed_seconds: float
    retry_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait `delay_s`, then send again. `event` is set for creates only."""

    delay_s: float
    event: CreateRetryEvent | None = None


class Attempts:
    """The history of one request. Feed every failure to `after`; it answers a Pause, or None when that was the last."""

    def __init__(self, request: Request, budget_s: float, jitter: Callable[[float, float], float] = random.uniform) -> None:
        self._request = request
        self._budget_s = budget_s
        self._jitter = jitter
        self._failures = 0
        self._quick = 0
        self.may_have_arrived = False

    def after(self, failure: Answer | errors.ConnectionError, elapsed_s: float) -> Pause | None:
        """`elapsed_s` counts from the first attempt."""
        self._failures += 1
        if isinstance(failure, Answer):
            return self._after_refusal(failure, elapsed_s)
        arrived = bool(failure.fields.get("maybe_sent", True))
        self.may_have_arrived |= arrived
        if self._request.is_create and self.may_have_arrived:
            delay_s = min(MAX_JITTER_S, 0.25 * 2 ** min(self._failures, 8)) * self._jitter(0.5, 1.0)
            return self._within_budget(delay_s, elapsed_s, 0, str(failure.message), None)
        if (arrived and not self._request.safe_to_repeat) or self._quick >= len(QUICK_DELAYS_S):
            return None
        if self._request.is_create and self._budget_s <= 0:
            return None
        delay_s = QUICK_DELAYS_S[self._quick] * self._jitter(0.5, 1.5)
        self._quick += 1
        return Pause(delay_s)

    def _after_refusal(self, answer: Answer, elapsed_s: float) -> Pause | None:
        if not self._request.is_create or answer.status not in (429, 503, 507):
            return None
        error = call.error_of(answer)
        wait_s = call.retry_after_s(answer.headers)
        if answer.status == 507:
            base_s = max(wait_s or 0.0, DISK_FULL_MIN_DELAY_S)
        elif wait_s is None or (answer.status == 503 and not _is_ours(answer)):
            # A load balancer's own 503 can follow a create that went through; ours carries both marks.
            return None
        else:
            base_s = wait_s
        delay_s = base_s + self._jitter(0.0, min(MAX_JITTER_S, 2.0 ** min(self._failures - 1, 8)))
        return self._within_budget(delay_s, elapsed_s, answer.status, error.message, wait_s)

    def _within_budget(self, delay_s: float, elapsed_s: float, status: int, message: str, wait_s: float | None) -> Pause | None:
        left_s = self._budget_s - elapsed_s
        if left_s <= 0 or (wait_s is not None and wait_s > left_s):
            return None
        if delay_s > left_s:
            # Only the jitter overshoots: one last attempt at the end of the budget, but never at once.
            if left_s < 1.0:
                return None
            delay_s = left_s
        event = CreateRetryEvent(
            self._request.method, f"/v1{self._request.path}", self._failures, status, message, delay_s, elapsed_s, wait_s
        )
        return Pause(delay_s, event)


def _is_ours(answer: Answer) -> bool:
    try:
        body = answer.json()
    except errors.ServerError:
        return False
    return isinstance(body, dict) and isinstance(body.get("error"), str)

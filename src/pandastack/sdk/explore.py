"""Best of N: try every candidate in a copy of a running sandbox, score what came out, keep the best copy.

    copies (one capture, all or none) -> run and score each -> pick -> promote the winner, delete the others

However it ends, no copy is left that the caller did not ask for: after an error, Ctrl-C or a cancelled task all of them are
deleted, the winner too. What is decided on the way is in `branches.py`.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from pandastack import errors
from pandastack.sdk import branches, strays
from pandastack.sdk.branches import AsyncScore, BranchOutcome, Candidate, ExploreResult, OnOutcome, Reaping, Score, Select
from pandastack.sdk.calls.call import Call
from pandastack.sdk.results import ExecResult, Lifecycle

if TYPE_CHECKING:
    from pandastack.sdk.async_sandboxes import AsyncSandbox
    from pandastack.sdk.client import AsyncClient, Client
    from pandastack.sdk.sandboxes import Sandbox


def explore(
    sandbox: Sandbox,
    candidates: Sequence[Candidate | str],
    *,
    score_fn: Score | None = None,
    select: Select = "max",
    require_success: bool = True,
    max_concurrency: int | None = None,
    cleanup_losers: bool = True,
    promote_winner: bool = True,
    capture_files: bool | str = True,
    ttl_seconds: int = branches.TTL_S,
    on_outcome: OnOutcome | None = None,
) -> ExploreResult[Sandbox]:
    """Run every candidate (at most 16) in a copy of `sandbox`, `max_concurrency` (4) at a time, and keep the best.

    `score_fn(copy, outcome)` gives a number, by default 1 for success and 0 otherwise; `select` is "max", "min" or a
    function that picks one of the outcomes. With `capture_files` the outcome lists the files that changed below /app,
    /work, /root and /home, or below the directories it names. A copy that outlives this program expires after
    `ttl_seconds` idle seconds. `on_outcome` is called with each outcome as it comes, from several threads.

    Raises ExploreError when none may win; then, and after any other exception, every copy is deleted.
    """
    plan = branches.planned(candidates, select, max_concurrency)
    with strays.forked(sandbox, len(plan), branches.METADATA) as children:
        run = _Branches(sandbox._client, score_fn, capture_files, ttl_seconds, on_outcome)
        run.remarks += branches.missing(plan, children)
        outcomes = run.all(children, plan, max_concurrency or branches.AT_ONCE)
        picked = branches.chosen(outcomes, select, require_success)
        winner: Sandbox = picked._sandbox
        tree_id, reaping = branches.tree_of(children), Reaping(children, picked, cleanup_losers)
        if promote_winner:
            try:
                reaping.promoted(winner.promote(cleanup_siblings=cleanup_losers, tree_id=tree_id or None))
            except errors.PandastackError as error:
                run.remarks.append(f"the winner could not be promoted: {error}")
        left = reaping.left()
        reaping.deleted(left, strays.reap(left))
        run.set_lifecycle(branches.unguard(winner, ttl_seconds))
    return ExploreResult(winner if promote_winner else None, picked, outcomes, tree_id, reaping.reaped, reaping.failures, run.remarks)


class _Branches:
    """Runs the candidates; what goes wrong inside one stays in its outcome, unless it ends the program."""

    def __init__(
        self, client: Client, score_fn: Score | None, capture_files: bool | str, ttl_seconds: int, on_outcome: OnOutcome | None
    ) -> None:
        self._client = client
        self._score_fn = score_fn
        self._capture_files = capture_files
        self._ttl_seconds = ttl_seconds
        self._on_outcome = on_outcome
        self._over = threading.Event()
        self.remarks: list[str] = []

    def all(self, children: list[Sandbox], plan: list[Candidate], at_once: int) -> list[BranchOutcome]:
        every_s = branches.renew_every_s(children, self._ttl_seconds)
        pool = ThreadPoolExecutor(at_once, thread_name_prefix="pandastack-explore")
        try:
            list(pool.map(self.set_lifecycle, [branches.guard(child, self._ttl_seconds) for child in children]))
            running = [pool.submit(self.one, child, candidate) for child, candidate in zip(children, plan, strict=False)]
            left = set(running)
            while left:
                done, left = wait(left, every_s, FIRST_EXCEPTION)
                for ended in done:
                    ended.result()
                for renewal in branches.renewals(children, self._ttl_seconds) if left else ():
                    self.set_lifecycle(renewal)
            return [ended.result() for ended in running]
        except BaseException:
            # Do not wait for those that run: their sandboxes are deleted next, which ends them.
            self._over.set()
            raise
        finally:
            pool.shutdown(wait=not self._over.is_set(), cancel_futures=True)

    def one(self, child: Sandbox, candidate: Candidate) -> BranchOutcome:
        if self._capture_files:
            self._look(child, branches.mark_command())
        outcome = self._try(child, candidate)
        if self._capture_files and outcome.ok and (found := self._look(child, branches.files_command(self._capture_files))) is not None:
            outcome.files_changed = branches.files_of(found)
        outcome = self._score(child, candidate, outcome)
        if self._on_outcome is not None and not self._over.is_set():
            try:
                self._on_outcome(outcome)
            except Exception as error:
                self.remarks.append(f"on_outcome raised {type(error).__name__}: {error}")
        return outcome

    def _try(self, child: Sandbox, candidate: Candidate) -> BranchOutcome:
        begun = time.monotonic()
        try:
            if candidate.fn is not None:
                return branches.outcome_of(candidate, child, begun, value=candidate.fn(child))
            result = child.exec(candidate.cmd or "", timeout_seconds=candidate.timeout_s, env=candidate.env)
            return branches.outcome_of(candidate, child, begun, result=result)
        except Exception as error:
            return branches.outcome_of(candidate, child, begun, failure=error)

    def _score(self, child: Sandbox, candidate: Candidate, outcome: BranchOutcome) -> BranchOutcome:
        score = branches.fixed_score(candidate, outcome, self._score_fn)
        if score is not None or self._score_fn is None:
            return branches.scored(outcome, score)
        try:
            return branches.scored(outcome, float(self._score_fn(child, outcome)))
        except Exception as error:
            return branches.scored(outcome, None, error)

    def _look(self, child: Sandbox, command: str) -> ExecResult | None:
        """Which files changed is a help for the score function, and no reason to fail."""
        try:
            return child.exec(command, timeout_seconds=branches.FILES_TIMEOUT_S)
        except errors.PandastackError as error:
            self.remarks.append(f"changed files of {child.id} are unknown: {error}")
            return None

    def set_lifecycle(self, call: Call[Lifecycle] | None) -> None:
        if call is not None:
            try:
                self._client._call(call)
            except errors.PandastackError as error:
                self.remarks.append(f"when a copy expires could not be changed: {error}")


async def async_explore(
    sandbox: AsyncSandbox,
    candidates: Sequence[Candidate | str],
    *,
    score_fn: AsyncScore | None = None,
    select: Select = "max",
    require_success: bool = True,
    max_concurrency: int | None = None,
    cleanup_losers: bool = True,
    promote_winner: bool = True,
    capture_files: bool | str = True,
    ttl_seconds: int = branches.TTL_S,
    on_outcome: OnOutcome | None = None,
) -> ExploreResult[AsyncSandbox]:
    """`explore` for asyncio. `fn` and `score_fn` may be coroutine functions; `on_outcome` is called in the event loop."""
    plan = branches.planned(candidates, select, max_concurrency)
    async with strays.async_forked(sandbox, len(plan), branches.METADATA) as children:
        run = _AsyncBranches(sandbox._client, score_fn, capture_files, ttl_seconds, on_outcome)
        run.remarks += branches.missing(plan, children)
        outcomes = await run.all(children, plan, max_concurrency or branches.AT_ONCE)
        picked = branches.chosen(outcomes, select, require_success)
        winner: AsyncSandbox = picked._sandbox
        tree_id, reaping = branches.tree_of(children), Reaping(children, picked, cleanup_losers)
        if promote_winner:
            try:
                reaping.promoted(await winner.promote(cleanup_siblings=cleanup_losers, tree_id=tree_id or None))
            except errors.PandastackError as error:
                run.remarks.append(f"the winner could not be promoted: {error}")
        left = reaping.left()
        reaping.deleted(left, await strays.async_reap(left))
        await run.set_lifecycle(branches.unguard(winner, ttl_seconds))
    return ExploreResult(winner if promote_winner else None, picked, outcomes, tree_id, reaping.reaped, reaping.failures, run.remarks)


class _AsyncBranches:
    """`_Branches` for asyncio."""

    def __init__(
        self, client: AsyncClient, score_fn: AsyncScore | None, capture_files: bool | str, ttl_seconds: int, on_outcome: OnOutcome | None
    ) -> None:
        self._client = client
        self._score_fn = score_fn
        self._capture_files = capture_files
        self._ttl_seconds = ttl_seconds
        self._on_outcome = on_outcome
        self.remarks: list[str] = []

    async def all(self, children: list[AsyncSandbox], plan: list[Candidate], at_once: int) -> list[BranchOutcome]:
        every_s, slots = branches.renew_every_s(children, self._ttl_seconds), asyncio.Semaphore(at_once)

        async def turn(child: AsyncSandbox, candidate: Candidate) -> BranchOutcome:
            async with slots:
                return await self.one(child, candidate)

        async def keep() -> None:
            while every_s is not None:
                await asyncio.sleep(every_s)
                for renewal in branches.renewals(children, self._ttl_seconds):
                    await self.set_lifecycle(renewal)

        await asyncio.gather(*(self.set_lifecycle(branches.guard(child, self._ttl_seconds)) for child in children))
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(keep(), name="explore: keep the copies")
            running = [
                tasks.create_task(turn(child, candidate), name=f"explore {candidate.label}")
                for child, candidate in zip(children, plan, strict=False)
            ]
            await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
            keeping.cancel()
        return [ended.result() for ended in running]

    async def one(self, child: AsyncSandbox, candidate: Candidate) -> BranchOutcome:
        if self._capture_files:
            await self._look(child, branches.mark_command())
        outcome = await self._try(child, candidate)
        if (
            self._capture_files
            and outcome.ok
            and (found := await self._look(child, branches.files_command(self._capture_files))) is not None
        ):
            outcome.files_changed = branches.files_of(found)
        outcome = await self._score(child, candidate, outcome)
        if self._on_outcome is not None:
            try:
                self._on_outcome(outcome)
            except Exception as error:
                self.remarks.append(f"on_outcome raised {type(error).__name__}: {error}")
        return outcome

    async def _try(self, child: AsyncSandbox, candidate: Candidate) -> BranchOutcome:
        begun = time.monotonic()
        try:
            if candidate.fn is not None:
                value = candidate.fn(child)
                return branches.outcome_of(candidate, child, begun, value=await value if inspect.isawaitable(value) else value)
            result = await child.exec(candidate.cmd or "", timeout_seconds=candidate.timeout_s, env=candidate.env)
            return branches.outcome_of(candidate, child, begun, result=result)
        except Exception as error:
            return branches.outcome_of(candidate, child, begun, failure=error)

    async def _score(self, child: AsyncSandbox, candidate: Candidate, outcome: BranchOutcome) -> BranchOutcome:
        score = branches.fixed_score(candidate, outcome, self._score_fn)
        if score is not None or self._score_fn is None:
            return branches.scored(outcome, score)
        try:
            value = self._score_fn(child, outcome)
            return branches.scored(outcome, float(await value if inspect.isawaitable(value) else value))
        except Exception as error:
            return branches.scored(outcome, None, error)

    async def _look(self, child: AsyncSandbox, command: str) -> ExecResult | None:
        """Which files changed is a help for the score function, and no reason to fail."""
        try:
            return await child.exec(command, timeout_seconds=branches.FILES_TIMEOUT_S)
        except errors.PandastackError as error:
            self.remarks.append(f"changed files of {child.id} are unknown: {error}")
            return None

    async def set_lifecycle(self, call: Call[Lifecycle] | None) -> None:
        if call is not None:
            try:
                await self._client._call(call)
            except errors.PandastackError as error:
                self.remarks.append(f"when a copy expires could not be changed: {error}")

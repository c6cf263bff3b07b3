"""Best of N over forks: who wins, and that nothing is left over however it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from typing import Any

import pytest

import pandastack
from pandastack import BranchOutcome, Candidate, ExploreError, errors
from pandastack.sdk import branches
from pandastack.sdk.async_sandboxes import AsyncSandbox
from pandastack.sdk.facts import Facts
from pandastack.sdk.sandboxes import Sandbox
from pandastack.sdk.testing import answer, broken
from pandastack.wire.sandboxes import SandboxView

from .world import World, says


def shell(sandbox: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    """`say TEXT`, `exit N`, `find ...` (one file per sandbox), `sleep S`; anything else does nothing."""
    word, _, rest = body["cmd"].partition(" ")
    if word == "find":
        return says(f"/work/of-{sandbox['id']}\n")
    if word == "sleep":
        time.sleep(float(rest))
    if word == "exit":
        return says(exit_code=int(rest), stderr="failed\n")
    return says(rest if word == "say" else "")


@pytest.fixture
def world() -> World:
    return World(shell)


@pytest.fixture
def parent(world: World) -> Sandbox:
    return world.client(max_create_retry_seconds=0).sandboxes.get(world.make()["id"])


def test_the_first_that_succeeds_wins_and_the_others_are_deleted(world: World, parent: Sandbox) -> None:
    world.make()  # somebody else's
    result = parent.explore(["exit 3", "say yes", "exit 4"])
    assert result.winner is not None
    assert result.winner_outcome is result.outcomes[0]
    assert (result.winner_outcome.label, result.winner_outcome.stdout_tail, result.winner_outcome.score) == ("say yes", "yes", 1.0)
    assert result.winner_outcome.files_changed == [f"/work/of-{result.winner.id}"]
    assert {outcome.exit_code for outcome in result.outcomes} == {0, 3, 4}
    assert sorted(result.reaped) == sorted(outcome.sandbox_id for outcome in result.outcomes[1:])
    assert (result.reap_failures, result.errors, result.best(1)) == ({}, [], [result.winner_outcome])
    assert set(world.sandboxes) == {parent.id, "s2", result.winner.id}
    assert result.tree_id == world.sandboxes[result.winner.id]["fork_tree_id"]
    assert result.table().splitlines()[1].startswith("* say yes")
    made = next(body for verb, _, body in world.asked if verb == "POST fork-tree")
    assert made["count"] == 3
    # Copies are bounded by their lifecycle instead, so that the winner can be given its parent's back.
    assert (made["metadata"]["explore"], "explore_ttl" in made["metadata"]) == ("1", False)


def test_scores_decide_and_functions_may_be_candidates(world: World, parent: Sandbox) -> None:
    seen: list[str] = []
    candidates = [
        Candidate.shell("a", "say 1", env={"K": "v"}, timeout_s=5),
        Candidate.call("b", lambda sandbox: sandbox.exec("say 7").stdout),
        Candidate("c", cmd="say 3"),
    ]

    def score(sandbox: Sandbox, outcome: BranchOutcome) -> float:
        assert outcome.sandbox_id == sandbox.id
        return float(outcome.value or outcome.stdout_tail)

    result = parent.explore(candidates, score_fn=score, on_outcome=lambda outcome: seen.append(outcome.label), capture_files=False)
    assert [(outcome.label, outcome.score) for outcome in result.outcomes] == [("b", 7.0), ("c", 3.0), ("a", 1.0)]
    assert sorted(seen) == ["a", "b", "c"]
    assert parent.explore(candidates, score_fn=score, select="min").winner_outcome.label == "a"
    assert parent.explore(candidates, select=lambda found: found[-1]).winner_outcome.label in "abc"
    assert parent.explore([Candidate("x", cmd="say", score=1), Candidate("y", cmd="say", score=2)]).winner_outcome.label == "y"
    bodies = [body for verb, _, body in world.asked if verb == "POST exec"]
    assert {"cmd": "say 1", "env": {"K": "v"}, "timeout_seconds": 5.0} in bodies


def outcome(label: str, score: float, ms: int = 1, ok: bool = True, error: str | None = None) -> BranchOutcome:
    return BranchOutcome(label, "s", ok, score, 0, "", "", [], ms, error=error)


@pytest.mark.parametrize(
    ("outcomes", "select", "require_success", "winner"),
    [
        ([outcome("a", 1, 9), outcome("b", 1, 2)], "max", True, "b"),
        ([outcome("a", 1, 9), outcome("b", 1, 2)], "min", True, "b"),
        ([outcome("b", 1), outcome("a", 1)], "max", True, "a"),
        ([outcome("a", 1), outcome("b", 2)], "min", True, "a"),
        ([outcome("a", 1), outcome("b", 2, ok=False)], "max", True, "a"),
        ([outcome("a", 1), outcome("b", 2, ok=False)], "max", False, "b"),
        ([outcome("a", 5), outcome("b", 0, error="score_fn raised")], "min", True, "a"),
    ],
)
def test_who_wins(outcomes: list[BranchOutcome], select: Any, require_success: bool, winner: str) -> None:
    assert branches.chosen(outcomes, select, require_success).label == winner
    assert outcomes[0].label == winner


def test_a_time_limit_and_a_broken_score_stay_in_their_branch(world: World, parent: Sandbox) -> None:
    world.after["POST exec"] = lambda: (
        answer({"error": "timeout: too long", "code": "exec_timeout"}, 504) if "slow" in json.dumps(world.asked[-1]) else None
    )

    def score(sandbox: Sandbox, outcome: BranchOutcome) -> float:
        if outcome.label == "say bad":
            raise ZeroDivisionError("no")
        return float("nan") if outcome.label == "say nothing" else -1.0

    result = parent.explore(["slow", "say bad", "say nothing", "say good"], score_fn=score, max_concurrency=1, capture_files=False)
    found = {outcome.label: outcome for outcome in result.outcomes}
    assert result.winner_outcome.label == "say good"
    assert found["slow"].timed_out
    assert (found["say bad"].error, found["say bad"].ok) == ("score_fn raised ZeroDivisionError: no", True)
    assert found["say nothing"].error == "score_fn gave no number"


def test_without_a_winner_everything_is_deleted(world: World, parent: Sandbox) -> None:
    with pytest.raises(ExploreError, match=r"no candidate succeeded \(.*exit 3: exit code 3"):
        parent.explore(["exit 3", "exit 4"])
    with pytest.raises(ExploreError, match="picked none"):
        parent.explore(["say"], select=lambda found: outcome("other", 1))
    assert set(world.sandboxes) == {parent.id}


@pytest.mark.parametrize(
    "bad", [[], ["x"] * 17, [Candidate("empty")]], ids=["none", "too many", "empty"]
)  # fmt: skip
def test_what_can_not_work_is_said_before_anything_is_copied(bad: Any, world: World, parent: Sandbox) -> None:
    with pytest.raises(ExploreError):
        parent.explore(bad)
    with pytest.raises(ExploreError, match="select"):
        parent.explore(["x"], select="best")
    with pytest.raises(ExploreError, match="max_concurrency"):
        parent.explore(["x"], max_concurrency=0)
    assert "POST fork-tree" not in world.verbs()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_exception_outside_of_the_candidates_deletes_every_copy(failure: type[BaseException], world: World, parent: Sandbox) -> None:
    def select(found: list[BranchOutcome]) -> BranchOutcome:
        raise failure

    with pytest.raises(failure):
        parent.explore(["say 1", "say 2"], select=select)
    assert set(world.sandboxes) == {parent.id}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit])
def test_a_candidate_that_ends_the_program_deletes_every_copy(failure: type[BaseException], world: World, parent: Sandbox) -> None:
    def leave(sandbox: Sandbox) -> None:
        raise failure

    with pytest.raises(failure):
        parent.explore([Candidate.call("leave", leave), "sleep 0.2", "sleep 0.2"])
    assert set(world.sandboxes) == {parent.id}


def interrupt_when(event: threading.Event, then: threading.Event | None = None) -> threading.Thread:
    """Ctrl-C in the main thread once `event` is set; `then` is set a little later."""

    def run() -> None:
        event.wait(60)
        # The main thread shall wait by then: a signal that comes just before is seen when something else wakes it.
        time.sleep(0.3)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        # Long enough for a busy machine to let the main thread see it first.
        time.sleep(0.3)
        if then is not None:
            then.set()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_ctrl_c_while_candidates_run_deletes_every_copy(world: World, parent: Sandbox) -> None:
    begun, over = threading.Event(), threading.Event()

    def wait(sandbox: Sandbox) -> None:
        begun.set()
        over.wait(60)

    thread = interrupt_when(begun)
    try:
        with pytest.raises(KeyboardInterrupt):
            parent.explore([Candidate.call("a", wait), Candidate.call("b", wait), "say never"], max_concurrency=1)
    finally:
        over.set()
        thread.join()
    assert set(world.sandboxes) == {parent.id}
    assert "say never" not in json.dumps(world.asked)


def test_ctrl_c_while_the_copies_are_made_deletes_them_too(world: World, parent: Sandbox) -> None:
    asked, go_on = threading.Event(), threading.Event()
    world.before["POST fork-tree"] = lambda: (asked.set(), go_on.wait(60))
    thread = interrupt_when(asked, go_on)
    with pytest.raises(KeyboardInterrupt):
        parent.explore(["say 1", "say 2"])
    thread.join()
    # Either the server made them, or the interrupt came before anything was sent.
    assert len(world.answers) <= 1
    assert set(world.sandboxes) == {parent.id}


def test_a_second_ctrl_c_ends_the_waiting_and_not_the_deleting(world: World, parent: Sandbox) -> None:
    asked, again, go_on = threading.Event(), threading.Event(), threading.Event()
    world.before["POST fork-tree"] = lambda: (asked.set(), go_on.wait(60))
    threads = [interrupt_when(asked, again), interrupt_when(again, go_on)]
    with pytest.raises(KeyboardInterrupt):
        parent.explore(["say 1", "say 2"])
    for thread in threads:
        thread.join()
    # Python waits for this thread before it exits, and so does the test.
    for thread in threading.enumerate():
        if thread.name == "pandastack-fork":
            thread.join(10)
    assert len(world.answers) == 1
    assert set(world.sandboxes) == {parent.id}


def test_ctrl_c_while_the_server_is_full_asks_no_more(world: World) -> None:
    waiting = threading.Event()
    world._fork = lambda *_: answer({"error": "full", "code": "no_capacity"}, 503, retry_after="30")
    client = world.client(on_create_retry=lambda event: waiting.set())
    sandbox = client.sandboxes.get(world.make()["id"])
    thread = interrupt_when(waiting)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sandbox.explore(["say 1"])
    thread.join()
    assert time.monotonic() - begun < 5
    assert world.verbs().count("POST fork-tree") == 1


def test_copies_whose_answer_was_lost_are_found_by_their_mark(world: World, parent: Sandbox) -> None:
    world.make(metadata={"fork_request": "another"})
    world.after["POST fork-tree"] = lambda: (_ for _ in ()).throw(broken())
    with pytest.raises(errors.APIConnectionError):
        parent.explore(["say 1", "say 2"])
    assert len(world.answers) == 1
    assert set(world.sandboxes) == {parent.id, "s2"}


def test_copies_that_can_not_be_deleted_are_told(world: World, parent: Sandbox) -> None:
    world._promote = lambda winner, body: answer({"error": "no", "code": "internal"}, 500)
    real = world._answer

    def refuse(request: Any, verb: str, parts: list[str], body: dict[str, Any]) -> Any:
        return answer({"error": "busy"}, 500) if request.method == "DELETE" else real(request, verb, parts, body)

    world._answer = refuse
    result = parent.explore(["say 1", "exit 1"])
    assert list(result.reap_failures.values()) == ["busy"]
    assert result.errors == ["the winner could not be promoted: no"]
    with pytest.raises(ExploreError) as caught:
        parent.explore(["exit 1"])
    assert "could not be deleted: busy" in caught.value.__notes__[0]


def test_losers_and_winner_stay_as_they_are_when_asked(world: World, parent: Sandbox) -> None:
    result = parent.explore(["say 1", "exit 1"], cleanup_losers=False, promote_winner=False)
    assert result.winner is None
    assert result.reaped == []
    assert set(world.sandboxes) == {parent.id, *(outcome.sandbox_id for outcome in result.outcomes)}
    assert "POST promote" not in world.verbs()


def test_copies_expire_should_the_program_die_and_the_winner_does_not(world: World) -> None:
    persistent = world.make(persistent=True, ttl_seconds=0)
    lives: list[dict[str, Any]] = []
    world.run = lambda sandbox, body: (lives.append(dict(sandbox)), says())[1]
    result = world.client().sandboxes.get(persistent["id"]).explore(["say 1"], ttl_seconds=60, capture_files=False)
    assert (lives[-1]["ttl_seconds"], lives[-1]["persistent"]) == (60, False)
    assert result.winner is not None
    assert (world.sandboxes[result.winner.id]["ttl_seconds"], world.sandboxes[result.winner.id]["persistent"]) == (0, True)
    assert result.errors == []


def test_copies_that_wait_for_the_others_are_kept(world: World, parent: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "renew_every_s", lambda children, ttl_seconds: 0.05)
    parent.explore(["say 1", "sleep 0.3"], ttl_seconds=7)
    renewed = {sandbox_id for verb, sandbox_id, body in world.asked if verb == "PATCH lifecycle" and body == {"keep_awake_seconds": 7}}
    assert len(renewed) == 2


def copy(**facts: Any) -> Facts:
    found = Facts()
    found._take(SandboxView(id="c", **facts))
    return found


def test_how_often_copies_are_kept() -> None:
    assert branches.renew_every_s([copy(ttl_seconds=3600)], 600) == 200
    assert branches.renew_every_s([copy(ttl_seconds=30)], 600) == 10
    assert branches.renew_every_s([copy(ttl_seconds=0), copy()], 0) is None
    assert branches.guard(copy(ttl_seconds=30), 600) is None
    assert branches.guard(copy(), 600) is None
    assert branches.guard(copy(ttl_seconds=0), 600) is not None


def test_directories_to_look_at_are_quoted() -> None:
    assert branches.files_command("/srv '/a b'").startswith("find /srv '/a b' -type f -newer ")
    assert branches.files_command("/x;reboot").startswith("find '/x;reboot' ")


def test_a_server_with_room_for_fewer_is_told_about(world: World, parent: Sandbox) -> None:
    real = world._fork

    def fewer(sandbox: dict[str, Any], body: dict[str, Any], key: str) -> Any:
        return real(sandbox, {**body, "count": 1}, key)

    world._fork = fewer
    result = parent.explore(["say 1", "say 2"])
    assert len(result.outcomes) == 1
    assert result.errors == ["2 copies were asked for and 1 came: say 2"]


# The same with asyncio.


async def beginning(world: World) -> AsyncSandbox:
    return await world.async_client(max_create_retry_seconds=0).sandboxes.get(world.make()["id"])


@pytest.mark.anyio
async def test_async_the_best_wins_and_the_others_are_deleted(world: World) -> None:
    parent = await beginning(world)

    async def use(sandbox: AsyncSandbox) -> str:
        return (await sandbox.exec("say 9")).stdout

    async def score(sandbox: AsyncSandbox, outcome: BranchOutcome) -> float:
        return float(outcome.value or outcome.stdout_tail or 0)

    result = await parent.explore(["say 1", Candidate.call("fn", use), "exit 2"], score_fn=score)
    assert isinstance(result.winner, AsyncSandbox)
    assert (result.winner_outcome.label, result.winner_outcome.value) == ("fn", "9")
    assert set(world.sandboxes) == {parent.id, result.winner.id}
    assert (await pandastack.async_explore(parent, ["say 1"], score_fn=lambda sandbox, outcome: 2)).winner_outcome.score == 2
    with pytest.raises(ExploreError):
        await parent.explore(["exit 1"])


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.anyio
async def test_async_cancelled_while_candidates_run(world: World) -> None:
    parent = await beginning(world)
    task = asyncio.create_task(parent.explore(["sleep 0.5", Candidate.call("forever", lambda sandbox: asyncio.sleep(100))]))
    await until(lambda: "sleep 0.5" in json.dumps(world.asked))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert set(world.sandboxes) == {parent.id}


@pytest.mark.anyio
async def test_async_cancelled_while_the_copies_are_made(world: World) -> None:
    go_on = threading.Event()
    world.before["POST fork-tree"] = lambda: go_on.wait(60)
    parent = await beginning(world)
    task = asyncio.create_task(parent.explore(["say 1", "say 2"]))
    await until(lambda: "POST fork-tree" in world.verbs())
    task.cancel()
    await asyncio.sleep(0.05)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(world.answers) == 1
    assert set(world.sandboxes) == {parent.id}


@pytest.mark.anyio
async def test_async_copies_whose_answer_was_lost(world: World) -> None:
    world.after["POST fork-tree"] = lambda: (_ for _ in ()).throw(broken())
    parent = await beginning(world)
    world.make()
    with pytest.raises(errors.APIConnectionError):
        await parent.explore(["say 1"])
    assert set(world.sandboxes) == {parent.id, "s2"}


@pytest.mark.anyio
async def test_async_copies_that_wait_are_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "renew_every_s", lambda children, ttl_seconds: 0.05)
    parent = await beginning(world)
    result = await parent.explore(["say 1", "sleep 0.3"], ttl_seconds=7)
    assert result.errors == []
    assert ({"keep_awake_seconds": 7}) in [body for verb, _, body in world.asked if verb == "PATCH lifecycle"]

"""The server is killed in the middle of saving, waking and copying: nothing acknowledged is lost, nothing half made stays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from pandastack import errors
from pandastack.sdk.client import Client
from pandastack.sdk.sandboxes import Sandbox

from . import notes
from .conftest import MakeServer
from .servers import Server

# So much that every verb takes about a second or more, of which the delays see different parts.
BALLAST_MIB = 200


class Asked:
    """One request in a thread; `answer` is set only if the server lived long enough to give it."""

    def __init__(self, server: Server, sandbox_id: str, verb: Callable[[Sandbox], Any]) -> None:
        self.answer: Any = None
        self.answered = False
        self.wrong: list[BaseException] = []
        self._client = Client(api_url=server.url, api_key=server.token, max_create_retry_seconds=0, timeout=120)
        self._sandbox = self._client.sandboxes.get(sandbox_id)
        self._verb = verb
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.answer = self._verb(self._sandbox)
            self.answered = True
        except errors.ConnectionError:
            pass
        except BaseException as error:
            self.wrong.append(error)

    def end(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._client.close()
        assert self.wrong == []


def killed_during(server: Server, sandbox_id: str, verb: Callable[[Sandbox], Any], delay_s: float) -> Asked:
    asked = Asked(server, sandbox_id, verb)
    time.sleep(delay_s)
    server.kill()
    asked.end()
    server.start()
    return asked


class Story:
    """A sandbox that is worked on, and two bystanders; each remembers every word it was told."""

    def __init__(self, server: Server) -> None:
        self.server = server
        client = server.client()
        self.box, self.running, self.asleep = (client.sandboxes.create("base", persistent=True).id for _ in range(3))
        self.words: dict[str, list[str]] = {}
        for name in (self.box, self.running, self.asleep):
            notes.begin(client.sandboxes.get(name), ballast_mib=BALLAST_MIB if name == self.box else 0)
            self.words[name] = []
            self.told(name)
        client.sandboxes.get(self.asleep).hibernate()

    def told(self, name: str) -> None:
        word = f"word-{len(self.words[name])}"
        self.words[name].append(word)
        assert notes.add(self.server.client().sandboxes.get(name), word) == self.words[name], self.server.said()

    def check(self, delay_s: float) -> dict[str, Sandbox]:
        """Everyone acknowledged is there with its memory; the answer is whoever else is there."""
        found = {sandbox.id: sandbox for sandbox in self.server.client().sandboxes.list()}
        assert found.keys() >= self.words.keys(), (delay_s, self.server.said())
        assert found[self.asleep].status == "hibernated", delay_s
        assert found[self.running].status == "running", delay_s
        self.told(self.running)
        self.told(self.box)
        return {name: sandbox for name, sandbox in found.items() if name not in self.words}

    def end(self) -> None:
        self.told(self.asleep)
        # Records, machines and saved states are those of the three, and of nobody else.
        assert len(self.server.client().sandboxes.list()) == 3
        assert len(self.server.machines()) == 3
        assert [path.name for path in (self.server.data / "snapshots").iterdir()] == [".new"]
        assert list((self.server.data / "captures").iterdir()) == []


def test_killed_in_the_middle_of_saving_waking_and_copying(own_server: MakeServer) -> None:
    # One after the other on one server: what one of them left would trip the next.
    story = Story(own_server())
    for delay_s in (0.1, 0.6):
        killed_while_it_hibernates_and_wakes(story, delay_s)
    for delay_s in (0.4, 1.2, 3.0):
        killed_while_it_is_forked(story, delay_s)
    for delay_s in (0.2, 0.8):
        killed_while_a_snapshot_is_taken(story, delay_s)
    story.end()


def killed_while_it_hibernates_and_wakes(story: Story, delay_s: float) -> None:
    asked = killed_during(story.server, story.box, lambda sandbox: sandbox.hibernate(), delay_s)
    found = story.server.client().sandboxes.get(story.box)
    assert found.status in (("hibernated",) if asked.answered else ("hibernated", "running"))
    found.hibernate()
    killed_during(story.server, story.box, lambda sandbox: sandbox.wake(), delay_s)
    assert story.server.client().sandboxes.get(story.box).status in ("hibernated", "running")
    assert story.check(delay_s) == {}


def killed_while_it_is_forked(story: Story, delay_s: float) -> None:
    asked = killed_during(story.server, story.box, lambda sandbox: sandbox.fork(count=4), delay_s)
    before = list(story.words[story.box])
    others = story.check(delay_s)
    assert len(others) in ((4,) if asked.answered else (0, 4)), (delay_s, story.server.said())
    for child in others.values():
        assert child.status == "running"
        assert notes.add(child, "child") == [*before, "child"]
        child.kill()


def killed_while_a_snapshot_is_taken(story: Story, delay_s: float) -> None:
    asked = killed_during(story.server, story.box, lambda sandbox: sandbox.snapshot(), delay_s)
    before = list(story.words[story.box])
    assert story.check(delay_s) == {}
    client = story.server.client()
    names = [snapshot.id for snapshot in client.snapshots.list()]
    assert names == [asked.answer] if asked.answered else len(names) <= 1, delay_s
    for name in names:
        with client.sandboxes.create(from_snapshot=name) as copy:
            assert notes.add(copy, "copy") == [*before, "copy"]
        client.snapshots.delete(name)

"""Saving, waking and copying with the bare tool: `runsc checkpoint`, then `restore` and `exec` for each copy, by the command line.

The program with the state is the first process of its sandbox: runsc cannot restore a state in which something that it
was told to `exec` still runs. The files of a checkpoint are in the page cache when runsc is done; it does not sync them.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pandastack.bench import runsc_sandboxes
from pandastack.bench.workloads import HOLDER, READY, READY_TIMEOUT_S, Workload
from pandastack.errors import HostUnfit

_TIMEOUT_S = 300.0  # A large state on a slow disk.


class RunscState:
    """See `tool.BareState`."""

    def __init__(self, by_hand: runsc_sandboxes.Bare, work: Path, workload: Workload, name: str, bundle: Path, prefix: list[str]) -> None:
        self._by_hand = by_hand
        self._work = work
        self._workload = workload
        self._name, self._bundle, self._prefix = name, bundle, prefix

    def checkpoint(self) -> float:
        """`runsc checkpoint --leave-running`."""
        with self._image() as image:
            return self._save(image, "--leave-running")

    def fork(self, children: int, *, at_once: bool = False) -> list[float]:
        """One checkpoint, then `restore` and `exec /bin/true` for each child."""
        with contextlib.ExitStack() as undo:
            image = undo.enter_context(self._image())
            limits = self._workload.limits(self._by_hand.spec.limits)
            prepared = [undo.enter_context(self._by_hand.prepared(self._work, _program(self._workload), limits)) for _ in range(children)]
            saved, began = self._save(image, "--leave-running"), time.perf_counter()

            def answered(child: tuple[str, Path, list[str]]) -> float:
                name, bundle, prefix = child
                self._restore(image, name, bundle, prefix)
                self._by_hand.exec_true(name, prefix)
                return saved + time.perf_counter() - began

            with ThreadPoolExecutor(children if at_once else 1) as threads:
                return list(threads.map(answered, prepared))

    def hibernate_and_wake(self) -> tuple[float, float]:
        """`checkpoint` and `delete`, then `restore` and `exec /bin/true`, in the same bundle."""
        with self._image() as image:
            down = self._save(image)
            began = time.perf_counter()
            runsc_sandboxes.delete(self._name, self._prefix)
            down += time.perf_counter() - began
            up = self._restore(image, self._name, self._bundle, self._prefix)
            return down, up + self._by_hand.exec_true(self._name, self._prefix)

    @contextlib.contextmanager
    def _image(self) -> Iterator[Path]:
        folder = self._work / "image"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _save(self, image: Path, *words: str) -> float:
        command = [*self._prefix, "checkpoint", f"--image-path={image}", *words, *_uncompressed(self._by_hand.runsc), self._name]
        began = time.perf_counter()
        runsc_sandboxes.call(command, timeout_s=_TIMEOUT_S)
        return time.perf_counter() - began

    def _restore(self, image: Path, name: str, bundle: Path, prefix: list[str]) -> float:
        began = time.perf_counter()
        # With a bundle it makes the sandbox by itself; without one there would have to be a `create` before.
        command = [*prefix, "restore", "--detach", f"--image-path={image}", "--bundle", str(bundle), name]
        runsc_sandboxes.call(command, timeout_s=_TIMEOUT_S)
        return time.perf_counter() - began


@contextlib.contextmanager
def holding(by_hand: runsc_sandboxes.Bare, work: Path, workload: Workload) -> Iterator[RunscState]:
    """A bare sandbox whose first process holds the state."""
    with by_hand.prepared(work, _program(workload), workload.limits(by_hand.spec.limits)) as (name, bundle, prefix):
        runsc_sandboxes.call([*prefix, "run", "--detach", "--bundle", str(bundle), name])
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not _there(prefix, name):
            if time.monotonic() > deadline:
                raise HostUnfit("the bare sandbox did not fill its memory in time")
            time.sleep(0.1)
        yield RunscState(by_hand, work, workload, name, bundle, prefix)


def _program(workload: Workload) -> list[str]:
    return ["/usr/bin/python3", "-c", HOLDER, str(workload.state_mb)]


def _there(prefix: list[str], name: str) -> bool:
    try:
        runsc_sandboxes.call([*prefix, "exec", name, "/usr/bin/test", "-e", READY])
    except HostUnfit:
        return False
    return True


@functools.cache
def _uncompressed(runsc: Path) -> list[str]:
    """Compression costs seconds, so it is turned off where the release has the flag."""
    done = subprocess.run([runsc, "help", "checkpoint"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    return ["--compression=none"] if "-compression" in done.stdout + done.stderr else []

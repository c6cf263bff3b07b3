"""A patch must make the second tree of the first: git itself is asked, on trees that Hypothesis makes up."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pandastack.wire import patches
from pandastack.wire.patches import Blob

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="no git on this machine")
SLOW = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])

lines = st.lists(st.sampled_from([b"a\n", b"b\n", b"c\n", b"\n", b"}\n", b"odd\r\n", b"\xff\n", b"-- x\n", b"@@ -1 +1 @@\n"]), max_size=30)
texts = st.builds(lambda rows, end: b"".join(rows) + end, lines, st.sampled_from([b"", b"no end"]))
contents = st.one_of(texts, st.binary(max_size=200), st.builds(lambda data: data * 50, st.binary(min_size=1, max_size=80)))
blobs = st.one_of(
    st.builds(Blob, st.sampled_from([b"100644", b"100755"]), contents),
    st.builds(Blob, st.just(b"120000"), st.binary(min_size=1, max_size=30).filter(lambda data: b"\0" not in data)),
)
names = st.one_of(
    st.sampled_from(
        [b"a", b"b", b"d", b"with space", b'q"uote', b"new\nline", b"tab\t", b"\xff\xfe", b"back\\slash", b"-x", "\u00e9".encode()]
    ),
    st.binary(min_size=1, max_size=12).filter(
        lambda name: b"\0" not in name and b"/" not in name and name not in (b".", b"..") and name.lower() != b".git"
    ),
)
paths = st.lists(names, min_size=1, max_size=3).map(b"/".join)
Tree = dict[bytes, Blob]


def _possible(tree: Tree) -> Tree:
    """Without what would be below a file."""
    return {path: blob for path, blob in tree.items() if not any(path.startswith(other + b"/") for other in tree)}


trees = st.dictionaries(paths, blobs, max_size=6).map(_possible)


def _write(root: Path, tree: Tree) -> None:
    for name, blob in tree.items():
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if blob.mode == b"120000":
            os.symlink(blob.data, path)  # noqa: PTH211 - a Path would tidy the target up
        else:
            path.write_bytes(blob.data)
            path.chmod(int(blob.mode[-3:], 8))


def _read(root: Path) -> Tree:
    found = {}
    for path in root.rglob("*"):
        name = os.fsencode(path.relative_to(root))
        if path.is_symlink():
            found[name] = Blob(b"120000", os.fsencode(os.readlink(path)))  # noqa: PTH115 - a Path would tidy the target up
        elif path.is_file():
            found[name] = Blob(patches.file_mode(path.stat().st_mode), path.read_bytes())
    return found


def _patch(one: Tree, two: Tree) -> bytes:
    ordered = sorted({*one, *two}, key=lambda path: path.split(b"/"))
    return b"".join(patches.render(path, one.get(path), two.get(path)) for path in ordered)


def _applied(one: Tree, patch: bytes, *options: str) -> Tree:
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), one)
        if patch:
            alone = {
                **os.environ,
                "GIT_CEILING_DIRECTORIES": str(Path(folder).parent),
                "GIT_CONFIG_GLOBAL": "/dev/null",
                "GIT_CONFIG_SYSTEM": "/dev/null",
            }
            subprocess.run(["git", "apply", *options, "-"], cwd=folder, input=patch, check=True, env=alone, stderr=subprocess.PIPE)
        return _read(Path(folder))


@needs_git
@SLOW
@given(one=trees, two=trees)
def test_git_makes_the_second_tree_of_the_first_and_back(one: Tree, two: Tree) -> None:
    patch = _patch(one, two)
    assert _applied(one, patch) == two
    assert _applied(two, patch, "-R") == one


@needs_git
@SLOW
@given(before=lines, edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3), lines), max_size=4), tail=lines)
def test_edits_of_a_longer_text(before: list[bytes], edits: list[tuple[int, int, list[bytes]]], tail: list[bytes]) -> None:
    old = [*before, *(b"%d\n" % number for number in range(100)), *tail]
    new = list(old)
    for at, gone, added in edits:
        new[at : at + gone] = added
    one, two = ({b"f": Blob(b"100644", b"".join(rows))} for rows in (old, new))
    assert _applied(one, _patch(one, two)) == two


@pytest.mark.parametrize("line", ["two kinds", "few kinds", "many kinds", "mostly unique", "one kind"])
def test_no_text_takes_long(line: str) -> None:
    random = Random(1)
    kinds = {"two kinds": 2, "few kinds": 200, "many kinds": 25_000, "mostly unique": 10**9, "one kind": 1}[line]
    one, two = (Blob(b"100644", b"".join(b"%d\n" % random.randrange(kinds) for _ in range(49_000 - skew))) for skew in (0, 7))
    begun = time.process_time()
    patches.render(b"f", one, two)
    assert time.process_time() - begun < 10


def test_only_what_changed_is_in_it() -> None:
    old = b"".join(b"%d\n" % number for number in range(1000))
    new = old.replace(b"\n500\n", b"\nnew\n500\n")
    text = patches.render(b"f", Blob(b"100644", old), Blob(b"100644", new))
    assert text.splitlines()[4:] == [b"@@ -498,6 +498,7 @@", b" 497", b" 498", b" 499", b"+new", b" 500", b" 501", b" 502"]


def test_what_git_does_not_see_is_empty() -> None:
    assert patches.render(b"f", Blob(patches.file_mode(0o644), b"x"), Blob(patches.file_mode(0o600), b"x")) == b""
    assert patches.render(b"f", None, None) == b""


@needs_git
def test_what_is_left_out_is_passed_over() -> None:
    parts = [
        patches.left_out(b"big\nname", "it is large"),
        patches.render(b"f", None, Blob(b"100644", b"x\n")),
        patches.left_out(b"z", "no"),
    ]
    assert parts[0].count(b"\n") == 1
    assert _applied({}, b"".join(parts)) == {b"f": Blob(b"100644", b"x\n")}
    binary = (
        patches.render(b"f", None, Blob(b"100644", b"\0")) + patches.left_out(b"z", "no") + patches.render(b"g", None, Blob(b"100644", b""))
    )
    assert set(_applied({}, binary)) == {b"f", b"g"}

"""What a recipe may say, and what a person is told when it says something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from pandastack.errors import HostUnfit, TemplateError, TemplateNotFound
from pandastack.host.storage import mirrors, recipes

SHIPPED = Path(__file__).parents[2] / "templates"
BASE = 'name = "base"\nlabel = "Base"\n[distribution]\nname = "debian"\nversion = "12"\nsuite = "bookworm"\n'
DERIVED = 'name = "child"\nlabel = "Child"\nbase = "base"\n'


def write(top: Path, name: str, text: str) -> Path:
    folder = top / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "template.toml").write_text(text)
    return folder


def digest(top: Path, name: str = "base", architecture: str = "amd64") -> str:
    return recipes.digest(recipes.Catalog([top]).chain(name), architecture)


def test_the_shipped_templates_are_valid() -> None:
    catalog = recipes.Catalog([SHIPPED])
    assert catalog.broken == {}
    assert {"base", "code-interpreter", "ubuntu-24.04"} <= set(catalog.names())
    interpreter = catalog.effective("code-interpreter")
    assert str(interpreter.distribution) == "debian-12"
    assert interpreter.env["LANG"] == "C.UTF-8"
    assert [user.name for user in interpreter.users] == ["user"]
    assert interpreter.warm is not None
    assert "pandas" in interpreter.warm.python_modules


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (BASE + 'colour = "red"\n', "distribution.colour"),
        ("cpu = 0\n" + BASE, "cpu"),
        ('cpu = "2"\n' + BASE, "cpu"),
        ('packages = ["--allow-unauthenticated"]\n' + BASE, "packages.0"),
        ('aliases = ["Not OK"]\n' + BASE, "aliases.0"),
        ('remove = ["/usr/../etc/x"]\n' + BASE, "remove"),
        ('remove = ["/etc"]\n' + BASE, "remove"),
        ('dpkg_options = ["force-all"]\n' + BASE, "dpkg_options.0"),
        ('users = [{name = "root; id", uid = 1000}]\n' + BASE, "users.0.name"),
        ('users = [{name = "me", uid = 0}]\n' + BASE, "users.0.uid"),
        (BASE + '[env]\n"A B" = "1"\n', "env"),
        (BASE + '[env]\nA = "1\\n2"\n', "env"),
        (BASE + '[warm]\npython_modules = ["os; import x"]\n', "warm.python_modules.0"),
        ('name = "base"\nlabel = "x"\n', "recipe"),
        ('base = "other"\n' + BASE, "recipe"),
        ('name = "base"\nlabel = "x"\nbase = "base"\n', "recipe"),
        ("cpu =", None),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path: Path, text: str, field: str | None) -> None:
    folder = write(tmp_path, "base", text)
    with pytest.raises(TemplateError) as caught:
        recipes.load(folder)
    assert str(folder / "template.toml") in str(caught.value)
    assert caught.value.hint
    if field:
        assert field in caught.value.fields["fields_wrong"]


def test_the_folder_and_the_name_must_agree(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="folder is 'other'"):
        recipes.load(write(tmp_path, "other", BASE))


@pytest.mark.parametrize("line", ["numpy", "numpy==1.0", "--index-url http://x", "git+https://x/y", "numpy>=1 --hash=sha256:ab"])
def test_requirements_without_pins_and_hashes_are_refused(tmp_path: Path, line: str) -> None:
    folder = write(tmp_path, "child", DERIVED + '[python]\nrequirements = "requirements.txt"\n')
    (folder / "requirements.txt").write_text(f"# a comment\n{line}\n")
    with pytest.raises(TemplateError, match=r"not pinned with hashes"):
        recipes.load(folder)


def test_a_missing_lock_and_links_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"requirements\.txt is missing"):
        recipes.load(write(tmp_path, "child", DERIVED + '[python]\nrequirements = "requirements.txt"\n'))
    folder = write(tmp_path, "base", BASE)
    (folder / "files").mkdir()
    (folder / "files/passwd").symlink_to("/etc/passwd")
    with pytest.raises(TemplateError, match="files/passwd is a link"):
        recipes.load(folder)


def test_hooks_are_the_two_we_run_and_can_be_started(tmp_path: Path) -> None:
    folder = write(tmp_path, "base", BASE)
    hooks = folder / "hooks"
    hooks.mkdir()
    assert recipes.hooks(recipes.load(folder)) == {}
    (hooks / "before-snapshot").write_text("#!/bin/sh\nsync\n")
    (hooks / "after-restore").write_bytes(b"\x7fELF...")
    assert sorted(recipes.hooks(recipes.load(folder))) == ["after-restore", "before-snapshot"]
    for name, content, problem in (
        ("after-boot", "#!/bin/sh\n", "'after-boot' is no hook"),
        ("before-snapshot", "sync\n", "hooks/before-snapshot does not say what runs it"),
        ("before-snapshot", "", "hooks/before-snapshot does not say what runs it"),
    ):
        before = (hooks / name).read_text() if (hooks / name).exists() else None
        (hooks / name).write_text(content)
        with pytest.raises(TemplateError, match=problem) as refused:
            recipes.load(folder)
        assert refused.value.fields["fields_wrong"] == ["hooks"]
        (hooks / name).unlink()
        if before is not None:
            (hooks / name).write_text(before)
    (hooks / "after-restore").unlink()
    (hooks / "after-restore").symlink_to("/bin/true")
    with pytest.raises(TemplateError, match="hooks/after-restore is a link"):
        recipes.load(folder)
    (hooks / "after-restore").unlink()
    (hooks / "before-snapshot").rename(folder / "elsewhere")
    hooks.rmdir()
    hooks.write_text("")
    with pytest.raises(TemplateError, match="hooks: is no folder"):
        recipes.load(folder)


def test_hooks_are_part_of_the_digest_and_their_absence_is_not(tmp_path: Path) -> None:
    folder = write(tmp_path, "base", BASE)
    write(tmp_path, "child", DERIVED)
    first, child = digest(tmp_path), digest(tmp_path, "child")
    (folder / "hooks").mkdir()
    assert digest(tmp_path) == first
    (folder / "hooks/after-restore").write_text("#!/bin/sh\n")
    second = digest(tmp_path)
    assert second != first
    assert digest(tmp_path, "child") != child
    (folder / "hooks/after-restore").chmod(0o755)
    assert digest(tmp_path) == second
    (folder / "hooks/after-restore").write_text("#!/bin/bash\n")
    assert digest(tmp_path) not in (first, second)


def test_one_broken_recipe_hides_only_itself(tmp_path: Path) -> None:
    write(tmp_path, "base", BASE)
    write(tmp_path, "child", DERIVED + "cpu = 0\n")
    catalog = recipes.Catalog([tmp_path, tmp_path / "absent"])
    assert catalog.names() == ["base"]
    with pytest.raises(TemplateError, match="cpu"):
        catalog.find("child")


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    write(tmp_path, "base", BASE)
    with pytest.raises(TemplateNotFound, match="known templates: base"):
        recipes.Catalog([tmp_path]).find("bas")


def test_a_later_folder_wins_and_aliases_resolve(tmp_path: Path) -> None:
    write(tmp_path / "a", "base", 'aliases = ["debian"]\n' + BASE)
    write(tmp_path / "b", "base", 'aliases = ["debian"]\ncpu = 7\n' + BASE)
    assert recipes.Catalog([tmp_path / "a", tmp_path / "b"]).effective("debian").cpu == 7


def test_an_alias_has_one_owner(tmp_path: Path) -> None:
    write(tmp_path, "base", BASE)
    write(tmp_path, "child", 'aliases = ["base"]\n' + DERIVED)
    with pytest.raises(TemplateError, match="'base' already belongs to base"):
        recipes.Catalog([tmp_path]).find("child")


def test_a_circle_and_a_missing_base_are_errors(tmp_path: Path) -> None:
    write(tmp_path, "child", DERIVED)
    with pytest.raises(TemplateError, match="no template named 'base'"):
        recipes.Catalog([tmp_path]).chain("child")
    write(tmp_path, "base", 'name = "base"\nlabel = "x"\nbase = "child"\n')
    with pytest.raises(TemplateError, match="leads back"):
        recipes.Catalog([tmp_path]).chain("child")


def test_a_derived_recipe_takes_what_it_leaves_out(tmp_path: Path) -> None:
    write(tmp_path, "base", 'cpu = 3\ntools = ["git"]\n' + BASE + '[env]\nA = "1"\nB = "1"\n')
    write(tmp_path, "child", "memory_mb = 2048\n" + DERIVED + '[env]\nB = "2"\n')
    child = recipes.Catalog([tmp_path]).effective("child")
    assert (child.cpu, child.memory_mb, child.disk_mb) == (3, 2048, recipes.DEFAULTS["disk_mb"])
    assert child.env == {"A": "1", "B": "2"}
    assert child.tools == ["git"]


def test_the_digest_follows_content_and_nothing_else(tmp_path: Path) -> None:
    folder = write(tmp_path, "base", BASE)
    (folder / "files/etc").mkdir(parents=True)
    (folder / "files/etc/motd").write_text("hello")
    write(tmp_path, "child", DERIVED)
    first, child = digest(tmp_path), digest(tmp_path, "child")
    assert first == digest(tmp_path)
    assert first != digest(tmp_path, architecture="arm64")

    write(tmp_path, "base", 'description = "Better words"\ncpu = 8\n' + BASE)
    assert digest(tmp_path) == first
    (folder / "files/etc/motd").chmod(0o755)
    assert digest(tmp_path) != first
    (folder / "files/etc/motd").chmod(0o644)
    (folder / "files/etc/motd").write_text("bye")
    assert digest(tmp_path) != first
    assert digest(tmp_path, "child") != child
    (folder / "files/etc/motd").write_text("hello")
    write(tmp_path, "base", 'packages = ["git"]\n' + BASE)
    assert digest(tmp_path) != first


DEBIAN = recipes.Distribution(name="debian", version="12", suite="bookworm")


def apt(tmp_path: Path, **files: str) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    for name, text in files.items():
        (tmp_path / "sources.list.d" / name.replace("_", ".")).write_text(text)
    return tmp_path


def test_the_hosts_official_debian_mirrors_are_used_and_no_others(tmp_path: Path) -> None:
    etc = apt(
        tmp_path,
        a_list="deb [signed-by=/k/docker.asc] https://docker.example/linux/debian bookworm stable\n"
        "deb https://packages.example/apt cloud-bookworm main\ndeb [trusted=yes] http://evil.example/debian bookworm main\n",
        b_sources="Types: deb\nURIs: https://vendor.example/debian\nSuites: bookworm\nComponents: main\nSigned-By: /k/vendor.gpg\n\n"
        "Types: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: trixie\nComponents: main\n\n"
        "# a comment\nTypes: deb deb-src\nURIs: http://mirror.example/debian/\nSuites: trixie trixie-updates\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
    )
    mirror = mirrors.find(DEBIAN, debian_mirror=None, ubuntu_mirror=None, apt=etc)
    assert mirror == mirrors.Mirror(main="http://mirror.example/debian", security="http://mirror.example/debian-security")
    assert "bookworm-security main" in mirrors.sources_list(DEBIAN, mirror, "/k.gpg")


def test_a_mirror_list_in_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "mirrors").write_text("# note\nhttps://cloud.example/debian\tpriority:1\n")
    etc = apt(tmp_path, a_list=f"deb mirror+file://{tmp_path}/mirrors bookworm main\n")
    assert mirrors.find(DEBIAN, debian_mirror=None, ubuntu_mirror=None, apt=etc).main == "https://cloud.example/debian"


def test_without_a_mirror_the_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostUnfit, match="debian_mirror"):
        mirrors.find(DEBIAN, debian_mirror=None, ubuntu_mirror=None, apt=tmp_path)
    with pytest.raises(HostUnfit, match="no mirror address"):
        mirrors.find(DEBIAN, debian_mirror="mirror.example", ubuntu_mirror=None, apt=tmp_path)
    both = mirrors.find(DEBIAN, debian_mirror="http://a.example/d http://b.example/s/", ubuntu_mirror=None, apt=tmp_path)
    assert both == mirrors.Mirror(main="http://a.example/d", security="http://b.example/s")


def test_only_how_to_reach_the_network_is_taken_from_the_host(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://index.example/simple\nfind-links = /opt/wheels\n")
    dump = (
        'Acquire::http::Proxy "http://proxy.example:3128";\nAcquire::Check-Valid-Until "false";\nAcquire::AllowInsecureRepositories "1";\n'
    )
    environ = {"PIP_FIND_LINKS": "/opt/wheels", "PIP_TIMEOUT": "9", "HTTPS_PROXY": "http://p.example", "AWS_SECRET": "x"}
    settings = mirrors.host_settings(dump, environ, home=tmp_path, etc=tmp_path)
    assert settings.apt_options == ["Acquire::http::Proxy=http://proxy.example:3128"]
    assert settings.environment == {"PIP_INDEX_URL": "https://index.example/simple", "PIP_TIMEOUT": "9", "HTTPS_PROXY": "http://p.example"}

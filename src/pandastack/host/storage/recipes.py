"""Recipes: what a template is made of, as declared in `templates/<name>/template.toml`.

Runs on a host; `images` reads recipes here and builds them. Nothing in this file starts a process or writes a file,
so a recipe can be checked anywhere. A recipe folder holds `template.toml`, perhaps a requirements file, perhaps `files/`,
whose content is laid over the root of the image, and perhaps `hooks/`: programs that its sandboxes run around a snapshot.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, ValidationError, field_validator, model_validator

from pandastack.errors import TemplateError, TemplateNotFound

# Part of every digest: raise it when the builder makes a different image from the same recipe.
BUILDER_VERSION = 3

# What `hooks/` may hold: the guest runs them before a snapshot, and after a restore with the new identity in place.
HOOKS = ("after-restore", "before-snapshot")

# These describe a template or size a sandbox, but change nothing in the image, so editing them builds nothing anew.
_NOT_BUILT_IN = {"label", "description", "category", "aliases", "tools", "cpu", "memory_mb", "disk_mb", "fallback", "build_space_mb"}

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{0,62}$")]
# Debian's own grammar for package names; a leading dash, which a tool would read as an option, is not in it.
Package = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.-]+$")]
Word = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
UserName = Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")]
Module = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]
DpkgOption = Annotated[str, StringConstraints(pattern=r"^path-(exclude|include)=/[^\s]+$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Distribution(_Strict):
    """Where a root file system starts; `suite` and `components` are apt's words."""

    name: Literal["debian", "ubuntu"]
    version: Word
    suite: Word
    components: list[Word] = ["main"]

    def __str__(self) -> str:
        return f"{self.name}-{self.version}"


class User(_Strict):
    """A person inside the sandbox, with a home folder and no password; `sudo` needs none either."""

    name: UserName
    uid: int = Field(ge=1000, lt=60000)
    home: str | None = Field(default=None, pattern=r"^/[A-Za-z0-9._/-]+$")
    shell: str = Field(default="/bin/bash", pattern=r"^/[A-Za-z0-9._/-]+$")
    sudo: bool = False

    @property
    def home_path(self) -> str:
        return self.home or f"/home/{self.name}"


class Python(_Strict):
    """`requirements` is a file in the recipe folder: every package pinned, every pin with hashes."""

    requirements: str = Field(pattern=r"^[A-Za-z0-9._-]+$")


class Warm(_Strict):
    """An interpreter the platform may keep started: these modules are imported before user code arrives."""

    python_modules: list[Module] = []


class Recipe(_Strict):
    """One template. Sizes in MiB, `cpu` in cores; None takes the base's value, and DEFAULTS at the end of the chain."""

    name: Name
    label: str = Field(min_length=1, max_length=80)
    description: str = Field(default="", max_length=500)
    category: Word = "general"
    aliases: list[Name] = []
    base: Name | None = None
    distribution: Distribution | None = None
    fallback: Name | None = None
    packages: list[Package] = []
    dpkg_options: list[DpkgOption] = []
    python: Python | None = None
    users: list[User] = []
    env: dict[str, str] = {}
    remove: list[str] = []
    cpu: int | None = Field(default=None, ge=1, le=256)
    memory_mb: int | None = Field(default=None, ge=64, le=1024 * 1024)
    disk_mb: int | None = Field(default=None, ge=256, le=16 * 1024 * 1024)
    build_space_mb: int = Field(default=2048, ge=1, le=1 << 30)
    tools: list[str] = []
    warm: Warm | None = None

    _folder: Path = PrivateAttr()

    @property
    def folder(self) -> Path:
        """The folder this recipe was read from."""
        return self._folder

    @property
    def origin(self) -> Distribution:
        """The distribution. Only a recipe as written that has a base lacks it; `Catalog.effective` fills it in."""
        if self.distribution is None:
            raise ValueError(f"{self.name} has a base; ask for its effective recipe")
        return self.distribution

    @field_validator("env")
    @classmethod
    def _env_is_plain(cls, env: dict[str, str]) -> dict[str, str]:
        for key, value in env.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                raise ValueError(f"{key!r} is no name of an environment variable")
            # The values are also written to /etc/environment, where a quote or a new line would end them early.
            if not re.fullmatch(r"[^\x00-\x1f\x7f\"]*", value):
                raise ValueError(f"the value of {key} has a quote or a control character")
        return env

    @field_validator("remove")
    @classmethod
    def _remove_stays_below_the_root(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            path = PurePosixPath(pattern)
            if not pattern.startswith("/") or ".." in path.parts or len(path.parts) < 3:
                raise ValueError(f"{pattern!r} must be an absolute path pattern below a top folder, without ..")
        return patterns

    @model_validator(mode="after")
    def _has_one_origin(self) -> Recipe:
        if (self.base is None) == (self.distribution is None):
            raise ValueError("give either base or [distribution], not both and not none")
        if self.dpkg_options and self.distribution is None:
            raise ValueError("dpkg_options belongs to a recipe with [distribution]; a derived one keeps its base's")
        if self.name in (self.base, self.fallback):
            raise ValueError("a template cannot be its own base or fallback")
        return self


DEFAULTS = {"cpu": 1, "memory_mb": 512, "disk_mb": 4096}


def load(folder: Path) -> Recipe:
    """Read and check one recipe folder. Raises TemplateError naming the file and every field that is wrong."""
    path = folder / "template.toml"
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise TemplateError(f"{folder} has no template.toml", hint="add one, see docs/howto/add-a-template.md") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TemplateError(f"{path} cannot be read: {error}", hint="correct the file", file=str(path)) from error
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems = [f"{'.'.join(str(part) for part in item['loc']) or 'recipe'}: {item['msg']}" for item in error.errors()]
        raise TemplateError(
            f"{path} is not a valid recipe: {'; '.join(problems)}",
            hint="correct the field, see docs/howto/add-a-template.md",
            file=str(path),
            fields_wrong=[problem.split(":", 1)[0] for problem in problems],
        ) from error
    recipe._folder = folder
    _check_folder(recipe, path)
    return recipe


def _check_folder(recipe: Recipe, path: Path) -> None:
    def wrong(field: str, text: str, hint: str) -> TemplateError:
        return TemplateError(f"{path}: {field}: {text}", hint=hint, file=str(path), fields_wrong=[field])

    if recipe.name != recipe.folder.name:
        raise wrong("name", f"is {recipe.name!r}, but the folder is {recipe.folder.name!r}", "give both the same name")
    hooks = recipe.folder / "hooks"
    if hooks.is_symlink() or (hooks.exists() and not hooks.is_dir()):
        raise wrong("hooks", "is no folder", f"make it a folder with {' or '.join(HOOKS)}")
    for hook in sorted(hooks.iterdir()) if hooks.exists() else []:
        if hook.name not in HOOKS:
            raise wrong("hooks", f"{hook.name!r} is no hook", f"the hooks are {' and '.join(HOOKS)}")
        if hook.is_symlink() or not hook.is_file():
            raise wrong("hooks", f"hooks/{hook.name} is a link, a folder or a special file", "use plain files")
        # Without one the kernel cannot start it, and no sandbox of the template could be saved or handed out.
        if not hook.read_bytes().startswith((b"#!", b"\x7fELF")):
            raise wrong("hooks", f"hooks/{hook.name} does not say what runs it", "begin it with a line such as #!/bin/sh")
    if recipe.python:
        lock = recipe.folder / recipe.python.requirements
        if not lock.is_file():
            raise wrong("python.requirements", f"{lock.name} is missing", "create it with `uv pip compile --generate-hashes`")
        for number, line in enumerate(requirement_lines(lock), 1):
            if not re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*==\S+", line) or "--hash=sha256:" not in line:
                raise wrong(
                    "python.requirements",
                    f"{lock.name}, requirement {number}: {line.split(' ', 1)[0]!r} is not pinned with hashes",
                    "lock it with `uv pip compile --generate-hashes --no-emit-index-url`",
                )
    for file in _files(recipe.folder):
        if file.is_symlink() or not (file.is_file() or file.is_dir()):
            raise wrong("files", f"{file.relative_to(recipe.folder)} is a link or a special file", "use plain files")


def requirement_lines(lock: Path) -> list[str]:
    """The requirements of a lock file, one string each, continuation lines joined, comments left out."""
    text = "\n".join(line for line in lock.read_text("utf-8").splitlines() if not line.lstrip().startswith("#"))
    joined = text.replace("\\\n", " ")
    return [" ".join(line.split()) for line in joined.splitlines() if line.strip()]


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted((folder / "files").rglob("*"))


def hooks(recipe: Recipe) -> dict[str, bytes]:
    """The programs of `hooks/` by name."""
    return {name: (recipe.folder / "hooks" / name).read_bytes() for name in HOOKS if (recipe.folder / "hooks" / name).is_file()}


def digest(chain: Sequence[Recipe], architecture: str) -> str:
    """The sha256 (hex) of all that decides an image's content; `chain` runs from the distribution to the template.

    Neither the date nor the mirror is in it: the same recipe is the same image until someone builds it anew.
    """
    below = ""
    for recipe in chain:
        parts: dict[str, object] = {
            "builder": BUILDER_VERSION,
            "architecture": architecture,
            "base": below,
            "recipe": recipe.model_dump(mode="json", exclude=_NOT_BUILT_IN),
            "files": {
                str(file.relative_to(recipe.folder)): [bool(file.stat().st_mode & 0o100), hashlib.sha256(file.read_bytes()).hexdigest()]
                for file in _files(recipe.folder)
                if file.is_file()
            },
        }
        if recipe.python:
            lock = requirement_lines(recipe.folder / recipe.python.requirements)
            parts["requirements"] = lock  # Comments of the lock may change without a new image.
        if programs := hooks(recipe):
            parts["hooks"] = {name: hashlib.sha256(program).hexdigest() for name, program in programs.items()}
        below = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return below


class Catalog:
    """All recipes of several folders. A later folder wins over an earlier one, so operators can replace a template.

    A broken recipe hides only itself: `broken` says why, and asking for it raises that error.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.recipes: dict[str, Recipe] = {}
        self.broken: dict[str, TemplateError] = {}
        for top in folders:
            for folder in sorted(top.iterdir()) if top.is_dir() else []:
                # A leading dot or underscore marks what is no template: editor folders, __pycache__.
                if folder.is_dir() and folder.name[0] not in "._":
                    self._add(folder)
        self._aliases: dict[str, str] = {}
        for recipe in list(self.recipes.values()):
            for alias in recipe.aliases:
                other = alias if alias in self.recipes else self._aliases.get(alias)
                if other is None:
                    self._aliases[alias] = recipe.name
                else:
                    path = recipe.folder / "template.toml"
                    self._break(
                        recipe.name,
                        TemplateError(
                            f"{path}: aliases: {alias!r} already belongs to {other}",
                            hint="choose another alias",
                            file=str(path),
                        ),
                    )

    def _add(self, folder: Path) -> None:
        self.recipes.pop(folder.name, None)
        self.broken.pop(folder.name, None)
        try:
            self.recipes[folder.name] = load(folder)
        except TemplateError as error:
            self.broken[folder.name] = error

    def _break(self, name: str, error: TemplateError) -> None:
        self.recipes.pop(name, None)
        self.broken[name] = error
        self._aliases = {alias: owner for alias, owner in self._aliases.items() if owner != name}

    def names(self) -> list[str]:
        return sorted(self.recipes)

    def find(self, name: str) -> Recipe:
        """The recipe as written, aliases resolved. Raises TemplateNotFound with the known names, or TemplateError."""
        actual = self._aliases.get(name, name)
        if actual in self.broken:
            raise self.broken[actual]
        if actual not in self.recipes:
            known = ", ".join(self.names()) or "none"
            raise TemplateNotFound(f"there is no template named {name!r}", hint=f"known templates: {known}", known=self.names())
        return self.recipes[actual]

    def chain(self, name: str) -> list[Recipe]:
        """The recipe and all its bases, the one with a distribution first. Raises TemplateError for a missing base or a circle."""
        chain = [self.find(name)]
        while (base := chain[0].base) is not None:
            path = chain[0].folder / "template.toml"
            try:
                below = self.find(base)
            except TemplateNotFound as error:
                raise TemplateError(f"{path}: base: there is no template named {base!r}", hint=error.hint, file=str(path)) from error
            if below in chain:
                raise TemplateError(f"{path}: base: {base!r} leads back to {name!r}", hint="break the circle", file=str(path))
            chain.insert(0, below)
        return chain

    def effective(self, name: str) -> Recipe:
        """The recipe with what it takes from its bases: env, users, sizes, tools, warm, distribution."""
        chain = self.chain(name)
        last = chain[-1]
        merged: dict[str, object] = {
            "distribution": chain[0].distribution,
            "env": {key: value for recipe in chain for key, value in recipe.env.items()},
            "users": [user for recipe in chain for user in recipe.users],
            "tools": next((recipe.tools for recipe in reversed(chain) if recipe.tools), []),
            "warm": next((recipe.warm for recipe in reversed(chain) if recipe.warm), None),
        }
        for field, default in DEFAULTS.items():
            values = [getattr(recipe, field) for recipe in reversed(chain)]
            merged[field] = next((value for value in values if value is not None), default)
        return last.model_copy(update=merged)

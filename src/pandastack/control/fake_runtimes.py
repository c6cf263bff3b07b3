"""The runtimes of `FakeHost`: which it has, which one a create gets, and how far templates are on each."""

from __future__ import annotations

from collections.abc import Iterator

from pandastack.errors import InvalidRequest, IsolationTooWeak, RuntimeUnavailable
from pandastack.wire.host import RuntimeInfo
from pandastack.wire.isolation import AUTO, MICROVM, MINIMUMS, RUNTIMES, Minimum, level
from pandastack.wire.templates import TemplateState

TEMPLATES = ("base", "code-interpreter", "ubuntu-24.04")


class FakeRuntimes:
    """`fake` at first; `offer` adds one. `templates` are the states for all of them, `templates_on` those that differ."""

    def __init__(self) -> None:
        self.templates: dict[str, TemplateState] = dict.fromkeys(TEMPLATES, "ready")
        self.templates_on: dict[tuple[str, str], TemplateState] = {}
        self.min_isolation: Minimum = "none"
        self._infos: dict[str, RuntimeInfo] = {}
        self.offer("fake", "none")

    def offer(
        self, name: str, isolation: str, *, acceleration: str | None = None, works: bool = True, reason: str = "it does not work here"
    ) -> None:
        """Have this runtime, or have it otherwise."""
        self._infos[name] = RuntimeInfo(
            name=name,
            works=works,
            reason=None if works else reason,
            hint="use a real host",
            isolation=isolation,
            acceleration=acceleration,
            capabilities={"own_kernel": isolation == "microvm"},
        )

    def infos(self) -> list[RuntimeInfo]:
        """The strongest first."""
        return sorted(self._infos.values(), key=_level, reverse=True)

    def best(self) -> RuntimeInfo | None:
        return next(self._strong(self.infos()), None)

    def choose(self, wanted: str) -> RuntimeInfo:
        """As `Host.create` promises."""
        meant = self._meant(wanted)
        if (found := next(self._strong(meant), None)) is not None:
            return found
        if weak := [info for info in meant if info.works]:
            raise IsolationTooWeak("it isolates less than this machine asks for", runtime=weak[0].name, minimum=self.min_isolation)
        reasons = "; ".join(info.reason or "" for info in meant) or "it is not tried here"
        raise RuntimeUnavailable(
            f"the runtime {wanted} does not work on this machine ({reasons})", hint="run `pandastack doctor`", runtime=wanted
        )

    def meets(self, wanted: str, runtime: str) -> bool:
        return runtime in [info.name for info in self._meant(wanted)]

    def template_state(self, template: str, runtime: str) -> TemplateState:
        return self.templates_on.get((template, runtime), self.templates[template])

    def set_template(self, template: str, runtime: str, state: TemplateState) -> None:
        if (template, runtime) in self.templates_on:
            self.templates_on[template, runtime] = state
        else:
            self.templates[template] = state

    def _meant(self, wanted: str) -> list[RuntimeInfo]:
        infos = self.infos()
        if wanted == AUTO:
            return infos
        if wanted == MICROVM:
            return [info for info in infos if info.capabilities["own_kernel"]]
        if wanted in self._infos or wanted in RUNTIMES:
            return [info for info in infos if info.name == wanted]
        choices = [AUTO, MICROVM, *self._infos]
        raise InvalidRequest(f"isolation: {wanted!r} is unknown", field="isolation", choices=choices)

    def _strong(self, infos: list[RuntimeInfo]) -> Iterator[RuntimeInfo]:
        return (info for info in infos if info.works and _level(info) >= MINIMUMS[self.min_isolation])


def _level(info: RuntimeInfo) -> int:
    return level(info.name, info.isolation, info.acceleration)

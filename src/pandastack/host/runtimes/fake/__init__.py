"""A runtime without any isolation, in memory: for tests, and for trying the platform where gVisor does not run."""

from pandastack.host.runtimes.fake.driver import FakeMachine, FakeRuntime, Hang

__all__ = ["FakeMachine", "FakeRuntime", "Hang"]

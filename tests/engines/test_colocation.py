"""Engines and actor on the same GPUs: whose memory is there when, also when something fails.

What is recorded are the calls to an actor, engines and a push of the test's own, which hold no GPU; that the calls do
nothing on a CPU and change no number is shown by tests/test_train.py, what moving the actor's memory does by
tests/test_actor.py. vLLM's own sleep has not been run on a GPU.
"""

from collections.abc import Callable

import pytest

from megatron_entropy.errors import EngineLost, Fault
from megatron_entropy.trainer.rollouts import Sampler


class Memory:
    """The GPU: who is on it. Raises where both would be."""

    def __init__(self) -> None:
        self.actor = True
        self.engine: set[str] = {"weights", "kv_cache"}
        self.log: list[str] = []

    def note(self, event: str) -> None:
        self.log.append(event)
        assert not (self.actor and "kv_cache" in self.engine), f"{event}: both are on the GPU after {self.log}"


class World:
    """An actor, one engine, its pool and the push to it; `fail` maps an event to what happens there once."""

    index = 0
    version = 0

    def __init__(self) -> None:
        self.memory = Memory()
        self.fail: dict[str, Callable[[], None]] = {}

    def at(self, event: str) -> None:
        self.memory.note(event)
        if event in self.fail:
            self.fail.pop(event)()

    def offload(self) -> None:
        self.memory.actor = False

    def onload(self) -> None:
        self.memory.actor = True
        self.memory.note("onload")

    def sleep(self) -> None:
        self.memory.engine = set()

    def wake(self, part: str) -> None:
        self.memory.engine.add(part)
        self.at(f"wake {part}")

    def wait_ready(self) -> None: ...

    def clients(self) -> list["World"]:
        return [self]

    def restart(self, indices: object) -> None:
        assert not self.memory.actor, "an engine loads into free memory"
        self.memory.engine = {"weights", "kv_cache"}
        self.memory.log.append("restart")

    def push(self, version: int, clients: object) -> None:
        assert self.memory.actor and self.memory.engine == {"weights"}, "a push needs both sides' weights"
        self.at("push")


@pytest.fixture
def world() -> World:
    return World()


def colocated(world: World) -> Sampler:
    sampler = object.__new__(Sampler)
    sampler.actor = sampler._pool = sampler._push = world
    sampler.version, sampler._colocated = 1, True
    world.offload()  # as the stage does before engines start
    sampler._end_turn()
    return sampler


def generate(sampler: Sampler, world: World) -> None:
    with sampler._turn():
        sampler._sync_weights()
        world.at("generate")


def test_they_take_turns(world):
    sampler = colocated(world)
    world.memory.log.clear()
    generate(sampler, world)
    assert world.memory.log == ["onload", "wake weights", "push", "wake kv_cache", "generate", "onload"]
    assert world.memory.actor and not world.memory.engine


def lose() -> None:
    raise EngineLost([0], "killed")


@pytest.mark.parametrize("moment", ["wake weights", "push", "wake kv_cache"])
def test_a_lost_engine_is_made_anew_while_the_actor_is_away(world, moment):
    sampler = colocated(world)
    world.fail[moment] = lose
    generate(sampler, world)
    assert world.memory.log.count("restart") == 1 and world.memory.actor and not world.memory.engine


def test_a_failure_gives_the_memory_back_to_the_actor(world):
    sampler = colocated(world)

    def fail() -> None:
        raise Fault("the disk is full")

    world.fail["generate"] = fail
    with pytest.raises(Fault, match="disk"):
        generate(sampler, world)
    assert world.memory.actor and not world.memory.engine

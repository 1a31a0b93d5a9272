"""Engines and actor on the same GPUs: which of them has memory when, also after an error.

The actor, the engine and the weight sync are fakes that record the calls and own no GPU. That the calls do nothing on a
CPU and change no number is proved by tests/engines/test_train.py, that the actor's memory moves correctly by
tests/distributed/test_actor.py. vLLM's own sleep has not been run on a GPU.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_entropy.config.schema import RolloutConfig
from megatron_entropy.errors import EngineLost, Fault
from megatron_entropy.monitor.timer import StepTimer
from megatron_entropy.rollout.engine import Completion, Request
from megatron_entropy.trainer.rollout_service import RolloutService

REQUESTS = [Request((number,), (5, 6), seed=number, max_tokens=1, temperature=1.0) for number in range(2)]


class Gpu:
    """Who has memory on the GPU. Fails when the actor and the engine's KV cache are there together."""

    def __init__(self) -> None:
        self.has_actor = self.has_state = True
        self.engine_tags = {"weights", "kv_cache"}
        self.log: list[str] = []

    def note(self, event: str) -> None:
        self.log.append(event)
        assert not (self.has_actor and "kv_cache" in self.engine_tags), f"{event}: both are on the GPU after {self.log}"
        assert not (self.has_state and self.engine_tags), f"{event}: the actor has more than weights after {self.log}"


class World:
    """An actor, a pool with one engine, and the weight sync; `fail` maps an event to what happens there once."""

    def __init__(self) -> None:
        self.gpu = Gpu()
        self.fail: dict[str, Callable[[], None]] = {}

    def at(self, event: str) -> None:
        self.gpu.note(event)
        if event in self.fail:
            self.fail.pop(event)()

    # The actor.

    def offload(self, *, keep_weights: bool = False) -> None:
        self.gpu.has_state = False
        self.gpu.has_actor = self.gpu.has_actor and keep_weights

    def onload(self) -> None:
        self.gpu.has_actor = self.gpu.has_state = True
        self.gpu.note("onload")

    # The engine.

    def sleep(self) -> None:
        self.gpu.engine_tags = set()

    def wake(self, tag: str) -> None:
        self.gpu.engine_tags.add(tag)
        self.at(f"wake {tag}")

    # The pool.

    def wait_ready(self) -> None: ...

    def clients(self) -> list["World"]:
        return [self]

    def restart(self, indices: Sequence[int]) -> None:
        if indices:
            assert not self.gpu.has_actor, "an engine starts in free memory"
            self.gpu.engine_tags = {"weights", "kv_cache"}
            self.gpu.log.append("restart")

    def generate(
        self, requests: Sequence[Request], description: str, on_finished: object = None
    ) -> tuple[list[Completion], list[int]]:
        self.at("generate")
        answer = np.array([1], np.int32), np.zeros(1, np.float32)
        return [Completion(request.key, *answer, "stop") for request in requests], []

    # The weight sync.

    def sync(self, version: int, clients: object) -> None:
        assert self.gpu.has_actor and self.gpu.engine_tags == {"weights"}, "a sync needs the weights of both sides"
        self.at("sync")

    def close(self) -> None: ...


@pytest.fixture
def world() -> World:
    return World()


def colocated(world: World) -> RolloutService:
    world.offload()  # as a stage does before engines start
    service = RolloutService(
        RolloutConfig(colocate=True), actor=world, weight_sync=world, pool=world, timer=StepTimer()
    )  # fmt: skip
    assert world.gpu.has_actor and not world.gpu.engine_tags
    world.gpu.log.clear()
    return service


def generate(service: RolloutService) -> list[tuple[int, ...]]:
    return [c.key for c in service.generate(REQUESTS, description="test", file=Path("unused"))]


def test_engines_have_the_gpu_only_while_they_generate(world):
    service = colocated(world)
    assert generate(service) == [(0,), (1,)]
    assert world.gpu.log == ["onload", "wake weights", "sync", "wake kv_cache", "generate", "onload"]
    assert world.gpu.has_actor and not world.gpu.engine_tags


def test_engines_get_the_weights_again_after_every_sleep_but_the_version_counts_updates(world):
    service = colocated(world)
    for expected in (1, 1):
        generate(service)
        assert service.version == expected
    assert world.gpu.log.count("sync") == 2
    service.weights_changed()
    generate(service)
    assert service.version == 2


def lose_engine() -> None:
    raise EngineLost([0], "killed")


@pytest.mark.parametrize("moment", ["wake weights", "sync", "wake kv_cache"])
def test_a_lost_engine_is_restarted_while_the_actor_is_offloaded(world, moment):
    service = colocated(world)
    world.fail[moment] = lose_engine
    assert generate(service) == [(0,), (1,)]
    assert world.gpu.log.count("restart") == 1 and world.gpu.has_actor and not world.gpu.engine_tags


def test_the_actor_has_its_memory_again_after_an_error(world):
    service = colocated(world)

    def fail() -> None:
        raise Fault("the disk is full")

    world.fail["generate"] = fail
    with pytest.raises(Fault, match="disk"):
        generate(service)
    assert world.gpu.has_actor and not world.gpu.engine_tags


def test_recorded_completions_are_replayed_without_engines(tmp_path, world):
    service = RolloutService(
        RolloutConfig(record=str(tmp_path)), actor=world, weight_sync=world, pool=world, timer=StepTimer()
    )
    world.gpu.has_state, world.gpu.engine_tags = False, {"weights"}
    recorded = service.generate(REQUESTS, description="test", file=Path("rl/000001_00_rl.npz"))
    replay = RolloutService(
        RolloutConfig(replay=str(tmp_path)), actor=world, weight_sync=None, pool=None, timer=StepTimer()
    )
    replayed = replay.generate(REQUESTS, description="test", file=Path("rl/000001_00_rl.npz"))
    assert [(c.key, c.tokens.tolist(), c.finish_reason) for c in replayed] == [
        (c.key, c.tokens.tolist(), c.finish_reason) for c in recorded
    ]
    with pytest.raises(Fault, match="recorded for 2 requests, this run makes 1; the first difference is request 1"):
        replay.generate(REQUESTS[:1], description="test", file=Path("rl/000001_00_rl.npz"))
    with pytest.raises(Fault, match="does not exist"):
        replay.generate(REQUESTS, description="test", file=Path("rl/000002_00_rl.npz"))

"""Settings that a resumed stage may change, and those that it may not."""

import json

import pytest

from megatron_entropy.config.changes import MAY_CHANGE, Change, find_changes
from megatron_entropy.config.schema import Config
from megatron_entropy.config.types import Section
from megatron_entropy.methods import METHOD_CONFIGS


def config(**changes):
    return Config.model_validate({"steps": 3, "method": METHOD_CONFIGS["grpo"](), **changes})


def stored(config):
    return json.loads(json.dumps(config.model_dump(mode="json")))


def test_equal_settings_do_not_differ():
    both = config(actor={"optimizer": {"lr": 0.1}}, data={"train": ["a"], "chat_options": {"enable_thinking": False}})
    assert find_changes(both, stored(both)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 7}, Change("seed", 1, 7)),
        ({"actor": {"optimizer": {"betas": (0.9, 0.95)}}}, Change("actor.optimizer.betas", [0.9, 0.999], [0.9, 0.95])),
        ({"data": {"chat_options": {"a": 1}}}, Change("data.chat_options", {}, {"a": 1})),
        ({"data": {"train": ["b"]}}, Change("data.train", [], ["b"])),
        ({"method": METHOD_CONFIGS["grpo"](clip_low=0.1)}, Change("method.clip_low", 0.2, 0.1)),
        ({"method": METHOD_CONFIGS["sft"]()}, Change("method.name", "grpo", "sft")),
    ],
)
def test_a_change_of_numbers_is_found(changes, expected):
    first = find_changes(config(**changes), stored(config()))[0]
    assert first == expected and not first.is_free


def test_what_does_not_change_numbers_is_free():
    other = config(
        steps=9, output="x", actor={"parallel": {"dp": 2}}, rollout={"num_engines": 2}, checkpoint={"keep": 9}
    )
    changes = find_changes(other, stored(config()))
    assert [change.key for change in changes] == [
        "output", "steps", "actor.parallel.dp", "rollout.num_engines", "checkpoint.keep",
    ]  # fmt: skip
    assert all(change.is_free for change in changes)


def test_keys_of_another_version_are_not_compared():
    old = stored(config()) | {"gone": 1}
    del old["seed"]
    assert find_changes(config(seed=5), old) == [] == find_changes(config(), {})


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_every_free_key_exists(key):
    section = config()
    for part in key.split("."):
        assert isinstance(section, Section)
        section = getattr(section, part)

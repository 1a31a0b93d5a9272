"""A method, a verifier and a schema from a folder outside the repository, without a change in it.

The samples in tests/outside are those of the documentation. The whole `train` run is in tests/engines.
"""

import dataclasses
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from entropy_kernels import TokenStats
from megatron_entropy.config import load
from megatron_entropy.data.packing import pack
from megatron_entropy.data.schemas import read_rows
from megatron_entropy.errors import ConfigError
from megatron_entropy.methods import build_method, load_method_config
from megatron_entropy.records import Group, Prompt, Sample, refill, samples_of
from megatron_entropy.rewards.registry import load_verifier

SAMPLES = Path(__file__).parents[1] / "outside"
MODULES = ("my_method", "my_schema", "my_verifier")
NAME = "my_method:MyConfig"


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The samples in a folder of their own, on the Python path."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(SAMPLES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(folder)
    yield folder
    for module in MODULES:
        sys.modules.pop(module, None)


def load_config(folder: Path, *overrides: str):
    """The configuration of one stage with the method from outside."""
    file = folder / "my.toml"
    file.write_text(f'steps = 1\n[method]\nname = "{NAME}"\ncap = 4.0\n[batch]\nprompts = 1\nsamples = 2\n')
    (config,) = load.load(file, overrides, load_method_config)
    return config


class Rollouts:
    """One correct and one wrong response for each prompt."""

    def __init__(self, prompts: list[Prompt], grade) -> None:
        self.prompts, self.grade = prompts, grade

    def take_prompts(self, count: int) -> list[Prompt]:
        return self.prompts[:count]

    def sample(self, prompts, num_samples: int) -> list[Group]:
        texts = ("It is 12", "It is 13")
        tokens = np.array([1, 2, 5, 6, 7], np.int32)
        return [
            Group(
                prompt, tuple(Sample(tokens, 2, "stop", text, grade=self.grade(text, prompt.answer)) for text in texts)
            )
            for prompt in prompts
        ]


def test_a_step_of_a_method_from_outside(outside):
    data = outside / "train.jsonl"
    data.write_text(json.dumps({"problem": "3 * 4?", "result": 12, "working": "It is 12"}) + "\n")
    (row,) = read_rows(data, schema="my_schema:SCHEMA")
    assert (row.messages[0].content, row.answer, row.target) == ("3 * 4?", "12", "It is 12")
    method = build_method(load_config(outside))
    prompts = method.select([Prompt(0, row.messages[0].content, (1, 2), row.answer)])
    groups = method.generate(Rollouts(prompts, load_verifier("my_verifier:grade")))  # type: ignore[arg-type]
    assert [s.grade.correct for s in samples_of(groups)] == [True, False]
    scored = [
        dataclasses.replace(s, logprob=s.constant(-1), entropy=np.array([0, 0, 0.1, 0.2, 9], np.float32))
        for s in samples_of(groups)
    ]
    samples = samples_of(method.compute_advantages(method.reward(refill(groups, scored))))
    size = np.sqrt(0.5)  # of GRPO's advantages; the bonus is at most a quarter of it
    np.testing.assert_allclose(samples[0].response("advantage"), size + np.array([0.04, 0.08, size / 4]), atol=1e-5)
    np.testing.assert_allclose(samples[1].response("advantage"), -size + np.array([0.04, 0.08, size / 4]), atol=1e-5)
    batch = pack(samples, [0, 1], device=torch.device("cpu"))
    stats = TokenStats(logprob=batch.logprob.clone().requires_grad_(), entropy=batch.entropy)
    loss, metrics = method.loss(stats, batch)
    (batch.weight * loss).sum().backward()
    np.testing.assert_allclose(stats.logprob.grad, -batch.weight * batch.advantage, atol=1e-6)
    assert "policy/entropy" in metrics and method.pop_metrics()["policy/entropy_bonus"].count == 6


def test_the_resolved_configuration_keeps_the_name(outside):
    config = load_config(outside)
    assert config.method.name == NAME
    file = outside / "config.toml"
    load.write([config], file)
    assert load.load(file, [], load_method_config) == [config]


def test_misspelled_and_missing_settings_are_found(outside):
    with pytest.raises(ConfigError, match=r"method\.scal: unknown key; did you mean method\.scale\?"):
        load_config(outside, "--method.scal=1")
    with pytest.raises(ConfigError, match=r"method\.cap: input should be greater than 1"):
        load_config(outside, "--method.cap=1.0")


@pytest.mark.parametrize(
    "name,message",
    [
        ("grpp", "unknown name 'grpp'; use one of grpo, dapo"),
        ("no_such_module:MyConfig", "'no_such_module:MyConfig' cannot be imported .*no_such_module"),
        ("my_method:Missing", "'my_method:Missing' cannot be imported .*Missing"),
        ("my_method:MyMethod", "'my_method:MyMethod' must be a subclass of MethodSettings .*found 'MyMethod'"),
        ("my_method:np", "must be a subclass of MethodSettings"),
        ("megatron_entropy.methods.base:MethodSettings", "with a class variable `method`"),
    ],
)
def test_a_wrong_name_is_one_line(outside, name, message):
    with pytest.raises(ConfigError, match=f"^method.name: .*{message}") as raised:
        load_method_config(name)
    assert "\n" not in str(raised.value)


def test_an_entry_point_gives_a_short_name(outside, monkeypatch):
    point = importlib.metadata.EntryPoint("mine", NAME, "megatron_entropy.methods")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point] if group == "megatron_entropy.methods" else []
    )
    assert load_method_config("mine").__name__ == "MyConfig"
    with pytest.raises(ConfigError, match="use one of grpo, .*, mine, or package"):
        load_method_config("other")

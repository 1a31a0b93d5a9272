"""Training methods, one short file each. To add one: its file, and its line here."""

from __future__ import annotations

from megatron_entropy.config import Config
from megatron_entropy.methods.base import Method, Registered
from megatron_entropy.methods.dapo import DapoConfig
from megatron_entropy.methods.grpo import GrpoConfig
from megatron_entropy.methods.sft import SftConfig

METHOD_CONFIGS: dict[str, type[Registered]] = {
    "grpo": GrpoConfig,
    "dapo": DapoConfig,
    "sft": SftConfig,
}
"""Configuration class of every method, by the name it has in a configuration file."""


def build_method(stage: Config) -> Method:
    """The method a stage asks for."""
    assert isinstance(stage.method, Registered)
    return stage.method.method(stage)

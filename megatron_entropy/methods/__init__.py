"""Training methods, one short file each. To add one: its file, and its line here."""

from __future__ import annotations

from megatron_entropy.config.schema import Config
from megatron_entropy.methods.base import Method, Registered
from megatron_entropy.methods.cer import CerConfig
from megatron_entropy.methods.cov import ClipCovConfig, KlCovConfig
from megatron_entropy.methods.cure import CureConfig
from megatron_entropy.methods.curiosft import CurioRlConfig, CurioSftConfig
from megatron_entropy.methods.dapo import DapoConfig
from megatron_entropy.methods.grpo import GrpoConfig
from megatron_entropy.methods.sent import SentConfig
from megatron_entropy.methods.sft import SftConfig

METHOD_CONFIGS: dict[str, type[Registered]] = {
    "grpo": GrpoConfig,
    "dapo": DapoConfig,
    "cure": CureConfig,
    "cer": CerConfig,
    "sent": SentConfig,
    "clip_cov": ClipCovConfig,
    "kl_cov": KlCovConfig,
    "sft": SftConfig,
    "curiosft": CurioSftConfig,
    "curio_rl": CurioRlConfig,
}
"""Configuration class of every method, by the name it has in a configuration file."""


def build_method(config: Config) -> Method:
    """The method a stage asks for."""
    assert isinstance(config.method, Registered)
    return config.method.method(config)

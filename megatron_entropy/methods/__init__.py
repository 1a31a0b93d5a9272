"""Training methods, one short file each. A new method needs its file and a line in `METHOD_CONFIGS`.

A method outside this package needs neither: `method.name = "package.module:ConfigClass"`, or an entry point of the
group `megatron_entropy.methods`.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from megatron_entropy.config.schema import Config
from megatron_entropy.errors import ConfigError
from megatron_entropy.methods.base import Method, MethodSettings
from megatron_entropy.methods.cer import CerConfig
from megatron_entropy.methods.cov import ClipCovConfig, KlCovConfig
from megatron_entropy.methods.cure import CureConfig
from megatron_entropy.methods.curiosft import CurioRlConfig, CurioSftConfig
from megatron_entropy.methods.dapo import DapoConfig
from megatron_entropy.methods.grpo import GrpoConfig
from megatron_entropy.methods.sent import SentConfig
from megatron_entropy.methods.sft import SftConfig
from megatron_entropy.monitor.history import StageHistory
from megatron_entropy.plugins import load_plugin

log = logging.getLogger(__name__)

METHOD_CONFIGS: dict[str, type[MethodSettings]] = {
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
"""Settings class of every built-in method, by its name in a configuration file."""


WITHOUT_COPY = {"kl_coefficient": 0, "penalty_to": "old", "teacher": "policy"}
"""Settings of methods whose reference is no copy of the weights."""


def load_method_config(name: str) -> type[MethodSettings]:
    """Find the settings class of a method by a value of `method.name`.

    Args:
        name: a name of `METHOD_CONFIGS`, an entry point of `megatron_entropy.methods`, or `package.module:ConfigClass`.
    Raises:
        ConfigError: an unknown name (the known ones are listed), an import that fails, or not a settings class.
    """
    found = load_plugin(name, METHOD_CONFIGS, key="method.name", group="megatron_entropy.methods")
    if not (isinstance(found, type) and issubclass(found, MethodSettings) and hasattr(found, "method")):
        raise ConfigError(
            f"method.name: {name!r} must be a subclass of MethodSettings with a class variable `method`, "
            f"found {getattr(found, '__name__', found)!r}"
        )
    return found


def build_method(config: Config) -> Method[Any]:
    """Build the method of a stage.

    Raises:
        ConfigError: a setting without effect, or settings that do not fit each other or the stage.
    """
    assert isinstance(config.method, MethodSettings), f"load_method_config returns no {type(config.method).__name__}"
    method = config.method.method(config)
    if config.actor.fp8.parameters and method.reference in ("initial", "ema"):
        settings = method.settings
        keys = [f"method.{k}={json.dumps(v)}" for k, v in WITHOUT_COPY.items() if getattr(settings, k, v) != v]
        raise ConfigError(
            f"actor.fp8.parameters=true: the reference of method.name={config.method.name} is a copy of the weights, "
            f"which cannot replace weights stored in FP8; set {' and '.join(keys) or 'another method'}, or leave "
            "parameters out"
        )
    return method


def explain_stage(history: StageHistory) -> list[str]:
    """Let the method of a stage say what it did (`Method.explain`); a method that fails to is reported in the log."""
    if not history.method:
        return []
    try:
        return load_method_config(str(history.method.get("name"))).method.explain(history)
    except Exception as error:  # code of others and files of other versions; a report must not end a run
        log.warning("stage %s is not explained: %s: %s", history.name, type(error).__name__, error)
        return []

"""Methods, verifiers and schemas from outside the repository."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping

from megatron_entropy.errors import ConfigError


def load_plugin(name: str, known: Mapping[str, object], *, key: str, group: str) -> object:
    """Find an object by the name that a configuration key gives.

    Args:
        name: a name of `known`, an installed entry point, or `package.module:NAME`. The package is searched for on
            sys.path (PYTHONPATH).
        known: the built-in objects. They win over entry points of the same name.
        key: the configuration key, for messages.
        group: the group of entry points, such as `megatron_entropy.verifiers`.

    Raises:
        ConfigError: an unknown name (the known ones are listed), or an object that cannot be imported.
    """
    if name in known:
        return known[name]
    installed = {point.name: point for point in importlib.metadata.entry_points(group=group)}
    module, colon, attribute = name.partition(":")
    if name not in installed and not colon:
        names = ", ".join([*known, *sorted(installed)])
        raise ConfigError(f"{key}: unknown name {name!r}; use one of {names}, or package.module:NAME")
    try:
        return installed[name].load() if name in installed else getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # an import runs the module
        raise ConfigError(f"{key}: {name!r} cannot be imported ({error}); is its folder on PYTHONPATH?") from error

"""Errors a user can act on: one base, one child per area.

A user's mistake raises a `UserError`: one line that names the key or file to change, the value found and what is
allowed. The command line prints the line and exits with code 2. A fault of the run (a NaN loss, a lost engine) raises
a `Fault` and exits with code 1. Our own mistakes are asserts. A new area needs one class here.
"""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """Something the user can fix; the message says what to change. Exit code 2."""


class ConfigError(UserError):
    """A configuration key, its value, or a combination of values."""


class ModelError(UserError):
    """A model folder: missing, corrupt, of an unknown architecture, or not matching its tensors."""


class DataError(UserError):
    """A data file: missing, empty, or lacking a column."""


class TokenizerError(UserError):
    """A tokenizer that is missing or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, or of another model."""


class MissingPackageError(UserError):
    """An optional package that a setting needs is not installed."""


class Fault(RuntimeError):
    """The run failed, but not because of its configuration. Exit code 1."""


class NonFiniteLossError(Fault):
    """NaN or infinity in a loss or gradient; raised before the optimizer step."""


class EngineFault(Fault):
    """A rollout engine could not start, or engines failed more often than `rollout.max_restarts` allows."""


class TransportError(Fault):
    """A transfer of weights broke: a peer died or did not answer in time."""


class ChecksumError(Fault):
    """A tensor arrived with other bytes than the sender sent; the message names it."""


class EngineDied(Fault):
    """The core of a rollout engine is dead, and the engine with it; the message is the cause."""


class EngineLost(Fault):
    """Rollout engines died or hung; `indices` names those to restart."""

    def __init__(self, indices: Sequence[int], reason: str) -> None:
        super().__init__(f"lost rollout engine {', '.join(map(str, indices))}: {reason}")
        self.indices = tuple(indices)
        self.reason = reason

    def __reduce__(self) -> tuple[type[EngineLost], tuple[tuple[int, ...], str]]:
        return type(self), (self.indices, self.reason)

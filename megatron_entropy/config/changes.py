"""Compare a stage's settings with those that it was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from megatron_entropy.config.schema import Config
from megatron_entropy.config.types import Section

MAY_CHANGE = (
    "output",
    "steps",
    "checkpoint",
    "cluster",
    "log",
    "eval",
    "data.eval",
    "actor.parallel",
    "actor.max_tokens_per_microbatch",
    "actor.recompute",
    "actor.performance",
    "actor.reference_on_host",
    "reward.workers",
    "reward.timeout",
    "reward.budget",
    "reward.url",
    "rollout.num_engines",
    "rollout.tensor_parallel",
    "rollout.nodes",
    "rollout.max_num_seqs",
    "rollout.kv_cache_gib",
    "rollout.gpu_memory_utilization",
    "rollout.colocate",
    "rollout.weight_transfer",
    "rollout.verify_weights",
    "rollout.max_restarts",
    "rollout.entropy_check_every",
    "rollout.top_alternatives",
    "rollout.record",
    "rollout.replay",
)
"""Keys and tables that a resumed stage may change: they say how long, where and how fast it trains, not what."""


class Change(NamedTuple):
    """A key with another value than before."""

    key: str
    old: Any
    new: Any

    @property
    def is_free(self) -> bool:
        """Whether a stage may be resumed with it."""
        return any(self.key == key or self.key.startswith(f"{key}.") for key in MAY_CHANGE)


def find_changes(config: Config, trained: Mapping[str, Any]) -> list[Change]:
    """List the keys that differ from a dump of earlier settings, in the order of the schema.

    A key that only one of them has belongs to another version or has no effect there, and is not compared.
    """
    return [
        Change(key, old, new)
        for key, new in _leaves(config, config.model_dump(mode="json"))
        if (old := _look_up(trained, key)) is not _MISSING and old != new
    ]


_MISSING = object()


def _leaves(section: Section, dump: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in dump.items():
        inner = getattr(section, key)
        if isinstance(inner, Section):
            yield from _leaves(inner, value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _look_up(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return _MISSING
        tree = tree[part]
    return tree

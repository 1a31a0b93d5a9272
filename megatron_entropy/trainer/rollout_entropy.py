"""Entropies that the engines recorded while sampling (`rollout.entropy`): used as the policy's, and compared with it.

Engine and actor have the same weights when both compute a token's entropy. What differs is their arithmetic: the order
of sums in float32, and above all the rounding to bfloat16. `differences` measures it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import Config
from megatron_entropy.distributed.dtypes import resolve_name
from megatron_entropy.records import Group, Metric, Sample

log = logging.getLogger(__name__)


def take_rollout_entropy(groups: Sequence[Group], temperature: float) -> list[Group]:
    """Fill a missing `entropy` with the engine's, where it was recorded at `temperature`."""

    def take(sample: Sample) -> Sample:
        if sample.entropy is not None or sample.rollout_temperature != temperature:
            return sample
        return dataclasses.replace(sample, entropy=sample.rollout_entropy)

    return [group.with_samples(map(take, group.samples)) for group in groups]


def keep_entropy(samples: Sequence[Sample], scored: Sequence[Sample]) -> list[Sample]:
    """Return the scored samples with the entropies that they had before they were scored."""
    return [
        new if old.entropy is None else dataclasses.replace(new, entropy=old.entropy)
        for old, new in zip(samples, scored, strict=True)
    ]


def differences(scored: Sequence[Sample], temperature: float) -> dict[str, Metric]:
    """Compare the engine's entropies and log-probs with the actor's, over all response tokens.

    Args:
        scored: with `entropy` and `logprob` by the actor, at `temperature`.
    Returns:
        Mean absolute and largest difference of each (nats); nothing for samples that the engine has not measured.
    """
    measured = [s for s in scored if s.rollout_temperature == temperature and s.response_length]
    if not measured:
        return {}
    entropy = _gaps(measured, "rollout_entropy", "entropy")
    logprob = _gaps(measured, "rollout_uncut_logprob", "logprob")
    return {
        "rollout/entropy_diff": Metric(float(entropy.sum(dtype=np.float64)), len(entropy)),
        "rollout/entropy_diff_max": Metric(float(entropy.max())),
        "rollout/logprob_diff": Metric(float(logprob.sum(dtype=np.float64)), len(logprob)),
        "rollout/logprob_diff_max": Metric(float(logprob.max())),
    }


def _gaps(samples: Sequence[Sample], engine: str, actor: str) -> np.ndarray:
    return np.concatenate([np.abs(s.response(engine) - s.response(actor)) for s in samples])


def log_differences(config: Config, arch: ModelArchitecture, step: int, metrics: dict[str, Metric]) -> None:
    """Log a comparison with the number types of both sides."""
    engine, actor = (resolve_name(dtype, arch) for dtype in (config.rollout.dtype, config.actor.dtype))
    log.info(
        "step %d: engine (%s) against trainer (%s) over %d tokens: entropy differs by %.1e nats on average and %.1e at "
        "most, log-prob by %.1e and %.1e",
        step,
        engine,
        actor,
        metrics["rollout/entropy_diff"].count,
        metrics["rollout/entropy_diff"].value,
        metrics["rollout/entropy_diff_max"].value,
        metrics["rollout/logprob_diff"].value,
        metrics["rollout/logprob_diff_max"].value,
    )

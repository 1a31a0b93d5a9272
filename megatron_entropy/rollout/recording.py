"""Completions in files: training without engines, on the responses of another run.

Use it to debug an update, to compare layouts or methods on the same responses, or to profile: `rollout.record=FOLDER`
in one run, `rollout.replay=FOLDER` in another. One file per call, `<stage>/<step>_<call>_<purpose>.npz`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_entropy.errors import ConfigError, Fault
from megatron_entropy.rollout.engine import Completion, Request

_FINISH_REASONS = ("stop", "length")
_ENTROPY_FIELDS = ("entropy", "uncut_logprobs")


def write(file: Path, requests: Sequence[Request], completions: Sequence[Completion]) -> None:
    """Write the completions of one call.

    Raises:
        ConfigError: the folder is not writable.
    """
    by_key = {completion.key: completion for completion in completions}
    ordered = [by_key[request.key] for request in requests]
    entropies: dict[str, Any] = {}
    if all(completion.entropy is not None for completion in ordered):
        entropies = {name: _concatenate([getattr(c, name) for c in ordered], np.float32) for name in _ENTROPY_FIELDS}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            file,
            requests=np.array([_digest(request) for request in requests], np.uint32),
            lengths=np.array([len(completion.tokens) for completion in ordered], np.int64),
            finish_reasons=np.array([_FINISH_REASONS.index(c.finish_reason) for c in ordered], np.int8),
            tokens=_concatenate([c.tokens for c in ordered], np.int32),
            logprobs=_concatenate([c.logprobs for c in ordered], np.float32),
            **entropies,
        )
    except OSError as error:
        raise ConfigError(f"rollout.record: {file} cannot be written: {error.strerror}") from None


def read(file: Path, requests: Sequence[Request], *, needs_entropy: bool = False) -> list[Completion]:
    """Read the completions of one call, in the order of its requests.

    Raises:
        Fault: the file does not exist, was recorded for other requests, or lacks the needed entropies.
    """
    if not file.is_file():
        raise Fault(f"rollout.replay: {file} does not exist; the recorded run was shorter or had other settings")
    with np.load(file) as stored:
        content = {name: stored[name] for name in stored.files}
    digests, recorded = [_digest(request) for request in requests], content["requests"].tolist()
    if digests != recorded:
        pairs = zip(digests, recorded, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(digests), len(recorded)))
        raise Fault(
            f"rollout.replay: {file} was recorded for {len(recorded)} requests, this run makes {len(digests)}; the "
            f"first difference is request {first}; data, seed, batch, lengths and method must be those of the recorded "
            "run"
        )
    ends = np.cumsum(content["lengths"])[:-1]
    if needs_entropy and "entropy" not in content:
        raise Fault(
            f"rollout.replay: {file} was recorded without entropies; set rollout.entropy=false, or record again with it"
        )
    names = ["tokens", "logprobs", *(name for name in _ENTROPY_FIELDS if name in content)]
    columns = [np.split(content[name], ends) for name in names]
    return [
        Completion(request.key, finish_reason=_FINISH_REASONS[reason], **dict(zip(names, values, strict=True)))  # type: ignore[arg-type]
        for request, reason, *values in zip(requests, content["finish_reasons"].tolist(), *columns, strict=True)
    ]


def _concatenate(responses: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *responses])


def _digest(request: Request) -> int:
    return zlib.crc32(np.array([request.max_tokens, *request.tokens], np.int64).tobytes())

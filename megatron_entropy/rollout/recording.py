"""What engines answered, written to files and taken from them: training without engines, on equal rollouts.

To look into an update, to compare layouts or methods on the same responses, to profile: `rollout.record=FOLDER` in one
run, `rollout.replay=FOLDER` in another. One file per call, `<stage>/<step>_<call>_<purpose>.npz`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_entropy.errors import ConfigError, Fault
from megatron_entropy.rollout.engine import Completion, Request

_FINISHES = ("stop", "length")


def write(file: Path, requests: Sequence[Request], completions: Sequence[Completion]) -> None:
    """Write the answers to one call.

    Raises:
        ConfigError: the folder takes no files.
    """
    order = {completion.key: completion for completion in completions}
    answers = [order[request.key] for request in requests]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            file,
            given=np.array([_digest(request) for request in requests], np.uint32),
            lengths=np.array([len(answer.tokens) for answer in answers], np.int64),
            finishes=np.array([_FINISHES.index(answer.finish_reason) for answer in answers], np.int8),
            tokens=np.concatenate([np.zeros(0, np.int32), *(answer.tokens for answer in answers)]),
            logprobs=np.concatenate([np.zeros(0, np.float32), *(answer.logprobs for answer in answers)]),
        )
    except OSError as error:
        raise ConfigError(f"rollout.record: {file} cannot be written: {error.strerror}") from None


def read(file: Path, requests: Sequence[Request]) -> list[Completion]:
    """The answers to one call, in the order of its requests.

    Raises:
        Fault: there is no such file, or its requests were others.
    """
    if not file.is_file():
        raise Fault(f"rollout.replay: {file} is not there; the recorded run did not get so far or has other settings")
    with np.load(file) as stored:
        content = {name: stored[name] for name in stored.files}
    given = [_digest(request) for request in requests]
    if given != content["given"].tolist():
        pairs = zip(given, content["given"].tolist(), strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(given), len(content["given"])))
        raise Fault(
            f"rollout.replay: {file} answers {len(content['given'])} requests, here are {len(given)}; the first that "
            f"differs is number {place}; data, seed, batch, lengths and method must be those of the recorded run"
        )
    ends = np.cumsum(content["lengths"])[:-1]
    parts = zip(np.split(content["tokens"], ends), np.split(content["logprobs"], ends), strict=True)
    return [
        Completion(request.key, tokens, logprobs, _FINISHES[finish])  # type: ignore[arg-type]
        for request, finish, (tokens, logprobs) in zip(requests, content["finishes"].tolist(), parts, strict=True)
    ]


def _digest(request: Request) -> int:
    return zlib.crc32(np.array([request.max_tokens, *request.tokens], np.int64).tobytes())

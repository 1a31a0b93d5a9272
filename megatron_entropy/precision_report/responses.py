"""The batch of a report: responses sampled by the model itself, or read from a rollout dump."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import Config
from megatron_entropy.data.tokenizer import Tokenizer
from megatron_entropy.distributed.seeds import derive_seed
from megatron_entropy.errors import DataError
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.records import Grade, Group, Prompt, Sample
from megatron_entropy.rewards import open_grader
from megatron_entropy.rollout.engine import Request
from megatron_entropy.trainer.rollouts import build_groups, grade_groups
from megatron_entropy.trainer.standalone import open_service


class _Line(BaseModel):
    """The keys of a line of a rollout dump (`monitor.rollout_dumps`) that a report reads."""

    prompt: int
    question: str
    answer: str | None = None
    response: str
    tokens: list[int]
    prompt_length: int
    finish_reason: str
    correct: bool | None = None


def sample_responses(
    config: Config, prompts: Sequence[Prompt], arch: ModelArchitecture, tokenizer: Tokenizer
) -> list[Group]:
    """Sample `batch.samples` graded responses to every prompt with engines that have the model folder's weights."""
    rollout = config.rollout
    requests = [
        Request(
            key=(prompt.index, number),
            tokens=prompt.tokens,
            seed=derive_seed(config.seed, "fp8_report", prompt.index, number),
            max_tokens=rollout.max_response_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
        )
        for prompt in prompts
        for number in range(config.batch.samples)
    ]
    with open_service(config, arch, tokenizer) as service:
        completions = service.generate(requests, description="responses", file=Path())
    groups = build_groups(prompts, config.batch.samples, completions, tokenizer=tokenizer, policy_version=0)
    with closing(open_grader(config.reward)) as grader:
        return grade_groups(groups, grader=grader, tokenizer=tokenizer)


def read_responses(path: Path, arch: ModelArchitecture, *, limit: int | None = None) -> list[Group]:
    """Read responses from a rollout dump, or from the last training dump of a run folder.

    Args:
        path: a file `step_000007.jsonl`, or the folder of a run.
        arch: of the model that the responses are scored with.
        limit: number of responses, from the first one on; None: all.
    Returns:
        A group for each response; responses without a token are left out.
    Raises:
        DataError: no dump, a line that is not one of a dump, tokens beyond the vocabulary, or no response.
    """
    dump = _last_dump(path) if path.is_dir() else path
    try:
        lines = dump.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{dump}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    groups = []
    for number, text in enumerate(lines[:limit], start=1):
        try:
            line = _Line.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "line"
            raise DataError(f"{dump}:{number}: no line of a rollout dump: {where}: {first['msg']}") from None
        if max(line.tokens, default=0) >= arch.vocab_size or min(line.tokens, default=0) < 0:
            raise DataError(f"{dump}:{number}: a token is not in the model's vocabulary of {arch.vocab_size}; name the "
                            "model that these responses were sampled from")  # fmt: skip
        if 0 < line.prompt_length < len(line.tokens) <= arch.max_positions:
            groups.append(_group(line))
    if not groups:
        raise DataError(f"{dump}: holds no response of at most {arch.max_positions} tokens")
    return groups


def _group(line: _Line) -> Group:
    prompt = Prompt(line.prompt, line.question, tuple(line.tokens[: line.prompt_length]), line.answer)
    tokens = np.array(line.tokens, np.int32)
    sample = Sample(tokens, line.prompt_length, line.finish_reason, line.response, grade=Grade(line.correct))
    return Group(prompt, (sample,))


def _last_dump(folder: Path) -> Path:
    dumps = sorted((RunFolder(folder).root / "rollouts").glob("*/step_*.jsonl"), key=lambda dump: dump.stat().st_mtime)
    if not dumps:
        raise DataError(f"{folder}: no rollouts/STAGE/step_N.jsonl here; name the folder of a run, or a dump's file")
    return dumps[-1]

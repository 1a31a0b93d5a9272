"""The folder of an evaluation, and `eval.json` in it: what decides its samples, so that nothing else is added to them.

```
eval.json                 settings, benchmarks, versions, times
gsm8k.jsonl  aime24.jsonl one row a sample (`samples.SampleRow`)
summary.json  report.html the table's numbers, and the page
```
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_entropy.errors import ConfigError, DataError
from megatron_entropy.files import atomic_write_text, read_json

Setting = str | int | float | bool
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 4096
"""Of a weight file, for the fingerprint of a model."""


@dataclass(frozen=True)
class EvalFolder:
    """Paths of an evaluation."""

    root: Path

    @property
    def record(self) -> Path:
        """What was asked for."""
        return self.root / "eval.json"

    @property
    def summary(self) -> Path:
        """The numbers of the table."""
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        """The page with curves and samples."""
        return self.root / "report.html"

    def rows(self, benchmark: str) -> Path:
        """Samples of a benchmark, one JSON object a line."""
        return self.root / f"{benchmark}.jsonl"


@dataclass(frozen=True)
class BenchmarkRecord:
    """What was asked of one benchmark.

    `samples`: of each question. `graders`: the first gives the main score. `questions`: number of those that are
    sampled, the first ones of the source. `digest`: of these questions. `skipped`: reason -> ids of questions that are
    not sampled.
    """

    source: str
    samples: int
    graders: tuple[str, ...]
    questions: int
    digest: str
    skipped: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Number of samples of a complete evaluation."""
        return self.samples * self.questions


@dataclass(frozen=True)
class EvalRecord:
    """`eval.json`.

    `model`: the folder's name. `settings`: everything that decides a sample, by name; it can be compared between
    machines. `engines`: what decides the speed only. `started` and `finished`: times in ISO 8601; `finished` is None
    while samples are missing.
    """

    model: str
    settings: dict[str, Setting]
    benchmarks: dict[str, BenchmarkRecord]
    engines: dict[str, Setting]
    versions: dict[str, str]
    started: str
    finished: str | None = None


_RECORD = TypeAdapter(EvalRecord)


def read_record(folder: EvalFolder) -> EvalRecord:
    """Read `eval.json`.

    Raises:
        DataError: it is missing or not the record of an evaluation.
    """
    if not folder.record.exists():
        raise DataError(f"{folder.root}: no eval.json here; name the folder of an evaluation")
    content = read_json(folder.record, DataError)
    try:
        return _RECORD.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(
            f"{folder.record}: not the record of an evaluation: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None


def write_record(folder: EvalFolder, record: EvalRecord) -> None:
    """Replace `eval.json` in one step."""
    atomic_write_text(folder.record, json.dumps(asdict(record), indent=2) + "\n")


def extend_record(folder: EvalFolder, asked: EvalRecord, digests: Mapping[str, Sequence[str]]) -> EvalRecord:
    """Return the record to continue a folder with: what it holds already, and what is asked for now.

    More samples, more questions and further benchmarks can be added; everything else must be as before.

    Args:
        folder: may be new.
        asked: this evaluation.
        digests: for each benchmark asked for, the digest of its first n questions for n = 0, 1, ...
    Raises:
        ConfigError: a setting differs, which the message names; or fewer samples or questions are asked for.
        DataError: `eval.json` cannot be read.
    """
    if not folder.record.exists():
        return asked
    before = read_record(folder)
    for name in {**before.settings, **asked.settings}:
        _check_equal(folder, name, before.settings.get(name), asked.settings.get(name))
    for name, new in asked.benchmarks.items():
        if (old := before.benchmarks.get(name)) is None:
            continue
        for what in ("samples", "questions"):
            if getattr(new, what) < getattr(old, what):
                raise _differs(folder, f"{name}: {what}", getattr(old, what), getattr(new, what))
        _check_equal(folder, f"{name}: questions", old.digest, digests[name][old.questions])
    benchmarks = {**before.benchmarks, **asked.benchmarks}
    return replace(asked, benchmarks=benchmarks, started=before.started, finished=before.finished)


def _check_equal(folder: EvalFolder, name: str, old: Setting | None, new: Setting | None) -> None:
    if old != new:
        raise _differs(folder, name, old, new)


def _differs(folder: EvalFolder, name: str, old: Setting | None, new: Setting | None) -> ConfigError:
    return ConfigError(
        f"{folder.root}: holds an evaluation with {name} = {old}, this one has {new}; repeat the earlier command to go "
        "on with it, or choose another folder with --out"
    )


def digest_prefixes(texts: Sequence[str]) -> list[str]:
    """Compute digests of the first 0, 1, ... len(texts) texts."""
    state = hashlib.blake2b(digest_size=8)
    digests = [state.hexdigest()]
    for text in texts:
        state.update(f"{len(text)}:".encode() + text.encode("utf-8", "surrogatepass"))
        digests.append(state.copy().hexdigest())
    return digests


def fingerprint_model(folder: Path) -> str:
    """Compute a digest of a model folder that changes with its weights, its configuration or its tokenizer.

    Reads all of the small files, and of each weight file its size and blocks at equal distances: training changes
    every tensor, and a model of 100 GB takes no longer than a small one.
    """
    state = hashlib.blake2b(digest_size=8)
    names = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt")
    for file in sorted(file for name in names for file in folder.glob(name)):
        size = file.stat().st_size
        state.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            if file.suffix != ".safetensors":
                state.update(stream.read())
                continue
            for block in range(SAMPLED_BLOCKS):
                stream.seek(block * size // SAMPLED_BLOCKS)
                state.update(stream.read(BLOCK_BYTES))
    return state.hexdigest()

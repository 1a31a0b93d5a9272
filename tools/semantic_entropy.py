#!/usr/bin/env python3
"""Semantic entropy of every question of a data set, for the curriculum of SENT.

    python tools/semantic_entropy.py MODEL_FOLDER DATA... --out data_with_se.parquet [--samples 8]

A vLLM engine answers each question several times; answers that are equal form a cluster; the entropy of the clusters'
shares, in nats, is written beside the question. The rows of all files come out in their order, untouched but for:

    semantic_entropy     what the curriculum reads, by `--weight`
    semantic_entropy_count, _likelihood, _length_norm     the same, by each of the weights
    semantic_clusters    number of different answers
    semantic_samples     number of answers
    semantic_accuracy    share of them that the verifier calls right

Equal are answers whose extracted texts are (`boxed`, `dapo`, `choice`, `final_marker`, or a verifier of your own that
extracts), and with `math_verify` those that are mathematically equal, compared in processes that are killed when they
hang. Answers that cannot be read are one cluster (`--invalid own`: each its own). A row whose prompt is over the limit
is left without an entropy.

What is done is kept in `OUT.partial`: after Ctrl-C the same command goes on from there. Equal commands give equal
numbers, whatever the number of engines. Exit code 0, 2 for a mistake of the user's, 1 for a fault, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_entropy.cli.main import Parser, exit_code
from megatron_entropy.config.schema import RolloutConfig
from megatron_entropy.distributed.seeds import derive_seed
from megatron_entropy.errors import ConfigError, DataError
from megatron_entropy.methods.semantic_entropy import Weight, semantic_entropy
from megatron_entropy.records import Grade, Prompt
from megatron_entropy.rewards import VERIFIERS, RewardPool, load_verifier
from megatron_entropy.rollout.engine import Completion, EngineSpec, Request

if TYPE_CHECKING:
    import pyarrow
    import torch

    from megatron_entropy.config.architecture import ModelArchitecture
    from megatron_entropy.data.tokenizer import Tokenizer
    from megatron_entropy.weights.buckets import TensorMeta

REQUESTS_AT_A_TIME = 2048
"""Answers between two writes of what is done."""
UNREADABLE = -1
"""The cluster of answers that cannot be read."""
WEIGHTS: tuple[Weight, ...] = ("count", "likelihood", "length_norm")
SETTINGS = (
    "model", "data", "samples", "temperature", "top_p", "max_tokens", "max_prompt_tokens", "columns", "template",
    "tokenizer", "verifier", "dtype", "seed",
)  # fmt: skip
"""What decides the answers; with another value the work of an earlier run is of no use."""


@dataclass(frozen=True)
class Answers:
    """The answers to one question.

    `row`: of the question over all files. `clusters`: which answers are equal; `UNREADABLE` where there is none to
    read. `logprobs`: nats, sums over the tokens. `lengths`: tokens, the end token included. `correct`: None where the
    verifier could not say.
    """

    row: int
    clusters: list[int]
    logprobs: list[float]
    lengths: list[int]
    correct: list[bool | None]

    def columns(self, *, weight: Weight, invalid: str) -> dict[str, Any]:
        """What is written beside the question.

        Args:
            invalid: `shared` or `own` cluster for answers that cannot be read.
        """
        own = itertools.count(UNREADABLE, -1)
        clusters = [next(own) if c == UNREADABLE and invalid == "own" else c for c in self.clusters]
        entropies = {
            name: semantic_entropy(clusters, weight=name, logprobs=self.logprobs, lengths=self.lengths)
            for name in WEIGHTS
        }
        judged = [verdict for verdict in self.correct if verdict is not None]
        return {
            "semantic_entropy": entropies[weight],
            **{f"semantic_entropy_{name}": value for name, value in entropies.items()},
            "semantic_clusters": len(set(clusters)),
            "semantic_samples": len(clusters),
            "semantic_accuracy": sum(judged) / len(judged) if judged else None,
        }


COLUMNS = tuple(Answers(0, [0], [0.0], [1], [None]).columns(weight="count", invalid="shared"))


# Answers and their clusters.


def same_answer(left: str, right: str) -> Grade:
    """Whether two responses give mathematically equal answers; `extracted`: the left one's, None if there is none.

    Runs in the workers of a `RewardPool`, as it may hang.
    """
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limits are off
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    options: dict[str, Any] = {"extraction_config": targets, "parsing_timeout": None, "raise_on_error": True}
    found = parse(left, **options)
    if not found:
        return Grade(False)
    if left == right:
        return Grade(True, str(found[-1]))
    other = parse(right, **options)
    limits: dict[str, Any] = {"timeout_seconds": None, "raise_on_error": True}
    # It takes the first for the ground truth, which for sets and relations makes a difference.
    equal = bool(other) and (verify(found, other, **limits) or verify(other, found, **limits))
    return Grade(bool(equal), str(found[-1]))


if multiprocessing.parent_process() is not None:
    same_answer("$1$", "$2$")  # in a worker: what it imports and caches counts as its start, not as its first answer


def merge(answers: Sequence[str | None], equal: Mapping[tuple[str, str], bool]) -> list[int]:
    """The cluster of every answer: 0, 1, ... in the order in which they first appear, `UNREADABLE` for None.

    Args:
        answers: as texts; the same text is the same answer.
        equal: which texts, the one that appears first in front, say the same. An answer joins the earliest cluster
            whose first text it equals.
    """
    initial_responses: list[str] = []
    cluster_of: dict[str, int] = {}
    for answer in answers:
        if answer is None or answer in cluster_of:
            continue
        concat_response_tokens = next(
            (i for i, first in enumerate(initial_responses) if equal.get((first, answer), False)),
            len(initial_responses),
        )
        if concat_response_tokens == len(initial_responses):
            initial_responses.append(answer)
        cluster_of[answer] = concat_response_tokens
    return [UNREADABLE if answer is None else cluster_of[answer] for answer in answers]


class Judge:
    """Tells which responses to a question are right and which give the same answer.

    Args:
        verifier: a name of `rewards.VERIFIERS`, or `package.module:function`.
        workers: processes, for verifiers that may hang.
        timeout: seconds for one comparison; two answers whose comparison takes longer are different.
    """

    def __init__(self, verifier: str, *, workers: int, timeout: float) -> None:
        self._verifier = RewardPool(verifier=verifier, workers=workers, timeout=timeout)
        self._comparison: RewardPool | None = None
        if verifier == "math_verify":
            sys.path.extend({str(Path(__file__).parent)} - set(sys.path))  # the workers take it over and find this file
            name = f"{Path(__file__).stem}:{same_answer.__name__}"
            self._comparison = RewardPool(verifier=name, workers=workers, timeout=timeout)

    def close(self) -> None:
        """Stop the workers."""
        self._verifier.close()
        if self._comparison is not None:
            self._comparison.close()

    def judge(self, questions: Sequence[tuple[str | None, Sequence[str]]]) -> list[tuple[list[bool | None], list[int]]]:
        """Verdicts and clusters of the responses to each question.

        Args:
            questions: ground truth, if there is one, and responses of each.
        """
        pairs = [(text, truth or "") for truth, texts in questions for text in texts]
        grades = iter(self._verifier.grade(pairs))
        grouped = [[next(grades) for _ in texts] for _, texts in questions]
        verdicts = [
            [None if truth is None else grade.correct for grade in group]
            for (truth, _), group in zip(questions, grouped, strict=True)
        ]
        answers = [[grade.extracted for grade in group] for group in grouped]
        if self._comparison is None:
            clusters = [merge(_readable(group), {}) for group in answers]
        else:
            clusters = self._compare(self._comparison, [texts for _, texts in questions])
        return list(zip(verdicts, clusters, strict=True))

    def _compare(self, comparison: RewardPool, questions: Sequence[Sequence[str]]) -> list[list[int]]:
        """Clusters by mathematical equality, which is asked of each two different answers to a question."""
        grades = iter(comparison.grade([(text, text) for texts in questions for text in texts]))
        answers = [[next(grades).extracted for _ in texts] for texts in questions]
        asked: list[tuple[int, tuple[str, str]]] = []
        responses: list[tuple[str, str]] = []
        for number, (texts, group) in enumerate(zip(questions, answers, strict=True)):
            initial_responses = {answer: text for answer, text in reversed(list(zip(group, texts, strict=True)))}
            different = [answer for answer in dict.fromkeys(group) if answer is not None]
            for left, right in itertools.combinations(different, 2):
                asked.append((number, (left, right)))
                responses.append((initial_responses[left], initial_responses[right]))
        equal: list[dict[tuple[str, str], bool]] = [{} for _ in questions]
        for (number, pair), grade in zip(asked, comparison.grade(responses), strict=True):
            equal[number][pair] = grade.correct is True
        return [merge(group, pairs) for group, pairs in zip(answers, equal, strict=True)]


def _readable(answers: Sequence[str | None]) -> list[str | None]:
    """Without DAPO's word for no answer."""
    from megatron_entropy.rewards.dapo import INVALID

    return [None if answer == INVALID else answer for answer in answers]


# Sampling: engines as in training, their weights pushed from the folder.


class FolderSource:
    """A model folder's tensors as a source of weights, in one process."""

    def __init__(self, folder: str, arch: ModelArchitecture, dtype: torch.dtype) -> None:
        from megatron_entropy.weights import names
        from megatron_entropy.weights.buckets import TensorMeta
        from megatron_entropy.weights.hf_folder import TensorFolder

        self.gather_seconds = 0.0
        self._folder = TensorFolder(folder)
        self._metadata = [
            TensorMeta(name, dtype, size)
            for entry in names.entries(arch)
            for name, size in zip(entry.tensors, entry.shapes, strict=True)
        ]
        for meta in self._metadata:
            self._folder.check(meta.name, meta.shape)
        self._open: tuple[int, torch.Tensor] | None = None

    def metadata(self) -> Sequence[TensorMeta]:
        """Name, type and full shape of every tensor."""
        return self._metadata

    def read(self, number: int, first: int, count: int, out: torch.Tensor | None, *, in_place: bool) -> None:
        """Write rows [first, first + count) of tensor `number` into `out`."""
        assert out is not None, "there is one rank"
        if self._open is None or self._open[0] != number:
            meta = self._metadata[number]
            self._open = number, self._folder.read(meta.name, meta.shape)
        out.copy_(self._open[1][first : first + count])


class Engines:
    """The engines with the folder's weights; those that die are replaced."""

    def __init__(self, chosen: argparse.Namespace, arch: ModelArchitecture, tokenizer: Tokenizer) -> None:
        import torch

        from megatron_entropy.rollout.pool import EnginePool
        from megatron_entropy.weights.sync import WeightSync

        on_gpu = torch.cuda.is_available()
        dtype = ("bfloat16" if on_gpu else "float32") if chosen.dtype == "auto" else chosen.dtype
        source = FolderSource(chosen.model, arch, getattr(torch, dtype))
        os.environ.setdefault("LOCAL_WORLD_SIZE", "0")  # no GPU is kept for a trainer
        config = RolloutConfig(
            num_engines=chosen.engines,
            tensor_parallel=chosen.tensor_parallel,
            gpu_memory_utilization=0.9,
            weight_transfer="gloo",
        )
        spec = EngineSpec(
            model_folder=chosen.model,
            max_model_len=chosen.max_prompt_tokens + chosen.max_tokens,
            eos_ids=tokenizer.eos_ids,
            dtype=dtype,
            device="cuda" if on_gpu else "cpu",
        )
        self._pool = EnginePool(config, spec)
        self._push = WeightSync(source, address=self._pool.address)
        try:
            self._sync_weights()
        except BaseException:
            self.close()
            raise

    def answer(self, requests: Sequence[Request], description: str) -> dict[tuple[int, ...], Completion]:
        """Every request's completion by its key."""
        answered: dict[tuple[int, ...], Completion] = {}
        while missing := [request for request in requests if request.key not in answered]:
            done, dead = self._pool.generate(missing, description)
            answered |= {completion.key: completion for completion in done}
            if dead:
                self._pool.restart(dead)
                self._sync_weights()
        return answered

    def close(self) -> None:
        """Stop the engines."""
        self._push.close()
        self._pool.shutdown()

    def _sync_weights(self) -> None:
        from megatron_entropy.errors import EngineLost

        while True:
            self._pool.wait_ready()
            try:
                self._push.push(1, self._pool.clients())
            except EngineLost as lost:
                self._pool.restart(lost.indices)
            else:
                return


def sample(chosen: argparse.Namespace, prompts: Sequence[Prompt], done: dict[int, Answers], partial: Path) -> None:
    """Have the questions answered that are not in `done`, adding to it and to the file `partial`."""
    from megatron_entropy.config.architecture import read_architecture
    from megatron_entropy.data.tokenizer import load_tokenizer

    missing = [prompt for prompt in prompts if prompt.index not in done]
    if not missing:
        return
    arch = read_architecture(chosen.model)
    tokenizer = load_tokenizer(chosen.tokenizer or chosen.model, vocab_size=arch.vocab_size)
    with ExitStack() as stack:
        engines = stack.enter_context(closing(Engines(chosen, arch, tokenizer)))
        judge = stack.enter_context(closing(Judge(chosen.verifier, workers=chosen.workers, timeout=chosen.timeout)))
        file = stack.enter_context(partial.open("a"))
        size = max(1, REQUESTS_AT_A_TIME // chosen.samples)
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            description = f"questions {len(done) + 1} to {len(done) + len(part)} of {len(prompts)}"
            if not sys.stderr.isatty():  # where it is one, the engines' progress bar shows it
                print(description, file=sys.stderr, flush=True)
            for answers in _answer(chosen, part, engines, judge, tokenizer, description):
                done[answers.row] = answers
                file.write(json.dumps(asdict(answers)) + "\n")
            file.flush()


def _answer(
    chosen: argparse.Namespace,
    prompts: Sequence[Prompt],
    engines: Engines,
    judge: Judge,
    tokenizer: Tokenizer,
    description: str,
) -> Iterator[Answers]:
    requests = [
        Request(
            key=(prompt.index, number),
            tokens=prompt.tokens,
            seed=derive_seed(chosen.seed, "semantic_entropy", prompt.index, number),
            max_tokens=chosen.max_tokens,
            temperature=chosen.temperature,
            top_p=chosen.top_p,
        )
        for prompt in prompts
        for number in range(chosen.samples)
    ]
    by_key = engines.answer(requests, description)
    answered = [[by_key[prompt.index, number] for number in range(chosen.samples)] for prompt in prompts]
    texts = [[tokenizer.decode(one.tokens.tolist()) for one in group] for group in answered]
    judged = judge.judge([(prompt.answer, group) for prompt, group in zip(prompts, texts, strict=True)])
    for prompt, group, (correct, clusters) in zip(prompts, answered, judged, strict=True):
        logprobs = [float(one.logprobs.sum(dtype=np.float64)) for one in group]
        yield Answers(prompt.index, clusters, logprobs, [len(one.tokens) for one in group], correct)


# Files.


def read_partial(partial: Path, settings: Mapping[str, object]) -> dict[int, Answers]:
    """What an earlier run has done; the file is made to hold just that, ready to be added to.

    Raises:
        ConfigError: the earlier run had other settings.
    """
    done: dict[int, Answers] = {}
    if partial.exists():
        lines = [line for line in map(_json_or_none, partial.read_text().splitlines()) if line is not None]
        before = lines[0].get("settings", {}) if lines else dict(settings)
        for name, value in settings.items():
            if before.get(name) != value:
                raise ConfigError(
                    f"{partial}: holds the work of a run with {name}={before.get(name)}, this one has {value}; repeat "
                    "that command to finish it, or delete the file"
                )
        done = {line["row"]: Answers(**line) for line in lines[1:]}
    with replacing(partial) as new:
        header = {"settings": dict(settings)}
        new.write_text("".join(json.dumps(line) + "\n" for line in [header, *map(asdict, done.values())]))
    return done


def _json_or_none(line: str) -> dict[str, Any] | None:
    """A line, or None for one whose end was never written."""
    try:
        return json.loads(line)
    except ValueError:
        return None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file that appears complete or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    new = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        os.replace(new, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        new.unlink(missing_ok=True)


def write_rows(out: Path, files: Sequence[Path], columns: Sequence[Mapping[str, Any]]) -> None:
    """The rows of the files, as many as there are `columns`, with these beside them.

    Raises:
        DataError: parquet files whose columns have different types.
    """
    import pyarrow
    import pyarrow.parquet

    if out.suffix == ".parquet":
        try:
            tables = [
                pyarrow.parquet.read_table(file)
                if file.suffix == ".parquet"
                else pyarrow.Table.from_pylist(list(_rows(file)))
                for file in files
            ]
            table = pyarrow.concat_tables(tables, promote_options="default").slice(0, len(columns))
        except pyarrow.ArrowException as error:
            raise DataError(f"{out}: the rows make no parquet file: {' '.join(str(error).split())}") from None
        added = pyarrow.Table.from_pylist(list(columns), schema=_parquet_schema())
        for name in COLUMNS:
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, added[name])
        with replacing(out) as new:
            pyarrow.parquet.write_table(table, new)
        return
    rows = itertools.chain.from_iterable(map(_rows, files))
    with replacing(out) as new, new.open("w") as stream:
        for row, beside in zip(rows, columns, strict=False):
            stream.write(json.dumps({**row, **beside}, ensure_ascii=False, default=str) + "\n")


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that has been read before, raw."""
    if file.suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches():
                yield from batch.to_pylist()
        return
    with file.open("rb") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _parquet_schema() -> pyarrow.Schema:
    import pyarrow

    whole = {"semantic_clusters", "semantic_samples"}
    return pyarrow.schema([(name, pyarrow.int64() if name in whole else pyarrow.float64()) for name in COLUMNS])


def plot(path: Path, entropies: Sequence[float], title: str) -> None:
    """A histogram, with the median marked, where two stages of equal size part."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(entropies, bins=40, color="#1f5f8b")
    median = float(np.median(entropies))
    axes.axvline(median, color="#c8553d", linewidth=1.2)
    axes.annotate(f" median {median:.3f}", (median, 0.95), xycoords=("data", "axes fraction"), color="#c8553d")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("semantic entropy (nats)")
    axes.set_ylabel("questions")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as new:
        figure.savefig(new, format="png")


# The command.


def run(chosen: argparse.Namespace) -> int:
    """Sample what is missing, write, summarise."""
    files, out = [Path(file) for file in chosen.data], Path(chosen.out)
    if out.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"--out {out}: the name must end in .parquet or .jsonl")
    if out.resolve() in [file.resolve() for file in files]:
        raise ConfigError(f"--out {out}: is one of the data files; name another")
    if out.exists() and not chosen.overwrite:
        raise ConfigError(f"--out {out}: exists; add --overwrite to replace it")
    load_verifier(chosen.verifier)  # an unknown one is told before the engines start
    prompts = _load(chosen)
    num_rows = sum(1 for file in files for _ in _rows(file))
    num_rows = min(num_rows, chosen.limit or num_rows)
    prompts = [prompt for prompt in prompts if prompt.index < num_rows]
    if not prompts:
        raise DataError(f"{files[0]}: no prompt of the first {num_rows} rows is within the limit; raise --limit")
    partial = out.with_name(out.name + ".partial")
    settings = {name: getattr(chosen, name) for name in SETTINGS}
    settings["data"] = [[str(file), file.stat().st_size] for file in files]
    done = read_partial(partial, settings)
    sample(chosen, prompts, done, partial)
    of_row = {
        prompt.index: done[prompt.index].columns(weight=chosen.weight, invalid=chosen.invalid) for prompt in prompts
    }
    nothing = dict.fromkeys(COLUMNS)
    write_rows(out, files, [of_row.get(row, nothing) for row in range(num_rows)])
    entropies = [columns["semantic_entropy"] for columns in of_row.values()]
    if chosen.plot:
        plot(Path(chosen.plot), entropies, f"{len(prompts)} questions, {chosen.samples} answers each")
    partial.unlink()
    _summarise(chosen, [done[prompt.index] for prompt in prompts], entropies, num_rows)
    return 0


def _load(chosen: argparse.Namespace) -> list[Prompt]:
    from megatron_entropy.config.architecture import read_architecture
    from megatron_entropy.data.dataset import load_prompts
    from megatron_entropy.data.tokenizer import load_tokenizer

    arch = read_architecture(chosen.model)
    longest = chosen.max_prompt_tokens + chosen.max_tokens
    if longest > arch.max_positions:
        raise ConfigError(
            f"--max-prompt-tokens {chosen.max_prompt_tokens} and --max-tokens {chosen.max_tokens} are more than the "
            f"model's {arch.max_positions} positions; lower one of them"
        )
    if arch.num_heads % chosen.tensor_parallel:
        raise ConfigError(
            f"--tensor-parallel {chosen.tensor_parallel} does not divide the model's {arch.num_heads} attention heads"
        )
    loaded = load_prompts(
        chosen.data,
        load_tokenizer(chosen.tokenizer or chosen.model, vocab_size=arch.vocab_size),
        max_prompt_tokens=chosen.max_prompt_tokens,
        schema=chosen.columns,
        template=chosen.template or None,
    )
    return [dataclasses.replace(prompt, target=None) for prompt in loaded.prompts]


def _summarise(
    chosen: argparse.Namespace, answers: Sequence[Answers], entropies: Sequence[float], num_rows: int
) -> None:
    unreadable = [sum(cluster == UNREADABLE for cluster in one.clusters) for one in answers]
    judged = [verdict for one in answers for verdict in one.correct if verdict is not None]
    total = len(answers) * chosen.samples
    print(f"{chosen.out}: {len(answers)} questions, {chosen.samples} answers each")
    print(
        f"semantic entropy ({chosen.weight}): mean {np.mean(entropies):.3f}, median {np.median(entropies):.3f}, "
        f"largest {max(entropies):.3f} nats; 0 for {np.mean(np.array(entropies) < 1e-9):.1%} of the questions"
    )
    if judged:
        print(f"accuracy: {np.mean(judged):.1%} of {len(judged)} answers")
    if any(unreadable):
        none = sum(count == chosen.samples for count in unreadable)
        print(
            f"unreadable: {sum(unreadable)} of {total} answers; {none} questions have no other"
            + (" (entropy 0; see --invalid)" if none and chosen.invalid == "shared" else "")
        )
    if num_rows > len(answers):
        print(f"left without an entropy: {num_rows - len(answers)} rows with a prompt over --max-prompt-tokens")


def _at_least_one(text: str) -> int:
    if not text.lstrip("+").isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def _share(text: str) -> float:
    if (value := _positive(text)) > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, got {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; see the module's text for exit codes."""
    parser = Parser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("model", metavar="MODEL_FOLDER", help="the policy that training starts from")
    add("data", metavar="DATA", nargs="+", help="JSONL or parquet files")
    add("--out", metavar="FILE", required=True, help=".parquet or .jsonl")
    add("--overwrite", action="store_true", help="replace FILE if it exists")
    add("--samples", metavar="M", type=_at_least_one, default=8, help="answers to each question; default: %(default)s")
    add("--temperature", type=_positive, default=1.0, help="default: %(default)s")
    add("--top-p", type=_share, default=1.0, help="default: %(default)s")
    add("--max-tokens", type=_at_least_one, default=2048, help="of an answer; default: %(default)s")
    add("--max-prompt-tokens", type=_at_least_one, default=1024, help="default: %(default)s")
    add("--weight", choices=WEIGHTS, default="count", help="what an answer counts; default: %(default)s")
    add("--verifier", default="math_verify", help=f"{', '.join(VERIFIERS)}, or module:function; default: %(default)s")
    add("--invalid", choices=("shared", "own"), default="shared", help="cluster of answers that cannot be read")
    add("--limit", metavar="N", type=_at_least_one, help="the first N rows only")
    add("--plot", metavar="PNG", help="draw a histogram")
    add("--columns", default="auto", help="schema of the rows (data.columns)")
    add("--template", default="", help="{question} with text around it (data.template)")
    add("--tokenizer", default="", help="folder or tokenizer.model; default: the model's")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the engines")
    add("--engines", type=_at_least_one, default=1, help="default: %(default)s")
    add("--tensor-parallel", type=_at_least_one, default=1, help="GPUs of one engine; default: %(default)s")
    add("--workers", type=_at_least_one, default=2, help="processes that compare answers; default: %(default)s")
    add("--timeout", type=_positive, default=10.0, help="seconds for one comparison; default: %(default)s")
    add("--seed", type=int, default=1)
    chosen = parser.parse_args(arguments)
    return exit_code(lambda: run(chosen))


if __name__ == "__main__":
    sys.exit(main())

"""`megatron-entropy semantic-entropy`: write the semantic entropy of every question beside it (for SENT)."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_entropy.cli.arguments import Subparsers, fraction, positive_float, positive_int, server_url

if TYPE_CHECKING:
    from megatron_entropy.config.architecture import ModelArchitecture
    from megatron_entropy.config.schema import Config
    from megatron_entropy.semantic_entropy.measure import Answers

DESCRIPTION = """Sample several answers to every question, group equal answers into clusters, and write the entropy of
the clusters in nats beside the question. The rows of all files are written in their order and otherwise unchanged, with
the columns semantic_entropy (by --weight), semantic_entropy_count, _likelihood and _length_norm (by each weight),
semantic_clusters, semantic_samples and semantic_accuracy (fraction of correct answers). Answers are equal when the
verifier extracts the same text; with math_verify, when they are mathematically equal. A question whose prompt is over
the limit has no entropy. Finished answers are kept in FILE.partial: after Ctrl-C the same command continues. The same
command gives the same numbers for any number of engines."""


def add_parser(subparsers: Subparsers) -> None:
    """Define the command line."""
    parser = subparsers.add_parser(
        "semantic-entropy",
        help="measure the semantic entropy of every question of a data set",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL_FOLDER", help="the model that training starts from")
    add("data", metavar="DATA", nargs="+", help="JSONL or parquet files")
    add("--out", metavar="FILE", type=Path, required=True, help=".parquet or .jsonl")
    add("--overwrite", action="store_true", help="replace FILE if it exists")
    add("--samples", metavar="M", type=positive_int, default=8, help="answers per question; default: %(default)s")
    add("--temperature", type=positive_float, default=1.0, help="default: %(default)s")
    add("--top-p", type=fraction, default=1.0, help="default: %(default)s")
    add("--max-tokens", type=positive_int, default=2048, help="of an answer; default: %(default)s")
    add("--max-prompt-tokens", type=positive_int, default=1024, help="default: %(default)s")
    weights = ("count", "likelihood", "length_norm")
    add("--weight", choices=weights, default="count", help="weight of an answer; default: %(default)s")
    add("--verifier", default="math_verify", help="as reward.verifier; default: %(default)s")
    add("--invalid", choices=("shared", "own"), default="shared", help="cluster of unreadable answers")
    add("--limit", metavar="N", type=positive_int, help="only the first N rows")
    add("--plot", metavar="PNG", type=Path, help="draw a histogram")
    add("--format", default="auto", help="schema of the rows, as data.format")
    add("--template", default="", help="{question} with text around it, as data.template")
    add("--tokenizer", default="", help="folder or tokenizer.model; default: the model's")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the engines")
    add("--engines", type=positive_int, default=1, help="default: %(default)s")
    add("--tensor-parallel", type=positive_int, default=1, help="GPUs of one engine; default: %(default)s")
    add("--workers", type=positive_int, default=2, help="processes that compare answers; default: %(default)s")
    add("--timeout", type=positive_float, default=10.0, help="seconds for one comparison; default: %(default)s")
    add(
        "--reward-url", metavar="URL", type=server_url, default="", help="compare on a reward server, see serve-rewards"
    )
    add("--seed", type=int, default=1, help="default: %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, write the rows, print a summary."""
    import numpy as np

    from megatron_entropy.config.architecture import read_architecture
    from megatron_entropy.data.dataset import load_prompts
    from megatron_entropy.data.tokenizer import load_tokenizer
    from megatron_entropy.errors import DataError
    from megatron_entropy.rewards import check_grader
    from megatron_entropy.semantic_entropy import measure, tables

    files, out = [Path(file) for file in args.data], args.out
    _check_out(args, files)
    config, arch = _config(args), read_architecture(args.model)
    check_grader(config.reward)
    _check_model(args, arch)
    tokenizer = load_tokenizer(args.tokenizer or args.model, vocab_size=arch.vocab_size)
    load_prompts(files, tokenizer, config.data, first_only=True)  # a chat template that never ends is found here
    loaded = load_prompts(files, tokenizer, config.data)
    num_rows = sum(1 for _ in tables.all_rows(files))
    num_rows = min(num_rows, args.limit or num_rows)
    prompts = [dataclasses.replace(prompt, target=None) for prompt in loaded.prompts if prompt.index < num_rows]
    if not prompts:
        raise DataError(f"{files[0]}: no prompt of the first {num_rows} rows is within the limit; raise --limit")
    partial = out.with_name(out.name + ".partial")
    answers = measure.measure(config, prompts, arch, tokenizer, partial)
    columns = {p.index: answers[p.index].columns(weight=args.weight, invalid=args.invalid) for p in prompts}
    empty = dict.fromkeys(measure.COLUMNS)
    tables.write_rows(out, files, [columns.get(row, empty) for row in range(num_rows)])
    entropies = [row["semantic_entropy"] for row in columns.values()]
    if args.plot:
        title = f"{len(prompts)} questions, {args.samples} answers each"
        tables.plot_histogram(args.plot, entropies, float(np.median(entropies)), title)
    partial.unlink()
    _print_summary(args, [answers[prompt.index] for prompt in prompts], entropies, num_rows)
    return 0


def _config(args: argparse.Namespace) -> Config:
    """The flags as the configuration of a run."""
    from megatron_entropy.config import schema

    return schema.Config(
        steps=1,
        seed=args.seed,
        method=schema.MethodConfig(name="semantic_entropy"),
        model=schema.ModelConfig(path=args.model),
        data=schema.DataConfig(
            train=args.data,
            format=args.format,
            template=args.template,
            tokenizer=args.tokenizer,
            max_prompt_tokens=args.max_prompt_tokens,
        ),
        rollout=schema.RolloutConfig(
            num_engines=args.engines,
            tensor_parallel=args.tensor_parallel,
            temperature=args.temperature,
            top_p=args.top_p,
            max_response_tokens=args.max_tokens,
            dtype=args.dtype,
            gpu_memory_utilization=0.9,
            weight_transfer="gloo",
        ),
        reward=schema.RewardConfig(
            verifier=args.verifier, workers=args.workers, timeout=args.timeout, url=args.reward_url
        ),
        batch=schema.BatchConfig(samples=args.samples),
    )


def _check_out(args: argparse.Namespace, files: Sequence[Path]) -> None:
    from megatron_entropy.errors import ConfigError

    if args.out.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"--out {args.out}: the name must end in .parquet or .jsonl")
    if args.out.resolve() in [file.resolve() for file in files]:
        raise ConfigError(f"--out {args.out}: is one of the data files; choose another name")
    if args.out.exists() and not args.overwrite:
        raise ConfigError(f"--out {args.out}: exists; add --overwrite to replace it")


def _check_model(args: argparse.Namespace, arch: ModelArchitecture) -> None:
    from megatron_entropy.errors import ConfigError

    if args.max_prompt_tokens + args.max_tokens > arch.max_positions:
        raise ConfigError(
            f"--max-prompt-tokens {args.max_prompt_tokens} and --max-tokens {args.max_tokens} are more than the "
            f"model's {arch.max_positions} positions; lower one of them"
        )
    if arch.num_heads % args.tensor_parallel:
        raise ConfigError(
            f"--tensor-parallel {args.tensor_parallel} does not divide the model's {arch.num_heads} attention heads"
        )


def _print_summary(
    args: argparse.Namespace, answers: Sequence[Answers], entropies: Sequence[float], num_rows: int
) -> None:
    import numpy as np

    from megatron_entropy.semantic_entropy.clusters import UNREADABLE

    unreadable = [sum(cluster == UNREADABLE for cluster in one.clusters) for one in answers]
    judged = [verdict for one in answers for verdict in one.correct if verdict is not None]
    print(f"{args.out}: {len(answers)} questions, {args.samples} answers each")
    print(
        f"semantic entropy ({args.weight}): mean {np.mean(entropies):.3f}, median {np.median(entropies):.3f}, "
        f"largest {max(entropies):.3f} nats; 0 for {np.mean(np.array(entropies) < 1e-9):.1%} of the questions"
    )
    if judged:
        print(f"accuracy: {np.mean(judged):.1%} of {len(judged)} answers")
    if any(unreadable):
        none = sum(count == args.samples for count in unreadable)
        print(
            f"unreadable: {sum(unreadable)} of {len(answers) * args.samples} answers; {none} questions have no other"
            + (" (entropy 0; see --invalid)" if none and args.invalid == "shared" else "")
        )
    if num_rows > len(answers):
        print(f"left without an entropy: {num_rows - len(answers)} rows with a prompt over --max-prompt-tokens")

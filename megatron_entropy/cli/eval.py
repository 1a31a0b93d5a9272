"""`megatron-entropy eval`: sample and grade the papers' benchmarks, grade again, compare two evaluations."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_entropy.cli.arguments import Subparsers, fraction, positive_float, positive_int

if TYPE_CHECKING:
    from megatron_entropy.benchmarks.folder import EvalFolder, EvalRecord
    from megatron_entropy.benchmarks.prepare import Prepared
    from megatron_entropy.benchmarks.presets import Preset
    from megatron_entropy.benchmarks.run import Sampling
    from megatron_entropy.config.schema import Config, RewardConfig
    from megatron_entropy.data.tokenizer import Tokenizer

SERVER_PATIENCE = 600.0
"""Seconds without any success of a reward server after which the evaluation stops."""

DESCRIPTION = """Sample answers to the questions of benchmarks with vLLM engines, grade them, and print a table with
standard errors. FOLDER gets one JSON line per sample, eval.json with the settings, summary.json and report.html. After
Ctrl-C or a crash the same command goes on; no finished sample is drawn again, and more samples (--k), more questions
(--limit) or further benchmarks (--suite) can be added. A sample depends on --seed, its question and its number only,
not on the engines. Benchmarks are read from --data, or from the Hugging Face hub by the package `datasets`."""


def add_parser(subparsers: Subparsers) -> None:
    """Define the command line."""
    parser = subparsers.add_parser(
        "eval", help="evaluate a model on benchmarks", description=DESCRIPTION, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", metavar="MODEL|RUN", nargs="?", help="Hugging Face folder, or folder of a finished run")
    add("--suite", metavar="NAME|FILE.toml,...", help="math, ood, benchmarks such as gsm8k,aime24, or a suite file")
    add("--preset", help="protocol of a paper: cure, curiosft, sent or cer")
    add("--data", metavar="FOLDER", help="benchmark files: FOLDER/gsm8k.jsonl or FOLDER/gsm8k/test.jsonl")
    add("--out", metavar="FOLDER", type=Path, help="default: evals/MODEL/PRESET, or RUN/benchmarks/PRESET")
    add("--overwrite", action="store_true", help="delete the evaluation in FOLDER first")
    add("--k", metavar="N", type=positive_int, help="samples of each question; default: the preset's")
    add("--limit", metavar="N", type=positive_int, help="only the first N rows of each benchmark")
    add("--graders", metavar="NAME,...", default="", help="in place of the benchmarks' own; the first is the main one")
    add("--regrade", action="store_true", help="grade the samples in FOLDER again; needs no engine")
    add("--compare", metavar=("A", "B"), nargs=2, type=Path, help="compare two evaluations question by question")
    sampling = parser.add_argument_group("sampling", "in place of the preset's values; eval.json has all of them")
    add = sampling.add_argument
    add("--max-tokens", metavar="N", type=positive_int, help="of an answer")
    add("--temperature", metavar="T", type=positive_float)
    add("--top-p", metavar="P", type=fraction)
    add("--top-k", metavar="N", type=positive_int, help="most probable tokens to sample from")
    add("--repetition-penalty", metavar="X", type=positive_float)
    add("--max-prompt-tokens", metavar="N", type=positive_int, default=2048, help="default: %(default)s")
    add("--seed", type=int, default=1, help="default: %(default)s")
    add("--no-entropy", action="store_true", help="do not measure the entropy of the tokens")
    engines = parser.add_argument_group("engines")
    add = engines.add_argument
    add("--engines", metavar="N", type=positive_int, default=1, help="default: %(default)s")
    add("--tensor-parallel", metavar="N", type=positive_int, default=1, help="GPUs of one engine; default: %(default)s")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: as rollout.dtype")
    add("--max-num-seqs", metavar="N", type=positive_int, default=256, help="decoded at once; default: %(default)s")
    add("--kv-cache-gib", metavar="N", type=positive_int, default=2, help="of an engine on a CPU; default: %(default)s")
    grading = parser.add_argument_group("grading")
    add = grading.add_argument
    add("--reward-url", metavar="URL", default="", help="grade on a server (megatron-entropy serve-rewards)")
    add("--workers", metavar="N", type=positive_int, default=2, help="grading processes; default: %(default)s")
    add("--timeout", metavar="SECONDS", type=positive_float, default=10.0, help="for an answer; default: %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, grade again or compare."""
    if args.compare:
        return _compare(args)
    return _regrade(args) if args.regrade else _evaluate(args)


def _compare(args: argparse.Namespace) -> int:
    from megatron_entropy.benchmarks.compare import compare, print_comparison
    from megatron_entropy.benchmarks.folder import EvalFolder

    first, second = (EvalFolder(path) for path in args.compare)
    print_comparison(compare(first, second))
    return 0


def _regrade(args: argparse.Namespace) -> int:
    from megatron_entropy.benchmarks.folder import EvalFolder, read_record
    from megatron_entropy.benchmarks.grading import regrade
    from megatron_entropy.errors import ConfigError
    from megatron_entropy.launch.lock import RunLock

    place = args.out or (Path(args.model) if args.model else None)
    if place is None:
        raise ConfigError("--regrade needs the folder of an evaluation: megatron-entropy eval FOLDER --regrade")
    folder = EvalFolder(place)
    record = read_record(folder)
    lock = RunLock(folder.root, option="out")
    if names := _names(args.graders):
        benchmarks = {name: dataclasses.replace(one, graders=names) for name, one in record.benchmarks.items()}
        record = dataclasses.replace(record, benchmarks=benchmarks)
    for benchmark, found in regrade(folder, record, _reward(args)).items():
        changed = ", ".join(f"{count} by {name}" for name, count in found.changed.items() if count) or "none"
        print(f"{benchmark}: {found.rows} samples graded again, grades that differ: {changed}")
    _finish(folder, record)
    lock.close()
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from megatron_entropy.benchmarks import prepare
    from megatron_entropy.benchmarks.folder import EvalFolder, extend_record, write_record
    from megatron_entropy.benchmarks.run import generate_samples
    from megatron_entropy.data.tokenizer import load_tokenizer
    from megatron_entropy.errors import ConfigError
    from megatron_entropy.launch.lock import RunLock
    from megatron_entropy.launch.preflight import check_machine, check_model_folder
    from megatron_entropy.launch.prepare import read_model

    model, root = _find_model(args)
    preset, reward = _preset(args), _reward(args)
    benchmarks = prepare.load_suites(_names(args.suite))
    arch = read_model("MODEL", model)
    if arch.num_heads % args.tensor_parallel:
        raise ConfigError(
            f"--tensor-parallel {args.tensor_parallel} does not divide the model's {arch.num_heads} attention heads"
        )
    check_model_folder(model, arch)
    tokenizer = load_tokenizer(model, vocab_size=arch.vocab_size)
    prepared = prepare.prepare(
        benchmarks,
        preset,
        tokenizer,
        data_folder=args.data,
        limit=args.limit,
        graders=_names(args.graders),
        seed=args.seed,
        max_prompt_tokens=args.max_prompt_tokens,
    )
    prepare.check_length(prepared, preset.max_tokens, arch.max_positions)
    prepare.check_graders(prepared.tasks, reward)
    config = _config(args, model, preset, reward, prepared.longest_prompt)
    check_machine([config])
    folder = EvalFolder(root)
    root.mkdir(parents=True, exist_ok=True)
    lock = RunLock(root, option="out")
    if args.overwrite:
        _delete(folder, prepared)
    record = extend_record(folder, _record(args, model, preset, config, prepared), prepared.digests)
    _print_plan(folder, tokenizer, prepared)
    write_record(folder, record)
    sampling = _sampling(args, preset)
    if generate_samples(folder, prepared.tasks, sampling, config=config, arch=arch, tokenizer=tokenizer):
        record = dataclasses.replace(record, finished=None)
    _finish(folder, record)
    lock.close()
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _find_model(args: argparse.Namespace) -> tuple[str, Path]:
    """The model's folder and the folder of its evaluation."""
    from megatron_entropy.errors import ConfigError, ModelError
    from megatron_entropy.monitor.run_folder import RunFolder

    for value, name in ((args.model, "MODEL"), (args.suite, "--suite"), (args.preset, "--preset")):
        if not value:
            raise ConfigError(
                f"{name} is missing: megatron-entropy eval MODEL --suite math --preset cure, or --regrade, or --compare"
            )
    path = Path(args.model)
    run = RunFolder(path)
    if (path / "config.json").exists() or not run.config.exists():
        return args.model, args.out or Path("evals") / path.resolve().name / args.preset
    exported = run.export("", last=True)
    if not exported.is_dir():
        raise ModelError(
            f"{path}: the run has no exported model ({exported.name}/) yet; finish it with --resume, or name the model "
            "folder of one of its stages"
        )
    return str(exported), args.out or run.benchmarks / args.preset


def _preset(args: argparse.Namespace) -> Preset:
    """The preset with the values of the command line."""
    from megatron_entropy.benchmarks.presets import load_preset

    names = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.k:
        changes |= {"samples": args.k, "samples_by_benchmark": {}}
    return dataclasses.replace(load_preset(args.preset), **changes)


def _reward(args: argparse.Namespace) -> RewardConfig:
    from pydantic import ValidationError

    from megatron_entropy.config.schema import RewardConfig
    from megatron_entropy.errors import ConfigError

    try:
        return RewardConfig(workers=args.workers, timeout=args.timeout, url=args.reward_url, budget=SERVER_PATIENCE)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--reward-{first['loc'][0]}: {first['msg']}") from None


def _config(
    args: argparse.Namespace, model: str, preset: Preset, reward: RewardConfig, max_prompt_tokens: int
) -> Config:
    """The flags as the configuration of engines."""
    from megatron_entropy.config import schema
    from megatron_entropy.config.architecture import read_architecture
    from megatron_entropy.distributed.dtypes import resolve_name

    return schema.Config(
        steps=1,
        seed=args.seed,
        method=schema.MethodConfig(name="eval"),
        model=schema.ModelConfig(path=model),
        data=schema.DataConfig(max_prompt_tokens=max_prompt_tokens),
        rollout=schema.RolloutConfig(
            num_engines=args.engines,
            tensor_parallel=args.tensor_parallel,
            temperature=preset.temperature,
            max_response_tokens=preset.max_tokens,
            dtype=resolve_name(args.dtype, read_architecture(model)),
            max_num_seqs=args.max_num_seqs,
            kv_cache_gib=args.kv_cache_gib,
            gpu_memory_utilization=0.9,
            weight_transfer="gloo",
            entropy=not args.no_entropy,
        ),
        reward=reward,
    )


def _sampling(args: argparse.Namespace, preset: Preset) -> Sampling:
    from megatron_entropy.benchmarks.run import Sampling

    return Sampling(
        temperature=preset.temperature,
        top_p=preset.top_p,
        top_k=preset.top_k,
        repetition_penalty=preset.repetition_penalty,
        max_tokens=preset.max_tokens,
        seed=args.seed,
    )


def _record(args: argparse.Namespace, model: str, preset: Preset, config: Config, prepared: Prepared) -> EvalRecord:
    from megatron_entropy.benchmarks.folder import EvalRecord, fingerprint_model
    from megatron_entropy.monitor.summary import versions

    return EvalRecord(
        model=Path(model).resolve().name,
        settings={
            "preset": preset.name,
            "model": fingerprint_model(Path(model)),
            **dataclasses.asdict(_sampling(args, preset)),
            "max_prompt_tokens": args.max_prompt_tokens,
            "dtype": config.rollout.dtype,
            "entropy": config.rollout.entropy,
        },
        benchmarks=prepared.records,
        engines={name: getattr(args, name) for name in ("engines", "tensor_parallel", "max_num_seqs")},
        versions=versions(),
        started=_now(),
    )


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _delete(folder: EvalFolder, prepared: Prepared) -> None:
    """Delete the files that an evaluation writes."""
    from megatron_entropy.benchmarks.folder import read_record

    names = set(prepared.records)
    if folder.record.exists():
        names |= set(read_record(folder).benchmarks)
    for path in (folder.record, folder.summary, folder.report, *map(folder.rows, sorted(names))):
        path.unlink(missing_ok=True)


def _print_plan(folder: EvalFolder, tokenizer: Tokenizer, prepared: Prepared) -> None:
    from megatron_entropy.data.schemas import Message

    lines = list(prepared.notes)
    if tokenizer.render([Message("user", "1")]) == "1\n":
        lines.append("the model has no chat template: prompts are plain text")
    for line in lines:
        print(line, file=sys.stderr)
    tasks = ", ".join(f"{task.benchmark} {len(task.questions)} x {task.samples}" for task in prepared.tasks)
    print(f"{folder.root}: {prepared.num_samples:,} samples ({tasks})", file=sys.stderr, flush=True)


def _finish(folder: EvalFolder, record: EvalRecord) -> None:
    """Print the table, write record, summary and report."""
    from megatron_entropy.benchmarks.folder import write_record
    from megatron_entropy.benchmarks.report import write_report
    from megatron_entropy.benchmarks.table import print_table, summarize, write_summary

    write_record(folder, record)
    summary = summarize(folder)
    drawn = {benchmark.benchmark: benchmark.num_samples for benchmark in summary.benchmarks}
    is_complete = all(drawn.get(name, 0) >= asked.num_samples for name, asked in record.benchmarks.items())
    write_record(folder, dataclasses.replace(record, finished=(record.finished or _now()) if is_complete else None))
    print_table(summary)
    write_summary(folder, summary)
    write_report(folder, summary)
    print(f"{folder.report}: written")

"""`megatron-entropy fp8-report`: what FP8 does to a model's log-probs, entropies and to what methods select by them."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_entropy.cli.arguments import Subparsers, fraction, positive_float, positive_int

if TYPE_CHECKING:
    from megatron_entropy.config.architecture import ModelArchitecture
    from megatron_entropy.config.schema import Config
    from megatron_entropy.data.tokenizer import Tokenizer
    from megatron_entropy.records import Group

DESCRIPTION = """Compute one batch of responses in bf16 and in FP8, and write a page with what changes: log-prob and
entropy by token and by entropy, the importance ratio, CURE's candidates for a cut, SENT's set of low entropy, CER's
rewards. Each recipe is emulated in plain PyTorch, on any device; where Transformer Engine and the GPU compute it, a row
of the real one stands beside it. Intervals come from resampling the responses. The model itself samples the responses,
or they are read from a rollout dump, and then no engine is needed."""


def add_parser(subparsers: Subparsers) -> None:
    """Define the command line."""
    parser = subparsers.add_parser(
        "fp8-report", help="measure what FP8 does to entropies and selections", description=DESCRIPTION,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL_FOLDER", help="a Hugging Face folder")
    add("--out", metavar="FOLDER", type=Path, required=True, help="for report.html, report.json, README.md")
    add("--overwrite", action="store_true", help="replace a report in FOLDER")
    add("--data", metavar="DATA", nargs="+", default=[], help="JSONL or parquet files of questions to sample from")
    add("--responses", metavar="FILE", type=Path, help="a rollout dump (step_N.jsonl), or a run folder, instead")
    add("--recipes", metavar="RECIPE", nargs="+", help="default: every recipe that can be emulated")
    add(
        "--weight-margins", metavar="F", nargs="+", type=positive_float, default=[],
        help="add rows with the scales of weights divided by F, at least 1: what another rounding of the same weights "
        "does, which no interval here contains",
    )  # fmt: skip
    add("--prompts", metavar="N", type=positive_int, default=24, help="first questions; default: %(default)s")
    add("--samples", metavar="M", type=positive_int, default=1, help="responses per question; default: %(default)s")
    add("--temperature", type=positive_float, default=1.0, help="default: %(default)s")
    add("--top-p", type=fraction, default=1.0, help="default: %(default)s")
    add("--max-tokens", type=positive_int, default=256, help="of a response; default: %(default)s")
    add("--max-prompt-tokens", type=positive_int, default=1024, help="default: %(default)s")
    add("--microbatch-tokens", type=positive_int, default=8192, help="of a forward pass; default: %(default)s")
    add("--format", default="auto", help="schema of the rows, as data.format")
    add("--template", default="", help="{question} with text around it, as data.template")
    add("--seed", type=int, default=1, help="default: %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Sample or read the responses, measure, write the page."""
    recipes = _check(args)
    from megatron_entropy.config.architecture import read_architecture
    from megatron_entropy.data.tokenizer import load_tokenizer
    from megatron_entropy.monitor.console import hide_library_warnings
    from megatron_entropy.precision_report.responses import read_responses

    hide_library_warnings()
    arch = read_architecture(args.model)
    tokenizer = load_tokenizer(args.model, vocab_size=arch.vocab_size)
    if args.responses:
        groups = read_responses(args.responses, arch)
        source = str(args.responses)
    else:
        groups = _sample(args, arch, tokenizer)
        source = f"sampled by the model from {', '.join(args.data)}"
    longest = max(len(sample.tokens) for group in groups for sample in group.samples)
    _report(args, recipes, groups, arch, tokenizer, source, max(args.microbatch_tokens, longest))
    print(args.out / "report.html")
    return 0


def _check(args: argparse.Namespace) -> list[str]:
    """The recipes to emulate."""
    from megatron_entropy.config.fp8 import EMULATED_NAMES
    from megatron_entropy.errors import ConfigError

    if bool(args.data) == bool(args.responses):
        raise ConfigError("fp8-report needs --data FILE, to sample responses, or --responses FILE, not both")
    if (args.out / "report.json").exists() and not args.overwrite:
        raise ConfigError(f"--out {args.out}: holds a report; add --overwrite to replace it")
    for recipe in args.recipes or []:
        if recipe not in EMULATED_NAMES:
            raise ConfigError(f"--recipes {recipe} cannot be emulated; choose from {', '.join(EMULATED_NAMES)}")
    for margin in args.weight_margins:
        if margin < 1:
            raise ConfigError(
                f"--weight-margins {margin:g} is below 1: the largest weights would exceed FP8; choose 1 to 2"
            )
    args.out.mkdir(parents=True, exist_ok=True)
    return args.recipes or list(EMULATED_NAMES)


def _sample(args: argparse.Namespace, arch: ModelArchitecture, tokenizer: Tokenizer) -> list[Group]:
    """Sample the responses and keep them in the folder."""
    from megatron_entropy.data.dataset import load_prompts
    from megatron_entropy.monitor.rollout_dumps import dump_rollouts
    from megatron_entropy.precision_report.responses import sample_responses

    config = _config(args)
    files = [Path(file) for file in args.data]
    load_prompts(files, tokenizer, config.data, first_only=True)  # a chat template that never ends is found here
    prompts = load_prompts(files, tokenizer, config.data).prompts[: args.prompts]
    groups = sample_responses(config, [dataclasses.replace(p, target=None) for p in prompts], arch, tokenizer)
    dump_rollouts(args.out / "responses.jsonl", groups)
    return [group for group in groups if any(sample.response_length for sample in group.samples)]


def _config(args: argparse.Namespace) -> Config:
    """The flags as the configuration of a run."""
    from megatron_entropy.config import schema

    return schema.Config(
        steps=1,
        seed=args.seed,
        method=schema.MethodConfig(name="fp8_report"),
        model=schema.ModelConfig(path=args.model),
        data=schema.DataConfig(
            train=args.data,
            format=args.format,
            template=args.template,
            max_prompt_tokens=args.max_prompt_tokens,
        ),
        rollout=schema.RolloutConfig(
            temperature=args.temperature,
            top_p=args.top_p,
            max_response_tokens=args.max_tokens,
            dtype="bfloat16",
            weight_transfer="gloo",
        ),
        batch=schema.BatchConfig(samples=args.samples),
    )


def _report(
    args: argparse.Namespace,
    recipes: Sequence[str],
    groups: Sequence[Group],
    arch: ModelArchitecture,
    tokenizer: Tokenizer,
    source: str,
    microbatch_tokens: int,
) -> None:
    import torch.distributed as dist

    from megatron_entropy.distributed import process_groups
    from megatron_entropy.precision_report import page
    from megatron_entropy.precision_report.compare import compare
    from megatron_entropy.precision_report.measure import measure

    samples = [sample for group in groups for sample in group.samples if sample.response_length]
    responses = [sample.tokens[sample.prompt_length :].tolist() for sample in samples]
    real = _real_recipes(recipes)
    if not dist.is_initialized():
        process_groups.init_process_group()
    measured = measure(
        args.model,
        arch,
        samples,
        emulated=recipes,
        real=real,
        weight_margins=args.weight_margins,
        temperature=args.temperature,
        max_tokens=microbatch_tokens,
        progress=lambda name: print(f"computing {name}", file=sys.stderr, flush=True),
    )
    rows = [(one, compare(one.found, one.base, responses, tokenizer.text_of, seed=args.seed)) for one in measured]
    process_groups.destroy_process_group()
    remarks = [
        "FP8 is EMULATED: operands of every linear layer are rounded to 8 bits and back in plain PyTorch; norms and "
        "attention are exact, and so is the head but in its own row."
        + ("" if real else " No row is of a GPU."),
        "The base of every row is the same model in bf16, whose linear layers are PyTorch's. The first row is the "
        "noise floor: bf16 against itself with products summed in fp32.",
    ]  # fmt: skip
    name = Path(args.model).name or Path(args.model).resolve().name
    settings = {
        "command": _command(args),
        "model": f"{name}, {arch.num_layers} layers, hidden size {arch.hidden_size}",
        "responses": f"{len(samples)}, {sum(map(len, responses))} tokens, {source}",
        "temperature": args.temperature,
        "tokens of a forward pass": microbatch_tokens,
        "seed": args.seed,
    }
    title = f"Emulated FP8 against bf16: {name}"
    page.write(args.out, rows, title=title, settings=settings, remarks=remarks)


def _real_recipes(recipes: Sequence[str]) -> list[str]:
    """The recipes that this machine computes; `delayed` takes its scales from training, so it has no real row."""
    from megatron_entropy.cli.doctor import inspect_machine

    known = inspect_machine().fp8_recipes
    return [recipe for recipe in recipes if recipe in known and recipe != "delayed"]


def _command(args: argparse.Namespace) -> str:
    """The command line, with what differs from the defaults."""
    parts = ["megatron-entropy fp8-report", args.model]
    parts += ["--data", *args.data] if args.data else ["--responses", str(args.responses)]
    margins = ["--weight-margins", *map(str, args.weight_margins)] if args.weight_margins else []
    defaults = {"prompts": 24, "samples": 1, "temperature": 1.0, "max_tokens": 256, "seed": 1}
    for name, value in defaults.items():
        if args.data and getattr(args, name) != value:
            parts += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    recipes = ["--recipes", *args.recipes] if args.recipes else []
    return " ".join([*parts, *recipes, *margins, "--out", str(args.out)])

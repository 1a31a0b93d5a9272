"""`megatron-entropy merge-lora`: merge a LoRA adapter in PEFT's format into its base model."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_entropy.cli.arguments import Subparsers, byte_progress, byte_size


def add_parser(subparsers: Subparsers) -> None:
    """Define the command line."""
    parser = subparsers.add_parser(
        "merge-lora",
        help="merge a LoRA adapter into its base model",
        description="Merge a LoRA adapter in PEFT's format into a Hugging Face folder, one tensor in memory at a time. "
        "Sums are computed in fp32 and cast to the type of the base. Adapter options that change more than that (DoRA, "
        "bias, saved modules, rank patterns, ...) are refused by name.",
        allow_abbrev=False,
    )
    parser.add_argument("base", metavar="BASE_FOLDER", type=Path)
    parser.add_argument("adapter", metavar="ADAPTER_FOLDER", type=Path)
    parser.add_argument("target", metavar="OUT", type=Path)
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", type=byte_size, default="2GiB", help="of a file; default: %(default)s"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merge and print how many tensors changed."""
    from megatron_entropy.weights import peft

    changed = peft.merge(
        args.base,
        args.adapter,
        args.target,
        max_shard_bytes=args.max_shard_size,
        overwrite=args.overwrite,
        progress=byte_progress,
    )
    print(f"{args.target}: written, {changed} tensors changed by the adapter")
    return 0

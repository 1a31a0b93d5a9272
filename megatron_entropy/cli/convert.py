"""`megatron-entropy convert`: convert and compare Hugging Face folders and Megatron checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_entropy.cli.arguments import Parser, Subparsers, byte_progress, byte_size

DTYPES = ("float32", "bfloat16", "float16")
DESCRIPTION = """Convert models between Hugging Face folders and Megatron checkpoints, one parameter in memory at a
time. `to-megatron` writes OUT/shards, which megatron.core.dist_checkpointing reads under any layout, and copies
configuration and tokenizer beside it; OUT also serves as model.path. `to-hf` reads such a folder, or a checkpoint of a
run (runs/x/checkpoints/STAGE/step_000010), which needs --like. Types stay as they are unless --dtype names another.
Exit code 1: `compare` or --verify found a difference."""


def add_parser(subparsers: Subparsers) -> None:
    """Define the command line."""
    parser = subparsers.add_parser(
        "convert",
        help="convert between Hugging Face folders and Megatron checkpoints",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    forward = actions.add_parser("to-megatron", help="Hugging Face folder to Megatron checkpoint", allow_abbrev=False)
    forward.add_argument("source", metavar="HF_FOLDER", type=Path)
    back = actions.add_parser("to-hf", help="Megatron checkpoint to Hugging Face folder", allow_abbrev=False)
    back.add_argument("source", metavar="CHECKPOINT", type=Path)
    for action in (forward, back):
        action.add_argument("target", metavar="OUT", type=Path)
        action.add_argument("--dtype", choices=DTYPES, help="type to cast to; default: as stored")
        action.add_argument(
            "--max-shard-size", metavar="SIZE", type=byte_size, default="2GiB", help="of a file; default: %(default)s"
        )
        action.add_argument("--verify", action="store_true", help="compare every tensor afterwards, bit for bit")
        action.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    compare = actions.add_parser("compare", help="compare two models of either kind, bit for bit", allow_abbrev=False)
    compare.add_argument("source", metavar="FIRST", type=Path)
    compare.add_argument("target", metavar="SECOND", type=Path)
    for action in (back, compare):
        action.add_argument(
            "--like", metavar="HF_FOLDER", type=Path, help="model folder with the config.json the checkpoint lacks"
        )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert or compare."""
    from megatron_entropy.weights import convert

    if args.action == "compare":
        convert.compare(args.source, args.target, like=args.like, progress=byte_progress)
        print(f"{args.source} and {args.target}: every tensor is the same")
        return 0
    import torch

    options: dict[str, Any] = {"overwrite": args.overwrite, "verify": args.verify, "progress": byte_progress}
    options["dtype"] = getattr(torch, args.dtype) if args.dtype else None
    if args.action == "to-megatron":
        convert.to_megatron(args.source, args.target, max_file_bytes=args.max_shard_size, **options)
    else:
        convert.to_hf(args.source, args.target, like=args.like, max_shard_bytes=args.max_shard_size, **options)
    print(f"{args.target}: written" + (", every tensor compared" if args.verify else ""))
    return 0

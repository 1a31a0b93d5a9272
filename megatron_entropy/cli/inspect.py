"""`megatron-entropy inspect`: show what is in a folder of a run or a model, and whether it is intact."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_entropy.cli.arguments import Subparsers

DESCRIPTION = """Show what a folder holds and whether it is intact. FOLDER is a run, a stage's checkpoints, one
checkpoint (step_000010), a converted Megatron checkpoint, a Hugging Face model, or a LoRA adapter. Shows the tensors
with shape, type and size (read from the index, so it takes no longer for 100 GB than for 1 MB) and, for a checkpoint,
the step, the layout it was saved under and the fingerprint of its settings; of several checkpoints the newest in
full. Compares file sizes, and checksums if they take reading less than 4 GiB. Exit code 1: damaged; 2: nothing to
inspect."""


def add_parser(subparsers: Subparsers) -> None:
    """Define the command line."""
    parser = subparsers.add_parser(
        "inspect", help="show the content of a checkpoint or model folder", description=DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--checksums", action=argparse.BooleanOptionalAction, help="always or never read all bytes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Inspect the folder and print the findings."""
    from rich.console import Console

    from megatron_entropy.checkpoint.inspection import inspect

    return inspect(args.folder, args.checksums, Console(width=None if sys.stdout.isatty() else 140))

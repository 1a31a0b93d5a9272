#!/usr/bin/env python3
"""Converts models between Hugging Face folders and Megatron checkpoints, one parameter in memory at a time.

    python tools/convert_checkpoint.py to-megatron HF_FOLDER OUT
    python tools/convert_checkpoint.py to-hf CHECKPOINT OUT [--like HF_FOLDER]
    python tools/convert_checkpoint.py compare FIRST SECOND [--like HF_FOLDER]

`to-megatron` writes the tensors into OUT/shards, as `megatron.core.dist_checkpointing` reads them under any layout, and
configuration and tokenizer beside them; OUT serves as `model.path` too. `to-hf` takes such a folder, or a checkpoint
of a run (runs/x/checkpoints/STAGE/step_000010, saved under any layout), which needs --like for what it does not hold.
Types stay as they are unless --dtype names another; padding of the vocabulary comes and goes. Folders whose tensors
have several types need --dtype.

Exit code 0, 2 for an input that cannot be converted, 1 when a comparison finds a difference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_entropy.cli.main import Parser, byte_progress, byte_size, exit_code

DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; see the module's text for exit codes."""
    chosen = _parser().parse_args(arguments)
    return exit_code(lambda: chosen.run(chosen))


def _parser() -> Parser:
    parser = Parser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    forward = commands.add_parser("to-megatron", help="Hugging Face folder to Megatron checkpoint", allow_abbrev=False)
    forward.add_argument("source", metavar="HF_FOLDER", type=Path)
    forward.set_defaults(run=_to_megatron)
    back = commands.add_parser("to-hf", help="Megatron checkpoint to Hugging Face folder", allow_abbrev=False)
    back.add_argument("source", metavar="CHECKPOINT", type=Path)
    back.set_defaults(run=_to_hf)
    for command in (forward, back):
        command.add_argument("target", metavar="OUT", type=Path)
        command.add_argument("--dtype", choices=DTYPES, help="type to cast to; default: as it is")
        command.add_argument(
            "--max-shard-size", metavar="SIZE", type=byte_size, default="2GiB", help="of a file; default: %(default)s"
        )
        command.add_argument("--verify", action="store_true", help="compare every tensor afterwards, bit for bit")
        command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    compare = commands.add_parser("compare", help="compare two models of either kind, bit for bit", allow_abbrev=False)
    compare.add_argument("first", metavar="FIRST", type=Path)
    compare.add_argument("second", metavar="SECOND", type=Path)
    compare.set_defaults(run=_compare)
    for command in (back, compare):
        command.add_argument(
            "--like", metavar="HF_FOLDER", type=Path, help="model folder with the config.json the checkpoint lacks"
        )
    return parser


def _to_megatron(chosen: argparse.Namespace) -> int:
    from megatron_entropy.weights import convert as conversion

    conversion.to_megatron(chosen.source, chosen.target, max_file_bytes=chosen.max_shard_size, **_options(chosen))
    return _tell(chosen)


def _to_hf(chosen: argparse.Namespace) -> int:
    from megatron_entropy.weights import convert as conversion

    conversion.to_hf(
        chosen.source, chosen.target, like=chosen.like, max_shard_bytes=chosen.max_shard_size, **_options(chosen)
    )
    return _tell(chosen)


def _compare(chosen: argparse.Namespace) -> int:
    from megatron_entropy.weights import convert as conversion

    conversion.compare(chosen.first, chosen.second, like=chosen.like, progress=byte_progress)
    print(f"{chosen.first} and {chosen.second}: every tensor is the same")
    return 0


def _options(chosen: argparse.Namespace) -> dict:
    import torch

    dtype = getattr(torch, chosen.dtype) if chosen.dtype else None
    return {"dtype": dtype, "overwrite": chosen.overwrite, "verify": chosen.verify, "progress": byte_progress}


def _tell(chosen: argparse.Namespace) -> int:
    print(f"{chosen.target}: written" + (", every tensor compared" if chosen.verify else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Merges a LoRA adapter in PEFT's format into a Hugging Face model folder, one tensor in memory at a time.

    python tools/merge_lora.py BASE_FOLDER ADAPTER_FOLDER OUT

Sums are formed in fp32 and cast to the type of the base. Options of an adapter that change more than that (DoRA, bias,
saved modules, ranks by pattern, ...) are refused by name. Exit code 0, or 2 for an input that cannot be merged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_entropy.cli.main import Parser, byte_progress, byte_size, exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge; see the module's text for exit codes."""
    parser = Parser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("base", metavar="BASE_FOLDER", type=Path)
    parser.add_argument("adapter", metavar="ADAPTER_FOLDER", type=Path)
    parser.add_argument("target", metavar="OUT", type=Path)
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", type=byte_size, default="2GiB", help="of a file; default: %(default)s"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    chosen = parser.parse_args(arguments)

    def run() -> int:
        from megatron_entropy.weights import peft as lora

        changed = lora.merge(
            chosen.base, chosen.adapter, chosen.target,
            max_shard_bytes=chosen.max_shard_size, overwrite=chosen.overwrite, progress=byte_progress,
        )  # fmt: skip
        print(f"{chosen.target}: written, {changed} tensors changed by the adapter")
        return 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())

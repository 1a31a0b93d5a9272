#!/usr/bin/env python3
"""Convert models between Hugging Face folders and Megatron checkpoints: `megatron-entropy convert` as a script."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_entropy.cli import main as cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `megatron-entropy convert`."""
    return cli.main(["convert", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())

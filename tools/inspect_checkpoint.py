#!/usr/bin/env python3
"""Show the content of a checkpoint or model folder: `megatron-entropy inspect` as a script."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_entropy.cli import main as cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `megatron-entropy inspect`."""
    return cli.main(["inspect", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())

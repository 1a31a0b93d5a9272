"""`python -m megatron_entropy` is the command `megatron-entropy`."""

import sys

from megatron_entropy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

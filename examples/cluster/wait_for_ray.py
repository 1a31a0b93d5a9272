"""Wait until a number of nodes have joined the Ray cluster at RAY_ADDRESS.

    python examples/cluster/wait_for_ray.py NODES [SECONDS]

Exit code 1 with one line when they have not come in time (300 s).
"""

import logging
import os
import sys
import time

import ray


def main() -> str | None:
    """Return the message of a failure."""
    wanted, seconds = int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 300.0
    address = os.environ["RAY_ADDRESS"]
    deadline = time.monotonic() + seconds
    joined, reason = 0, ""
    while time.monotonic() < deadline:
        try:
            if not ray.is_initialized():
                ray.init(address=address, logging_level=logging.CRITICAL, log_to_driver=False)
            joined = sum(node["Alive"] for node in ray.nodes())
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = f" ({' '.join(str(error).split())[:200]})"
        if joined >= wanted:
            return None
        time.sleep(1.0)
    return f"error: {joined} of {wanted} nodes have joined the Ray cluster at {address} within {seconds:.0f} s{reason}"


if __name__ == "__main__":
    sys.exit(main())

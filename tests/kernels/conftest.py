"""Makes `entropy_kernels` importable from the source tree and offers gloo ranks to the tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parents[1] / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def ranks() -> Iterator:
    """As many gloo processes as a test needs, for the whole session (starting them is the slow part)."""
    from cases import RANKS
    from rank_pool import RankPool

    pool = RankPool(max(RANKS))
    yield pool
    pool.close()

"""What holds for all tests: hypothesis has no deadline, for a busy machine is no failure; random numbers are seeded."""

import random
import sys

import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Seed the generators of the libraries that the test has imported."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)

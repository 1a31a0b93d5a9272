"""What holds for all tests: hypothesis has no deadline, for a busy machine is not a failure."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

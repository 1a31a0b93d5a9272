"""Settings of a run on several machines."""

from __future__ import annotations

from megatron_entropy.config.types import PositiveFloat, Section


class ClusterConfig(Section):
    """Limits on waiting for other machines. A run uses those of its first stage."""

    timeout: PositiveFloat = 3600.0
    """Seconds that a rank waits for the others in one collective; more than the longest generation takes."""
    lost_after: PositiveFloat = 120.0
    """Seconds without a sign of life of another machine after which the run ends. Shorter losses are survived."""

"""Verifiers grade a response against a ground truth.

`registry` has the verifiers by name; they are in `strings`, `dapo` and `symbolic`. `pool` runs them safely.
"""

from megatron_entropy.rewards.pool import RewardPool, check_verifier
from megatron_entropy.rewards.registry import VERIFIERS, Verifier, load_verifier

__all__ = ["VERIFIERS", "RewardPool", "Verifier", "check_verifier", "load_verifier"]

"""Verifiers: from a response and a ground truth to a `Grade`, with hanging and crashing contained.

`registry` knows the verifiers by name, `strings` and `symbolic` hold them, `pool` runs them.
"""

from megatron_entropy.rewards.pool import RewardPool
from megatron_entropy.rewards.registry import VERIFIERS, Verifier, load_verifier

__all__ = ["VERIFIERS", "RewardPool", "Verifier", "load_verifier"]

"""Verifiers grade a response against a ground truth.

`registry` has the verifiers by name, a family of them in each file. `pool` runs them safely. `client` chooses between
a pool and a reward server, `server` is that server.
"""

from megatron_entropy.rewards.client import TOKEN_VARIABLE, Grader, RemoteGrader, check_grader, open_grader
from megatron_entropy.rewards.pool import RewardPool, check_verifier
from megatron_entropy.rewards.registry import COMPARISON, VERIFIERS, Verifier, load_verifier

__all__ = [
    "COMPARISON",
    "TOKEN_VARIABLE",
    "VERIFIERS",
    "Grader",
    "RemoteGrader",
    "RewardPool",
    "Verifier",
    "check_grader",
    "check_verifier",
    "load_verifier",
    "open_grader",
]

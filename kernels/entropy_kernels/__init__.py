"""Exact per-token statistics of a language model's head, from hidden states, without logits.

One call gives log-probability, entropy and more of `softmax(hidden @ weight^T / temperature)`,
with the vocabulary split over a tensor-parallel group or not, and their exact gradients. Needs
torch; uses Triton on CUDA where it is installed. See README.md beside this package.
"""

from .api import token_stats, token_stats_from_logits
from .distillation import distillation
from .guided import GuidedTeacher, guided_teacher, guided_temperature
from .records import TokenStats

__all__ = [
    "GuidedTeacher",
    "TokenStats",
    "distillation",
    "guided_teacher",
    "guided_temperature",
    "token_stats",
    "token_stats_from_logits",
]

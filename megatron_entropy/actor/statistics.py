"""Functions that compute per-token fields from hidden states and the head's weight, for `Actor.score`.

A `TokenStatistics` gets the `HeadInputs` of one micro-batch and returns the `Sample` fields it fills. A method that
needs another quantity of the distribution passes its own function; the logits never exist as a whole.
"""

from __future__ import annotations

from torch import Tensor

from entropy_kernels import TokenStats, token_stats
from megatron_entropy.records import HeadInputs, TokenStatistics


def policy_statistics(*, temperature: float, entropy: bool = True) -> TokenStatistics:
    """Fill `logprob` (nats) and, if requested, `entropy` (nats, over the full vocabulary).

    Args:
        temperature: > 0; the distribution is softmax(logits / temperature).
    """

    def compute(head: HeadInputs) -> dict[str, Tensor]:
        stats = head_statistics(head, temperature=temperature, entropy=entropy)
        return {"logprob": stats.logprob} | ({} if stats.entropy is None else {"entropy": stats.entropy})

    return compute


def reference_statistics(*, temperature: float) -> TokenStatistics:
    """Fill `reference_logprob` (nats).

    Args:
        temperature: > 0; the distribution is softmax(logits / temperature).
    """

    def compute(head: HeadInputs) -> dict[str, Tensor]:
        return {"reference_logprob": head_statistics(head, temperature=temperature, entropy=False).logprob}

    return compute


def head_statistics(head: HeadInputs, *, temperature: float, entropy: bool) -> TokenStats:
    """Log-probability and, if requested, entropy of every token of a micro-batch: [T] each, differentiable."""
    return token_stats(
        head.hidden,
        head.weight,
        head.targets,
        temperature=temperature,
        entropy=entropy,
        group=head.group,
        sequence_parallel=head.sequence_parallel,
        vocab_size=head.vocab_size,
        impl=head.impl,
        main_grad=head.main_grad,
    )

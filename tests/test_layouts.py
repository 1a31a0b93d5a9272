"""The actor computes the same whatever the layout: log-probabilities, entropies, losses, gradients, updates.

Runs `tools/check_layouts.py` on the real Megatron model over gloo ranks. Does not cover context parallelism, which
needs Transformer Engine, nor bfloat16.
"""

import check_layouts
import pytest

QUANTITIES = ("logprob", "entropy", "loss", "grad_norm", "parameters")


@pytest.mark.actor
def test_every_layout_agrees_with_one_rank():
    rows = check_layouts.run()
    assert {"TP2", "TP2+SP", "PP2", "PP2+VPP2", "DP2", "DP2+distributed optimizer", "TP2xPP2"} <= {
        row["layout"] for row in rows
    }
    for row in rows:
        for quantity in QUANTITIES:
            assert row[quantity] <= check_layouts.TOLERANCE, (row["layout"], quantity, row[quantity])


@pytest.mark.actor
def test_a_lost_gradient_would_be_seen():
    """The comparison is not blind: another seed's batch differs by far more than the tolerance."""
    samples = check_layouts.make_samples(301, seed=0), check_layouts.make_samples(301, seed=1)
    assert any((a.tokens != b.tokens).any() for a, b in zip(*samples, strict=True))

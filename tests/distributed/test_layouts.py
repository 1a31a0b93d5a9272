"""The actor computes the same under every layout: log-probabilities, entropies, losses, gradients, updates.

Runs `tools/check_layouts.py` on the real Megatron model over gloo ranks. Does not cover bfloat16, nor Transformer
Engine's attention, which context parallelism uses on a GPU.
"""

import check_layouts
import numpy as np
import pytest

QUANTITIES = (*check_layouts.NUMBERS, "parameters")


@pytest.mark.actor
def test_every_layout_agrees_with_one_rank():
    rows = check_layouts.run()
    expected = {"TP2", "TP2+SP", "PP2", "PP2+VPP2", "DP2", "DP2xCP2+distributed optimizer", "TP2xPP2"}
    assert expected | {"CP2", "TP2+SPxCP2", "PP2xCP2, recomputed"} <= {row["layout"] for row in rows}
    for row in rows:
        for quantity in QUANTITIES:
            assert row[quantity] <= check_layouts.TOLERANCE, (row["layout"], quantity, row[quantity])


@pytest.mark.actor
def test_every_layout_of_experts_agrees_with_one_rank():
    for row in check_layouts.run(check_layouts.EXPERT_LAYOUTS, experts=True):
        for quantity in QUANTITIES:
            assert row[quantity] <= check_layouts.TOLERANCE, (row["layout"], quantity, row[quantity])


@pytest.mark.actor
def test_the_comparison_sees_a_difference():
    """An outcome that differs in one parameter by twice the tolerance is reported."""
    one = np.zeros(1)
    numbers = dict.fromkeys(check_layouts.NUMBERS, one)
    reference = check_layouts.Outcome(**numbers, parameters={"w": np.zeros(3)})
    moved = check_layouts.Outcome(**numbers, parameters={"w": np.array([0, 0, 2 * check_layouts.TOLERANCE])})
    differences = check_layouts.compare(moved, reference)
    assert differences["parameters"] > check_layouts.TOLERANCE and differences["logprob"] == 0

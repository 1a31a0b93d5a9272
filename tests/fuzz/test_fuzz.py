"""Damaged inputs of every kind end in one line, never in a traceback, a hang or an output folder.

The generators are those of tools/fuzz.py, which runs many more cases.
"""

import logging
import random

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    made = fuzz.make_inputs(tmp_path_factory.mktemp("inputs"))
    logging.disable(logging.CRITICAL)
    yield made
    logging.disable(logging.NOTSET)


@settings(max_examples=500, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_damaged_inputs_are_accepted_or_refused_in_one_line(inputs, seed):
    outcome = fuzz.run_case(inputs, seed, random.Random(seed))
    assert outcome.kind in ("accepted", "refused"), f"{outcome.target}: {outcome.kind}\n{outcome.text}"


def test_values_that_are_never_right_are_noticed(inputs, monkeypatch):
    """The check can fail: a command that accepts everything, raises or writes is reported."""

    def outcomes(command):
        monkeypatch.setattr("megatron_entropy.cli.main.main", command)
        return {fuzz.run_case(inputs, seed, random.Random(seed)).kind for seed in range(100)}

    assert outcomes(lambda arguments: 0) == {"accepted", "must refuse"}
    assert outcomes(lambda arguments: 1 / 0) == {"traceback"}
    assert outcomes(lambda arguments: 2) == {"many lines"}
    assert outcomes(lambda arguments: (inputs.root / "out").mkdir() or 0) == {"wrote"}

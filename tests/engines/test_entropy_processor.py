"""The logits processors that record entropies, fed as vLLM feeds them, without an engine.

Proves: a processor follows requests through the slots of the batch, also where a move overwrites a finished request
that vLLM does not list as removed; what it records is that of the right token; the logits stay as they are. For the V2
model runner, which needs a GPU, this is the only proof. The V1 one also runs in the engines of `test_rollout.py`.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_entropy.rollout import vllm_entropy
from megatron_entropy.rollout.entropy import ROW

MOVE, SWAP = vllm_entropy.MoveDirectionality.UNIDIRECTIONAL, vllm_entropy.MoveDirectionality.SWAP
VOCABULARY = 1000


@pytest.fixture(autouse=True)
def log(monkeypatch):
    monkeypatch.setattr(vllm_entropy, "LOG", vllm_entropy.EntropyLog())
    monkeypatch.setitem(vllm_entropy.CHUNK, "cpu", 3 * VOCABULARY)  # four rows: a chunk of three and a single one


def setting(rank=0, speculative_config=None):
    parallel = SimpleNamespace(rank=rank)
    return SimpleNamespace(parallel_config=parallel, speculative_config=speculative_config)


def params(row, temperature=1.0):
    return vllm_entropy.SamplingParams(temperature=temperature, extra_args=None if row is None else {ROW: row})


def logits(rows, seed=0):
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 8


def expected(scaled):
    logprobs = scaled.double().log_softmax(-1)
    return torch.stack([torch.special.entr(logprobs.exp()).sum(-1), logprobs.amax(-1)], 1).float()


class V1:
    """vLLM's persistent batch, as far as a processor sees it."""

    def __init__(self, rank=0):
        self.processor = vllm_entropy.EntropyProcessor(setting(rank), torch.device("cpu"), False)
        self.outputs = {}

    def step(self, order, removed=(), added=(), moved=()):
        """Run a step whose batch holds the requests `order`; returns {request: position} of what was recorded."""
        self.outputs |= {row: [] for _, row in added}
        update = vllm_entropy.BatchUpdate(
            batch_size=len(order),
            removed=list(removed),
            added=[(slot, params(row), [1, 2], self.outputs[row]) for slot, row in added],
            moved=list(moved),
        )
        self.processor.update_state(update if removed or added or moved else None)
        batch = logits(len(order), seed=len(self.outputs))
        before = batch.clone()
        assert self.processor.apply(batch) is batch and torch.equal(batch, before)
        recorded = vllm_entropy.LOG.read()
        np.testing.assert_allclose(recorded.values, expected(batch), atol=2e-5)
        for row in order:
            self.outputs[row].append(7)
        assert recorded.rows.tolist() == order
        return dict(zip(order, recorded.positions.tolist(), strict=True))


def test_requests_are_followed_through_the_slots():
    batch = V1()
    assert batch.step([0, 1, 2, 3], added=[(slot, slot) for slot in range(4)]) == dict.fromkeys(range(4), 0)
    assert batch.step([0, 1, 2, 3]) == dict.fromkeys(range(4), 1)
    # 1 has finished, 3 moves into its slot: vLLM takes slot 1 off the list of removed ones when it fills it.
    assert batch.step([0, 3, 2], moved=[(3, 1, MOVE)]) == {0: 2, 3: 2, 2: 2}
    # 3 has finished, 4 takes its slot at once, again without a removal.
    assert batch.step([0, 4, 2], added=[(1, 4)]) == {0: 3, 4: 0, 2: 3}
    assert batch.step([2, 4, 0], moved=[(0, 2, SWAP)]) == {2: 4, 4: 1, 0: 4}
    # 2 and 4 have finished: slots 0 and 1; 0 moves to slot 0, and slot 1 is listed.
    assert batch.step([0], removed=[1], moved=[(2, 0, MOVE)]) == {0: 5}
    # A preempted request comes back with its output.
    kept = batch.outputs[0]
    batch.step([5], removed=[0], added=[(0, 5)])
    batch.processor.update_state(
        vllm_entropy.BatchUpdate(batch_size=2, removed=[], added=[(1, params(0), [1], kept)], moved=[])
    )
    assert batch.step([5, 0]) == {5: 1, 0: 6}


def test_other_workers_record_nothing_and_a_request_without_a_row_has_none():
    batch = V1(rank=1)
    batch.processor.update_state(
        vllm_entropy.BatchUpdate(batch_size=1, removed=[], added=[(0, params(0), [1], [])], moved=[])
    )
    batch.processor.apply(logits(1))
    assert [len(column) for column in vllm_entropy.LOG.read()] == [0, 0, 0]
    assert vllm_entropy.row_of(params(None)) == vllm_entropy.NO_ROW


def test_extreme_logits_have_an_entropy():
    rows = torch.full((4, VOCABULARY), -torch.inf)
    rows[0, 5] = 3.0
    rows[1, :2] = -300.0
    rows[2] = 1e4
    rows[3, 0], rows[3, 1:] = 500.0, 0.0
    found = vllm_entropy.sampling_statistics(rows)
    wanted = [[0, 0], [np.log(2), -np.log(2)], [np.log(VOCABULARY), -np.log(VOCABULARY)], [0, 0]]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_speculative_decoding_is_refused():
    with pytest.raises(ValueError, match=r"rollout.entropy=true does not go with speculative decoding"):
        vllm_entropy.EntropyProcessor(setting(speculative_config=object()), torch.device("cpu"), False)


def test_the_v2_processor_divides_by_the_temperature_of_the_slot(monkeypatch):
    from vllm.v1.worker.gpu import buffer_utils

    from megatron_entropy.rollout import vllm_entropy_v2

    monkeypatch.setattr(vllm_entropy_v2, "LOG", vllm_entropy.LOG)
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)  # pinned memory needs a GPU
    prompt_length = buffer_utils.UvaBackedTensor(4, torch.int32)
    prompt_length.np[:] = [5, 0, 3, 9]
    prompt_length.copy_to_uva()
    processor = vllm_entropy_v2.EntropyProcessor(setting(), SimpleNamespace(max_num_reqs=4, prompt_len=prompt_length))
    assert processor.add_request(2, params(0, 0.5)) and processor.add_request(0, params(1, 1.5))
    assert processor.add_request(3, params(None))
    processor.apply_staged_writes()
    # Slot 2 has read 3 + 4 tokens, slot 0 its prompt, slot 3 a part of it.
    context = SimpleNamespace(expanded_idx_mapping=torch.tensor([2, 0, 3]), pos=torch.tensor([6, 4, 2]))
    batch = logits(3)
    before = batch.clone()
    assert processor.apply(batch, context) is batch and torch.equal(batch, before)
    processor.add_request(2, params(7, 1.0))  # the slot's next request
    recorded = vllm_entropy.LOG.read()
    assert recorded.rows.tolist() == [0, 1, vllm_entropy.NO_ROW] and recorded.positions.tolist() == [4, 0, -6]
    np.testing.assert_allclose(recorded.values, expected(batch / torch.tensor([[0.5], [1.5], [1.0]])), atol=2e-5)

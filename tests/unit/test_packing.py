"""Packing keeps every sequence once, stays within its token limit, balances ranks, and shifts targets by one."""

import dataclasses

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_entropy.data.packing import IGNORE_INDEX, own_positions, pack, plan_microbatches
from megatron_entropy.records import Sample

CPU = torch.device("cpu")


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    max_tokens_per_microbatch=st.integers(50, 1000),
    ranks=st.integers(1, 4),
    multiple=st.integers(1, 3),
)
def test_every_sequence_is_packed_once_within_the_limit(lengths, max_tokens_per_microbatch, ranks, multiple):
    per_rank = plan_microbatches(
        lengths, max_tokens_per_microbatch=max_tokens_per_microbatch, ranks=ranks, multiple=multiple
    )
    assert len(per_rank) == ranks
    assert len({len(batches) for batches in per_rank}) == 1 and len(per_rank[0]) % multiple == 0
    assert sorted(i for batches in per_rank for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in (batch for batches in per_rank for batch in batches):
        assert sum(lengths[i] for i in batch) <= max_tokens_per_microbatch or len(batch) == 1


@given(lengths=st.lists(st.integers(10, 60), min_size=64, max_size=128), ranks=st.integers(2, 4))
def test_ranks_have_about_the_same_number_of_tokens(lengths, ranks):
    per_rank = plan_microbatches(lengths, max_tokens_per_microbatch=400, ranks=ranks)
    loads = [sum(lengths[i] for batch in batches for i in batch) for batches in per_rank]
    assert max(loads) - min(loads) <= 2 * max(lengths)


def sample(prompt: int, response: int, first: int) -> Sample:
    made = Sample(np.arange(first, first + prompt + response, dtype=np.int32), prompt, "stop", "")
    return dataclasses.replace(made, weight=made.constant(0.5), logprob=made.constant(-1.0))


def test_targets_are_the_next_tokens_of_the_response():
    batch = pack([sample(2, 3, 10), sample(1, 1, 50)], [0, 1], device=CPU)
    assert batch.tokens.tolist() == [10, 11, 12, 13, 50]
    assert batch.targets.tolist() == [IGNORE_INDEX, 12, 13, 14, 51]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0]
    assert batch.boundaries.tolist() == [0, 4, 5]
    assert batch.weight.tolist() == [0, 0.5, 0.5, 0.5, 0.5]
    assert batch.logprob.tolist() == [0, -1, -1, -1, -1]
    assert batch.advantage is None and batch.order == (0, 1)


def test_padding_is_an_extra_sequence_without_targets_and_weight():
    batch = pack([sample(2, 3, 10)], [0], multiple=8, device=CPU)
    assert batch.boundaries.tolist() == [0, 4, 8] and batch.order == (0, -1)
    assert set(batch.targets[4:].tolist()) == {IGNORE_INDEX} and not batch.weight[4:].any()


def test_a_micro_batch_without_sequences_is_padding():
    batch = pack([], [], multiple=2, device=CPU)
    assert batch.boundaries.tolist() == [0, 2] and not batch.weight.any() and batch.advantage is not None


@given(cp=st.integers(1, 5), chunk=st.integers(1, 9))
def test_context_parallel_ranks_share_positions_and_work(cp, chunk):
    length = 2 * cp * chunk
    own = [own_positions(length, cp_rank=rank, cp=cp) for rank in range(cp)]
    assert sorted(np.concatenate(own)) == list(range(length))
    assert len({sum(position + 1 for position in held) for held in own}) == 1, "keys that causal queries see"
    assert own[0].tolist() == [*range(chunk), *range(length - chunk, length)], "the first and the last chunk"


@given(
    lengths=st.lists(st.integers(1, 12), min_size=0, max_size=4),
    cp=st.integers(2, 4),
    multiple=st.sampled_from([1, 3, 4]),
)
def test_the_parts_of_context_parallel_ranks_are_the_whole_pack(lengths, cp, multiple):
    samples = [sample(1, response, 100 * index) for index, response in enumerate(lengths)]
    parts = [pack(samples, range(len(lengths)), multiple=multiple, cp_rank=r, cp=cp, device=CPU) for r in range(cp)]
    for part in parts:
        assert len(part.tokens) % multiple == 0 and part.edges == parts[0].edges and part.order == parts[0].order
        assert part.boundaries.tolist() == list(part.edges) and part.edges[-1] == len(part.tokens)
    found = {index: {} for index in range(len(lengths))}
    for part in parts:
        for index, start, end in zip(part.order, part.edges, part.edges[1:], strict=False):
            assert (end - start) % 2 == 0, "two chunks"
            for at in range(start, end):
                fields = [getattr(part, name)[at].item() for name in ("tokens", "targets", "weight", "logprob")]
                position = part.positions[at].item()
                if index >= 0 and position < lengths[index]:
                    found[index][position] = fields
                else:
                    assert fields[1:3] == [IGNORE_INDEX, 0], "padding"
    for index, length in enumerate(lengths):
        assert found[index] == {p: [100 * index + p, 100 * index + p + 1, 0.5, -1.0] for p in range(length)}

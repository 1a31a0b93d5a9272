"""The plan of a layout: every element of every Hugging Face tensor comes from exactly one rank.

Random models and layouts (hypothesis), and the published sizes of common models. Pure arithmetic without process
groups; that ranks really hold what the plan says is shown by tests/distributed/test_actor.py.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_entropy.config.architecture import ModelArchitecture, MoeArchitecture, split_layers
from megatron_entropy.config.schema import ParallelConfig
from megatron_entropy.errors import ConfigError
from megatron_entropy.weights import names
from megatron_entropy.weights.plan import plan, transfers


def model(family: str, layers: int, hidden: int, ffn: int, heads: int, groups: int, head_dim: int, vocab: int, **more):
    numbers = dict(max_positions=64, norm_eps=1e-6, rope_theta=1e4, rope_kind="default", rope_scaling={})
    return ModelArchitecture(
        architecture=family, family=family, num_layers=layers, hidden_size=hidden, ffn_size=ffn, num_heads=heads,
        num_query_groups=groups, head_dim=head_dim, vocab_size=vocab, tied_embeddings=more.pop("tied", False),
        qkv_bias=family == "qwen2", qk_norm=family.startswith("qwen3"), **more, **numbers,
    )  # fmt: skip


@st.composite
def models_and_layouts(draw: st.DrawFn) -> tuple[ModelArchitecture, ParallelConfig]:
    tp, pp, vpp = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    ep, etp, dp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 8]))
    cp = draw(st.sampled_from([1, 2]))
    family = draw(st.sampled_from(sorted(names.FAMILIES)))
    groups = draw(st.sampled_from([1, 2, 4]))
    moe = None
    if family == "qwen3_moe":
        moe = MoeArchitecture(ep * draw(st.integers(1, 3)), 1, 4 * draw(st.integers(1, 3)), True)
        while tp * cp * dp % (ep * etp):
            dp *= 2
    else:
        ep = etp = 1
    arch = model(
        family,
        layers=draw(st.integers(pp * vpp, 7)),
        hidden=draw(st.integers(1, 9)),
        ffn=4 * draw(st.integers(1, 4)),
        heads=groups * draw(st.integers(1, 3)),
        groups=groups,
        head_dim=4 * draw(st.integers(1, 2)),
        vocab=draw(st.integers(1, 400)),
        tied=draw(st.booleans()),
        moe=moe,
    )
    return arch, ParallelConfig(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, dp=dp, cp=cp)


@settings(max_examples=150)
@given(models_and_layouts())
def test_every_element_comes_from_exactly_one_rank(case):
    arch, layout = case
    placements = plan(arch, layout)
    seen: dict[str, np.ndarray] = {}
    for entry in (placement.entry for placement in placements):
        seen |= {name: np.zeros(full, int) for name, full in zip(entry.tensors, entry.shapes, strict=True)}
    taken: dict[tuple[int, str], np.ndarray] = {}
    shard_shapes = {p.entry.megatron: names.shard_shape(p.entry, arch, ranks=p.num_shards) for p in placements}
    for move in transfers(placements, arch):
        leading = (slice(None),) * move.dim
        seen[move.tensor][(*leading, slice(move.tensor_start, move.tensor_start + move.length))] += 1
        shard = taken.setdefault((move.rank, move.parameter), np.zeros(shard_shapes[move.parameter], dtype=int))
        shard[(*leading, slice(move.shard_start, move.shard_start + move.length))] += 1
        assert 0 <= move.rank < layout.world_size
    assert all((count == 1).all() for count in seen.values())
    assert all(count.max() <= 1 for count in taken.values()), "no element of a shard is in two tensors"


@settings(max_examples=100)
@given(models_and_layouts(), st.integers(0, 2**31))
def test_unshard_undoes_shard(case, seed):
    arch, layout = case
    generator = torch.Generator().manual_seed(seed)
    for placement in plan(arch, layout):
        entry, ranks = placement.entry, placement.num_shards
        tensors = [torch.randn(full, generator=generator) for full in entry.shapes]
        shards = [names.shard(entry, tensors, arch, rank=rank, ranks=ranks) for rank in range(len(placement.ranks))]
        for name, tensor in zip(entry.tensors, tensors, strict=True):
            assert torch.equal(names.unshard(entry, shards, arch)[name], tensor)


def test_fused_heads_are_in_the_order_that_megatron_computes_with():
    """Two groups of two query heads: rank 1 of 2 holds group 1: its queries, then its key, then its value."""
    arch = model("qwen2", 1, 1, 4, 4, 2, 3, 8)
    entry = next(e for e in names.entries(arch) if e.megatron.endswith("linear_qkv.bias"))
    q, k, v = torch.arange(12.0), 100 + torch.arange(6.0), 200 + torch.arange(6.0)
    shard = names.shard(entry, [q, k, v], arch, rank=1, ranks=2)
    assert shard.tolist() == [6, 7, 8, 9, 10, 11, 103, 104, 105, 203, 204, 205]


def test_layers_are_split_evenly_and_the_ends_get_no_more_than_others():
    assert [len(r) for r in split_layers(28, 8)] == [3, 4, 4, 4, 4, 3, 3, 3]
    for count in range(1, 40):
        for stages in range(1, count + 1):
            sizes = [len(layers) for layers in split_layers(count, stages)]
            assert [layer for layers in split_layers(count, stages) for layer in layers] == list(range(count))
            assert max(sizes) - min(sizes) <= 1 and sizes[-1] == min(sizes)


MOE = dict(num_experts=128, experts_per_token=8, normalise=True)
PUBLISHED: dict[str, tuple[ModelArchitecture, int]] = {
    "Qwen2.5-Math-7B": (model("qwen2", 28, 3584, 18944, 28, 4, 128, 152064), 7_615_616_512),
    "Qwen3-4B": (model("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, tied=True), 4_022_468_096),
    "Qwen3-8B": (model("qwen3", 36, 4096, 12288, 32, 8, 128, 151936), 8_190_735_360),
    "Qwen3-14B": (model("qwen3", 40, 5120, 17408, 40, 8, 128, 151936), 14_768_307_200),
    "Qwen3-30B-A3B": (
        model("qwen3_moe", 48, 2048, 6144, 32, 4, 128, 151936, moe=MoeArchitecture(ffn_size=768, **MOE)),
        30_532_122_624,
    ),
    "Qwen3-235B-A22B": (
        model("qwen3_moe", 94, 4096, 12288, 64, 4, 128, 151936, moe=MoeArchitecture(ffn_size=1536, **MOE)),
        235_093_634_560,
    ),
    "Llama-3.1-8B": (model("llama", 32, 4096, 14336, 32, 8, 128, 128256), 8_030_261_248),
    "Llama-3.1-70B": (model("llama", 80, 8192, 28672, 64, 8, 128, 128256), 70_553_706_496),
}
"""Sizes from each model's config.json, and the number of parameters its safetensors index implies."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_planned(name):
    arch, num_parameters = PUBLISHED[name]
    assert arch.num_parameters == num_parameters
    layout = ParallelConfig(tp=8, pp=8, ep=8 if arch.moe else 1)
    placements = plan(arch, layout)
    moves = list(transfers(placements, arch))
    sizes = {n: full for e in names.entries(arch) for n, full in zip(e.tensors, e.shapes, strict=True)}
    moved = sum(m.length * (int(np.prod(sizes[m.tensor])) // sizes[m.tensor][m.dim]) for m in moves)
    assert moved == num_parameters
    assert {move.rank for move in moves} == set(range(64))
    # The plan does not grow faster than the model: a shard of query, key and value has most slices, which are three.
    assert len(moves) <= 3 * sum(len(placement.ranks) for placement in placements)


def test_an_uneven_cut_is_named():
    arch = model("llama", 2, 8, 12, 4, 4, 8, 100)
    with pytest.raises(
        ConfigError, match=r"actor\.parallel\.tp=8 does not divide the 12 rows or columns of .*mlp\.linear_fc1"
    ):
        plan(dataclasses.replace(arch, num_heads=8, num_query_groups=8), ParallelConfig(tp=8))

"""LoRA on Megatron: the adapters are trained, nothing else, and every layout does the same.

A tiny random Qwen3 on CPU ranks over gloo. The definition is PyTorch's: transformers' model with weights
`W + scale * up @ down` and their gradients by autograd, one sequence after the other. Layouts are compared with a single
rank after three updates. Tolerance 1e-5: other layouts sum in another order, about 1e-7 relative in fp32. Not proved
here: Transformer Engine's layers, which need a GPU.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import check_layouts
import inspect_checkpoint
import merge_lora
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from megatron_entropy import config as configuration
from megatron_entropy import manifest, parallel
from megatron_entropy.architecture import read_shape
from megatron_entropy.config import ActorConfig, LoraConfig, OptimizerConfig, ParallelConfig
from megatron_entropy.errors import CheckpointError, ConfigError, ModelError
from megatron_entropy.resharding import names
from megatron_entropy.resharding.folder import TensorFolder
from megatron_entropy.resharding.lora import write_adapter
from megatron_entropy.resharding.source import ShardedSource, load

pytestmark = pytest.mark.actor

TOLERANCE = 1e-5
TEMPERATURE = 0.8
LORA = LoraConfig(rank=4, alpha=6.0)
ONE = ParallelConfig()
TP2 = ParallelConfig(tp=2)
TP2_SP = ParallelConfig(tp=2, sequence_parallel=True)
PP2 = ParallelConfig(pp=2)
DP2_SHARDED = ParallelConfig(dp=2, distributed_optimizer=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout, and what else changes how the same numbers are computed."""

    parallel: ParallelConfig
    recompute: str = "none"


CASES = {
    "TP2": Case(TP2),
    "TP2+SP, recompute": Case(TP2_SP, "full"),
    "PP2, recompute": Case(PP2, "full"),
    "PP2+VPP2": Case(ParallelConfig(pp=2, vpp=2)),
    "DP2": Case(ParallelConfig(dp=2)),
    "DP2+distributed optimizer": Case(DP2_SHARDED),
    "TP2+SPxPP2": Case(ParallelConfig(tp=2, pp=2, sequence_parallel=True)),
    "TP4, 2 key/value heads": Case(ParallelConfig(tp=4)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Tied embeddings: of a pipeline's ends both hold them, neither trains them."""
    return str(write_model(tmp_path_factory.mktemp("model"), "Qwen3", tied=True))


def write_model(folder: Path, family: str, *, tied: bool = False) -> Path:
    import transformers

    sizes = dict(
        vocab_size=151, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, head_dim=32,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.1,
    )  # fmt: skip
    if family == "Qwen3Moe":
        sizes |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))
    model.save_pretrained(folder)
    return folder


def build(folder: str, layout: ParallelConfig, *, lora: LoraConfig = LORA, recompute="none", seed=7, clip=0.5, **changes):
    from megatron_entropy.actor.actor import Actor

    parallel.lay_out(layout, seed=1)
    # Adam's first steps are lr * sign(gradient) however small the gradient, which would turn rounding into a
    # difference of 2 lr; a large eps keeps an update proportional to its gradient.
    optimizer = OptimizerConfig(lr=0.02, eps=0.1, weight_decay=0.1, clip_grad=clip)
    settings = dict(parallel=layout, optimizer=optimizer, lora=lora, recompute=recompute, token_budget=192)
    actor = Actor(
        read_shape(folder), ActorConfig(**settings, **{"dtype": "float32", **changes}), total_updates=10, seed=seed
    )
    load(TensorFolder(folder), actor.shape, layout, actor.named_shards())
    actor.after_load()
    return actor


def loss(stats, batch):
    return -batch.advantage * stats.logprob - 0.01 * stats.entropy, {}


def update(actor) -> tuple[float, float]:
    samples = check_layouts.make_samples(actor.shape.vocab_size)
    metrics = actor.update(samples, loss, temperature=TEMPERATURE)
    return metrics["train/loss"].value, metrics["train/grad_norm"].value


def whole(actor, local, streamed=None) -> dict[str, torch.Tensor]:
    """Tensors of a stream on rank 0; a collective."""
    source = ShardedSource(actor.shape, actor.config.parallel, local, torch.float32, streamed)
    return {name: tensor.clone() for name, tensor in source if tensor is not None}


def adapters(actor, local=None) -> dict[str, torch.Tensor]:
    local = actor.adapter_shards() if local is None else local
    return whole(actor, local, names.adapter_entries(actor.shape, actor.config.lora))


def scores(actor) -> np.ndarray:
    samples = check_layouts.make_samples(actor.shape.vocab_size)
    return np.concatenate([s.response("logprob") for s in actor.score(samples, temperature=TEMPERATURE)])


def life(folder: str, case: Case) -> dict[str, object] | None:
    """Every promise of an actor with adapters, on all ranks; what rank 0 saw."""
    from megatron_entropy.actor import lora

    plain = build(folder, case.parallel, lora=LoraConfig())
    for parameter in plain.named_shards().values():
        parameter.requires_grad_(False)  # torch.matmul multiplies in another order where a weight wants a gradient
    base = scores(plain)
    actor = build(folder, case.parallel, recompute=case.recompute)
    before = {name: shard.detach().clone() for name, shard in actor.named_shards().items()}
    assert np.array_equal(scores(actor), base), "adapters that have not been trained change no bit"
    start = adapters(actor)
    steps = [update(actor) for _ in range(3)]
    for name, shard in actor.named_shards().items():
        assert torch.equal(shard, before[name]) and not shard.requires_grad, name
    trained = scores(actor)
    assert np.abs(trained - base).max() > 1e-2
    with lora.disabled(actor):
        assert np.array_equal(scores(actor), base)
    assert np.array_equal(scores(actor), trained)
    found = {"steps": steps, "start": start, "adapters": adapters(actor), "scores": trained}
    found["merged"] = whole(actor, actor.merged_shards())
    found["names"] = list(actor.named_shards()) == list(actor.merged_shards())
    return found if parallel.rank() == 0 else None


@pytest.fixture(scope="module")
def single(folder) -> dict:
    return parallel.run_on_ranks(life, 1, folder, Case(ONE))[0]


def assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_every_layout_trains_the_same_adapters(folder, single, name):
    case = CASES[name]
    found = parallel.run_on_ranks(life, case.parallel.world_size, folder, case)[0]
    for tensor, other in zip(found["start"].values(), single["start"].values(), strict=True):
        assert torch.equal(tensor, other), "drawn the same, to the bit"
    np.testing.assert_allclose(found["steps"], single["steps"], atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(found["scores"], single["scores"], atol=TOLERANCE)
    assert_close(found["adapters"], single["adapters"])
    assert_close(found["merged"], single["merged"])


def folded(base: dict, updates: dict, scale: float) -> dict[str, torch.Tensor]:
    """The model that base and PEFT's tensors make, in fp64."""
    result = {}
    for name, tensor in base.items():
        module = "base_model.model." + name.removesuffix(".weight")
        result[name] = tensor.double()
        if f"{module}.lora_A.weight" in updates:
            down, up = (updates[f"{module}.lora_{part}.weight"].double() for part in "AB")
            result[name] = result[name] + scale * (up @ down)
    return result


def test_the_stream_is_the_base_with_the_adapters_folded_in(folder, single):
    base = load_file(Path(folder) / "model.safetensors")
    expected = folded(base, single["adapters"], 6.0 / 4)
    assert_close(single["merged"], {name: tensor.float() for name, tensor in expected.items()})
    changed = [name for name, tensor in base.items() if not torch.equal(tensor, single["merged"][name])]
    assert len(changed) == 4 * 7 and all(name.endswith("_proj.weight") for name in changed)
    downs = [single["start"][f"base_model.model.model.layers.0.self_attn.{p}_proj.lora_A.weight"] for p in "qkv"]
    assert torch.equal(downs[0], downs[1]) and torch.equal(downs[0], downs[2])
    # PEFT's start: uniform within 1/sqrt(in), which has a deviation of that over sqrt(3).
    for name, down in single["start"].items():
        if "lora_A" in name:
            bound = down.shape[1] ** -0.5
            assert down.abs().max() <= bound and abs(down.std() * 3**0.5 / bound - 1) < 0.15
        else:
            assert not down.any()


def gradients(folder: str, case: Case, updates: dict) -> dict[str, torch.Tensor] | None:
    """Loss and gradients of one update, with adapters of which no part is zero."""
    actor = build(folder, case.parallel, recompute=case.recompute, clip=0.0)
    layout, shards = case.parallel, actor.adapter_shards()
    for name, entry in names.match(names.adapter_entries(actor.shape, LORA), shards).items():
        parts = [updates[tensor] for tensor in entry.tensors]
        with torch.no_grad():
            shards[name].copy_(
                names.shard(entry, parts, actor.shape, rank=parallel.rank() % layout.tp, ranks=layout.tp)
            )
    actor.after_load()
    found, norm = update(actor)
    result = adapters(actor, {name: shard.main_grad for name, shard in shards.items()})
    return {"loss": found, "norm": norm, **result} if parallel.rank() == 0 else None


def reference_gradients(folder: str, updates: dict) -> dict[str, object]:
    """The same by transformers and autograd, from the definition."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    leaves: dict[str, torch.Tensor] = {}
    for name, tensor in updates.items():
        leaf = leaves.get(_shared(name))
        leaves[name] = tensor.clone().requires_grad_() if leaf is None else leaf
    weights = {}
    for name, tensor in model.named_parameters():
        module = "base_model.model." + name.removesuffix(".weight")
        weights[name] = tensor.detach()
        if f"{module}.lora_A.weight" in leaves:
            down, up = (leaves[f"{module}.lora_{part}.weight"] for part in "AB")
            weights[name] = weights[name] + 6.0 / 4 * up @ down
    total = torch.zeros(())
    for sample in check_layouts.make_samples(151):
        tokens = torch.tensor(sample.tokens[None].astype(np.int64))
        logits = torch.func.functional_call(model, weights, (tokens,)).logits[0, sample.prompt_length - 1 : -1]
        logprobs = (logits / TEMPERATURE).log_softmax(-1)
        chosen = logprobs.gather(1, tokens[0, sample.prompt_length :, None])[:, 0]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        weight, advantage = (torch.tensor(sample.response(field)) for field in ("weight", "advantage"))
        total = total + (weight * (-advantage * chosen - 0.01 * entropy)).sum()
    total.backward()
    distinct = {id(leaf): leaf for leaf in leaves.values()}
    norm = sum(float(leaf.grad.square().sum()) for leaf in distinct.values()) ** 0.5
    return {"loss": float(total), "norm": norm, **{name: leaf.grad for name, leaf in leaves.items()}}


def random_adapters(folder: str) -> dict[str, torch.Tensor]:
    """PEFT's tensors, of which none is zero; those of fused modules have one `lora_A`."""
    generator = torch.Generator().manual_seed(3)
    updates: dict[str, torch.Tensor] = {}
    for entry in names.adapter_entries(read_shape(folder), LORA):
        for name, size in zip(entry.tensors, entry.shapes, strict=True):
            tensor = 0.1 * torch.randn(size, generator=generator)
            updates[name] = updates.get(_shared(name), tensor)
    return updates


def _shared(name: str) -> str:
    """The first of the modules that share a `lora_A`."""
    for first, other in (("q_proj", "k_proj"), ("q_proj", "v_proj"), ("gate_proj", "up_proj")):
        name = name.replace(f"{other}.lora_A", f"{first}.lora_A")
    return name


@pytest.mark.parametrize("case", [Case(ONE, "full"), Case(TP2_SP), Case(ParallelConfig(tp=2, pp=2), "full")], ids=str)
def test_gradients_are_those_of_the_definition(folder, case):
    updates = random_adapters(folder)
    expected = reference_gradients(folder, updates)
    found = parallel.run_on_ranks(gradients, case.parallel.world_size, folder, case, updates)[0]
    assert abs(found.pop("loss") - expected.pop("loss")) < TOLERANCE
    norm = expected.pop("norm")
    assert abs(found.pop("norm") - norm) < TOLERANCE * max(norm, 1)
    assert min(float(tensor.abs().max()) for tensor in expected.values()) > 1e-4
    assert_close(found, expected)

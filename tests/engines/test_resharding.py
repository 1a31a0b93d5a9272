"""From the actor's shards into real vLLM engines, checked inside the engines.

Proves: after a weight sync every tensor of an engine equals the actor's, byte for byte, for every layout of the actor
and for engines with tensor parallelism 1 and 2, which join the same sync. The expected values are computed here
from the Hugging Face tensors, without our names and without vLLM's loader: the actor's parameters are those tensors
times a number. After an optimizer step the engines' log-probs and entropies are the actor's, and CURE cuts at the same
tokens with either. A flipped bit is named; an engine is
lost with any of its workers. Both backends are used, gloo and shared memory. Experts, which vLLM pads and packs, are
checked by log-probs only, in an exhaustive test. Not proved here: GPUs.
"""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

import local_ranks
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.schema import ActorConfig, OptimizerConfig, ParallelConfig, RolloutConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.errors import ChecksumError, EngineLost, Fault
from megatron_entropy.records import Prompt, Sample
from megatron_entropy.weights.hf_folder import TensorFolder
from megatron_entropy.weights.source import ShardedSource, load
from megatron_entropy.weights.sync import WeightSync
from megatron_entropy.weights.transport import Sender

LAYOUTS = {
    "TP2": ParallelConfig(tp=2, dp=2),
    "PP2": ParallelConfig(pp=2, dp=2),
    "TP2xPP2": ParallelConfig(tp=2, pp=2),
    "DP2 with distributed optimizer": ParallelConfig(tp=2, dp=2, distributed_optimizer=True),
    "DP4 with distributed optimizer": ParallelConfig(dp=4, distributed_optimizer=True),
}
ENGINE_TP = (1, 2)
BACKENDS = ("gloo", "shared_memory")
RANKS = 4
EOS = 1
TEMPERATURE = 0.7
VOCABULARY, PADDED = 90, 128  # vLLM pads to a multiple of 64, with zeros
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "eos_token_id": EOS,
}  # fmt: skip
# A worker of the engine with two has 48 of an expert's columns, which vLLM pads to 64; 96 need no padding.
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True, "head_dim": 32,
}  # fmt: skip
FLIPPED = "model.layers.1.mlp.up_proj.weight"


def engine_tensors(model: dict[str, torch.Tensor], rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """The expected tensors of worker `rank` of a vLLM engine, by vLLM's names."""

    def rows(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.chunk(ranks)[rank] for tensor in tensors])

    def vocabulary(tensor: torch.Tensor) -> torch.Tensor:
        return rows(torch.cat([tensor, torch.zeros(PADDED - VOCABULARY, tensor.shape[1])]))

    tensors = {name: vocabulary(model[name]) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors["model.norm.weight"] = model["model.norm.weight"]
    for layer in (f"model.layers.{number}." for number in range(SIZES["num_hidden_layers"])):
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            tensors[layer + norm] = model[layer + norm]
        for kind in ("weight", "bias"):
            fused = [model[f"{layer}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            tensors[f"{layer}self_attn.qkv_proj.{kind}"] = rows(*fused)
        fused = [model[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        tensors[layer + "mlp.gate_up_proj.weight"] = rows(*fused)
        for name in (layer + "self_attn.o_proj.weight", layer + "mlp.down_proj.weight"):
            tensors[name] = model[name].chunk(ranks, dim=1)[rank].contiguous()
    return tensors


def wrong_tensors(sums: list[dict[str, int]], model: dict[str, torch.Tensor]) -> list[str]:
    """Tensors of an engine's workers with another checksum than the model's."""
    wrong = []
    for rank, found in enumerate(sums):
        expected = {name: t + 0.0 for name, t in engine_tensors(model, rank, len(sums)).items()}  # -0 becomes 0
        assert set(found) == set(expected)
        wrong += [
            f"{name} of worker {rank}" for name, t in expected.items() if found[name] != zlib.crc32(t.numpy().data)
        ]
    return wrong


def start_engines(folder: str) -> tuple[list, list | None]:
    """Start one pool with one engine for each of `ENGINE_TP`, on rank 0; returns the pools and all clients."""
    from megatron_entropy.rollout.engine import EngineSpec
    from megatron_entropy.rollout.pool import EnginePool

    if process_groups.rank():
        return [], None
    spec = EngineSpec(folder, 256, (EOS,), threads=1)
    pools = [EnginePool(RolloutConfig(tensor_parallel=tp, entropy=True), spec) for tp in ENGINE_TP]
    clients = [client for pool in pools for client in pool.clients()]
    for index, client in enumerate(clients):
        client.index = index
    return pools, clients


def build(folder: str, layout: ParallelConfig, factor: float):
    """Build an actor with the folder's weights times `factor`, and the source of its weights."""
    from megatron_entropy.actor.actor import Actor

    arch = read_architecture(folder)
    process_groups.init_model_parallel(layout, seed=1)
    config = ActorConfig(
        parallel=layout, optimizer=OptimizerConfig(lr=1e-2), dtype="float32", max_tokens_per_microbatch=128
    )
    actor = Actor(arch, config, total_updates=1)
    load(TensorFolder(folder), arch, layout, actor.named_shards())
    with torch.no_grad():
        for parameter in actor.named_shards().values():
            parameter.mul_(factor)
    actor.after_load()
    return actor, ShardedSource(arch, layout, actor.named_shards(), torch.float32)


def sync_of(source: ShardedSource, backend: str) -> WeightSync:
    return WeightSync(source, bucket_bytes=2**15, checksum=True, timeout=180, backend=backend)


def update(actor, samples: list[Sample]) -> None:
    """Take an optimizer step that increases the probability of the samples."""
    samples = [dataclasses.replace(s, weight=s.constant(0.01)) for s in samples]
    actor.update(samples, lambda stats, batch: (-stats.logprob, {}), temperature=TEMPERATURE)


def answers(pools: list) -> list[list[Sample]]:
    """The completions of each engine, as samples."""
    from megatron_entropy.rollout.engine import Request

    generator = np.random.default_rng(0)
    prompts = [tuple(generator.integers(2, VOCABULARY, 4 + length).tolist()) for length in range(8)]
    requests = [
        Request((number,), prompt, seed=number, max_tokens=16, temperature=TEMPERATURE, top_p=0.9)
        for number, prompt in enumerate(prompts)
    ]
    samples = []
    for pool in pools:
        done, dead = pool.generate(requests, "test")
        assert not dead
        samples.append(
            [
                Sample(
                    np.array([*p, *c.tokens], np.int32),
                    len(p),
                    "stop",
                    "",
                    rollout_uncut_logprob=np.concatenate([np.zeros(len(p), np.float32), c.uncut_logprobs]),
                    rollout_entropy=np.concatenate([np.zeros(len(p), np.float32), c.entropy]),
                )
                for p, c in zip(prompts, done, strict=True)
            ]
        )
    return samples


def disagreement(actor, sampled: list[list[Sample]]) -> list[float]:
    """For each engine the largest difference between a log-prob or entropy of its samples and the actor's."""
    from megatron_entropy.actor.statistics import policy_statistics

    worst = []
    for samples in sampled:
        scored = actor.score(samples, policy_statistics(temperature=TEMPERATURE))
        worst.append(
            max(
                np.abs(s.response(ours) - s.response(theirs)).max()
                for s in scored
                for ours, theirs in (("logprob", "rollout_uncut_logprob"), ("entropy", "rollout_entropy"))
            )
        )
        assert cuts(scored) == cuts([dataclasses.replace(s, entropy=s.rollout_entropy) for s in scored])
    return worst


def cuts(samples: list[Sample]) -> list[tuple[int, ...]]:
    """Where CURE cuts the responses."""
    from megatron_entropy.config.schema import Config
    from megatron_entropy.methods.cure import Cure, CureConfig

    cure = Cure(Config(steps=1, method=CureConfig(top=4), batch={"samples": 16}))
    prompt = Prompt(0, "", ())
    return [
        cure.branch_prompt(prompt, n, sample, lambda token: "word").response_prefix for n, sample in enumerate(samples)
    ]


def sync_from_every_layout(folder: str) -> dict[str, object]:
    """Run on every rank; returns what rank 0 observed, by layout, and the errors."""
    first = process_groups.rank() == 0
    pools, clients = start_engines(folder)
    seen: dict[str, object] = {}
    model = load_file(Path(folder, "model.safetensors"))
    try:
        for pool in pools:
            pool.wait_ready()
        for number, (name, layout) in enumerate(LAYOUTS.items()):
            factor = -(0.5 ** (1 + number % 2))  # exact, and not the factor of the sync before
            one, other = BACKENDS[number % 2], BACKENDS[1 - number % 2]
            actor, source = build(folder, layout, factor)
            weight_sync = sync_of(source, one)
            weight_sync.sync(1, clients)
            weight_sync.close()
            scaled = {key: tensor * factor for key, tensor in model.items()}
            wrong = [wrong_tensors(client.weight_checksums(), scaled) for client in clients or ()]
            update(actor, process_groups.broadcast_object(answers(pools)[0] if first else None))
            weight_sync = sync_of(source, other)
            weight_sync.sync(2, clients)
            updated = dict(source)
            unchanged = [wrong_tensors(client.weight_checksums(), scaled) for client in clients or ()]
            wrong += [wrong_tensors(client.weight_checksums(), updated) for client in clients or ()]
            worst = disagreement(actor, process_groups.broadcast_object(answers(pools) if first else None))
            seen[name] = {"wrong": wrong, "changed": [len(names) for names in unchanged], "logprob": worst}
            if number + 1 < len(LAYOUTS):
                weight_sync.close()
        if not first:
            with _flipping():
                weight_sync.sync(3, None)
            for version in (4, 5):
                weight_sync.sync(version, None)
            return seen
        with _flipping():
            seen["flipped"] = _failure(lambda: weight_sync.sync(3, clients))
        weight_sync.sync(4, clients)
        seen["repaired"] = len(answers(pools))
        _workers(pools[1].pids[0])[-1].kill()
        seen["killed"] = _failure(lambda: weight_sync.sync(5, clients))
        return seen
    finally:
        for pool in reversed(pools):
            pool.shutdown()


def sync_experts(folder: str) -> list[list[float]]:
    """Run on every rank; returns the disagreement of each engine with the actor after the first and the second sync."""
    first = process_groups.rank() == 0
    pools, clients = start_engines(folder)
    try:
        actor, source = build(folder, ParallelConfig(dp=2, ep=2), 1.0)
        weight_sync = sync_of(source, "shared_memory")
        for pool in pools:
            pool.wait_ready()
        seen = []
        for version in (1, 2):
            weight_sync.sync(version, clients)
            sampled = process_groups.broadcast_object(answers(pools) if first else None)
            seen.append(disagreement(actor, sampled))
            update(actor, sampled[0])
        return seen
    finally:
        for pool in reversed(pools):
            pool.shutdown()


def _workers(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children()
    return [child for child in children if "Worker" in child.name() or "spawn_main" in " ".join(child.cmdline())]


def _failure(work) -> Fault | None:
    try:
        work()
    except Fault as fault:
        return fault
    return None


class _flipping:
    """Flips a bit of one tensor after its checksum was computed, inside the `with` block."""

    def __enter__(self) -> None:
        self.seal = seal = Sender._seal

        def flip(sender, bucket, metadata, buffer):
            seal(sender, bucket, metadata, buffer)
            for slab, offset in zip(bucket.slabs, bucket.offsets, strict=True):
                if metadata[slab.number].name == FLIPPED:
                    buffer[offset + 7] ^= 1

        Sender._seal = flip

    def __exit__(self, *exception: object) -> None:
        Sender._seal = self.seal


def write(model: torch.nn.Module, folder: Path) -> str:
    """Give biases and norms random values too, and save the model."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.2)  # biases start at zero, norms at one
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)).float()
    folder = write(model, tmp_path_factory.mktemp("model"))
    return local_ranks.run_on_ranks(sync_from_every_layout, RANKS, folder, timeout_s=540)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_engines_have_the_weights_of_the_actor(seen: dict, layout: str) -> None:
    assert seen[layout]["wrong"] == [[]] * (len(BACKENDS) * len(ENGINE_TP))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_an_update_the_engines_agree_with_the_actor(seen: dict, layout: str) -> None:
    assert max(seen[layout]["logprob"]) < 1e-4  # fp32 on both sides, sums in another order
    assert min(seen[layout]["changed"]) > 10  # the update changed nearly every tensor


def test_a_flipped_bit_is_named_and_the_next_sync_repairs_it(seen: dict) -> None:
    assert isinstance(seen["flipped"], ChecksumError) and str(seen["flipped"]).startswith(FLIPPED)
    assert seen["repaired"] == len(ENGINE_TP)


def test_an_engine_is_lost_with_any_of_its_workers(seen: dict) -> None:
    assert isinstance(seen["killed"], EngineLost) and seen["killed"].indices == (1,)


@pytest.mark.exhaustive
def test_engines_with_experts_agree_with_the_actor_after_every_sync(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = write(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS)).float(), tmp_path)
    worst = local_ranks.run_on_ranks(sync_experts, 2, folder, timeout_s=540)[0]
    assert np.array(worst).shape == (2, len(ENGINE_TP)) and np.max(worst) < 1e-4, worst

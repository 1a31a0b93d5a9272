"""The actor agrees with transformers on checkpoints of every family, and its docstrings are true.

transformers writes tiny random checkpoints and the actor reads them. Tolerance 1e-4 in fp32: two implementations of 2-4
layers in different operation orders differ by about 1e-6. Runs on CPU ranks.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from local_ranks import run_on_ranks

from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.schema import ActorConfig, OptimizerConfig, ParallelConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.errors import ModelError, NonFiniteLossError
from megatron_entropy.records import Metric, Sample

pytestmark = pytest.mark.actor

TOLERANCE = 1e-4
TEMPERATURE = 0.7
SIZES = dict(
    vocab_size=151, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
ROPE = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip


def write_checkpoint(folder: Path, family: str, tied: bool, rope: str = "default", **changes) -> Path:
    import transformers

    names = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "llama": "Llama"}
    settings = {**SIZES, "tie_word_embeddings": tied, **changes}
    if ROPE[rope]:
        settings["rope_parameters"] = {"rope_theta": 10000.0, **ROPE[rope]}
    if family.startswith("qwen3"):
        settings["head_dim"] = 32  # Qwen3's head_dim need not be hidden_size / heads
    if family == "qwen3_moe":
        settings |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=not tied)
    config = getattr(transformers, names[family] + "Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, names[family] + "ForCausalLM")(config)
    for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide a wrong order
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    model.save_pretrained(folder)
    return folder


TP2_PP2 = ParallelConfig(tp=2, pp=2, sequence_parallel=True)  # Megatron requires it with experts


def make_samples(seed: int = 0) -> list[Sample]:
    generator = np.random.default_rng(seed)
    lengths = ((5, 40), (3, 9), (20, 1), (2, 60))
    return [Sample(generator.integers(0, 151, p + r).astype(np.int32), p, "stop", "") for p, r in lengths]


def reference(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """transformers' log-probabilities and entropies of the response tokens, one sequence at a time."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    result = []
    for sample in make_samples():
        tokens = torch.tensor(sample.tokens[None].astype(np.int64))
        with torch.no_grad():
            logprobs = (model(tokens).logits[0, :-1].double() / TEMPERATURE).log_softmax(-1)
        chosen = logprobs.gather(1, tokens[0, 1:, None])[:, 0]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        start = sample.prompt_length - 1
        result.append((chosen[start:].numpy(), entropy[start:].numpy()))
    return result


def score(folder: str, layout: ParallelConfig):
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.actor.statistics import policy_statistics
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    process_groups.init_model_parallel(layout, seed=1)
    arch = read_architecture(folder)
    actor = Actor(arch, ActorConfig(parallel=layout, dtype="float32", max_tokens_per_microbatch=128), total_updates=1)
    load(TensorFolder(folder), arch, actor.config.parallel, actor.named_shards())
    actor.after_load()
    scored = actor.score(make_samples(), policy_statistics(temperature=TEMPERATURE))
    return [(s.response("logprob"), s.response("entropy")) for s in scored]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama"])
@pytest.mark.parametrize("layout", [ParallelConfig(), TP2_PP2], ids=["1x1", "TP2xPP2"])
def test_scores_equal_transformers(tmp_path, family, tied, layout):
    folder = write_checkpoint(tmp_path, family, tied)
    for results in run_on_ranks(score, layout.world_size, str(folder), layout):
        for (logprob, entropy), (expected_logprob, expected_entropy) in zip(results, reference(folder), strict=True):
            np.testing.assert_allclose(logprob, expected_logprob, atol=TOLERANCE)
            np.testing.assert_allclose(entropy, expected_entropy, atol=TOLERANCE)


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_rotary_scaling_equals_transformers(tmp_path, rope):
    folder = write_checkpoint(tmp_path, "llama", False, rope)
    plain = write_checkpoint(tmp_path / "plain", "llama", False)
    expected, unscaled = reference(folder), reference(plain)
    assert max(np.abs(a[0] - b[0]).max() for a, b in zip(expected, unscaled, strict=True)) > 0.01
    for (logprob, _), (want, _) in zip(run_on_ranks(score, 1, str(folder), ParallelConfig())[0], expected, strict=True):
        np.testing.assert_allclose(logprob, want, atol=TOLERANCE)


def round_trip(folder: str, target: str, layout: ParallelConfig) -> None:
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.weights.hf_folder import TensorFolder, write_folder
    from megatron_entropy.weights.source import ShardedSource, load

    process_groups.init_model_parallel(layout, seed=1)
    arch = read_architecture(folder)
    actor = Actor(arch, ActorConfig(parallel=layout, dtype="float32"), total_updates=1)
    load(TensorFolder(folder), arch, actor.config.parallel, actor.named_shards())
    source = ShardedSource(arch, actor.config.parallel, actor.named_shards(), torch.float32)
    if process_groups.rank() == 0:
        write_folder(Path(target), source.metadata(), source, like=Path(folder), max_shard_bytes=100_000)
    else:
        list(source)


DENSE = (ParallelConfig(tp=2), ParallelConfig(pp=2, vpp=2), ParallelConfig(tp=4, pp=2), ParallelConfig(pp=3))
EXPERTS = (
    TP2_PP2,
    ParallelConfig(dp=2, ep=2),
    ParallelConfig(tp=2, pp=2, vpp=2, ep=2, sequence_parallel=True),
    ParallelConfig(tp=4, ep=2, sequence_parallel=True),
)


@pytest.mark.parametrize(
    "family,tied,layout",
    [
        (family, tied, layout)
        for family, tied in [("qwen2", True), ("qwen3", False), ("llama", True), ("qwen2", False)]
        for layout in DENSE
    ]
    + [("qwen3_moe", index % 2 == 0, layout) for index, layout in enumerate(EXPERTS)],
)
def test_loading_and_exporting_keeps_every_bit(tmp_path, family, tied, layout):
    from megatron_entropy.weights.hf_folder import TensorFolder

    source, target = write_checkpoint(tmp_path / "a", family, tied), tmp_path / "b"
    run_on_ranks(round_trip, layout.world_size, str(source), str(target), layout)
    before, after = TensorFolder(source), TensorFolder(target)
    assert set(before.names()) - {"lm_head.weight"} <= set(after.names())
    assert len(list(target.glob("*.safetensors"))) > 1, "small shards: the index is exercised"
    for name in after.names():
        assert torch.equal(after.read(name), before.read(name)), name


def every_layout(family: str) -> Iterator[ParallelConfig]:
    for tp, pp, vpp, ep in itertools.product((1, 2, 4), (1, 2), (1, 2), (1, 2)):
        if vpp <= pp and (ep == 1 or family == "qwen3_moe"):
            yield ParallelConfig(tp=tp, pp=pp, vpp=vpp, ep=ep, dp=max(1, ep // tp), sequence_parallel=tp > 1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "llama"])
def test_every_layout_keeps_every_bit_and_equals_transformers(tmp_path, family, tied):
    from megatron_entropy.weights.hf_folder import TensorFolder

    source = write_checkpoint(tmp_path / "source", family, tied)
    before, expected = TensorFolder(source), reference(source)
    for number, layout in enumerate(every_layout(family)):
        target = tmp_path / str(number)
        run_on_ranks(round_trip, layout.world_size, str(source), str(target), layout)
        after = TensorFolder(target)
        for name in after.names():
            assert torch.equal(after.read(name), before.read(name)), (layout, name)
        assert set(before.names()) - {"lm_head.weight"} <= set(after.names()), layout
        results = run_on_ranks(score, layout.world_size, str(source), layout)[0]
        for got, want in zip(results, expected, strict=True):
            np.testing.assert_allclose(got, want, atol=TOLERANCE, err_msg=str(layout))


def update_with(folder: str, layout: ParallelConfig, poison: int) -> str:
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    process_groups.init_model_parallel(layout, seed=1)
    arch = read_architecture(folder)
    actor = Actor(arch, ActorConfig(parallel=layout, dtype="float32", max_tokens_per_microbatch=64), total_updates=1)
    load(TensorFolder(folder), arch, actor.config.parallel, actor.named_shards())
    actor.after_load()
    before = {name: p.detach().clone() for name, p in actor.named_shards().items()}
    samples = [
        dataclasses.replace(s, weight=s.constant(1.0), advantage=s.constant(float("nan") if i == poison else 1.0))
        for i, s in enumerate(make_samples())
    ]
    try:
        actor.update(samples, lambda stats, batch: (stats.logprob * batch.advantage, {}), temperature=1.0)
    except NonFiniteLossError as error:
        assert all(torch.equal(p, before[name]) for name, p in actor.named_shards().items())
        return str(error)
    return "no error"


def test_a_nan_stops_every_rank_before_the_step_and_names_the_sample(tmp_path):
    folder = write_checkpoint(tmp_path, "qwen3", True)
    results = run_on_ranks(update_with, 2, str(folder), ParallelConfig(dp=2), 2)
    assert results == ["loss is not finite for sample(s) 2 of the step"] * 2


def learning_rates(folder: str, optimizer: OptimizerConfig) -> list[float]:
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    process_groups.init_model_parallel(ParallelConfig(), seed=1)
    arch = read_architecture(folder)
    actor = Actor(arch, ActorConfig(optimizer=optimizer, dtype="float32"), total_updates=8)
    load(TensorFolder(folder), arch, actor.config.parallel, actor.named_shards())
    actor.after_load()
    samples = [dataclasses.replace(s, weight=s.constant(1e-3)) for s in make_samples()]

    def loss(stats, batch):
        return -stats.logprob, {"one": Metric(1.0)}

    return [actor.update(samples, loss, temperature=1.0)["train/lr"].value for _ in range(8)]


def test_the_learning_rate_warms_up_and_decays(tmp_path):
    folder = write_checkpoint(tmp_path, "qwen3", True, num_hidden_layers=1)
    optimizer = OptimizerConfig(lr=1.0e-3, min_lr=1.0e-4, warmup_steps=4, schedule="linear")
    rates = run_on_ranks(learning_rates, 1, str(folder), optimizer)[0]
    np.testing.assert_allclose(rates[:5], [0, 2.5e-4, 5e-4, 7.5e-4, 1e-3], rtol=1e-6)
    np.testing.assert_allclose(np.diff(rates[4:]), -2.25e-4, rtol=1e-6)


def load_error(folder: str) -> str:
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    process_groups.init_model_parallel(ParallelConfig(), seed=1)
    try:
        arch = read_architecture(folder)
        actor = Actor(arch, ActorConfig(dtype="float32"), total_updates=1)
        load(TensorFolder(folder), arch, actor.config.parallel, actor.named_shards())
    except ModelError as error:
        return str(error)
    return "no error"


def test_broken_model_folders_give_a_one_line_error(tmp_path):
    folder = write_checkpoint(tmp_path / "m", "qwen3", True)
    weights = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())

    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    error = run_on_ranks(load_error, 1, str(folder))[0]
    assert "mlp.gate_proj.weight" in error and "(96, 64)" in error and "(128, 64)" in error

    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    assert "layers.2." in run_on_ranks(load_error, 1, str(folder))[0]

    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    assert "GPT2LMHeadModel" in run_on_ranks(load_error, 1, str(folder))[0]

    (folder / "config.json").write_text(json.dumps(config))
    weights.write_bytes(weights.read_bytes()[:1000])
    error = run_on_ranks(load_error, 1, str(folder))[0]
    assert "model.safetensors" in error and "\n" not in error

    weights.unlink()
    assert "safetensors" in run_on_ranks(load_error, 1, str(folder))[0]


def update_around_an_offload(folder: str, layout: ParallelConfig, offload: bool) -> tuple[float, list[float]]:
    """Bytes left by an offload, and the gradient norms of two updates, each with an offload after it."""
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.actor.offload import HostCopy, actor_memory
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    process_groups.init_model_parallel(layout, seed=1)
    arch = read_architecture(folder)
    actor = Actor(arch, ActorConfig(parallel=layout, dtype="bfloat16", max_tokens_per_microbatch=64), total_updates=2)
    load(TensorFolder(folder), arch, layout, actor.named_shards())
    actor.after_load()
    samples = [dataclasses.replace(s, weight=s.constant(1.0), advantage=s.constant(1.0)) for s in make_samples()]
    norms, left = [], 0.0
    for _ in range(2):
        metrics = actor.update(samples, lambda stats, batch: (-stats.logprob, {}), temperature=1.0)
        norms.append(metrics["train/grad_norm"].value)
        if offload:
            host = HostCopy()  # Actor.offload does nothing on a CPU
            weights, state, gradients = memory = actor_memory(actor.chunks, actor.optimizer, ())
            before = [weight.clone() for weight in weights]
            host.offload(state, gradients)
            assert all(bool((old == new).all()) for old, new in zip(before, weights, strict=True)), "for a weight sync"
            assert sum(tensor.untyped_storage().nbytes() for tensor in (*state, *gradients)) == 0
            for _ in range(2):
                host.offload([*weights, *state], gradients)
            left = sum(tensor.untyped_storage().nbytes() for tensors in memory for tensor in tensors)
            host.onload()
    return left, norms


@pytest.mark.parametrize("layout", [ParallelConfig(), ParallelConfig(dp=2, ep=2, distributed_optimizer=True)])
def test_offloaded_memory_comes_back_unchanged(tmp_path, layout):
    folder = str(write_checkpoint(tmp_path, "qwen3_moe", False))
    stayed = run_on_ranks(update_around_an_offload, layout.world_size, folder, layout, False)
    moved = run_on_ranks(update_around_an_offload, layout.world_size, folder, layout, True)
    for (_, expected), (left, norms) in zip(stayed, moved, strict=True):
        assert left == 0 and norms == expected and norms[0] != norms[1]

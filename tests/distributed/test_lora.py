"""LoRA on Megatron: only the adapters are trained, and every layout computes the same.

A tiny random Qwen3 on CPU ranks over gloo. The definition is PyTorch's: transformers' model with weights
`W + scale * up @ down` and their gradients by autograd, one sequence after the other. Layouts are compared with a
single rank after three updates. Tolerance 1e-5: other layouts sum in another order, about 1e-7 relative in fp32. Not
tested here: Transformer Engine's layers, which need a GPU.
"""

import dataclasses
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import check_layouts
import make_arithmetic
import numpy as np
import pytest
import torch
from local_ranks import run_on_ranks
from rich.console import Console
from safetensors.numpy import load_file

from megatron_entropy.checkpoint import inspection
from megatron_entropy.cli import main as cli
from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.schema import ActorConfig, LoraConfig, OptimizerConfig, ParallelConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.errors import CheckpointError, ConfigError
from megatron_entropy.weights import manifest, names
from megatron_entropy.weights.hf_folder import TensorFolder
from megatron_entropy.weights.megatron_folder import open_model
from megatron_entropy.weights.peft import ADAPTER_FILE
from megatron_entropy.weights.source import ShardedSource, load

pytestmark = pytest.mark.actor

TOLERANCE = 1e-5
TEMPERATURE = 0.8
LORA = LoraConfig(rank=4, alpha=6.0)
ONE = ParallelConfig()
TP2 = ParallelConfig(tp=2)
TP2_SP = ParallelConfig(tp=2, sequence_parallel=True)
PP2_VPP2 = ParallelConfig(pp=2, vpp=2)
DP2_SHARDED = ParallelConfig(dp=2, distributed_optimizer=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout and a recomputation setting."""

    parallel: ParallelConfig
    recompute: str = "none"


CASES = {
    "TP2+SP, recompute": Case(TP2_SP, "full"),
    "PP2+VPP2, recompute": Case(PP2_VPP2, "full"),
    "CP2": Case(ParallelConfig(cp=2)),
    "DP2+distributed optimizer": Case(DP2_SHARDED),
    "TP2+SPxPP2": Case(ParallelConfig(tp=2, pp=2, sequence_parallel=True)),
    "TP4, 2 key/value heads": Case(ParallelConfig(tp=4)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A model with tied embeddings: both ends of a pipeline hold them, neither trains them."""
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


def build(
    folder: str, layout: ParallelConfig, *, lora: LoraConfig = LORA, recompute="none", seed=7, clip=0.5, **changes
):
    from megatron_entropy.actor.actor import Actor

    process_groups.init_model_parallel(layout, seed=1)
    # Adam's first steps are lr * sign(gradient) however small the gradient, so rounding could cause a difference of
    # 2 lr. A large eps keeps an update proportional to its gradient.
    optimizer = OptimizerConfig(lr=0.02, eps=0.1, weight_decay=0.1, clip_grad=clip)
    settings = dict(parallel=layout, optimizer=optimizer, lora=lora, recompute=recompute, max_tokens_per_microbatch=192)
    actor = Actor(
        read_architecture(folder),
        ActorConfig(**settings, **{"dtype": "float32", **changes}),
        total_updates=10,
        seed=seed,
    )
    load(TensorFolder(folder), actor.arch, layout, actor.named_shards())
    actor.after_load()
    return actor


def loss(stats, batch):
    return -batch.advantage * stats.logprob - 0.01 * stats.entropy, {}


def update(actor) -> tuple[float, float]:
    samples = check_layouts.make_samples(actor.arch.vocab_size)
    metrics = actor.update(samples, loss, temperature=TEMPERATURE)
    return metrics["train/loss"].value, metrics["train/grad_norm"].value


def whole(actor, local, streamed=None) -> dict[str, np.ndarray]:
    """Tensors of a stream on rank 0; a collective."""
    source = ShardedSource(actor.arch, actor.config.parallel, local, torch.float32, streamed)
    return {name: tensor.numpy().copy() for name, tensor in source if tensor is not None}


def adapters(actor, local=None) -> dict[str, np.ndarray]:
    local = actor.adapter_shards() if local is None else local
    return whole(actor, local, names.adapter_entries(actor.arch, actor.config.lora))


def scores(actor) -> np.ndarray:
    from megatron_entropy.actor.statistics import policy_statistics

    samples = check_layouts.make_samples(actor.arch.vocab_size)
    return np.concatenate(
        [s.response("logprob") for s in actor.score(samples, policy_statistics(temperature=TEMPERATURE, entropy=False))]
    )


def train_adapters(folder: str, case: Case) -> dict[str, object] | None:
    """Check an actor with adapters on all ranks; rank 0 returns its numbers."""
    from megatron_entropy.actor import lora
    from megatron_entropy.actor.reference import LoraBase
    from megatron_entropy.actor.statistics import reference_statistics

    plain = build(folder, case.parallel, lora=LoraConfig())
    for parameter in plain.named_shards().values():
        parameter.requires_grad_(False)  # torch.matmul multiplies in another order if a weight requires a gradient
    base = scores(plain)
    actor = build(folder, case.parallel, recompute=case.recompute)
    before = {name: shard.detach().clone() for name, shard in actor.named_shards().items()}
    assert np.array_equal(scores(actor), base), "untrained adapters change no bit"
    start = adapters(actor)
    steps = [update(actor) for _ in range(3)]
    for name, shard in actor.named_shards().items():
        assert torch.equal(shard, before[name]) and not shard.requires_grad, name
    trained = scores(actor)
    assert np.abs(trained - base).max() > 1e-2
    with lora.disabled(actor.chunks):
        assert np.array_equal(scores(actor), base)
    actor.set_reference("initial")
    assert isinstance(actor.reference, LoraBase)
    samples = check_layouts.make_samples(actor.arch.vocab_size)
    scored = actor.score_reference(samples, reference_statistics(temperature=TEMPERATURE))
    assert np.array_equal(np.concatenate([sample.response("reference_logprob") for sample in scored]), base)
    assert np.array_equal(scores(actor), trained)
    found = {"steps": steps, "start": start, "adapters": adapters(actor), "scores": trained}
    found["merged"] = whole(actor, actor.merged_shards())
    found["names"] = list(actor.named_shards()) == list(actor.merged_shards())
    return found if process_groups.rank() == 0 else None


@pytest.fixture(scope="module")
def single(folder) -> dict:
    return run_on_ranks(train_adapters, 1, folder, Case(ONE))[0]


def assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_every_layout_trains_the_same_adapters(folder, single, name):
    case = CASES[name]
    found = run_on_ranks(train_adapters, case.parallel.world_size, folder, case)[0]
    for array, other in zip(found["start"].values(), single["start"].values(), strict=True):
        assert np.array_equal(array, other), "the same initial adapters, to the bit"
    np.testing.assert_allclose(found["steps"], single["steps"], atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(found["scores"], single["scores"], atol=TOLERANCE)
    assert_close(found["adapters"], single["adapters"])
    assert_close(found["merged"], single["merged"])


def merge_in_fp64(base: dict[str, np.ndarray], updates: dict[str, np.ndarray], scale: float) -> dict[str, np.ndarray]:
    """The base with PEFT's tensors merged in, in fp64."""
    result = {}
    for name, array in base.items():
        module = "base_model.model." + name.removesuffix(".weight")
        result[name] = array.astype(np.float64)
        if f"{module}.lora_A.weight" in updates:
            down, up = (updates[f"{module}.lora_{letter}.weight"].astype(np.float64) for letter in "AB")
            result[name] += scale * (up @ down)
    return result


def test_the_stream_is_the_base_with_the_adapters_merged_in(folder, single):
    base = load_file(Path(folder) / "model.safetensors")
    assert_close(single["merged"], merge_in_fp64(base, single["adapters"], 6.0 / 4))
    changed = [name for name, array in base.items() if not np.array_equal(array, single["merged"][name])]
    assert len(changed) == 4 * 7 and all(name.endswith("_proj.weight") for name in changed)
    downs = [single["start"][f"base_model.model.model.layers.0.self_attn.{p}_proj.lora_A.weight"] for p in "qkv"]
    assert np.array_equal(downs[0], downs[1]) and np.array_equal(downs[0], downs[2])
    # PEFT's initialisation: uniform within 1/sqrt(in), so the standard deviation is 1/sqrt(3 in).
    for name, down in single["start"].items():
        if "lora_A" in name:
            bound = down.shape[1] ** -0.5
            assert np.abs(down).max() <= bound and abs(down.std() * 3**0.5 / bound - 1) < 0.15
        else:
            assert not down.any()


def gradients(folder: str, case: Case) -> dict[str, object] | None:
    """Loss, gradient norm and gradients of one update, with adapters without zeros."""
    updates = random_adapters(folder)
    actor = build(folder, case.parallel, recompute=case.recompute, clip=0.0)
    layout, shards = case.parallel, actor.adapter_shards()
    for name, entry in names.match(names.adapter_entries(actor.arch, LORA), shards).items():
        tensors = [updates[tensor] for tensor in entry.tensors]
        with torch.no_grad():
            shards[name].copy_(
                names.shard(entry, tensors, actor.arch, rank=process_groups.rank() % layout.tp, ranks=layout.tp)
            )
    actor.after_load()
    found, norm = update(actor)
    result = adapters(actor, {name: shard.main_grad for name, shard in shards.items()})
    return {"loss": found, "norm": norm, **result} if process_groups.rank() == 0 else None


@pytest.fixture(scope="module")
def reference_gradients(folder) -> dict[str, object]:
    """The same with transformers and autograd, from the definition."""
    import transformers

    updates = random_adapters(folder)
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
            down, up = (leaves[f"{module}.lora_{letter}.weight"] for letter in "AB")
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
    return {"loss": float(total), "norm": norm, **{name: leaf.grad.numpy() for name, leaf in leaves.items()}}


def random_adapters(folder: str) -> dict[str, torch.Tensor]:
    """PEFT's tensors without zeros; fused modules share one `lora_A`."""
    generator = torch.Generator().manual_seed(3)
    updates: dict[str, torch.Tensor] = {}
    for entry in names.adapter_entries(read_architecture(folder), LORA):
        for name, size in zip(entry.tensors, entry.shapes, strict=True):
            tensor = 0.1 * torch.randn(size, generator=generator)
            updates[name] = updates.get(_shared(name), tensor)
    return updates


def _shared(name: str) -> str:
    """The first of the modules that share a `lora_A`."""
    for first, other in (("q_proj", "k_proj"), ("q_proj", "v_proj"), ("gate_proj", "up_proj")):
        name = name.replace(f"{other}.lora_A", f"{first}.lora_A")
    return name


@pytest.mark.parametrize("case", [Case(TP2_SP), Case(ParallelConfig(tp=2, pp=2), "full")], ids=str)
def test_gradients_equal_the_definition(folder, reference_gradients, case):
    found = run_on_ranks(gradients, case.parallel.world_size, folder, case)[0]
    assert min(np.abs(array).max() for array in reference_gradients.values()) > 1e-4
    assert_close(found, reference_gradients)


def batched_products(folder: str, recompute: str) -> list[str]:
    """The products of an update that multiply a batch of matrices."""
    actor = build(folder, ParallelConfig(), recompute=recompute)
    with torch.profiler.profile() as profile:
        update(actor)
    return [event.key for event in profile.key_averages() if "bmm" in event.key]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_no_frozen_weight_is_copied_for_every_token(folder, recompute):
    assert run_on_ranks(batched_products, 1, folder, recompute) == [[]]


def continued(folder: str, checkpoints: str, layout: ParallelConfig, saves: bool) -> list[tuple[float, float]]:
    """Loss and gradient norm of updates 3 and 4, after saving or loading the state of update 2."""
    from megatron_entropy.checkpoint import saver as checkpoint

    actor = build(folder, layout, seed=7 if saves else 8)
    if saves:
        update(actor)
        update(actor)
        saver = checkpoint.Saver(Path(checkpoints), keep=1, asynchronous=False)
        saver.save(actor, checkpoint.StageProgress(2, 2, 0, "settings"))
    else:
        path, progress = checkpoint.newest(Path(checkpoints))
        checkpoint.load(path, actor, progress)
    return [update(actor), update(actor)]


@pytest.mark.parametrize(
    "source, targets",
    [(TP2_SP, (TP2_SP, PP2_VPP2, DP2_SHARDED)), (DP2_SHARDED, (DP2_SHARDED, TP2))],
    ids=["from TP2+SP", "from sharded DP2"],
)
def test_training_continues_under_another_layout(folder, tmp_path, source, targets):
    checkpoints = str(tmp_path)
    expected = run_on_ranks(continued, 2, folder, checkpoints, source, True)[0]
    assert expected[1][0] < expected[0][0]
    for target in targets:
        found = run_on_ranks(continued, 2, folder, checkpoints, target, False)[0]
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, err_msg=str(target))
        if target is source:
            assert found == expected, "under the layout that saved, to the bit"

    # The checkpoint contains the adapters and their optimizer state, and no base weights.
    stored = manifest.tensors(tmp_path / "step_000002" / "shards")
    assert all("_lora." in name for name in stored)
    assert sum(not name.startswith("optimizer.") for name in stored) == 8
    console = Console(file=io.StringIO(), width=140)
    assert inspection.inspect(tmp_path / "step_000002", None, console) == 0


def refusals(folder: str, checkpoints: str) -> list[str]:
    """The errors for a checkpoint with other adapters than the configuration."""
    from megatron_entropy.checkpoint import saver as checkpoint

    found = []
    path, progress = checkpoint.newest(Path(checkpoints))
    for lora in (LoraConfig(), LoraConfig(rank=8), LoraConfig(rank=4, targets=["o_proj"])):
        actor = build(folder, TP2, lora=lora)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path, actor, progress)
        found.append(str(caught.value))
    with pytest.raises(CheckpointError) as caught:
        open_model(path, actor.arch).names()
    return [*found, str(caught.value)]


def test_a_checkpoint_of_other_adapters_is_refused(folder, tmp_path):
    run_on_ranks(continued, 2, folder, str(tmp_path), TP2, True)
    without, rank, targets, converted = run_on_ranks(refusals, 2, folder, str(tmp_path))[0]
    down = "decoder.layers.mlp.linear_fc1_lora.down"
    assert f"tensor {down} is (4, 4, 64) in it and missing in the model" in without
    assert f"tensor {down} is (4, 4, 64) in it and (4, 8, 64) in the model" in rank
    assert f"tensor {down} is (4, 4, 64) in it and missing in the model" in targets
    for message in (without, rank, targets):
        assert "model and actor.lora that started the run" in message and "\n" not in message
    assert "is missing" in converted and "\n" not in converted


@contextmanager
def captured_log(messages: list[str]) -> Iterator[None]:
    """Append the package's log lines to a list."""
    logger = logging.getLogger("megatron_entropy")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def run(config: str, overrides: list[str], resume: bool) -> list[str]:
    """Train and return this rank's log lines."""
    from megatron_entropy.config.load import load as load_configs
    from megatron_entropy.methods import load_method_config
    from megatron_entropy.trainer.loop import train

    messages: list[str] = []
    with captured_log(messages):
        train(load_configs(config, overrides, load_method_config), resume=resume)
    return messages


def test_a_run_exports_the_merged_model_and_the_adapter(tmp_path, monkeypatch):
    pytest.importorskip("google.protobuf", reason="the tokenizer of the example is made with it")
    monkeypatch.setattr("sys.argv", ["", "--out", str(tmp_path / "in"), "--train", "32", "--eval", "4"])
    make_arithmetic.main()
    config = tmp_path / "run.toml"
    config.write_text(f"""
        output = "{tmp_path}/run"
        steps = 2
        model.path = "{tmp_path}/in/model"
        method.name = "sft"
        batch.prompts = 8
        data = {{train = ["{tmp_path}/in/train.jsonl"], max_prompt_tokens = 16}}
        rollout.max_response_tokens = 24
        [actor]
        max_tokens_per_microbatch = 256
        optimizer.lr = 1e-2
        lora = {{rank = 4, alpha = 8}}
    """)  # fmt: skip
    (tmp_path / "run").mkdir()
    first = run_on_ranks(run, 2, str(config), ["--actor.parallel.tp=2"], False)[0]
    (tmp_path / "run" / "summary.json").unlink()  # it marks the stage as finished
    second = run_on_ranks(run, 2, str(config), ["--steps=3", "--actor.parallel.pp=2"], True)[0]
    assert any("resuming stage train after step 2" in message for message in second)
    counts = [[message for message in messages if "parameters trained" in message] for messages in (first, second)]
    assert len(counts[0]) == 1 and counts[0] == counts[1]

    base, hf, adapter, merged = (tmp_path / name for name in ("in/model", "run/hf", "run/adapter", "merged"))
    assert cli.main(["merge-lora", str(base), str(adapter), str(merged)]) == 0
    found, expected = load_file(merged / "model.safetensors"), load_file(hf / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-6, err_msg=name)
    assert_close(
        expected, merge_in_fp64(load_file(base / "model.safetensors"), load_file(adapter / ADAPTER_FILE), 8 / 4)
    )
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (4, 8, str(base))
    assert settings["target_modules"] == [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def update_experts(folder: str, layout: ParallelConfig) -> tuple[list, dict, list[str], list[str]]:
    """Two updates of a model with experts."""
    messages: list[str] = []
    with captured_log(messages):
        actor = build(folder, layout)
    before = {name: shard.detach().clone() for name, shard in actor.named_shards().items()}
    steps = [update(actor), update(actor)]
    assert all(torch.equal(shard, before[name]) for name, shard in actor.named_shards().items())
    return steps, whole(actor, actor.merged_shards()), list(adapters(actor)), messages


def test_experts_get_no_adapters(tmp_path):
    folder = str(write_model(tmp_path, "Qwen3Moe"))
    steps, merged, modules, messages = run_on_ranks(update_experts, 1, folder, ONE)[0]
    base = load_file(tmp_path / "model.safetensors")
    changed = {name.split(".")[4] for name, array in base.items() if not np.array_equal(array, merged[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"} and len(modules) == 4 * 4 * 2
    total = sum(array.size for array in base.values()) + 2 * (256 - 151) * 64  # with padding
    adapted = 4 * 4 * (64 + 256 + 128 + 64)
    assert messages == [
        "LoRA: experts get no adapters, all-linear means the attention's layers",
        f"LoRA: {adapted:,} of {total + adapted:,} parameters trained",
    ]
    for layout in (ParallelConfig(tp=2, ep=2, sequence_parallel=True), ParallelConfig(dp=2, pp=2, ep=2)):
        other = run_on_ranks(update_experts, layout.world_size, folder, layout)
        np.testing.assert_allclose(other[0][0], steps, atol=TOLERANCE)
        assert_close(other[0][1], merged)
        assert [lines for *_, lines in other] == [messages] + [[]] * (layout.world_size - 1), "once under every layout"


def merge_in_bf16(folder: str) -> tuple[float, bool]:
    """Largest error of merged weights against fp64 in units of bf16's precision; whether the base is unchanged."""
    actor = build(folder, ONE, dtype="bfloat16")
    update(actor)
    before = {name: shard.detach().clone() for name, shard in actor.named_shards().items()}
    merged, adapter, worst = actor.merged_shards(), actor.adapter_shards(), 0.0
    for name, weight in before.items():
        assert merged[name].dtype is torch.bfloat16
        layer = name.removesuffix(".weight")
        if f"{layer}_lora.up" not in adapter:
            assert merged[name] is actor.named_shards()[name], "weights without an adapter are not copied"
            continue
        up, down = adapter[f"{layer}_lora.up"].double(), adapter[f"{layer}_lora.down"].double()
        exact = weight.double() + 6.0 / 4 * (up @ down)
        worst = max(worst, float(((merged[name].double() - exact).abs() / (exact.abs() + 1e-6)).max()) * 2**8)
    return worst, all(torch.equal(shard, before[name]) for name, shard in actor.named_shards().items())


def test_weights_are_merged_in_fp32_and_rounded_once(folder):
    worst, unchanged = run_on_ranks(merge_in_bf16, 1, folder)[0]
    assert worst <= 1.01 and unchanged  # half a unit in the last place of 8 bits is 2**-9, relative at most 2**-8


def test_slabs_of_a_weight_are_merged_once(folder):
    assert run_on_ranks(read_in_slabs, 1, folder)[0] == 4 * 4


def read_in_slabs(folder: str) -> int:
    """Count the merges while the model is streamed in slabs of 10 rows."""
    from megatron_entropy.actor import lora

    calls, merge = [], lora.merge_adapter
    lora.merge_adapter = lambda *arguments: calls.append(1) or merge(*arguments)
    actor = build(folder, ONE)
    source = ShardedSource(actor.arch, ONE, actor.merged_shards(), torch.float32)
    for number, (_, dtype, size) in enumerate(source.metadata()):
        for first in range(0, size[0], 10):
            count = min(10, size[0] - first)
            source.read(number, first, count, torch.empty((count, *size[1:]), dtype=dtype), in_place=False)
    assert source._shard is None, "no slab stays in memory"
    return len(calls)


FUSED = "share an adapter, because Megatron fuses them; add"


@pytest.mark.parametrize(
    "targets,experts,message",
    [
        (["q_proj"], False, f": q_proj, k_proj, v_proj {FUSED} k_proj and v_proj"),
        (["o_proj", "up_proj"], False, f": gate_proj, up_proj {FUSED} gate_proj"),
        (["wq"], False, ": wq is no linear layer of the model; known are q_proj, k_proj, v_proj, o_proj, gate_proj,"),
        (["down_proj"], True, ": down_proj is a part of the experts, which take no adapters; known are q_proj,"),
        (["all-linear", "o_proj"], False, ": all-linear is no linear layer of the model"),
        ([], False, " is empty; all-linear is every layer"),
    ],
)
def test_wrong_targets_are_reported(folder, tmp_path, targets, experts, message):
    arch = read_architecture(write_model(tmp_path, "Qwen3Moe") if experts else folder)
    with pytest.raises(ConfigError) as caught:
        names.lora_linears(LoraConfig(rank=4, targets=targets), arch)
    assert str(caught.value).startswith("actor.lora.targets" + message)
    assert "\n" not in str(caught.value)
    assert names.lora_linears(LoraConfig(targets=targets), arch) == [], "rank 0 ignores them"


def test_targets_choose_the_layers(folder):
    arch = read_architecture(folder)
    lora = LoraConfig(rank=2, targets=["v_proj", "down_proj", "q_proj", "k_proj"])
    assert names.lora_linears(lora, arch) == ["linear_qkv", "linear_fc2"]
    assert len(names.adapter_entries(arch, lora)) == 4 * (3 + 1 + 1 + 1)

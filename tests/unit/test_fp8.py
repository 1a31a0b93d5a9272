"""FP8 by configuration: packs fit Transformer Engine, mistakes are one line, megatron-core gets its own names.

Transformer Engine's rules are restated here from its source; nothing in this file needs it, or a GPU.
"""

import dataclasses
import re

import numpy as np
import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_entropy.actor import fp8, model
from megatron_entropy.config import check
from megatron_entropy.config.architecture import ModelArchitecture, MoeArchitecture
from megatron_entropy.config.fp8 import RECIPES, Fp8Config, token_multiple
from megatron_entropy.config.schema import ActorConfig, Config, DataConfig
from megatron_entropy.data.packing import pack
from megatron_entropy.errors import ConfigError
from megatron_entropy.launch.fp8 import recipe_problem
from megatron_entropy.methods import build_method, load_method_config
from megatron_entropy.records import Sample

ARCH = ModelArchitecture(
    architecture="Qwen3ForCausalLM",
    family="qwen3",
    num_layers=6,
    hidden_size=256,
    ffn_size=512,
    num_heads=8,
    num_query_groups=4,
    head_dim=32,
    vocab_size=512,
    max_positions=8192,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_kind="default",
    rope_scaling={},
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=True,
)


@pytest.mark.parametrize("split", [1, 2, 8])
@pytest.mark.parametrize("recipe", RECIPES)
def test_packs_fit_the_matrix_products(recipe, split):
    """Rows of an input are a multiple of 8, of a weight gradient 16; without whole blocks blockwise gathers in bf16."""
    rows = {"blockwise": 128, "mxfp8": 32, "nvfp4": 16}.get(recipe, 8)
    multiple = token_multiple(Fp8Config(recipe=recipe), split=split)
    for length in (2, 17, 129, 1025):
        samples = [Sample(np.arange(length, dtype=np.int32), 1, "stop", "")]
        batch = pack(samples, [0], multiple=multiple, device=torch.device("cpu"))
        total = len(batch.tokens)
        assert total % split == 0 and total // split % rows == 0 and total % 16 == 0
        assert 0 <= total - (length - 1) < multiple, "no more padding than needed"
        assert batch.boundaries[-1] == total
    assert token_multiple(Fp8Config(), split=split) == split


def settings(**keys):
    actor = {key: keys.pop(key) for key in ("dtype", "lora", "parallel", "recompute") if key in keys}
    method = {"name": "grpo", **keys.pop("method", {})}
    return Config(
        steps=1,
        method=load_method_config(method["name"])(**method),
        data=DataConfig(train=["t.jsonl"]),
        rollout=keys.pop("rollout", {}),
        actor=ActorConfig.model_validate({**actor, "fp8": keys}),
    )


STORED = {"recipe": "blockwise", "parameters": True, "parallel": {"distributed_optimizer": True}}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"last_layers_bf16": 1}, "actor.fp8.last_layers_bf16 has no effect without actor.fp8.recipe"),
        ({"recipe": "nvfp4", "format": "hybrid"}, 'actor.fp8.format="hybrid": nvfp4 has one format'),
        ({"emulate": True}, "actor.fp8.emulate has no effect without actor.fp8.recipe"),
        ({"recipe": "current", "head": True}, "actor.fp8.head=true needs actor.fp8.emulate=true"),
        ({"recipe": "nvfp4", "emulate": True}, "one that can be emulated: current, delayed, blockwise, mxfp8"),
        ({"recipe": "mxfp8", "emulate": True, "block_scales": "fp32"}, 'needs actor.fp8.recipe="blockwise" and'),
        ({"recipe": "delayed", "emulate": True, "recompute": "full"}, 'actor.recompute="full": the scales of emulated'),
        ({"recipe": "delayed", "emulate": True, "lora": {"rank": 4}}, "actor.lora.rank=4: checkpoints of adapters"),
        ({"recipe": "current", "emulate": True, "dtype": "float32", "lora": {"rank": 4}}, None),
        ({"recipe": "current", "dtype": "float32"}, 'actor.dtype="float32": FP8 needs "bfloat16"'),
        ({"recipe": "delayed", "first_layers_bf16": 1}, "the recipe delayed cannot leave layers in bfloat16"),
        ({"recipe": "current", "first_layers_bf16": 3, "last_layers_bf16": 3}, "= 6 leaves none of the model's 6"),
        ({"recipe": "current", "first_layers_bf16": 3, "parallel": {"pp": 3}}, "at most the 2 layers of a pipeline"),
        ({"recipe": "mxfp8", "parallel": {"tp": 4}}, None),
        ({"parameters": True}, "actor.fp8.parameters has no effect without actor.fp8.recipe"),
        ({"recipe": "current", "parameters": True, "emulate": True}, "emulated FP8 stores no weights; leave one of"),
        ({"recipe": "delayed", "parameters": True}, "its scales are not known yet when weights are loaded; set the"),
        ({"recipe": "mxfp8", "parameters": True}, "gathers such weights through the gradients' memory"),
        ({"recipe": "nvfp4", "parameters": True}, "set the recipe to current or blockwise, or leave parameters out"),
        ({"recipe": "current", "parameters": True}, "needs actor.parallel.distributed_optimizer=true, which keeps"),
        ({**STORED, "lora": {"rank": 4}}, "with actor.lora.rank=4: LoRA's frozen weights stay in bfloat16; set rank"),
        (
            {**STORED, "rollout": {"colocate": True}},
            "with rollout.colocate=true: FP8 weights cannot be offloaded; give",
        ),
        ({**STORED, "dtype": "bfloat16", "first_layers_bf16": 1}, None),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(keys, message):
    if message is None:
        check.check(settings(**keys), ARCH)
        return
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        check.check(settings(**keys), ARCH)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ({"name": "grpo", "kl_coefficient": 0.1}, "method.kl_coefficient=0"),
        ({"name": "sent"}, 'method.penalty_to="old"'),
        ({"name": "sent", "kl_coefficient": 0.1}, 'method.kl_coefficient=0 and method.penalty_to="old"'),
        ({"name": "curiosft"}, 'method.teacher="policy"'),
        ({"name": "curiosft", "teacher": "policy"}, None),
        ({"name": "dapo"}, None),
    ],
)
def test_a_method_that_copies_weights_names_the_setting_that_avoids_it(method, setting):
    if setting is None:
        build_method(settings(**STORED, method=method))
        return
    with pytest.raises(ConfigError) as caught:
        build_method(settings(**STORED, method=method))
    assert "\n" not in str(caught.value) and f"; set {setting}, or leave parameters out" in str(caught.value)
    build_method(settings(recipe="blockwise", method=method))


@pytest.mark.parametrize(
    ("recipe", "change", "tp", "message"),
    [
        ("current", {"ffn_size": 520}, 1, "multiples of 16 on a rank, found 520 feed-forward columns"),
        ("current", {"ffn_size": 528}, 2, "found 264 feed-forward columns; lower actor.parallel.tp"),
        ("mxfp8", {"ffn_size": 528}, 1, "multiples of 32 on a rank, found 528 feed-forward columns"),
        ("current", {"hidden_size": 250}, 1, "found 250 hidden features"),
        ("current", {"head_dim": 10}, 4, "found 20 attention outputs"),
        ("current", {"moe": MoeArchitecture(8, 2, 24, True)}, 1, "found 24 columns of an expert"),
    ],
)
def test_layers_of_a_width_without_fp8_products_are_named(recipe, change, tp, message):
    config, arch = settings(recipe=recipe, parallel={"tp": tp}), dataclasses.replace(ARCH, **change)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check.check(config, arch)


H100, B200, L40, A100, RTX = (("gpu", capability) for capability in ((9, 0), (10, 0), (8, 9), (8, 0), (12, 0)))


@pytest.mark.parametrize(
    ("recipe", "devices", "cuda", "engine", "message"),
    [
        ("current", [L40], "12.4", "2.9.0", ""),
        ("delayed", [H100, H100], "13.0", "2.20.2", ""),
        ("blockwise", [H100], "13.0", "2.20.2", ""),
        ("mxfp8", [B200], "13.0", "2.20.2", ""),
        ("nvfp4", [RTX], "13.0", "2.20.2", ""),
        ("current", [H100, A100], "13.0", "2.20.2", "compute capability 8.9 or higher, found 8.0 (gpu)"),
        ("blockwise", [L40], "13.0", "2.20.2", "9.0 or higher, found 8.9 (gpu); set it to current or delayed"),
        ("blockwise", [H100], "12.8", "2.20.2", "needs a torch for CUDA 12.9 or newer, found 12.8"),
        ("mxfp8", [H100], "13.0", "2.20.2", "10.0 or higher and below 12.0, found 9.0 (gpu); set it to current or"),
        ("mxfp8", [RTX], "13.0", "2.20.2", "10.0 or higher and below 12.0, found 12.0"),
        ("current", [H100], "13.0", "2.8.0", "needs transformer-engine>=2.9, found 2.8.0"),
        ("current", [H100], "13.0", None, "needs the package transformer-engine, which is not installed"),
        ("current", [], None, "2.20.2", "needs a GPU, and this machine has none"),
    ],
)
def test_machine_that_cannot_compute_a_recipe_is_one_line(recipe, devices, cuda, engine, message):
    problem = recipe_problem(recipe, devices, cuda, engine)
    assert "\n" not in problem
    assert message in problem if message else problem == ""


@pytest.mark.parametrize("recipe", RECIPES)
def test_megatron_core_gets_its_own_names(recipe):
    parallel = {"tp": 2, "sequence_parallel": True, "distributed_optimizer": True}
    keys = {} if recipe == "delayed" else {"first_layers_bf16": 1, "last_layers_bf16": 2}
    stores = recipe in ("current", "blockwise")
    actor = settings(recipe=recipe, dtype="bfloat16", parallel=parallel, parameters=stores, **keys).actor
    built = TransformerConfig(
        num_layers=6,
        hidden_size=64,
        num_attention_heads=4,
        bf16=True,
        params_dtype=torch.bfloat16,
        **fp8.model_settings(actor.fp8),
    )
    assert (built.fp4, built.fp8) == (("e2m1", None) if recipe == "nvfp4" else (None, RECIPES[recipe].format))
    if recipe != "nvfp4":
        assert built.fp8_recipe == {"current": "tensorwise"}.get(recipe, recipe)
    assert built.fp8_param is stores
    layers = (built.first_last_layers_bf16, built.num_layers_at_start_in_bf16, built.num_layers_at_end_in_bf16)
    assert layers == ((False, 1, 1) if recipe == "delayed" else (True, 1, 2))
    off = Fp8Config(recipe=recipe, emulate=True)
    assert fp8.model_settings(off) == {}, "emulated FP8 is none of Megatron's"


class GroupedLinear(torch.nn.Module):
    """Stands in for Transformer Engine's grouped linear layers: `weight0` to `weightN` and `num_gemms`."""

    def __init__(self, experts):
        super().__init__()
        self.num_gemms = experts
        for index in range(experts):
            self.register_parameter(f"weight{index}", torch.nn.Parameter(torch.zeros(2, 2)))
            getattr(self, f"weight{index}").allreduce = True  # megatron-core 0.16 to 0.18 with ep = 1


def test_grouped_experts_reduce_among_their_own_replicas():
    experts = torch.nn.Module()
    experts.linear_fc1, experts.linear_fc2 = GroupedLinear(3), GroupedLinear(3)
    mlp = torch.nn.Module()
    mlp.experts, mlp.router = experts, torch.nn.Linear(2, 2)
    model._mark_sharded_weights(torch.nn.ModuleDict({"mlp": mlp}))
    for dim, layer in enumerate((experts.linear_fc1, experts.linear_fc2)):
        for weight in layer.parameters():
            marks = vars(weight)
            assert (marks["allreduce"], marks["tensor_model_parallel"], marks["partition_dim"]) == (False, True, dim)
    assert not hasattr(mlp.router.weight, "allreduce"), "the router is no expert"

"""Our settings, specs and names beside the real Transformer Engine, without a GPU: `make test-te`.

Layers cannot be built without a device, so nothing is computed here: what is compared are recipes, classes, rules and
names.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch

te = pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed: make test-te")

from megatron.core import fp8_utils  # noqa: E402
from megatron.core.extensions import transformer_engine as adapter  # noqa: E402
from megatron.core.fp4_utils import get_fp4_recipe  # noqa: E402
from megatron.core.fp8_utils import get_fp8_recipe  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from transformer_engine.common import recipe as te_recipe  # noqa: E402
from transformer_engine.pytorch.constants import DType  # noqa: E402
from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef  # noqa: E402
from transformer_engine.pytorch.quantization import get_align_size_for_quantization  # noqa: E402
from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor  # noqa: E402
from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec  # noqa: E402

from megatron_entropy.actor import fp8, fp8_weights, model  # noqa: E402
from megatron_entropy.actor.fp8_quantizers import quantize_tensor  # noqa: E402
from megatron_entropy.config.architecture import MoeArchitecture  # noqa: E402
from megatron_entropy.config.fp8 import AMAX_HISTORY, RECIPES, STORED, Fp8Config, token_multiple  # noqa: E402
from megatron_entropy.config.schema import ActorConfig  # noqa: E402

CLASSES = {
    "current": te_recipe.Float8CurrentScaling,
    "delayed": te_recipe.DelayedScaling,
    "blockwise": te_recipe.Float8BlockScaling,
    "mxfp8": te_recipe.MXFP8BlockScaling,
    "nvfp4": te_recipe.NVFP4BlockScaling,
}


def settings(recipe, **keys):
    """Megatron's settings of a small model with an FP8 recipe."""
    chosen = fp8.model_settings(Fp8Config.model_validate({"recipe": recipe, **keys}))
    return TransformerConfig(
        num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, params_dtype=torch.bfloat16, **chosen
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_becomes_transformer_engines_own(recipe):
    config = settings(recipe)
    built = get_fp4_recipe(config) if recipe == "nvfp4" else get_fp8_recipe(config)
    assert isinstance(built, CLASSES[recipe])
    assert built.fp8_format.name.lower() == RECIPES[recipe].format
    if recipe != "nvfp4":
        other = "e4m3" if RECIPES[recipe].format == "hybrid" else "hybrid"
        assert get_fp8_recipe(settings(recipe, format=other)).fp8_format.name.lower() == other


@pytest.mark.parametrize("recipe", STORED)
def test_weights_of_a_recipe_can_be_stored_and_gathered(recipe):
    assert settings(recipe, parameters=True).fp8_param and not settings(recipe).fp8_param
    keys = inspect.signature(te.fp8_model_init).parameters
    assert {"recipe", "preserve_high_precision_init_val"} <= keys.keys()
    assert fp8_utils.te_post_all_gather_processing is not None


def test_an_fp8_weight_is_read_as_bfloat16():
    """The tensor of `current` on a CPU, where Transformer Engine has a cast of its own; reading is what ours is."""
    payload = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    weight = torch.nn.Parameter(
        Float8Tensor(
            shape=payload.shape,
            dtype=torch.bfloat16,
            data=payload.view(torch.uint8),
            fp8_scale_inv=torch.tensor([0.25]),
            fp8_dtype=DType.kFloat8E4M3,
            device=torch.device("cpu"),
        )
    )
    read = fp8_weights.dequantize(weight)
    assert type(read) is torch.Tensor and read.dtype is torch.bfloat16 and not read.requires_grad
    assert torch.equal(read, (payload.float() * 0.25).bfloat16())


def test_delayed_scaling_has_transformer_engines_history():
    config = settings("delayed")
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (AMAX_HISTORY, "max")
    default = te_recipe.DelayedScaling()
    assert (default.amax_history_len, default.amax_compute_algo) == (AMAX_HISTORY, "max")


@pytest.mark.parametrize("recipe", RECIPES)
def test_defaults_and_multiples_are_transformer_engines(recipe):
    built = CLASSES[recipe]()
    assert built.fp8_format.name.lower() == RECIPES[recipe].format, "format = auto is its default"
    assert RECIPES[recipe].tokens % get_align_size_for_quantization(built) == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_padded_packs_pass_the_check_of_every_forward_pass(recipe):
    for split in (1, 2, 4):
        multiple = token_multiple(Fp8Config(recipe=recipe), split=split)
        assert_dim_for_fp8_exec(torch.empty(multiple // split, 1, RECIPES[recipe].width))
    with pytest.raises(ValueError, match="divisible by 8"):
        assert_dim_for_fp8_exec(torch.empty(12, 1, 16))


def layer(monkeypatch, **keys):
    """The submodules of a layer as the actor describes it where Transformer Engine runs."""
    monkeypatch.setattr(model, "has_transformer_engine", lambda: True)
    lora = {"rank": 4} if keys.pop("lora", False) else {}
    arch = SimpleNamespace(moe=keys.get("moe"), qk_norm=True)
    return model._layer_spec(arch, ActorConfig.model_validate({"lora": lora}), 0).submodules


def feed_forward(block):
    """The submodules of a layer's feed-forward block; megatron-core 0.17 and later hide them in a `partial`."""
    mlp = block.mlp
    return mlp.keywords["submodules"] if hasattr(mlp, "keywords") else mlp.submodules


def test_norms_are_fused_into_linear_layers_except_with_lora(monkeypatch):
    fused = layer(monkeypatch)
    assert fused.input_layernorm is IdentityOp and fused.pre_mlp_layernorm is IdentityOp
    assert fused.self_attention.submodules.linear_qkv is adapter.TELayerNormColumnParallelLinear
    separate = layer(monkeypatch, lora=True)
    assert separate.input_layernorm is adapter.TENorm and separate.pre_mlp_layernorm is adapter.TENorm
    assert separate.self_attention.submodules.linear_qkv is adapter.TEColumnParallelLinear
    assert feed_forward(separate).linear_fc1 is adapter.TEColumnParallelLinear


def test_experts_are_grouped(monkeypatch):
    block = layer(monkeypatch, moe=MoeArchitecture(4, 2, 32, True))
    assert block.pre_mlp_layernorm is not IdentityOp, (
        "the norm before experts is its own, and so is its checkpoint name"
    )
    assert "TEColumnParallelGroupedLinear" in repr(feed_forward(block))


def test_names_of_parameters_are_those_of_checkpoints():
    """The names that Transformer Engine registers, read from its source: building a layer takes a device."""
    assert '"layer_norm_weight"' in inspect.getsource(te.LayerNormLinear.__init__)
    grouped = inspect.getsource(te.GroupedLinear.__init__) + inspect.getsource(te.GroupedLinear)
    assert 'f"weight{i}"' in grouped and "num_gemms" in grouped
    assert model._EXPERT_NUMBER.search("decoder.layers.0.mlp.experts.linear_fc1.weight3")


@pytest.mark.parametrize("kind", ["TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"])
def test_weights_of_the_real_grouped_layers_are_marked_as_experts(kind):
    """An instance without its constructor, which takes a device."""
    grouped = object.__new__(getattr(adapter, kind))
    torch.nn.Module.__init__(grouped)
    grouped.num_gemms = 2
    for index in range(2):
        grouped.register_parameter(f"weight{index}", torch.nn.Parameter(torch.zeros(2, 2)))
    dim = int(kind.startswith("TERow"))
    experts = torch.nn.ModuleDict({f"linear_fc{1 + dim}": grouped})
    mlp = torch.nn.ModuleDict({"experts": experts})
    model._mark_sharded_weights(torch.nn.ModuleDict({"mlp": mlp}))
    for weight in grouped.parameters():
        assert vars(weight)["allreduce"] is False and vars(weight)["partition_dim"] == dim


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_emulated_current_scaling_is_the_reference_bit_for_bit(source, dtype, power_of_two):
    reference = CurrentScalingQuantizerRef(dtype=dtype, columnwise=False, pow_2_scales=power_of_two)
    generator = torch.Generator().manual_seed(0)
    for size in (0.0, 1e-30, 1e-6, 1e-3, 1.0, 7.0, 300.0, 1e4, 1e30):
        values = (torch.randn(96, 200, generator=generator) * size).to(source).nan_to_num()
        found, expected = quantize_tensor(values, dtype, power_of_two=power_of_two), reference.quantize(values)
        assert torch.equal(found.payload.view(torch.uint8), expected.data.view(torch.uint8)), size
        assert torch.equal(found.inverse_scale, expected.scale), size

"""Model folders are checked by `config.json` and the headers of the weights, without torch.

Shown: every wrong type, size or feature of `config.json` and every kind of damage to weights and index is a ModelError
in one line that names file and key or tensor; null values count as missing; whatever bytes a file has, nothing but a
ModelError comes out. Not shown: that the actor computes what config.json says (tests/distributed/test_actor.py), the
values of the weights.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import damaged
from safetensors.numpy import save_file

from megatron_entropy.config.architecture import FAMILIES, read_architecture
from megatron_entropy.errors import ModelError
from megatron_entropy.weights.headers import INDEX, TensorHeaders, check_model
from megatron_entropy.weights.names import entries

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": None,
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 40,
}
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 64,
}


def write_config(folder: Path, changes: dict) -> Path:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return folder


def write_model(folder: Path, changes: dict | None = None, *, files: int = 1) -> Path:
    """A model folder with zeros for weights, in one file or in several with an index."""
    arch = read_architecture(write_config(folder, changes or {}))
    shapes = {name: shape for entry in entries(arch) for name, shape in zip(entry.tensors, entry.shapes, strict=True)}
    shards = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    weight_map = {name: shards[i % files] for i, name in enumerate(shapes)}
    for shard in shards:
        save_file({n: np.zeros(shapes[n], np.float32) for n, f in weight_map.items() if f == shard}, folder / shard)
    if files > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def refusal(call, *arguments) -> str:
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"rope_scaling": LLAMA3}, {"rope_parameters": {"rope_theta": 10000}}])
def test_every_family_is_read(tmp_path, name, changes):
    arch = read_architecture(write_config(tmp_path, {**EXPERTS, "architectures": [name], **changes}))
    assert (arch.num_layers, arch.num_query_groups, arch.head_dim, arch.norm_eps) == (2, 2, 4, 1e-5)
    assert arch.rope_theta == changes.get("rope_parameters", {}).get("rope_theta", 500000.0)
    assert (arch.moe is not None) == ("Moe" in name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"hidden_size": "16"}, "hidden_size: must be a valid integer, found '16'"),
        ({"hidden_size": True}, "hidden_size: must be a valid integer, found True"),
        ({"hidden_size": 16.0}, "hidden_size: must be a valid integer, found 16.0"),
        ({"hidden_size": [16]}, "hidden_size: must be a valid integer, found list"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: must be greater than or equal to 1, found 0"),
        ({"vocab_size": -1}, "vocab_size: must be greater than or equal to 1, found -1"),
        ({"vocab_size": 10**12}, "vocab_size: must be less than or equal to 8388608, found 1000000000000"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: must be greater"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, "num_attention_heads=6 does not divide hidden_size=16"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"rms_norm_eps": "abc"}, "rms_norm_eps: must be a valid number, found 'abc'"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps: must be a finite number, found nan"),
        ({"rope_theta": -1}, "rope_theta: must be greater than 1, found -1"),
        ({"rope_theta": 10**400}, "rope_theta: must be a valid number"),
        ({"rope_scaling": [1]}, "rope_scaling: must be a valid dictionary, found list"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type: must be a valid string, found list"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "rotary scaling 'dynamic' is not one of default"),
        ({"rope_scaling": {"type": "linear"}}, "rotary scaling linear needs the key 'factor'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "x"}}, "factor: must be a valid number, found 'x'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rotary scaling llama3 needs the key 'low_"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "low_freq_factor=1.0 must be below high_freq_factor=1.0"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta: must be greater than 1, found 0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: quantized weights are not supported"),
        ({"model_type": "gemma"}, "model_type=gemma does not belong to"),
        ({"layer_types": "x"}, "layer_types: must be a valid list, found 'x'"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported"),
        ({"hidden_act": 5}, "hidden_act: must be a valid string, found 5"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window=true is not supported"),
        ({"attention_bias": True}, "attention_bias/mlp_bias=true is not supported for LlamaForCausalLM"),
        ({"architectures": None}, r"architecture \(none\) is not one of Qwen2ForCausalLM"),
        ({"architectures": "Llama"}, "architectures: must be a valid list, found 'Llama'"),
        ({"architectures": [5]}, "architectures.0: must be a valid string, found 5"),
        ({"architectures": ["Mamba"]}, "architecture Mamba is not one of Qwen2ForCausalLM"),
        ({**EXPERTS, "num_experts": None}, "key 'num_experts' is missing"),
        ({**EXPERTS, "num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than the 4 experts"),
        ({**EXPERTS, "num_experts": 10**4, "num_hidden_layers": 999}, "10000 experts in each of 999 layers"),
        ({**EXPERTS, "mlp_only_layers": [0]}, "mlp_only_layers/decoder_sparse_step: every layer"),
    ],
)  # fmt: skip
def test_mistakes_in_config_name_file_key_and_value(tmp_path, changes, message):
    with pytest.raises(ModelError, match=f"^{tmp_path}/config.json: {message}"):
        read_architecture(write_config(tmp_path, changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("null", "expected a JSON object, found NoneType"),
        ("[1]", "expected a JSON object, found list"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ('{"a": ' * 100_000, "not valid JSON: nested too deeply"),
        (r'{"\ud800": 1}', "not valid JSON: .*surrogates not allowed"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON: Exceeds the limit"),
        (b"\xff{}", "not valid JSON: .*utf-8"),
    ],
)
def test_files_that_are_no_object_are_named(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=f"config.json: {message}"):
        read_architecture(tmp_path)


def test_paths_that_are_no_model_folder_are_named(tmp_path):
    assert refusal(read_architecture, tmp_path / "none") == f"model.path: no such folder: {tmp_path}/none"
    assert "config.json: no such file; a model folder needs" in refusal(read_architecture, tmp_path)
    (tmp_path / "config.json").mkdir()
    assert refusal(read_architecture, tmp_path).endswith("config.json: not a regular file")
    for name in ("loop", "pipe"):
        folder = tmp_path / name
        folder.mkdir()
        os.symlink("config.json", folder / "config.json") if name == "loop" else os.mkfifo(folder / "config.json")
        assert refusal(read_architecture, folder).endswith("config.json: not a regular file")
    assert refusal(lambda: read_architecture(tmp_path / "pipe" / "config.json", key="model.reference")) == (
        f"model.reference: not a folder: {tmp_path}/pipe/config.json"
    )


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("changes", [{}, EXPERTS, {"tie_word_embeddings": True}], ids=["dense", "experts", "tied"])
def test_a_complete_model_passes(tmp_path, files, changes):
    check_model(write_model(tmp_path, changes, files=files), read_architecture(tmp_path))


QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "tensor model.layers.2.input_layernorm.weight is missing; config.json implies it"),
        ({"head_dim": 8}, r"q_proj.weight has shape \(16, 16\), config.json implies \(32, 16\)"),
        ({"vocab_size": 41}, r"embed_tokens.weight has shape \(40, 16\), config.json implies \(41, 16\)"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "q_norm.weight is missing"),
        (EXPERTS, "is missing"),
    ],
)
def test_weights_must_fit_the_architecture(tmp_path, changes, message):
    write_model(tmp_path)
    with pytest.raises(ModelError, match=message):
        check_model(tmp_path, read_architecture(write_config(tmp_path, changes)))


def test_damaged_weight_files_are_named(tmp_path):
    arch = read_architecture(write_model(tmp_path))
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for content in (b"", whole[:7], whole[:100], whole[:-1], whole + b"\0", b"\xff" * 8 + whole[8:], b"PK" + whole):
        file.write_bytes(content)
        assert f"{file}: corrupt or not a safetensors file" in refusal(check_model, tmp_path, arch)
    file.write_bytes(whole.replace(b'"F32"', b'"I32"', 1))
    assert "has type I32, not one of F32, BF16, F16" in refusal(check_model, tmp_path, arch)
    (tmp_path / "copy.safetensors").write_bytes(whole)
    assert "is in copy.safetensors too" in refusal(check_model, tmp_path, arch)
    for other in tmp_path.glob("*.safetensors"):
        other.unlink()
    assert "no *.safetensors file found" in refusal(check_model, tmp_path, arch)
    os.mkfifo(file)
    assert refusal(check_model, tmp_path, arch) == f"{file}: not a regular file"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ({}, "weight_map must be an object"),
        ({"weight_map": ["a"]}, "weight_map must be an object"),
        ({"weight_map": {"a": 5}}, "5 is not the name of one"),
        ({"weight_map": {"a": "../a.safetensors"}}, "'../a.safetensors' is not the name of one"),
        ({"weight_map": {"a": "b.bin"}}, "'b.bin' is not the name of one"),
        ({"weight_map": {"a": "b.safetensors"}}, f"b.safetensors: no such file, but {INDEX} names it"),
        ({"weight_map": {"a": "\0.safetensors"}}, "no such file"),
        ({"weight_map": {"a": "x" * 300 + ".safetensors"}}, "no such file"),
        ({"weight_map": {"a": "model-00001-of-00001.safetensors"}}, f"tensor a is missing; {INDEX} names it"),
    ],
)
def test_a_wrong_index_is_named(tmp_path, index, message):
    write_model(tmp_path)
    (tmp_path / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    assert message in refusal(TensorHeaders, tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), files=2)


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-00002.safetensors"])
@settings(max_examples=150)
@given(data=st.data())
def test_damaged_bytes_are_nothing_but_model_errors(model, name, data):
    whole = (model / name).read_bytes()
    length = int.from_bytes(whole[:8], "little") + 8 if name.endswith("safetensors") else len(whole)
    (model / name).write_bytes(data.draw(damaged(whole[:length])) + whole[length:])
    try:
        check_model(model, read_architecture(model))
    except ModelError as error:
        assert "\n" not in str(error)
    finally:
        (model / name).write_bytes(whole)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from([0, 2**70])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*LLAMA3, "type"]), inner)),
    max_leaves=6,
)


@settings(max_examples=300)
@given(changes=st.dictionaries(st.sampled_from([*LLAMA, *EXPERTS, "rope_parameters", "mlp_bias"]), values, min_size=1))
def test_any_values_are_read_or_refused(model, changes):
    whole = (model / "config.json").read_bytes()
    try:
        arch = read_architecture(write_config(model, changes))
        assert arch.hidden_size > 0 and math.isfinite(arch.norm_eps) and arch.rope_theta > 1
    except ModelError as error:
        assert "\n" not in str(error)
    finally:
        (model / "config.json").write_bytes(whole)


def test_checking_a_model_imports_no_torch(model):
    code = (
        "import sys; from megatron_entropy.config.architecture import read_architecture;"
        "from megatron_entropy.weights.headers import check_model;"
        "check_model(sys.argv[1], read_architecture(sys.argv[1])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""Models are converted to Megatron checkpoints and back without losing a bit, one parameter in memory at a time.

Tiny random models of every family, with biases, vocabularies that need padding, several files. A converted checkpoint
has the names and shapes of those that the actor saves, and actors under any layout load the same parameters from it as
from the original folder. A checkpoint of a run under any layout is converted back whole. Bad input ends in one line.
Merged adapters agree with fp64 arithmetic.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import local_ranks
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_entropy.cli import main as cli
from megatron_entropy.config.architecture import FAMILIES, read_architecture
from megatron_entropy.config.schema import ActorConfig, ParallelConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.errors import CheckpointError
from megatron_entropy.weights import convert as conversion
from megatron_entropy.weights import names
from megatron_entropy.weights.hf_folder import TensorFolder
from megatron_entropy.weights.megatron_folder import open_model

pytestmark = pytest.mark.actor

SIZES = dict(
    vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)
FAMILY_NAMES = sorted(FAMILIES.values())


def write_model(
    folder: Path, family: str, *, tied: bool = False, dtype=torch.float32, shard="150KB", **changes
) -> Path:
    """A random model in several files, with a tokenizer's file beside it; no parameter starts at 0 or 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    experts = EXPERTS if family.endswith("moe") else {}
    config = AutoConfig.for_model(family, **{**SIZES, **experts, "tie_word_embeddings": tied, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return folder


def bits(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder, as integers; read without our own code."""
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    return {name: t.view({2: torch.int16, 4: torch.int32}[t.element_size()]) for name, t in tensors.items()}


def assert_same(found: Path, expected: Path) -> None:
    a, b = bits(found), bits(expected)
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        assert torch.equal(a[name], tensor), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_round_trip_keeps_every_bit(tmp_path, family, tied):
    dtype = torch.bfloat16 if tied else torch.float32
    source = write_model(tmp_path / "hf", family, tied=tied, dtype=dtype)
    assert len(list(source.glob("*.safetensors"))) > 1
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    conversion.to_megatron(source, megatron, max_file_bytes=200_000, verify=True)
    assert len(list((megatron / "shards").glob("*.distcp"))) > 1
    conversion.to_hf(megatron, back, max_shard_bytes=100_000, verify=True)
    assert_same(back, source)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == bits(source).keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in bits(source).values())
    for side in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (back / side).read_bytes() == (source / side).read_bytes()


def test_a_type_can_be_chosen(tmp_path):
    source = write_model(tmp_path / "hf", "qwen3")
    conversion.to_megatron(source, tmp_path / "m", dtype=torch.bfloat16, verify=True)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    conversion.to_hf(tmp_path / "m", tmp_path / "low", verify=True)
    conversion.to_hf(tmp_path / "m", tmp_path / "high", dtype=torch.float32, verify=True)
    expected = {name: t.view(torch.float32).bfloat16() for name, t in bits(source).items()}
    for name, tensor in bits(tmp_path / "low").items():
        assert torch.equal(tensor.view(torch.bfloat16), expected[name])
    for name, tensor in bits(tmp_path / "high").items():
        assert torch.equal(tensor.view(torch.float32), expected[name].float())


def make_actor(folder: str, layout: ParallelConfig):
    from megatron_entropy.actor.actor import Actor

    process_groups.init_model_parallel(layout, seed=1)
    return Actor(read_architecture(folder), ActorConfig(parallel=layout, dtype="float32"), total_updates=1)


def save(folder: str, checkpoints: str, layout: ParallelConfig) -> None:
    from megatron_entropy.checkpoint import saver as checkpoint
    from megatron_entropy.weights.source import load

    actor = make_actor(folder, layout)
    load(TensorFolder(folder), actor.arch, layout, actor.named_shards())
    actor.after_load()
    saver = checkpoint.Saver(Path(checkpoints), keep=1, asynchronous=False)
    saver.save(actor, checkpoint.StageProgress(10, 0, 0, ""))


def stored(shards: Path) -> tuple[dict, set]:
    """Shape and type of the model's tensors in a checkpoint, and names of its modules' states."""
    from torch.distributed.checkpoint import FileSystemReader

    held = FileSystemReader(shards).read_metadata().state_dict_metadata
    model = {key: value for key, value in held.items() if not key.startswith("optimizer.")}
    tensors = {key: (value.size, value.properties.dtype) for key, value in model.items() if hasattr(value, "size")}
    return tensors, model.keys() - tensors.keys()


LAYOUTS = {
    "llama": ParallelConfig(tp=2),
    "qwen2": ParallelConfig(pp=2),
    "qwen3": ParallelConfig(pp=2, vpp=2),
    "qwen3_moe": ParallelConfig(dp=2, ep=2),
}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_checkpoints_of_runs_and_converted_ones_are_alike(tmp_path, family):
    source = write_model(tmp_path / "hf", family, tied=family == "qwen2")
    layout = LAYOUTS[family]
    local_ranks.run_on_ranks(save, layout.world_size, str(source), str(tmp_path / "run"), layout)
    conversion.to_megatron(source, tmp_path / "converted")
    saved_tensors, saved_states = stored(tmp_path / "run" / "step_000010" / "shards")
    tensors, states = stored(tmp_path / "converted" / "shards")
    assert tensors == saved_tensors
    assert states >= saved_states - {"common_state/shard_0_1"}  # megatron-core 0.19's; before it is the file common.pt
    conversion.to_hf(tmp_path / "run" / "step_000010", tmp_path / "back", like=source, verify=True)
    assert_same(tmp_path / "back", source)
    edit(source / "config.json", vocab_size=140)
    with pytest.raises(CheckpointError, match="has 131 rows without padding, config.json implies 140"):
        conversion.to_hf(tmp_path / "run" / "step_000010", tmp_path / "other", like=source)


def differing(folder: str, converted: str, layout: ParallelConfig) -> list[str]:
    """Parameters that are not the same, read by Megatron from a converted checkpoint and by us from the folder."""
    from megatron.core import dist_checkpointing

    from megatron_entropy.weights.source import load

    actor = make_actor(folder, layout)
    load(TensorFolder(folder), actor.arch, layout, actor.named_shards())
    expected = {name: parameter.detach().clone() for name, parameter in actor.named_shards().items()}

    def differing_now() -> list[str]:
        return [name for name, p in actor.named_shards().items() if not torch.equal(p, expected[name])]

    def spoil() -> None:
        for parameter in actor.named_shards().values():
            parameter.detach().fill_(7.0)

    spoil()
    model = {f"model{i}": chunk.module.sharded_state_dict() for i, chunk in enumerate(actor.chunks)}
    loaded = dist_checkpointing.load(model, f"{converted}/shards")
    for i, chunk in enumerate(actor.chunks):
        chunk.module.load_state_dict(loaded[f"model{i}"], strict=True)
    by_megatron = differing_now()
    spoil()
    load(open_model(converted, actor.arch), actor.arch, layout, actor.named_shards())
    return by_megatron + differing_now()


@pytest.mark.parametrize(
    "family,layout",
    [
        ("qwen2", ParallelConfig()),
        ("qwen2", ParallelConfig(tp=2)),
        ("llama", ParallelConfig(pp=2)),
        ("qwen3", ParallelConfig(pp=2, vpp=2)),
        ("qwen3_moe", ParallelConfig(dp=2, ep=2)),
        ("qwen3_moe", ParallelConfig(pp=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}{v}" for k, v in value if v not in (1, False)),
)
def test_actors_of_any_layout_load_what_was_converted(tmp_path, family, layout):
    source = write_model(tmp_path / "hf", family, tied=family == "qwen2")
    conversion.to_megatron(source, tmp_path / "converted")
    for names_ in local_ranks.run_on_ranks(
        differing, layout.world_size, str(source), str(tmp_path / "converted"), layout
    ):
        assert not names_


PEAK = """
import sys
from pathlib import Path
from megatron_entropy.weights import convert as conversion
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
before = peak()
sizes = {"to_megatron": "max_file_bytes", "to_hf": "max_shard_bytes"}
options = {sizes[sys.argv[1]]: 30_000_000}
getattr(conversion, sys.argv[1])(Path(sys.argv[2]), Path(sys.argv[3]), verify=True, **options)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Three more layers of 29 MB each, in files of 30 MB, need no more memory, but for a tenth of them."""
    used: dict[str, list[int]] = {"to_megatron": [], "to_hf": []}
    written: list[int] = []
    for layers in (2, 5):
        folder = tmp_path / str(layers)
        source = write_model(folder / "hf", "llama")
        sizes = dict(hidden_size=512, intermediate_size=4096, num_attention_heads=8, num_key_value_heads=8, head_dim=64)
        for file in source.glob("*.safetensors*"):
            file.unlink()
        edit(source / "config.json", **sizes, num_hidden_layers=layers)
        arch = read_architecture(source)
        tensors = {t: torch.zeros(s) for e in names.entries(arch) for t, s in zip(e.tensors, e.shapes, strict=True)}
        written.append(sum(t.nbytes for t in tensors.values()))
        save_file(tensors, source / "model.safetensors")
        del tensors
        for command, a, b in (("to_megatron", "hf", "m"), ("to_hf", "m", "back")):
            arguments = [sys.executable, "-c", PEAK, command, str(folder / a), str(folder / b)]
            # Freed tensors go back to the system at once: the peak is what was held, not what glibc kept for later.
            environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
            done = subprocess.run(arguments, stdout=subprocess.PIPE, check=True, env=environment)
            used[command].append(int(done.stdout))
    for command, (small, large) in used.items():
        assert large - small < (written[1] - written[0]) / 10, f"{command}: {small / 1e6:.0f}, {large / 1e6:.0f} MB"


def run(capsys, command, *arguments) -> str:
    """What a command says of bad input: one line, without the word `error`; exit code 2."""
    assert cli.main([command, *(str(a) for a in arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    message = [line for line in lines if line.startswith("error: ")]
    assert len(message) == 1 and "Traceback" not in lines
    return message[0].removeprefix("error: ")


def rewrite(folder: Path, change) -> Path:
    """Let `change` have all tensors of a folder, and write them as one file."""
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
BAD_TENSORS = {
    "missing": (lambda t: t.pop(QUERY), f"{{folder}}: tensor {QUERY} is missing"),
    "extra": (
        lambda t: t.update({"model.layers.9.x": torch.zeros(3)}),
        "{file}: tensor model.layers.9.x (3,) belongs to no parameter of Qwen2ForCausalLM",
    ),
    "shape": (
        lambda t: t.update({QUERY: torch.zeros(32, 64)}),
        f"{{file}}: tensor {QUERY} has shape (32, 64), config.json implies (64, 64)",
    ),
    "integers": (
        lambda t: t.update({QUERY: torch.zeros(64, 64, dtype=torch.int8)}),
        f"{{file}}: tensor {QUERY} has type I8, not one of F32, BF16, F16",
    ),
    "mixed": (
        lambda t: t.update({NORM: t[NORM].bfloat16()}),
        f"{{folder}}: tensors of several types (model.embed_tokens.weight is float32, {NORM} is bfloat16)",
    ),
    "tied copy": (
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
        "{file}: tensor lm_head.weight differs from model.embed_tokens.weight, to which config.json ties it",
    ),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_folder_that_is_not_its_config_is_refused(tmp_path, capsys, kind):
    change, expected = BAD_TENSORS[kind]
    source = write_model(tmp_path / "hf", "qwen2", tied=True)
    file = rewrite(source, change)
    found = run(capsys, "convert", "to-megatron", source, tmp_path / "out")
    assert found.startswith(expected.format(folder=source, file=file))
    assert not list(tmp_path.glob("out*"))


def test_mixed_types_are_converted_to_the_one_chosen(tmp_path, capsys):
    source = write_model(tmp_path / "hf", "qwen2", tied=True)
    rewrite(source, BAD_TENSORS["mixed"][0])
    arguments = ["to-megatron", str(source), str(tmp_path / "out"), "--dtype", "float32", "--verify"]
    assert cli.main(["convert", *arguments]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: written, every tensor compared\n"


def test_other_bad_folders_are_refused(tmp_path, capsys):
    source, out = write_model(tmp_path / "hf", "llama"), tmp_path / "out"
    config = (source / "config.json").read_bytes()

    def refusal(*arguments) -> str:
        return run(capsys, "convert", *arguments)

    assert refusal("to-megatron", tmp_path / "no", out) == f"{tmp_path / 'no'}: no such folder"
    assert (
        refusal("to-megatron", source, source)
        == f"{source}: contains the input {source}; name another folder to write to"
    )
    assert "contains the input" in refusal("to-megatron", source, tmp_path, "--overwrite")
    edit(source / "config.json", architectures=["MambaForCausalLM"])
    assert "config.json: architecture MambaForCausalLM is not one of" in refusal("to-megatron", source, out)
    (source / "config.json").write_bytes(config)
    first = sorted(source.glob("*.safetensors"))[0]
    content = first.read_bytes()
    first.write_bytes(content[:1000])
    assert refusal("to-megatron", source, out).startswith(f"{first}: corrupt or not a safetensors file")
    first.unlink()
    assert refusal("to-megatron", source, out).startswith(f"{first}: no such file, but model.safetensors.index.json")
    first.write_bytes(content)
    shutil.copy(first, source / "copy.safetensors")
    assert cli.main(["convert", "to-megatron", str(source), str(out)]) == 0, "what the index does not name"
    assert refusal("to-megatron", source, out).startswith(f"{out}: exists; name another folder, or pass --overwrite")
    assert cli.main(["convert", "to-megatron", str(source), str(out), "--overwrite"]) == 0
    (source / "model.safetensors.index.json").unlink()
    assert " is in copy.safetensors too" in refusal("to-megatron", source, tmp_path / "out2")


def test_bad_checkpoints_are_refused(tmp_path, capsys):
    source, out = write_model(tmp_path / "hf", "llama"), tmp_path / "out"
    megatron = tmp_path / "m"
    conversion.to_megatron(source, megatron)
    other = write_model(tmp_path / "deeper", "llama", num_hidden_layers=6)
    biased = write_model(tmp_path / "biased", "qwen2")
    bare = tmp_path / "step_000010"
    shutil.copytree(megatron / "shards", bare / "shards")
    metadata = bare / "shards" / ".metadata"

    def refusal(*arguments) -> str:
        return run(capsys, "convert", "to-hf", *arguments)

    assert "has no config.json; name the model folder it was trained from with --like" in refusal(bare, out)
    assert refusal(source, out) == f"{source}: not a Megatron checkpoint, .metadata is missing"
    shape = "decoder.layers.self_attention.linear_qkv.layer_norm_weight has shape (4, 64), config.json implies (6, 64)"
    assert refusal(bare, out, "--like", other) == f"{metadata}: tensor {shape}"
    missing = "decoder.layers.self_attention.linear_qkv.bias is missing; config.json implies it"
    assert refusal(bare, out, "--like", biased) == f"{metadata}: tensor {missing}"
    expected = "tensor model.layers.4.input_layernorm.weight has shape (64,), "
    assert expected in refusal(megatron, out, "--like", other), "its own config.json is compared"
    edit(source / "config.json", tie_word_embeddings=True)
    assert "output_layer.weight (256, 64) belongs to no parameter" in refusal(bare, out, "--like", source)
    edit(source / "config.json", tie_word_embeddings=False)
    data = bare / "shards" / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:5000])
    assert refusal(bare, out, "--like", source).startswith(f"{data}: 5000 bytes instead of the ")
    data.write_bytes(bytes(len(content)))
    assert refusal(bare, out, "--like", source).startswith(f"{data}: cannot read embedding.word_embeddings.weight: ")
    metadata.write_bytes(b"x")
    assert refusal(bare, out, "--like", source).startswith(f"{metadata}: cannot be read: ")
    assert not list(tmp_path.glob("out*"))


def test_differences_are_found_and_named(tmp_path, capsys):
    source = write_model(tmp_path / "hf", "qwen3")
    conversion.to_megatron(source, tmp_path / "m")
    assert cli.main(["convert", "compare", str(source), str(tmp_path / "m")]) == 0

    def flip(tensors):
        tensors[NORM].view(torch.int32)[5] ^= 1

    file = rewrite(source, flip)
    capsys.readouterr()
    assert cli.main(["convert", "compare", str(tmp_path / "m"), str(source)]) == 1
    found = capsys.readouterr().err.splitlines()[-1]
    first = tmp_path / "m" / "shards" / "__0_0.distcp"
    assert found.startswith(f"error: {file}: tensor {NORM} differs from {first}: ")
    assert found.endswith(" at (5,) of (64,), 1 of 64 values in all")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from megatron_entropy.cli.main import main
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("command", ["to-megatron", "to-hf"])
def test_a_full_disk_is_reported_and_nothing_is_left(tmp_path, command):
    source, megatron = write_model(tmp_path / "hf", "llama"), tmp_path / "m"
    conversion.to_megatron(source, megatron)
    arguments = [command, source if command == "to-megatron" else megatron, tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'out'}: cannot be written: ")
    assert "too large" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, capsys):
    source = write_model(tmp_path / "hf", "llama")
    found = run(capsys, "convert", "to-megatron", source, "/proc/out")
    assert found.startswith("/proc/out: cannot be written: ")


def write_adapter(folder: Path, base: Path, modules: list[str], rank: int = 4, **options) -> Path:
    folder.mkdir()
    config = dict(
        peft_type="LORA", r=rank, lora_alpha=6, use_rslora=False, target_modules=modules, modules_to_save=None,
        bias="none", use_dora=False, lora_dropout=0.1, task_type="CAUSAL_LM", inference_mode=True, rank_pattern={},
        init_lora_weights=True, megatron_core="megatron.core",
    )  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**config, **options}))
    tensors = {}
    weights = TensorFolder(base)
    for name in weights.names():
        if name.endswith(".weight") and name.split(".")[-2] in modules:
            rows, columns = weights.shape(name)
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns)
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adapters_are_merged_as_arithmetic_says(tmp_path, dtype, use_rslora):
    base = write_model(tmp_path / "base", "qwen2", dtype=dtype)
    adapter = write_adapter(tmp_path / "adapter", base, ["q_proj", "down_proj", "lm_head"], use_rslora=use_rslora)
    arguments = [str(base), str(adapter), str(tmp_path / "out"), "--max-shard-size", "100KB"]
    assert cli.main(["merge-lora", *arguments]) == 0
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    before, after = bits(base), bits(tmp_path / "out")
    updates = load_file(adapter / "adapter_model.safetensors")
    scale = 6 / (4**0.5 if use_rslora else 4)
    changed = 0
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        module = "base_model.model." + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" not in updates:
            assert torch.equal(after[name], tensor), name
            continue
        down, up = (updates[f"{module}.lora_{part}.weight"].double() for part in "AB")
        expected = tensor.view(dtype).double() + scale * (up @ down)
        # bfloat16 has 8 significant bits, float32 24; sums of 5 terms may lose a few at their ends.
        tolerance = 2**-8 if dtype is torch.bfloat16 else 2**-20
        torch.testing.assert_close(after[name].view(dtype).double(), expected, rtol=tolerance, atol=1e-5)
        changed += 1
    assert changed == 9


def test_adapters_that_do_not_fit_are_refused(tmp_path, capsys):
    base = write_model(tmp_path / "base", "qwen2")
    number = iter(range(99))

    def refusal(modules=("q_proj",), change=lambda tensors: None, **options) -> str:
        adapter = write_adapter(tmp_path / f"adapter{next(number)}", base, list(modules), **options)
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")
        return run(capsys, "merge-lora", base, adapter, tmp_path / "out").removeprefix(f"{adapter}/")

    module = "base_model.model.model.layers.0.self_attn.q_proj"
    file = "adapter_model.safetensors: tensor"
    assert refusal(use_dora=True) == "adapter_config.json: use_dora=True is not supported"
    assert refusal(bias="all") == "adapter_config.json: bias=all is not supported"
    assert refusal(modules_to_save=["lm_head"]) == "adapter_config.json: modules_to_save=['lm_head'] is not supported"
    assert refusal(some_new_option=3) == "adapter_config.json: some_new_option=3 is not supported"
    assert "init_lora_weights=pissa is not supported" in refusal(init_lora_weights="pissa")
    assert refusal(peft_type="LOHA").startswith("adapter_config.json: peft_type=LOHA, r=4: only LORA")
    assert (
        refusal(["q_proj", "nothing"]) == "adapter_config.json: target module nothing matches no tensor of the adapter"
    )
    assert (
        refusal(change=lambda t: t.update({f"{module}.lora_A.weight": torch.zeros(4, 32)}))
        == f"{file} {module}.lora_A.weight has shape (4, 32), r=4 and model.layers.0.self_attn.q_proj.weight (64, 64) "
        f"of {TensorFolder(base).file('model.layers.0.self_attn.q_proj.weight')} imply (4, 64)"
    )
    assert "lora_A.weight has shape (4, 64), r=8 and " in refusal(r=8)
    stray = module.replace("layers.0", "layers.7")
    pair = {f"{stray}.lora_A.weight": torch.ones(4, 64), f"{stray}.lora_B.weight": torch.ones(64, 4)}
    assert refusal(change=lambda t: t.update(pair)) == (
        f"{file} {stray}.lora_A.weight (4, 64) changes model.layers.7.self_attn.q_proj.weight, which is not in {base}"
    )  # fmt: skip
    assert refusal(change=lambda t: t.pop(f"{module}.lora_B.weight")) == (
        f"{file} {module}.lora_A.weight has no lora_B beside it"
    )
    assert f"{file} {module}.bias (64,) is no base_model.model.<module>.lora_A/B.weight" == refusal(
        change=lambda t: t.update({f"{module}.bias": torch.zeros(64)})
    )
    assert not list(tmp_path.glob("out*"))

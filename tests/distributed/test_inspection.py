"""`inspect` reads every folder that the project writes and finds damage.

Checkpoints of runs and exported models are inspected in test_checkpoint.py, with the checkpoints they come from.
"""

import io
import json
import os

import pytest
from rich.console import Console
from test_conversion import write_adapter, write_model

from megatron_entropy.checkpoint import inspection
from megatron_entropy.cli import main as cli
from megatron_entropy.errors import UserError
from megatron_entropy.weights import convert

pytestmark = pytest.mark.actor


def inspect(folder):
    console = Console(file=io.StringIO(), width=140)
    code = inspection.inspect(folder, None, console)
    return code, " ".join(console.file.getvalue().split())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, its conversion and an adapter."""
    root = tmp_path_factory.mktemp("inspection")
    write_model(root / "hf", "qwen2")
    convert.to_megatron(root / "hf", root / "converted")
    write_adapter(root / "adapter", root / "hf", ["q_proj", "down_proj"])
    return root


def test_a_converted_folder(folders):
    code, shown = inspect(folders / "converted")
    assert code == 0
    for expected in (
        "decoder.layers.mlp.linear_fc1.weight",
        "4 x 192 x 64",
        "Qwen2ForCausalLM, 4 layers, hidden 64, 131 words",
        "verdict sizes match",
    ):
        assert expected in shown, expected
    code, shown = inspect(folders / "converted" / "shards")
    assert code == 0 and "no config.json" in shown


def test_an_adapter_folder(folders):
    code, shown = inspect(folders / "adapter")
    assert code == 0
    for expected in ("self_attn.q_proj.lora_A.weight", "LORA, rank 4, alpha 6", "q_proj, down_proj", "sizes match"):
        assert expected in shown, expected


def test_a_run_without_checkpoints(folders, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "hf").symlink_to(folders / "hf")
    code, shown = inspect(tmp_path / "run")
    assert code == 0 and "model.layers.*.self_attn.q_proj.weight" in shown


def test_damage_of_a_converted_folder(folders, tmp_path):
    convert.to_megatron(folders / "hf", tmp_path / "cut")
    shard = max((tmp_path / "cut" / "shards").glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(shard, 1000)
    code, shown = inspect(tmp_path / "cut")
    assert code == 1 and f"{shard.name}: 1000 bytes" in shown
    (tmp_path / "cut" / "shards" / ".metadata").write_bytes(b"no index")
    code, shown = inspect(tmp_path / "cut")
    assert code == 1 and "verdict damaged: " in shown
    raw = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 3}))
    assert inspect(tmp_path / "cut")[0] == 1


def test_other_folders_are_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match="is neither a run"):
        inspect(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "adapter_config.json: not valid JSON" in capsys.readouterr().err

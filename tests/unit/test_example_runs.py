"""Every file under examples/ passes `train --dry-run` with a model of the published shape and rows in published forms.

The models are folders with the published config.json (tests/unit/fixtures/published_models.json), safetensors headers
of all their tensors over a file without content, and a tokenizer that knows no word. Scripts for clusters pass
shellcheck, and each of the papers' files names its way to start. Not shown: that the settings train on GPUs.
"""

import json
import re
import shutil
import subprocess
from math import prod
from pathlib import Path

import make_arithmetic
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_entropy import procedural
from megatron_entropy.cli.main import main
from megatron_entropy.config import load
from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.methods import load_method_config
from megatron_entropy.weights.names import entries

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "published_models.json").read_text())
OVERLAYS = {
    "quickstart_plain.toml": ["quickstart.toml"],
    "precision/short.toml": ["quickstart.toml", "quickstart_plain.toml"],
}
"""Files that only change others -> the files that stand before them on the command line."""
FILES = sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.toml"))
PAPERS = sorted((EXAMPLES / "papers").glob("*.toml"))
SCRIPTS = sorted(
    str(path.relative_to(ROOT)) for path in (EXAMPLES / "cluster").iterdir() if path.suffix in (".sh", ".sbatch")
)

MESSAGES = [{"role": "user", "content": "What is 1 + 1?"}]
DAPO = {"prompt": MESSAGES, "reward_model": {"ground_truth": "2", "style": "rule"}, "data_source": "math_dapo"}
ROWS = {
    "gsm8k": {"question": "What is 1 + 1?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
    "dapo-math-17k-se": DAPO | {"semantic_entropy": 0.5},
    "dapo-math": DAPO,
    "aime": DAPO,
    "openr1": DAPO | {"target": [{"role": "assistant", "content": "It is \\boxed{2}."}]},
    "": {"question": "What is 1 + 1?", "solution": "1+1=2 <answer>2</answer>", "answer": "2"},
}
"""Beginning of a file's name -> one row in its published form."""


def model_name(path: str) -> str:
    return "SmolLM2-135M-Instruct" if "smollm2" in path else Path(path).name


def make_model(folder: Path, name: str) -> None:
    """Write the folder of a published model, without its numbers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name]["config"]))
    header, end = {}, 0
    for entry in entries(read_architecture(folder)):
        for tensor, shape in zip(entry.tensors, entry.shapes, strict=True):
            begin, end = end, end + 2 * prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # takes no space on the disk
    tokenizer = Tokenizer(models.WordLevel({"<unknown>": 0, "<end>": 1}, "<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=template)
    fast.save_pretrained(folder)


def make_data(path: Path) -> None:
    """Write a data file whose rows have the published form."""
    row = next(row for beginning, row in ROWS.items() if path.name.startswith(beginning))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 4), path)
    else:
        path.write_text(4 * (json.dumps(row) + "\n"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs start: models and data of all examples lie at the paths that they name."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def arithmetic(folder: Path) -> Path:
    """Model and data of make_arithmetic.py, with the semantic entropies that SENT needs."""
    out = folder / "arithmetic"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["make_arithmetic.py", "--out", str(out), "--seed", "1"])
        make_arithmetic.main()
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    (out / "train.jsonl").write_text("".join(json.dumps({**row, "semantic_entropy": 0.1}) + "\n" for row in rows))
    return out


def provide(stages: list, folder: Path, arithmetic: Path) -> None:
    """Put the models and data of a run at their paths."""
    for path in {stage.model.path for stage in stages if stage.model.path}:
        if (folder / path).exists():
            continue
        if model_name(path) in PUBLISHED:
            make_model(folder / path, model_name(path))
        else:
            shutil.copytree(arithmetic / "model", folder / path)
    for name in {name for stage in stages for name in (*stage.data.train, *stage.data.eval)}:
        if procedural.is_source(name) or (folder / name).exists():
            continue
        if model_name(stages[0].model.path) in PUBLISHED:
            make_data(folder / name)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(arithmetic / ("eval.jsonl" if "eval" in Path(name).name else "train.jsonl"), folder / name)


@pytest.mark.parametrize("file", FILES)
def test_dry_run(file, folder, arithmetic, monkeypatch, capsys):
    if "chain_sum" in file:
        pytest.importorskip("reasoning_gym", reason="the package reasoning-gym is not installed")
    files = [str(EXAMPLES / name) for name in (*OVERLAYS.get(file, []), file)]
    stages = load.load(files, [], load_method_config)
    provide(stages, folder, arithmetic)
    monkeypatch.chdir(folder)
    assert main(["train", *files, "--dry-run"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    if (name := model_name(stages[0].model.path)) in PUBLISHED:
        assert f"{PUBLISHED[name]['num_parameters']:,} parameters" in printed
    for stage in stages:
        assert stage.name in printed and stage.method.name in printed
        if file.startswith("papers/"):
            assert stage.actor.parallel.world_size == 8, "one node of eight GPUs"


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_settings_of_the_papers_name_their_start(path):
    comment = re.match(r"(#.*\n)+", path.read_text()).group()
    assert f"megatron-entropy train examples/papers/{path.name}" in comment
    assert f"examples/cluster/train.sbatch examples/papers/{path.name}" in comment


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (Debian: shellcheck)")
def test_scripts_pass_shellcheck():
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_manifests_name_what_exists():
    """Every script, option and file that a manifest's commands name is there."""
    manifests = sorted((EXAMPLES / "cluster").glob("*.yaml"))
    assert len(manifests) == 2
    for path in manifests:
        list(yaml.safe_load_all(path.read_text()))
        for name in re.findall(r"examples/[\w./-]+", path.read_text()):
            assert (ROOT / name.rstrip(".")).exists(), name


def test_every_script_is_described():
    text = (EXAMPLES / "cluster" / "README.md").read_text()
    for path in (EXAMPLES / "cluster").iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in text, path.name

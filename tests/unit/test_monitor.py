"""What a run records: rows survive kills and resumes without repetition, seconds add up, dumps align with tokens.

Not covered: the look of the console, and W&B beyond the error when it is not installed.
"""

import dataclasses
import json
import logging
import re
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_entropy.config.schema import LogConfig
from megatron_entropy.errors import DataError, MissingPackageError
from megatron_entropy.monitor import console, metrics, rollout_dumps, timer
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.records import Alternatives, Grade, Group, Metric, Prompt, Sample, merge_trained

QUIET = LogConfig(tensorboard=False)


@pytest.fixture
def package_logger():
    """The package's logger, restored after the test."""
    logger = logging.getLogger(console.ROOT_LOGGER)
    before = logger.handlers[:], logger.propagate, logger.level
    with warnings.catch_warnings():
        yield logger
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


def write_steps(folder, stage, steps, start_step=0):
    with metrics.MetricsWriter(folder, stage, QUIET, start_step) as writer:
        for step in steps:
            writer.write(step, {"train/loss": step / 3}, {"step": 0.5})


def steps_of(folder):
    return [(row["stage"], row["step"]) for row in metrics.read_metrics(folder.metrics)]


def test_row_holds_stage_step_means_and_seconds(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with metrics.MetricsWriter(folder, "rl", QUIET) as writer:
        writer.write(3, {"train/loss": 0.1 + 0.2, "reward/mean": Metric(3.0, 4.0)}, {"generate": 1.5})
    assert folder.metrics.read_text() == (
        '{"stage": "rl", "step": 3, "train/loss": 0.30000000000000004, "reward/mean": 0.75, "timing/generate": 1.5}\n'
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), Metric(0.0, 0.0)])
def test_value_without_json_form_becomes_null(tmp_path, value):
    folder = RunFolder(tmp_path)
    with metrics.MetricsWriter(folder, "rl", QUIET) as writer:
        writer.write(1, {"eval/accuracy": value}, {})
    assert metrics.read_metrics(folder.metrics) == [{"stage": "rl", "step": 1, "eval/accuracy": None}]


def test_row_is_on_disk_before_the_writer_closes(tmp_path):
    folder = RunFolder(tmp_path)
    writer = metrics.MetricsWriter(folder, "rl", QUIET)
    writer.write(1, {}, {})
    assert steps_of(folder) == [("rl", 1)]
    writer.close()


def test_resume_drops_rows_after_the_checkpoint_and_a_torn_line(tmp_path):
    folder = RunFolder(tmp_path)
    write_steps(folder, "sft", [0, 1, 2])
    write_steps(folder, "rl", [0, 1, 2, 3])
    with folder.metrics.open("a") as file:
        file.write('{"stage": "rl", "step": 4, "train/lo')
    write_steps(folder, "rl", [3, 4], start_step=2)
    assert steps_of(folder) == [("sft", 0), ("sft", 1), ("sft", 2)] + [("rl", step) for step in range(5)]


def test_resume_of_an_earlier_stage_drops_the_later_ones(tmp_path):
    folder = RunFolder(tmp_path)
    for stage in ("a", "b", "c"):
        write_steps(folder, stage, [0, 1, 2])
    write_steps(folder, "b", [2], start_step=1)
    assert steps_of(folder) == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]


def test_restarted_stage_repeats_no_row(tmp_path):
    folder = RunFolder(tmp_path)
    write_steps(folder, "a", [0, 1])
    write_steps(folder, "b", [0, 1])
    write_steps(folder, "b", [0, 1])
    assert steps_of(folder) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_kept_rows_stay_byte_for_byte(tmp_path):
    folder = RunFolder(tmp_path)
    write_steps(folder, "rl", range(1, 6))
    before = folder.metrics.read_bytes()
    metrics.truncate_metrics(folder.metrics, "rl", 5)
    assert folder.metrics.read_bytes() == before


@given(killed_at=st.integers(1, 8), every=st.integers(1, 4))
def test_kill_and_resume_give_the_rows_of_one_run(tmp_path_factory, killed_at, every):
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    write_steps(folder, "rl", range(1, killed_at + 1))
    checkpoint = killed_at // every * every
    write_steps(folder, "rl", range(checkpoint + 1, 10), start_step=checkpoint)
    assert steps_of(folder) == [("rl", step) for step in range(1, 10)]


def test_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a", "step": 1}\n{"sta\n{"stage": "a", "step": 3}\n')
    with pytest.raises(DataError, match="metrics.jsonl:2"):
        metrics.read_metrics(path)


def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = RunFolder(tmp_path)
    for start, steps in ((0, [1, 2, 3]), (1, [2])):
        with metrics.MetricsWriter(folder, "rl", LogConfig(), start) as writer:
            for step in steps:
                writer.write(step, {"train/loss": start + step}, {})
    events = accumulator.EventAccumulator(str(folder.tensorboard("rl")))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 3.0)]


def test_missing_wandb_error_names_the_key(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match="log.wandb_project='mine' needs the package wandb"):
        metrics.MetricsWriter(RunFolder(tmp_path), "rl", LogConfig(tensorboard=False, wandb_project="mine"))


def test_phases_of_a_step_add_up_and_a_second_counts_only_for_the_inner_phase():
    seconds = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 23.0, 25.5])
    step_timer = timer.StepTimer(now=lambda: next(seconds))
    with step_timer("generate"):
        with step_timer("weight_sync"):
            pass
    with pytest.raises(RuntimeError), step_timer("update"):
        raise RuntimeError
    assert step_timer.split() == {"generate": 6.0, "weight_sync": 3.0, "update": 6.0, "other": 8.0, "step": 23.0}
    assert step_timer.split() == {"other": 2.5, "step": 2.5}


def test_dump_holds_one_line_per_sample_aligned_with_its_response(tmp_path):
    tokens = np.array([5, 6, 7, 8], np.int32)
    entropy = np.array([0, 0, 0.5, 0.123456], np.float32)
    full = Sample(
        tokens,
        2,
        "stop",
        "ab",
        parent=0,
        grade=Grade(False, "b", "timeout"),
        reward=-1.0,
        entropy=entropy,
        advantage=np.array([0, 0, 1, 3], np.float32),
    )
    group = Group(Prompt(9, "why?", (5, 6), answer="a"), (Sample(tokens, 2, "length", "ab"), full))
    path = tmp_path / "rollouts" / "step_000001.jsonl"
    rollout_dumps.dump_rollouts(path, [group], token_text=lambda token: f"<{token}>")
    bare, row = [json.loads(line) for line in path.read_text().splitlines()]
    assert bare["entropies"] is None and bare["reward"] is None and bare["correct"] is None
    assert row["prompt"] == 9 and row["tokens"] == [5, 6, 7, 8] and row["pieces"] == ["<7>", "<8>"]
    assert row["entropies"] == [0.5, 0.123456] and row["advantage"] == 2.0 and row["parent"] == 0
    assert (row["correct"], row["extracted"], row["error"]) == (False, "b", "timeout")
    assert (row["group"], row["sample"], row["length"]) == (0, 1, 2) and row["advantages"] == [1.0, 3.0]
    assert (bare["parent"], bare["cut"]) == (None, None) and bare["trained"] is None and row["trained"] is False
    assert list(path.parent.iterdir()) == [path]


def test_dump_tells_the_cut_the_penalty_and_what_was_left_out(tmp_path):
    tokens = np.arange(6, dtype=np.int32)
    first = Sample(tokens, 2, "stop", "abcd", grade=Grade(None, error="crash"))
    branch = Sample(tokens.copy(), 4, "stop", "cd", parent=0, reward=1.0)
    kept = dataclasses.replace(
        branch,
        weight=np.array([0, 0, 0, 0, 0.5, 0], np.float32),
        kl_weight=np.array([0, 0, 0, 0, 0.05, 0.2], np.float32),
        reference_logprob=np.full(6, -1 / 3, np.float32),
    )
    first = dataclasses.replace(
        first, alternatives=Alternatives(np.array([[7, 8]] * 4), np.array([[-0.6931, -np.inf]] * 4))
    )
    group = Group(Prompt(0, "q", (0, 1)), (first, branch))
    groups = merge_trained([group], [group.with_samples([kept])])
    rollout_dumps.dump_rollouts(tmp_path / "a.jsonl", groups, token_text=str)
    skipped, row = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert skipped["alternatives"] == [[["7", -0.6931]]] * 4 and row["alternatives"] is None
    assert skipped["error"] == "crash" and skipped["sample"] == row["parent"] == 0
    assert row["trained"] and row["cut"] == 2 and row["untrained"] == [1] and row["kl_weights"] == [0.05, 0.2]
    assert row["reference_logprobs"] == [-0.333333, -0.333333] and skipped["reference_logprobs"] is None


@pytest.mark.parametrize(("rank", "shown"), [(0, ["INFO", "WARNING"]), (3, ["WARNING"])])
def test_ranks_above_zero_log_only_warnings(rank, shown, package_logger):
    logger = console.setup_logging(rank)
    levels = [name for name in ("DEBUG", "INFO", "WARNING") if logger.isEnabledFor(getattr(logging, name))]
    assert levels == shown and len(console.setup_logging(rank).handlers) == 1


def test_line_of_another_rank_starts_with_its_rank(capsys, package_logger):
    console.setup_logging(2).warning("slow link")
    assert capsys.readouterr().err == "[rank 2] WARNING slow link\n"


def test_summary_line_shows_the_metrics_that_are_present():
    line = console.summary_line(3, 9, {"train/loss": 0.25, "eval/accuracy": float("nan")}, {"update": 1.0, "step": 1.5})
    assert line == "step 3/9  loss 0.25  1.5 s (update 1.0)"


def test_off_a_terminal_a_record_is_one_line(capsys):
    logger = console.setup_logging(0)
    logger.info("step 3/9  %s", "word " * 60)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 and re.match(r"\d\d:\d\d:\d\d INFO step 3/9  word", out[0])


def test_summary_line_ends_in_the_time_that_is_left():
    assert console.summary_line(3, 9, {}, {"step": 2.0}, remaining=720.0).endswith("ETA 12 min")
    assert [console.duration(seconds) for seconds in (9, 99, 600, 9000)] == ["9 s", "99 s", "10 min", "2.5 h"]

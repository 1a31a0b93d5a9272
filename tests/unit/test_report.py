"""The report is built from whatever files a run folder has; its page refers to no other file and escapes all text.

Not covered: the look of the plots, only that there is one for each stage with values.
"""

import dataclasses
import json
import re

import numpy as np
import pytest

from megatron_entropy.config import load
from megatron_entropy.config.schema import Config, LogConfig, MethodConfig
from megatron_entropy.errors import DataError
from megatron_entropy.monitor import metrics, report, rollout_dumps, summary
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.records import Grade, Group, Prompt, Sample

LABELS = {1: "one", 2: "two", 3: "<b>"}


def stage(name, **changes):
    return Config(name=name, steps=4, seed=7, method=MethodConfig(name="grpo"), **changes)


def write_rows(folder, name, rows):
    with metrics.MetricsWriter(folder, name, LogConfig(tensorboard=False)) as writer:
        for step, row in enumerate(rows):
            writer.write(step, row, {"generate": 0.3, "step": 0.5} if step else {})


def full_run(folder):
    """A run of two stages, the second unfinished."""
    write_rows(
        folder, "sft", [{"eval/accuracy": 0.1, "eval/entropy": 0.9}, {"train/loss": 2.0}, {"eval/accuracy": 0.4}]
    )
    config = stage("sft", actor={"parallel": {"tp": 2}})
    summary.write_summary(folder, [summary.StageSummary.of_stage(folder, config, seconds=9.0)])
    write_rows(folder, "rl", [{"eval/accuracy": 0.4}, {"policy/entropy": 0.5, "rollout/length": 12.0}])
    load.write([config], folder.config)
    entropy = np.array([0, 0.25, 1.5], np.float32)
    right = Sample(np.array([1, 2, 3], np.int32), 1, "stop", "two<b>", grade=Grade(True, "3"), entropy=entropy)
    wrong = Sample(np.array([1, 2, 3], np.int32), 1, "length", "two<b>", grade=Grade(False, None))
    group = Group(Prompt(0, "1 < 2?", (1,), answer="3"), (right, wrong))
    rollout_dumps.dump_rollouts(folder.evaluation("sft", 2), [group], LABELS.__getitem__)
    rollout_dumps.dump_rollouts(folder.rollouts("rl", 1), [group])


def test_summary_holds_values_before_and_after_a_stage_and_reads_back(tmp_path):
    folder = RunFolder(tmp_path)
    full_run(folder)
    (entry,) = summary.read_summary(folder)
    assert (entry.name, entry.method, entry.steps, entry.seconds, entry.seed) == ("sft", "grpo", 2, 9.0, 7)
    assert entry.accuracy == summary.Change(0.1, 0.4)
    assert entry.entropy == summary.Change(0.9, None) and entry.length == summary.Change(None, None)
    assert entry.layout["tp"] == 2 and entry.versions["python"]
    summary.write_summary(folder, [entry])
    assert summary.read_summary(folder) == [entry]


def test_seconds_of_a_resumed_stage_include_earlier_steps(tmp_path):
    folder = RunFolder(tmp_path)
    write_rows(folder, "rl", [{}] * 9)
    assert summary.StageSummary.of_stage(folder, stage("rl"), seconds=1.0).seconds == 4.0


def test_error_of_an_invalid_summary_names_the_file(tmp_path):
    folder = RunFolder(tmp_path)
    folder.summary.write_text('{"stages": [{"name": "rl"}]}')
    with pytest.raises(DataError, match=r"summary\.json"):
        summary.read_summary(folder)


def test_page_holds_plots_table_samples_and_settings_and_no_links(tmp_path):
    folder = RunFolder(tmp_path)
    full_run(folder)
    report.write_report(folder)
    page = folder.report.read_text()
    assert sorted(path.name for path in folder.plots.iterdir()) == [
        *("accuracy_rl.png", "accuracy_sft.png", "entropy_rl.png", "entropy_sft.png", "length_rl.png"),
        *("time_rl.png", "time_sft.png"),
    ]
    assert page.count("data:image/png;base64,") == 7
    assert "10.0 → 40.0 % (+30.0)" in page and "TP2" in page
    assert 'class="sample correct"' in page and 'class="sample wrong"' in page
    assert 'title="1.5 nats">&lt;b&gt;</span>' in page and "1 &lt; 2?" in page
    assert "sft, step 2, eval questions" in page and "rl, step 1, train questions" in page
    assert "[[stages]]" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_text_of_a_run_is_escaped(tmp_path):
    script = "<script>alert(1)</script>"
    folder = RunFolder(tmp_path)
    name = "$<script>$"
    write_rows(folder, name, [{"eval/accuracy": 0.1}, {}])
    entry = summary.StageSummary.of_stage(folder, stage("rl"), seconds=9.0)
    summary.write_summary(folder, [dataclasses.replace(entry, name=name)])
    folder.config.write_text(f"# {script}")
    sample = Sample(np.array([1, 2], np.int32), 1, script, script, grade=Grade(True, script))
    group = Group(Prompt(0, script, (1,), answer=script), (sample,))
    rollout_dumps.dump_rollouts(folder.evaluation(name, 1), [group])
    report.write_report(folder)
    page = folder.report.read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 9


def test_table_prints_names_that_look_like_markup(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    entry = summary.StageSummary.of_stage(folder, stage("rl"), seconds=9.0)
    summary.write_summary(folder, [dataclasses.replace(entry, name="[red]rl")])
    report.print_table(folder)
    assert "[red]rl" in capsys.readouterr().out


def test_page_fits_a_phone(tmp_path):
    folder = RunFolder(tmp_path)
    full_run(folder)
    report.write_report(folder)
    page = folder.report.read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<table") == page.count('<div class="box"><table') == 2


def test_report_of_a_run_without_values_draws_nothing(tmp_path):
    folder = RunFolder(tmp_path)
    write_rows(folder, "rl", [{}])
    report.write_report(folder)
    assert "Nothing to draw yet" in folder.report.read_text()


def test_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        report.write_report(RunFolder(tmp_path))


def test_table_shows_the_stage(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    full_run(folder)
    report.print_table(folder)
    printed = capsys.readouterr().out
    assert "sft" in printed and "10.0 → 40.0 % (+30.0)" in printed and "9 s" in printed


@pytest.mark.parametrize(
    ("layout", "label"),
    [
        ({}, "1 rank"),
        ({"tp": 2, "pp": 1, "dp": 4}, "TP2 x DP4"),
        ({"tp": 2, "sequence_parallel": True, "distributed_optimizer": True},
         "TP2, sequence parallel, distributed optimizer"),
    ],
)  # fmt: skip
def test_layout_label_names_axes_above_one_and_switches(layout, label):
    assert summary.layout_label(layout) == label


def test_versions_include_python_torch_and_megatron():
    found = summary.versions()
    assert {"python", "torch", "megatron-core"} <= set(found)


GOOD_ROW = json.dumps({"stage": "a", "step": 1, "train/loss": 0.5})


@pytest.mark.parametrize(
    "row",
    ["[]", "3", '{"step": 1}', '{"stage": 1, "step": 1}', '{"stage": "a", "step": -1}', '{"stage": "a", "step": true}',
     '{"stage": "a", "step": 1, "train/loss": "x"}', "[" * 100_000, "1" * 5000, "\xff"],
)  # fmt: skip
def test_a_foreign_row_of_metrics_is_one_line(tmp_path, row):
    (tmp_path / "metrics.jsonl").write_text(f"{GOOD_ROW}\n{row}\n{GOOD_ROW}\n", encoding="latin-1")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: .*; fix or remove the line"):
        report.write_report(RunFolder(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", '{"stages": 3}', '{"stages": [{}]}', "\xff", "[" * 100_000, '{"stages": [{"name": 5}]}'],
)
def test_a_damaged_summary_is_one_line(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(f"{GOOD_ROW}\n")
    (tmp_path / "summary.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"summary\.json: not a summary of this version .*; remove it$"):
        report.write_report(RunFolder(tmp_path))


def test_damaged_dumps_are_counted_and_the_page_is_written(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(f"{GOOD_ROW}\n")
    dump = folder.rollouts("a", 1)
    dump.parent.mkdir(parents=True)
    good = json.dumps({"question": "why?", "response": "because", "correct": True})
    lines = [good, "{", "[]", '{"question": 1}', '{"correct": [1]}', "[" * 5000, "\xff"]
    dump.write_text("\n".join(lines), encoding="latin-1")
    dump.with_name("step_zzz.jsonl").write_text("x")
    folder.config.write_bytes(b"\xff\xfe not TOML")
    report.write_report(folder)
    assert "because" in folder.report.read_text() and "6 damaged lines are skipped" in caplog.text


def test_a_file_where_the_plots_belong_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f"{GOOD_ROW}\n")
    (tmp_path / "plots").write_text("")
    with pytest.raises(DataError, match="plots is not a folder; remove it"):
        report.write_report(RunFolder(tmp_path))

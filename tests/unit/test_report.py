"""The report is rebuilt from a run folder's files, whatever of them there is; its page needs no other file.

How the plots look is not tested, only that there is one where there is something to draw.
"""

import re

import numpy as np
import pytest

from megatron_entropy.config import load
from megatron_entropy.config.schema import Config, LogConfig, MethodConfig
from megatron_entropy.errors import DataError
from megatron_entropy.monitor import metrics, plots, report, rollout_dumps, summary
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


def test_summary_tells_before_and_after_and_reads_back(tmp_path):
    folder = RunFolder(tmp_path)
    full_run(folder)
    (entry,) = summary.read_summary(folder)
    assert (entry.name, entry.method, entry.steps, entry.seconds, entry.seed) == ("sft", "grpo", 2, 9.0, 7)
    assert entry.accuracy == summary.Change(0.1, 0.4)
    assert entry.entropy == summary.Change(0.9, None) and entry.length == summary.Change(None, None)
    assert entry.layout["tp"] == 2 and entry.versions["python"]
    summary.write_summary(folder, [entry])
    assert summary.read_summary(folder) == [entry]


def test_seconds_of_a_resumed_stage_count_the_steps_before(tmp_path):
    folder = RunFolder(tmp_path)
    write_rows(folder, "rl", [{}] * 9)
    assert summary.StageSummary.of_stage(folder, stage("rl"), seconds=1.0).seconds == 4.0


def test_summary_of_another_form_names_the_file(tmp_path):
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
        "accuracy.png",
        "entropy.png",
        "length.png",
        "time.png",
    ]
    assert page.count("data:image/png;base64,") == 4
    assert "10.0 → 40.0 % (+30.0)" in page and "TP2" in page
    assert 'class="sample correct"' in page and 'class="sample wrong"' in page
    assert 'title="1.5 nats">&lt;b&gt;</span>' in page and "1 &lt; 2?" in page
    assert "sft, after step 2: held-out questions" in page and "rl, after step 1: training rollouts" in page
    assert "[[stages]]" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_report_copes_with_a_run_that_has_only_begun(tmp_path):
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
def test_layout_label_names_what_differs_from_one_rank(layout, label):
    assert summary.layout_label(layout) == label


def test_stages_lie_one_after_the_other_on_the_axis():
    rows = [{"stage": name, "step": step} for name, last in (("a", 5), ("b", 3), ("c", 2)) for step in range(last + 1)]
    assert plots.stage_offsets(rows) == {"a": 0, "b": 5, "c": 8}


def test_versions_name_the_packages_that_matter():
    found = summary.versions()
    assert {"python", "torch", "megatron-core"} <= set(found)

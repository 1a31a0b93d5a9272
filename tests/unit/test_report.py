"""The report is built from whatever files a run folder has; its page refers to no other file and escapes all text.

It says what a method did, by counts that are checked on groups small enough to count by hand, and compares two runs.

Not covered: the look of the plots, only that there is one for each stage with values.
"""

import dataclasses
import json
import re

import numpy as np
import pytest

from megatron_entropy.cli.main import main
from megatron_entropy.config import load
from megatron_entropy.config.schema import Config, LogConfig, MethodConfig
from megatron_entropy.errors import DataError
from megatron_entropy.methods import METHOD_CONFIGS, explain_stage
from megatron_entropy.monitor import drawing, metrics, report, rollout_dumps, summary
from megatron_entropy.monitor.history import StageHistory
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
    report.write_report(folder, explain_stage)
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
    report.write_report(folder, explain_stage)
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
    report.write_report(folder, explain_stage)
    page = folder.report.read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<table") == page.count('<div class="box"><table') == 2


def test_report_of_a_run_without_values_draws_nothing(tmp_path):
    folder = RunFolder(tmp_path)
    write_rows(folder, "rl", [{}])
    report.write_report(folder, explain_stage)
    assert "Nothing to draw yet" in folder.report.read_text()


def test_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        report.write_report(RunFolder(tmp_path), explain_stage)


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
        report.write_report(RunFolder(tmp_path), explain_stage)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", '{"stages": 3}', '{"stages": [{}]}', "\xff", "[" * 100_000, '{"stages": [{"name": 5}]}'],
)
def test_a_damaged_summary_is_one_line(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(f"{GOOD_ROW}\n")
    (tmp_path / "summary.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"summary\.json: not a summary of this version .*; remove it$"):
        report.write_report(RunFolder(tmp_path), explain_stage)


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
    report.write_report(folder, explain_stage)
    assert "because" in folder.report.read_text() and "6 damaged lines are skipped" in caplog.text


def test_a_file_where_the_plots_belong_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f"{GOOD_ROW}\n")
    (tmp_path / "plots").write_text("")
    with pytest.raises(DataError, match="plots is not a folder; remove it"):
        report.write_report(RunFolder(tmp_path), explain_stage)


def branching_group(question, verdicts, *, cut=1, entropy=1.5, wrong="<b>"):
    """A wrong response of four tokens that is cut before token `cut` + 1, and branches with these verdicts."""
    tokens = np.array([7, 1, 2, 1, 2], np.int32)
    entropies = np.array([0, 0.5, 0.5, 0.5, 0.5], np.float32)
    entropies[1 + cut] = entropy
    parent = Sample(tokens, 1, "stop", wrong, grade=Grade(False, wrong), entropy=entropies, logprob=entropies * -1)
    branches = [
        Sample(tokens, 1 + cut, "stop", "two", grade=Grade(verdict, "3"), entropy=entropies, parent=0, reward=1.0)
        for verdict in verdicts
    ]
    return Group(Prompt(0, question, (7,), answer="3"), (parent, *branches))


def cure_run(folder):
    """Two steps of CURE; in the second every branch of a wrong response is right."""
    write_rows(folder, "rl", [{}, {"policy/entropy": 0.5}, {"policy/entropy": 0.4}])
    folder.config.write_text('[[stages]]\nname = "rl"\nmethod = { name = "cure", critical_token = "entropy" }\n')
    for step, verdicts in ((1, (True, False, False)), (2, (True, True, True))):
        group = branching_group(f"{step} < 3?", verdicts, entropy=step)
        rollout_dumps.dump_rollouts(folder.rollouts("rl", step), [group], {**LABELS, 7: "?"}.__getitem__)


def test_page_says_what_cure_did_and_draws_a_branch(tmp_path):
    folder = RunFolder(tmp_path)
    cure_run(folder)
    report.write_report(folder, explain_stage)
    page = folder.report.read_text()
    assert (
        "In steps 1 to 2 CURE cut 2 answers to 2 questions before an uncertain token, on average at 1.50 nats where "
        "all of their tokens have 0.75. 4 of 6 branches of wrong answers (67%) were right.</p>"
    ) in page
    tree = page[page.index('<div class="tree">') : page.index("<h2>Curves")]
    # Every branch begins with the old token, so in step 1 two verdicts follow it, in step 2 none.
    assert "1 &lt; 3?" in tree and "<b>" not in tree and 'class="kept">one</span>' in tree
    assert tree.count('<div class="sample correct">') == 1 and tree.count('<div class="sample wrong">') == 3
    assert tree.count('class="cut"') == 1
    assert "before token 2 of 4 (&#34;two&#34;, rank 1 by entropy, 1.000 nats" in tree


def test_a_long_response_is_drawn_around_its_cut(tmp_path):
    long = {"question": "q", "response": "r", "group": 0, "pieces": ["x"] * 5000, "entropies": [0.1] * 5000}
    rows = [
        long | {"sample": 0, "correct": True},
        long | {"sample": 1, "parent": 0, "cut": 2500, "correct": False},
    ]
    history = StageHistory(RunFolder(tmp_path), "rl", {}, [])
    dump = history.folder.rollouts("rl", 4)
    dump.parent.mkdir(parents=True)
    dump.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = drawing.draw_tree(history)
    assert tree is not None
    texts = [token["text"] for token in tree["parent"]["tokens"]]
    assert len(texts) == 2 * drawing.WINDOW + 2 and texts[0] == texts[-1] == "…" and tree["step"] == 4
    assert tree["parent"]["tokens"][drawing.WINDOW + 1]["cut"] and not tree["is_fixed"]
    assert len(tree["branches"][0]["tokens"]) == drawing.WINDOW + 1


VALUES = {
    "train/loss": [3.0, 0.5],
    "train/zero_advantage": [0.1, 0.3],
    "train/dropped_frac": [0.01],
    "train/low_entropy_frac": [0.8],
    "train/high_covariance_frac": [0.02],
    "policy/entropy": [2.0, 0.25],
    "policy/penalized_frac": [0.8],
    "policy/teacher_distance": [0.1, 0.3],
    "policy/teacher_temperature": [1.1, 1.5],
    "rollout/tokens": [600, 400],
    "rollout/mixed_groups": [0.5, 0.7],
    "rollout/rounds": [1, 2],
    "reward/teca": [0.5, 0.25],
}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("grpo", "20% of the groups earned equal rewards"),
        ("curio_rl", "20% of the groups earned equal rewards"),
        ("dapo", "60% of the sampled groups held right and wrong answers; .* in 1.5 rounds"),
        ("cure", "60% of the sampled groups"),  # without branches it is DAPO
        ("cer", "TECA.*from 0.500 to 0.250 nats"),
        ("clip_cov", "dropped at 1.00% of the tokens"),
        ("kl_cov", "80.00% of the tokens had a KL penalty"),
        ("sent", "80.0% of the tokens .* low entropy, 2.00% .* 80.0% had a KL penalty"),
        ("sft", "loss .* from 3.00 to 0.50, .* from 2.00 to 0.25 nats"),
        ("curiosft", ": 1.30 on average .means of steps: 1.10 to 1.50.; the distance to it was 0.200 nats"),
    ],
)
def test_every_method_says_what_it_did(tmp_path, name, said, caplog):
    rows = [{metric: values[i] for metric, values in VALUES.items() if i < len(values)} for i in range(2)]
    settings = METHOD_CONFIGS[name].model_validate({}).model_dump()
    sentences = explain_stage(StageHistory(RunFolder(tmp_path), "s", {"method": settings}, rows))
    assert re.search(said, " ".join(sentences)) and len(sentences) <= 2
    if METHOD_CONFIGS[name].method.uses_rollouts:
        assert (
            sentences[1]
            == "The policy's entropy in training went from 2.000 to 0.250 nats, over 1,000 generated tokens."
        )
    assert explain_stage(StageHistory(RunFolder(tmp_path), "s", {"method": {"name": name}}, [])) == []
    assert not caplog.text


def test_a_method_that_cannot_explain_itself_does_not_stop_the_report(tmp_path, caplog):
    assert explain_stage(StageHistory(RunFolder(tmp_path), "s", {"method": {"name": "no_such"}}, [])) == []
    assert "stage s is not explained: ConfigError" in caplog.text


def finished_run(root, answers, *, entropy):
    """A run with one stage; `answers` has the verdicts of each question."""
    folder = RunFolder(root)
    write_rows(
        folder,
        "rl",
        [
            {"eval/accuracy": 0.1, "eval/pass_at_2": 0.2},
            {"eval/accuracy": 0.4, "eval/pass_at_2": 2 / 3, "rollout/tokens": 1200.0},
        ],
    )
    entry = summary.StageSummary.of_stage(folder, stage("rl"), seconds=9.0)
    summary.write_summary(folder, [entry])
    tokens, entropies = np.array([7, 1, 2], np.int32), np.array([0, entropy, entropy], np.float32)
    groups = [
        Group(
            Prompt(i, f"q{i}", (7,), answer="3"),
            tuple(Sample(tokens, 1, "stop", "", grade=Grade(v, "3"), entropy=entropies + i / 100) for v in verdicts),
        )
        for i, verdicts in enumerate(answers)
    ]
    rollout_dumps.dump_rollouts(folder.evaluation("rl", 1), groups)
    return folder


def test_two_runs_are_compared_by_question(tmp_path, capsys):
    run = finished_run(tmp_path / "a", [(True, False), (True, True), (False, False)], entropy=0.5)
    other = finished_run(tmp_path / "b", [(True, True), (False, True), (False, False)], entropy=0.3)
    assert main(["report", str(run.root), str(other.root)]) == 0
    printed, page = capsys.readouterr().out, run.report.read_text()
    # Differences in accuracy: -50, +50, 0 points, standard deviation 50, so ± 1.96 * 50 / sqrt(3).
    for text in (
        "grpo ended with higher entropy (+0.200 ± 0.000) than grpo.",
        "The 3 questions show no difference in accuracy, pass@2 and length.",
    ):
        assert text in page and text in " ".join(printed.split())
    for cell in ("10.0 → 40.0", "+0.0 ± 56.6", "20.0 → 66.7", "1,200", str(run.report)):
        assert cell in printed, cell
    assert page.count("<table") == page.count('<div class="box"><table') == 3

    (other.evaluation("rl", 1)).unlink()
    report.print_table(run, other)
    assert "not evaluated on the same questions" in capsys.readouterr().out
    other.summary.unlink()
    assert main(["report", str(run.root), str(other.root)]) == 2
    assert "no stage has finished" in capsys.readouterr().err

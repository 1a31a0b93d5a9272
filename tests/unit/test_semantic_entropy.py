"""Semantic entropy and the command that measures it: formulas, clusters, files, and a real engine once.

Proves: the vectors of the specification; clusters by text and by mathematics, with comparisons that hang; rows stay
unchanged; a stopped measurement continues where it stopped. Not proved here: GPUs.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_entropy.cli import main as cli
from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.schema import DataConfig, RewardConfig
from megatron_entropy.data.dataset import load_prompts
from megatron_entropy.data.tokenizer import load_tokenizer
from megatron_entropy.methods.semantic_entropy import semantic_entropy, split_curriculum
from megatron_entropy.rollout.engine import Completion, Request
from megatron_entropy.semantic_entropy import measure as measuring
from megatron_entropy.semantic_entropy.clusters import AnswerJudge, assign_clusters
from megatron_entropy.semantic_entropy.measure import COLUMNS, Answers
from megatron_entropy.trainer.standalone import FolderSource

ROOT = Path(__file__).parents[2]
LIMITS = ["--max-tokens", "24", "--max-prompt-tokens", "16", "--verifier", "final_marker"]


@pytest.mark.parametrize(
    "counts,expected",
    [
        ([8], 0.0), ([7, 1], 0.376770), ([6, 1, 1], 0.735622), ([4, 4], 0.693147), ([2, 2, 2, 2], 1.386294),
        ([1] * 8, 2.079442),
    ],
)  # fmt: skip
def test_by_count(counts, expected):
    clusters = [f"answer {i}" for i, count in enumerate(counts) for _ in range(count)]
    assert semantic_entropy(clusters) == pytest.approx(expected, abs=1e-6)


def test_by_likelihood():
    short, long = [-10, -11, -10.5, -12], [-400, -520, -610, -450]
    assert semantic_entropy("AABC") == pytest.approx(1.039721, abs=1e-6)
    assert semantic_entropy("AABC", weight="likelihood", logprobs=short) == pytest.approx(0.815501, abs=1e-6)
    assert semantic_entropy("AABC", weight="likelihood", logprobs=long) == pytest.approx(9.64e-21, rel=0.01)
    normed = semantic_entropy("AABC", weight="length_norm", logprobs=long, lengths=[1000, 1300, 1500, 1100])
    assert normed == pytest.approx(1.038347, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-900, 0)), min_size=1, max_size=20), st.randoms())
def test_lies_between_0_and_the_logarithm_and_ignores_the_order(answers, random):
    for weight in ("count", "likelihood"):
        clusters, logprobs = zip(*answers, strict=True)
        value = semantic_entropy(clusters, weight=weight, logprobs=logprobs)
        assert 0 <= value <= math.log(len(set(clusters))) + 1e-9
        clusters, logprobs = zip(*random.sample(answers, len(answers)), strict=True)
        assert semantic_entropy(clusters, weight=weight, logprobs=logprobs) == pytest.approx(value, abs=1e-9)


ENTROPIES = [0, 2.079442, 0.693147, 0, 1.386294, 0.900256, 0.735622, 0.376770]


@pytest.mark.parametrize(
    "stages,expected",
    [
        (1, [[0, 3, 7, 2, 6, 5, 4, 1]]),
        (2, [[0, 3, 7, 2], [6, 5, 4, 1]]),
        (3, [[0, 3], [7, 2, 6], [5, 4, 1]]),
        (4, [[0, 3], [7, 2], [6, 5], [4, 1]]),
    ],
)
def test_curriculum_in_stages_of_equal_size(stages, expected):
    assert [stage.tolist() for stage in split_curriculum(ENTROPIES, stages=stages)] == expected


def test_curriculum_at_thresholds():
    split = split_curriculum(ENTROPIES, thresholds=[1e-9, 0.735622, 3.0])
    assert [stage.tolist() for stage in split] == [[0, 3], [7, 2], [6, 5, 4, 1], []]
    assert [stage.tolist() for stage in split_curriculum([], stages=2)] == [[], []]


@given(st.lists(st.floats(0, 3), max_size=30), st.integers(1, 5))
def test_every_question_is_in_one_stage_and_stages_ascend(entropies, stages):
    split = split_curriculum(entropies, stages=stages)
    indices = [int(index) for stage in split for index in stage]
    assert sorted(indices) == list(range(len(entropies)))
    values = [entropies[index] for index in indices]
    assert values == sorted(values)
    assert max(map(len, split)) - min(map(len, split)) <= 1


def test_answers_join_the_earliest_equal_cluster():
    assert assign_clusters(["a", None, "b", "a", "c"], {("a", "c"): True, ("b", "c"): True}) == [0, -1, 1, 0, 0]
    assert assign_clusters([None, None], {}) == [-1, -1]
    assert assign_clusters(["a", "b", "c"], {("b", "c"): True}) == [0, 1, 1]


def test_unreadable_answers_share_a_cluster_or_have_their_own():
    answers = Answers(0, [0, -1, -1, 0], [-1.0] * 4, [1] * 4, [True, None, None, False])
    shared, own = (answers.columns(weight="count", invalid=invalid) for invalid in ("shared", "own"))
    assert (shared["semantic_clusters"], own["semantic_clusters"]) == (2, 3)
    assert shared["semantic_entropy"] == pytest.approx(math.log(2))
    assert own["semantic_entropy"] == pytest.approx(1.5 * math.log(2))
    assert shared["semantic_accuracy"] == 0.5 and shared["semantic_samples"] == 4
    assert tuple(shared) == COLUMNS


@pytest.mark.parametrize(
    "verifier,texts,clusters",
    [
        ("final_marker", ["1 #4", "#4.0", "#5", "four", "# 4"], [0, 0, 1, -1, 0]),
        ("boxed", [r"\boxed{4}", r"\boxed{4.0}", "4"], [0, 1, -1]),
        ("dapo", ["Answer: 4", "Answer: $4$", "4"], [0, 0, -1]),
    ],
)
def test_clusters_by_text(verifier, texts, clusters):
    judged = AnswerJudge(RewardConfig(verifier=verifier, workers=1, timeout=5.0)).judge([("4", texts), (None, texts)])
    assert [found for _, found in judged] == [clusters, clusters]
    assert judged[0][0][0] is True and set(judged[1][0]) == {None}


def test_clusters_by_mathematics():
    """Different texts, the same number; also without a ground truth; an answer that hangs costs only itself."""
    texts = [r"so \boxed{0.5}", r"thus $\frac{1}{2}$", "no idea", r"\boxed{\frac{2}{4}}", r"\boxed{3}", r"\boxed{3.0}"]
    judge = AnswerJudge(RewardConfig(verifier="math_verify", workers=2, timeout=2.0))
    try:
        known, unknown = judge.judge([("1/2", texts), (None, texts[::-1])])
        assert known == ([True, True, False, True, False, False], [0, 0, -1, 0, 1, 1])
        assert unknown == ([None] * 6, [0, 0, 1, -1, 1, 1])
        ((verdicts, clusters),) = judge.judge([("1", [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{1}"])])
        assert verdicts[1] is True and len(set(clusters)) == 2
    finally:
        judge.close()


class FakeService:
    """Answers that depend on the request's seed alone; stops after so many calls."""

    calls = 0
    stops_after = 1000

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def generate(self, requests: Sequence[Request], *, description: str, file: Path) -> list[Completion]:
        if FakeService.calls == FakeService.stops_after:
            raise KeyboardInterrupt
        FakeService.calls += 1
        completions = []
        for request in requests:
            text = f"1+1=2\n#{request.seed % 3}" if request.seed % 4 else "0"
            tokens = np.array([*self.tokenizer.encode(text), self.tokenizer.eos_ids[0]], np.int32)
            logprobs = np.full(len(tokens), -0.5 - request.seed % 7, np.float32)
            completions.append(Completion(request.key, tokens, logprobs, "stop"))
        return completions


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeService]]:
    @contextmanager
    def open_fake(config, arch, tokenizer):
        yield FakeService(tokenizer)

    monkeypatch.setattr(measuring, "open_service", open_fake)
    monkeypatch.setattr(measuring, "REQUESTS_AT_A_TIME", 8)
    FakeService.calls, FakeService.stops_after = 0, 1000
    yield FakeService


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    command = [sys.executable, str(ROOT / "examples" / "make_arithmetic.py"), "--out", str(folder)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    subprocess.run([*command, "--train", "60", "--eval", "10"], check=True, env=environment, stdout=subprocess.DEVNULL)
    return folder


def measure(inputs: Path, out: Path, *options: str, data: Sequence[Path] = ()) -> int:
    files = map(str, data or [inputs / "eval.jsonl"])
    return cli.main(
        ["semantic-entropy", str(inputs / "model"), *files, "--out", str(out), "--samples", "4", *LIMITS, *options]
    )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_stay_unchanged(inputs, fake, tmp_path, capsys):
    assert measure(inputs, tmp_path / "out.jsonl", "--plot", str(tmp_path / "out.png")) == 0
    before, after = read(inputs / "eval.jsonl"), read(tmp_path / "out.jsonl")
    assert [{name: row[name] for name in row if name not in COLUMNS} for row in after] == before
    assert all(
        row["semantic_entropy"] == row["semantic_entropy_count"] and row["semantic_samples"] == 4 for row in after
    )
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.png"]
    assert "10 questions, 4 answers each" in capsys.readouterr().out


def test_parquet_keeps_its_types_and_the_order_of_files(inputs, fake, tmp_path):
    rows = read(inputs / "eval.jsonl")[:3]
    table = pyarrow.table(
        {
            "question": [row["question"] for row in rows],
            "answer": [row["answer"] for row in rows],
            "level": pyarrow.array([row["level"] for row in rows], pyarrow.int8()),
            "extra": pyarrow.array([{"list": [1, 2]}, None, {"list": []}]),
            "semantic_entropy": [9.0, 9.0, 9.0],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "one.parquet")
    out = tmp_path / "out.parquet"
    assert measure(inputs, out, "--weight", "length_norm", data=[tmp_path / "one.parquet"]) == 0
    written = pyarrow.parquet.read_table(out)
    assert written.select(["question", "answer", "level", "extra"]) == table.drop_columns(["semantic_entropy"])
    assert written["semantic_entropy"] == written["semantic_entropy_length_norm"]
    assert written["semantic_entropy"].to_pylist() != [9.0] * 3

    both = tmp_path / "both.jsonl"
    assert measure(inputs, both, data=[tmp_path / "one.parquet", inputs / "eval.jsonl"]) == 0
    questions = [row["question"] for row in rows] + [row["question"] for row in read(inputs / "eval.jsonl")]
    assert [row["question"] for row in read(both)] == questions
    prompts = load_prompts([both], load_tokenizer(inputs / "model"), DataConfig(max_prompt_tokens=16)).prompts
    assert [prompt.semantic_entropy for prompt in prompts] == [row["semantic_entropy"] for row in read(both)]


def test_a_stopped_measurement_continues(inputs, fake, tmp_path, capsys):
    assert measure(inputs, tmp_path / "whole.jsonl") == 0
    assert fake.calls == 5
    fake.calls, fake.stops_after = 0, 3
    out = tmp_path / "out.jsonl"
    assert measure(inputs, out) == 130
    partial = tmp_path / "out.jsonl.partial"
    assert not out.exists() and len(partial.read_text().splitlines()) == 1 + 6
    partial.write_text(partial.read_text()[:-20])  # the last line was being written
    capsys.readouterr()
    assert measure(inputs, out, "--temperature", "0.5") == 2
    assert "temperature=1.0, this one has 0.5" in capsys.readouterr().err
    fake.calls, fake.stops_after = 0, 1000
    assert measure(inputs, out) == 0
    assert fake.calls == 3 and not partial.exists()  # 5 of 10 were left
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_limits(inputs, fake, tmp_path, capsys):
    rows = read(inputs / "eval.jsonl")
    rows[1]["question"] = "1" + "+1" * 20
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert measure(inputs, tmp_path / "out.jsonl", "--limit", "4", data=[tmp_path / "data.jsonl"]) == 0
    written = read(tmp_path / "out.jsonl")
    assert [row["semantic_entropy"] is None for row in written] == [False, True, False, False]
    assert "left without an entropy: 1 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options,message",
    [
        (["--samples", "0"], "--samples: must be a whole number of at least 1, got 0"),
        (["--top-p", "1.5"], "--top-p: must be at most 1"),
        (["--temperature", "0"], "--temperature: must be a number above 0"),
        (["--verifier", "bxed"], "reward.verifier: unknown name 'bxed'"),
        (["--max-tokens", "600"], "--max-tokens 600 are more than the model's 512 positions"),
        (["--tensor-parallel", "3"], "--tensor-parallel 3 does not divide the model's 4 attention heads"),
        (["--format", "dapo"], "column 'prompt' is missing"),
    ],
)
def test_wrong_options_are_one_line(inputs, fake, tmp_path, capsys, options, message):
    try:
        code = measure(inputs, tmp_path / "out.jsonl", *options)
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and message in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_wrong_files_are_one_line(inputs, fake, tmp_path, capsys):
    model, data = str(inputs / "model"), str(inputs / "eval.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "there.jsonl").write_text("{}")
    (tmp_path / "bare").mkdir()
    for arguments, message in (
        ([str(tmp_path / "absent"), data, "out.jsonl"], "no such folder"),
        ([str(tmp_path / "bare"), data, "out.jsonl"], "config.json: no such file"),
        ([model, str(tmp_path / "absent.jsonl"), "out.jsonl"], "absent.jsonl: no such file"),
        ([model, str(tmp_path / "empty.jsonl"), "out.jsonl"], "the file has no rows"),
        ([model, data, "out.csv"], "must end in .parquet or .jsonl"),
        ([model, data, "there.jsonl"], "exists; add --overwrite"),
        ([model, str(tmp_path / "there.jsonl"), "there.jsonl"], "is one of the data files"),
    ):
        out = ["--out", str(tmp_path / arguments[2])]
        assert cli.main(["semantic-entropy", *arguments[:2], *out, *LIMITS]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said


def test_engines_get_the_weights_of_the_folder(inputs):
    arch = read_architecture(inputs / "model")
    source = FolderSource(str(inputs / "model"), arch, torch.bfloat16)
    stored = load_file(inputs / "model" / "model.safetensors")
    assert {meta.name for meta in source.metadata()} == set(stored)
    for number, meta in enumerate(source.metadata()):
        out = torch.empty(meta.shape, dtype=meta.dtype)
        middle = meta.shape[0] // 2
        for first, count in ((middle, meta.shape[0] - middle), (0, middle)):
            source.read(number, first, count, out[first : first + count], in_place=False)
        assert torch.equal(out, stored[meta.name].bfloat16())


@pytest.mark.slow
def test_with_a_real_engine(inputs, tmp_path):
    """A model of random weights: its answers are long and different, and some end in a number."""
    assert measure(inputs, tmp_path / "out.jsonl", "--limit", "4", "--dtype", "float32") == 0
    written = read(tmp_path / "out.jsonl")
    assert len(written) == 4
    for row in written:
        assert 0 <= row["semantic_entropy"] <= math.log(row["semantic_clusters"]) + 1e-9 <= math.log(4) + 1e-9
        assert row["semantic_samples"] == 4 and 0 <= row["semantic_accuracy"] <= 1
    likelihoods = [row["semantic_entropy_likelihood"] for row in written if row["semantic_clusters"] > 1]
    assert all(value > 0 for value in likelihoods)

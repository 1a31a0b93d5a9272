"""The FP8 report: numbers of a comparison counted by hand, the responses it reads, its page, wrong arguments.

The model and the emulation behind it are in `test_fp8_emulation.py` and `tests/distributed/test_fp8_layouts.py`; the
command runs once here on a tiny model with responses from a file. Not covered: engines, the look of the plots.
"""

import json

import make_arithmetic
import numpy as np
import pytest

from megatron_entropy.cli import main as cli
from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.errors import DataError
from megatron_entropy.methods.cer import segmented_reward
from megatron_entropy.precision_report.compare import compare
from megatron_entropy.precision_report.measure import Pass
from megatron_entropy.precision_report.responses import read_responses

LENGTHS = (50, 30, 1)


def make_passes(shift):
    """A base, and a pass whose log-probs and entropies are shifted; `shift` [tokens] is cut into the responses."""
    rng = np.random.default_rng(0)
    edges = np.cumsum(LENGTHS)[:-1]
    logprob, entropy = -rng.exponential(size=sum(LENGTHS)), rng.permutation(np.arange(sum(LENGTHS))) * 0.01
    base = [np.split(values, edges) for values in (logprob, entropy, np.zeros(sum(LENGTHS), int))]
    found = [np.split(values, edges) for values in (logprob + shift, entropy - 2 * shift, np.ones(sum(LENGTHS), int))]
    return Pass(*found), Pass(*base)


def responses():
    return [[7] * length for length in LENGTHS]


def test_a_pass_against_itself_has_no_difference():
    _, base = make_passes(np.zeros(sum(LENGTHS)))
    same = compare(base, base, responses(), lambda token: "word")
    for estimate in (same.logprob.bias, same.entropy.sd, same.outside_clip, same.cure_changed, same.sent_changed):
        assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)
    assert (same.first_top_changed, same.top_changed.value, same.cer_pairs_swapped) == (0, 0, 0)
    assert same.ratio_quantiles == (1.0,) * 7 and sum(decile.tokens for decile in same.deciles) == sum(LENGTHS)


def test_numbers_are_those_counted_by_hand():
    shift = np.where(np.arange(sum(LENGTHS)) % 4 == 0, 0.3, -0.1)  # 0.3 is outside the clip, -0.1 is not
    found, base = make_passes(shift)
    result = compare(found, base, responses(), lambda token: "word")
    assert result.logprob.bias.value == pytest.approx(shift.mean())
    assert result.logprob.sd.value == pytest.approx(shift.std())
    assert result.entropy.bias.value == pytest.approx(-2 * shift.mean())
    assert result.outside_clip.value == pytest.approx((shift == 0.3).mean())
    assert result.first_top_changed == 3 and result.top_changed.value == 1
    assert result.logprob.bias.low <= result.logprob.bias.value <= result.logprob.bias.high
    assert result.logprob.sd.low < result.logprob.sd.high

    tops = [
        [set([i for i in np.argsort(-e, kind="stable").tolist() if i > 0][:20]) for e in one.entropy]
        for one in (found, base)
    ]
    lost = [len(b - a) / 20 for a, b in zip(*tops, strict=True) if b]  # a response of one token has no candidate
    assert result.cure_changed.value == pytest.approx(np.mean(lost)) and result.cure_changed.value > 0

    low = [
        set(np.argsort(np.concatenate(one.entropy), kind="stable")[: int(0.8 * sum(LENGTHS))]) for one in (found, base)
    ]
    assert result.sent_changed.value == pytest.approx(len(low[1] - low[0]) / len(low[1]))
    rewards = [[segmented_reward(True, e.mean()) for e in one.entropy] for one in (found, base)]
    assert result.cer_change.value == pytest.approx(np.abs(np.array(rewards[0]) - rewards[1]).mean())


def test_tokens_that_cure_never_cuts_are_no_candidates():
    found, base = make_passes(np.where(np.arange(sum(LENGTHS)) % 2 == 0, 1.0, -1.0))
    texts = [[7, 8] * 25, [7, 8] * 15, [7]]
    changed = compare(found, base, texts, lambda token: "word" if token == 7 else "7").cure_changed.value
    assert changed == 0  # only even positions are left, and all of them shift alike
    assert compare(found, base, texts, lambda token: "word").cure_changed.value > 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    problems, _ = make_arithmetic.make_problems(train=2000, eval=1, seed=0, slip=0.0)
    texts = [f"{problem.question}{problem.solution}" for problem in problems]
    make_arithmetic.write_model(
        folder, make_arithmetic.make_tokenizer(texts, make_arithmetic.VOCAB_SIZE, folder), seed=0
    )
    return folder


def write_dump(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(**changes):
    plain = {"prompt": 0, "question": "?", "response": "!", "tokens": [1, 2, 3, 4, 5], "prompt_length": 2}
    return plain | {"finish_reason": "stop", "correct": True} | changes


def test_responses_come_from_a_dump_or_the_last_one_of_a_run(model, tmp_path):
    arch = read_architecture(str(model))
    file = write_dump(tmp_path / "run/rollouts/dapo/step_000003.jsonl", [row(), row(tokens=[1, 2])])
    for source in (file, tmp_path / "run"):
        groups = read_responses(source, arch)
        assert [group.samples[0].response_length for group in groups] == [3]
    for rows, message in (
        ([row(tokens=[1, 2, 10**6])], ":1: a token is not in the model's vocabulary"),
        ([row(), {"question": "?"}], ":2: no line of a rollout dump: prompt: Field required"),
        ([], "holds no response"),
    ):
        with pytest.raises(DataError, match=message):
            read_responses(write_dump(tmp_path / "bad.jsonl", rows), arch)
    with pytest.raises(DataError, match="no rollouts/STAGE"):
        read_responses(tmp_path / "run/rollouts", arch)


def test_the_command_writes_a_page_that_says_emulated(model, tmp_path):
    rng = np.random.default_rng(0)
    vocabulary = read_architecture(str(model)).vocab_size
    rows = [row(tokens=rng.integers(0, vocabulary, 20).tolist(), prompt_length=4) for _ in range(5)]
    dump = write_dump(tmp_path / "responses.jsonl", rows)
    out = tmp_path / "report"
    command = ["fp8-report", str(model), "--responses", str(dump), "--out", str(out), "--recipes", "delayed", "mxfp8"]
    command += ["--weight-margins", "1.3"]
    assert cli.main(command) == 0
    written = json.loads((out / "report.json").read_text())
    names = [entry["name"] for entry in written["rows"]]
    emulated = [
        f"{recipe}, emulated{weights}" for recipe in ("delayed", "mxfp8") for weights in ("", ", weights / 1.3")
    ]
    assert names == ["bf16, sums in fp32", *emulated, "head, emulated", "fp32"]
    spread = {entry["name"]: entry["logprob"]["sd"]["value"] for entry in written["rows"]}
    assert spread["mxfp8, emulated"] > spread["fp32"] > 0
    for file in ("report.html", "README.md"):
        text = (out / file).read_text()
        assert "FP8 is EMULATED" in text and "mxfp8, emulated" in text
    assert cli.main(command) == 2  # holds a report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs --data FILE, to sample responses, or --responses FILE, not both"),
        (["--data", "a.jsonl", "--responses", "b.jsonl"], "not both"),
        (
            ["--data", "a.jsonl", "--recipes", "nvfp4"],
            "--recipes nvfp4 cannot be emulated; choose from current, delayed,",
        ),
        (["--data", "a.jsonl", "--weight-margins", "0.5"], "--weight-margins 0.5 is below 1: the largest weights"),
    ],
)
def test_wrong_arguments_are_one_line(model, tmp_path, capsys, arguments, message):
    assert cli.main(["fp8-report", str(model), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()

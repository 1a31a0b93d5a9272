"""Questions of reasoning-gym as data, and its scorers as a verifier."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("reasoning_gym", reason="the package reasoning-gym is not installed")

from megatron_entropy import procedural  # noqa: E402
from megatron_entropy.config import load  # noqa: E402
from megatron_entropy.data.dataset import PromptStream, read_prompts  # noqa: E402
from megatron_entropy.data.schemas import read_rows  # noqa: E402
from megatron_entropy.errors import ConfigError, DataError, MissingPackageError  # noqa: E402
from megatron_entropy.launch import preflight  # noqa: E402
from megatron_entropy.methods import load_method_config  # noqa: E402
from megatron_entropy.rewards import RewardPool, load_verifier  # noqa: E402

SUMS = "reasoning-gym:chain_sum,gcd?size=20&seed=3&split=train"


def rows(source):
    return [(row.messages[0].content, row.answer or "") for row in read_rows(source)]


def config_of(*overrides):
    (config,) = load.load([], ["--steps=1", "--method.name=dapo", *overrides], load_method_config)
    return config


def test_questions_take_turns_and_ask_for_the_tags():
    found = rows(SUMS)
    assert len(found) == 40 and len({question for question, _ in found}) == 40
    assert [json.loads(truth)["dataset"] for _, truth in found] == ["chain_sum", "gcd"] * 20
    assert all(question.endswith(procedural.INSTRUCTION) for question, _ in found)
    (first, _), *_ = rows(f"{SUMS}&instruction=false")
    assert found[0][0] == first + procedural.INSTRUCTION


def test_another_process_makes_the_same_questions_and_another_seed_others():
    code = f"from megatron_entropy import procedural; print(list(procedural.questions({SUMS!r})))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert output.stdout.strip() == str(rows(SUMS))
    assert not {question for question, _ in rows(SUMS)} & {q for q, _ in rows(SUMS.replace("seed=3", "seed=3000"))}


def test_a_resumed_stream_goes_on_with_the_same_questions():
    whole = [prompt.answer for prompt in PromptStream(read_prompts([SUMS]), seed=1).take(100)]
    rest = PromptStream(read_prompts([SUMS]), seed=1, position=30).take(70)
    assert [prompt.answer for prompt in rest] == whole[30:]


def test_no_question_of_eval_is_in_train_and_both_cover_all():
    small = "reasoning-gym:chain_sum?size={}&seed=1&max_terms=2&max_digits=1&split={}"  # 200 different sums
    train, evaluation = ({q for q, _ in rows(small.format(size, s))} for size, s in ((140, "train"), (40, "eval")))
    assert not train & evaluation
    assert len({q for q, _ in rows(small.format(180, "all"))}) == 180
    with pytest.raises(DataError, match=r"chain_sum has only \d+ different questions of split eval among 2000"):
        rows(small.format(200, "eval"))


@pytest.mark.parametrize(
    ("form", "correct", "extracted"),
    [
        ("<answer>{}</answer>", True, "{}"),
        ("<answer>99999</answer> no, <answer> {} </answer>.", True, "{}"),
        (r"It is \boxed{{{}}}.", True, "{}"),
        ("<answer>99999</answer>", False, "99999"),
        ("<answer>the sum is {}</answer>", False, "the sum is {}"),  # a partial score of reasoning-gym
        ("It is {}.", False, None),
        ("<answer>{}", False, None),
    ],
)
def test_full_scores_are_right(form, correct, extracted):
    _, truth = rows("reasoning-gym:chain_sum?size=1&seed=5&split=train")[0]
    answer = json.loads(truth)["answer"]
    grade = load_verifier("reasoning_gym")(form.format(answer), truth)
    assert (grade.correct, grade.extracted) == (correct, extracted and extracted.format(answer))


def test_scorers_that_accept_several_answers():
    """countdown's scorer evaluates any expression; arc_agi's compares tuples, which JSON would not keep."""
    _, truth = rows("reasoning-gym:countdown?size=1&seed=1&split=all")[0]
    data_set, entry = procedural.entry_of(truth)
    swapped = f"0 + {entry['answer']}"
    assert data_set.score_answer(entry["answer"], entry) == 1.0
    verifier = load_verifier("reasoning_gym")
    assert verifier(f"<answer>{entry['answer']}</answer>", truth).correct is True
    assert verifier(f"<answer>{swapped}</answer>", truth).correct is (data_set.score_answer(swapped, entry) == 1.0)
    _, truth = rows("reasoning-gym:arc_agi?size=1&seed=1&split=all")[0]
    assert verifier(f"<answer>{json.loads(truth)['answer']}</answer>", truth).correct is True


def test_grading_runs_in_workers():
    _, truth = rows("reasoning-gym:gcd?size=1&seed=5&split=train")[0]
    with RewardPool(verifier="reasoning_gym", workers=1) as pool:
        right, wrong, foreign = pool.grade(
            [(rf"\boxed{{{json.loads(truth)['answer']}}}", truth), ("", truth), ("<answer>1</answer>", "1")]
        )
    assert right.correct is True and wrong.correct is False
    assert foreign.correct is None and foreign.error is not None and "not one of reasoning-gym" in foreign.error


def test_a_ground_truth_of_another_version_is_an_error():
    _, truth = rows("reasoning-gym:gcd?size=1&seed=5&split=train")[0]
    changed = json.dumps(json.loads(truth) | {"answer": "never"})
    with pytest.raises(ValueError, match="another version"):
        load_verifier("reasoning_gym")("<answer>never</answer>", changed)


def test_the_configuration_holds_seed_and_split():
    config = config_of(
        "--data.train=reasoning-gym:chain_sum,gcd", '--data.eval=["reasoning-gym:gcd?seed=9", "a.jsonl"]'
    )
    assert config.data.train == ["reasoning-gym:chain_sum,gcd?seed=1&split=train"]
    assert config.data.eval == ["reasoning-gym:gcd?seed=9&split=eval", "a.jsonl"]
    again = config_of(f"--data.train={config.data.train[0]}", "--seed=2")
    assert again.data.train == config.data.train


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("chain_sums", "no data set 'chain_sums'; did you mean chain_sum?"),
        ("zzz", "no data set 'zzz'; known are ab, acre"),
        ("composite", "no data set 'composite'"),
        ("word_ladder", "word_ladder makes other questions in every process"),
        ("gcd?max_number=5", "gcd has no setting 'max_number'; did you mean max_numbers?"),
        ("gcd?max_numbers=0", "gcd refuses its settings: max_numbers must be"),
        ("gcd?max_numbers=many", "gcd refuses its settings"),
        ("gcd?size=0", "size must be an integer of at least 1, found 0"),
        ("gcd?size=many", "size must be an integer of at least 1, found 'many'"),
        ("gcd?seed=-1", "seed must be an integer of at least 0, found -1"),
        ("gcd?split=test", "split must be one of train, eval, all, found 'test'"),
        ("gcd?instruction=maybe", "instruction must be true or false, found 'maybe'"),
        ("gcd?size", "expected KEY=VALUE, each key once, found 'size'"),
        ("gcd?size=1&size=2", "expected KEY=VALUE, each key once, found 'size=2'"),
        ("gcd,gcd", "expected names of data sets, each once"),
        ("", "expected names of data sets, each once"),
    ],
)
def test_wrong_sources_are_refused_in_one_line(source, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        text = procedural.complete(f"reasoning-gym:{source}", seed=1, split="train")
        list(procedural.questions(text))
    assert "\n" not in str(caught.value)


def test_a_source_outside_of_a_configuration_needs_a_seed():
    with pytest.raises(ConfigError, match="add seed=NUMBER"):
        rows("reasoning-gym:gcd?size=1")


def test_other_verifiers_are_refused(tmp_path):
    config = config_of("--data.train=reasoning-gym:gcd", "--model.path=m")
    with pytest.raises(ConfigError, match=r'reward.verifier=math_verify cannot read .* "reasoning_gym"'):
        preflight.check_data(config, "m", SimpleNamespace())  # type: ignore[arg-type]


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'megatron-entropy\[reasoning-gym\]'"):
        list(procedural.questions(SUMS))
    config = config_of("--data.train=a.jsonl", "--reward.verifier=reasoning_gym")
    with pytest.raises(MissingPackageError, match="reasoning-gym"):
        preflight.check_data(config, "m", SimpleNamespace())  # type: ignore[arg-type]


def test_names_are_taken_equally_often_by_every_prefix_of_the_order():
    names = Counter(json.loads(p.answer or "")["dataset"] for p in PromptStream(read_prompts([SUMS]), seed=1).take(400))
    assert names == {"chain_sum": 200, "gcd": 200}

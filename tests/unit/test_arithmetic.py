"""The demo's task: true answers, slips at the stated rate, no overlap of the files, the same folder from the same seed.

Also shown: the written model loads in transformers with the stated architecture and dtype. Not shown: that a model
learns the task, which the demo itself measures.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "examples"))

import make_arithmetic as task  # noqa: E402

from megatron_entropy.config.schema import DataConfig  # noqa: E402
from megatron_entropy.data.dataset import load_prompts  # noqa: E402
from megatron_entropy.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_entropy.rewards import load_verifier  # noqa: E402

STEP = re.compile(r"(\d)([-+*])(\d)(?:=|->)(\d)[\n;]")


def make(folder, *options):
    """Run the script as a user does."""
    command = [sys.executable, str(REPOSITORY / "examples" / "make_arithmetic.py"), "--out", str(folder)]
    subprocess.run([*command, *options], check=True, cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY)})
    return folder


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"), "--seed", "1", "--train", "600", "--eval", "100")


@pytest.mark.parametrize(
    ("question", "whole"), [("3+4*2-1", 13), ("4", 4), ("2-4", -2), ("4*4", 16), ("3-4*2", -2), ("4+4+4+4", 16)]
)
def test_answers_are_evaluated_left_to_right(question, whole):
    """Reducing modulo 5 after every step or only at the end is the same."""
    assert task.answer_of(question) == whole % task.MODULUS


def test_solutions_without_slips_are_true_and_follow_the_question():
    rng = random.Random(0)
    for _ in range(300):
        problem = task.solve(task.draw_question(rng), rng, slip=0.0)
        value, rest = problem.question[0], problem.question[1:]
        for left, sign, right, result in STEP.findall(problem.solution):
            assert (left, sign + right) == (value, rest[:2])
            assert int(result) == task.evaluate(int(left), sign, int(right))
            value, rest = result, rest[2:]
        assert rest == "" and problem.solution.endswith(f"#{value}")
        assert load_verifier("final_marker")(problem.solution, problem.answer).correct


def test_slips_occur_at_their_rate_and_the_next_step_continues_from_them():
    rng = random.Random(0)
    slips = steps = 0
    for _ in range(2000):
        problem = task.solve(task.draw_question(rng), rng, slip=0.2)
        found = STEP.findall(problem.solution)
        slips += sum(int(result) != task.evaluate(int(left), sign, int(right)) for left, sign, right, result in found)
        steps += len(found)
        assert [left for left, *_ in found[1:]] == [result for *_, result in found[:-1]]
        assert problem.solution.endswith(f"#{found[-1][3]}")
        assert problem.answer == str(task.answer_of(problem.question))
    assert abs(slips / steps - 0.2) < 0.02  # six standard errors of about 7,000 steps


def test_files_do_not_overlap_and_cover_all_levels(made):
    train, evaluation = (
        [json.loads(line) for line in (made / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "eval")
    )
    assert (len(train), len(evaluation)) == (600, 100)
    questions = [row["question"] for row in train + evaluation]
    assert len(set(questions)) == len(questions)
    assert {row["level"] for row in evaluation} == set(task.OPERANDS)
    for row in train + evaluation:
        assert row["answer"] == str(task.answer_of(row["question"]))
    assert all(load_verifier("final_marker")(row["solution"], row["answer"]).correct for row in evaluation)


def test_every_style_occurs(made):
    text = (made / "train.jsonl").read_text()
    assert len({re.sub(r"\d", "d", match[0]) for match in re.finditer(r"\d\+\d(=|->)\d(\\n|;)", text)}) == 4


def test_the_same_seed_gives_the_same_folder(made, tmp_path):
    options = ("--train", "600", "--eval", "100")
    assert digest(make(tmp_path / "again", "--seed", "1", *options)) == digest(made)
    other = digest(make(tmp_path / "other", "--seed", "2", *options))
    assert all(other[name] != digest(made)[name] for name in ("train.jsonl", "eval.jsonl", "model/model.safetensors"))


def test_few_problems_make_the_same_vocabulary(made, tmp_path):
    few = make(tmp_path / "few", "--train", "2", "--eval", "1")
    ours, theirs = (load_tokenizer(folder / "model") for folder in (few, made))
    size = task.VOCAB_SIZE
    assert {ours.piece(index) for index in range(size)} == {theirs.piece(index) for index in range(size)}


def test_model_folder_loads_in_transformers(made):
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "model", dtype="auto")
    assert model.config.model_type == "qwen3" and model.config.tie_word_embeddings
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    tokenizer = load_tokenizer(made / "model", vocab_size=model.config.vocab_size)
    assert model.generation_config.eos_token_id == tokenizer.eos_ids[0]
    assert model.generation_config.pad_token_id == tokenizer.pad_id


def test_everything_is_in_the_vocabulary(made):
    tokenizer = load_tokenizer(made / "model")
    for name in ("train", "eval"):
        for prompt in load_prompts([made / f"{name}.jsonl"], tokenizer, DataConfig(max_prompt_tokens=16)).prompts:
            assert prompt.target is not None and prompt.target[-1] == tokenizer.eos_ids[0]
            assert min(*prompt.tokens, *prompt.target[:-1]) > 2  # no unknown, end or padding token
            assert len(prompt.target) < 64

